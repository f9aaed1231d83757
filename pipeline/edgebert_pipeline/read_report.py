"""Reads ``report.json``, of this version or an older one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgebert_pipeline.intervals import wilson
from edgebert_pipeline.not_done import list_not_done
from edgebert_pipeline.recommend import recommend
from edgebert_pipeline.report import REPORT_VERSION, Report
from edgebert_runtime.errors import InputError

__all__ = ["read_report"]

_MALFORMED = (
    msgspec.MsgspecError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def read_report(path: Path) -> Report:
    """Reads a report; of a directory, the ``report.json`` in it.

    What an older version did not measure is ``None`` or empty, as ``Report`` says; nothing is
    made up. What this version concludes (the recommended variant, what was not done) is
    concluded anew from what the older one measured.

    Raises:
        InputError: It cannot be read, or is no report of a version up to ``REPORT_VERSION``.
    """
    path = path / "report.json" if path.is_dir() else path
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Head).report_version
    except OSError as exc:
        raise InputError(f"{path} cannot be read: {exc.strerror}") from exc
    except msgspec.ValidationError as exc:
        raise InputError(f"{path} is not a report of edgebert: it has no report_version") from exc
    except (msgspec.DecodeError, RecursionError) as exc:
        raise InputError(f"{path} is not a report: {exc}") from exc
    if version > REPORT_VERSION:
        raise InputError(
            f"{path} has report_version {version}; this edgebert reads up to {REPORT_VERSION}: "
            "use a newer one"
        )
    try:
        if version == REPORT_VERSION:
            return msgspec.json.decode(data, type=Report)
        raw = msgspec.json.decode(data)
        for older in range(version, REPORT_VERSION):
            _MIGRATIONS[older](raw)
        return _conclude(msgspec.convert(raw, Report, str_keys=True))
    except _MALFORMED as exc:
        raise InputError(f"{path} is not a report of version {version}: {exc}") from exc


class _Head(msgspec.Struct):
    """What every version has."""

    report_version: Annotated[int, Meta(ge=1)]


def _conclude(report: Report) -> Report:
    return msgspec.structs.replace(
        report,
        recommended=recommend(report.evaluation, report.gate),
        not_done=list_not_done(
            fine_tuned=report.training is not None,
            distillation=report.distillation,
            quantisation=report.quantisation,
            engines=report.engines,
            evaluation=report.evaluation,
            gated=bool(report.gate),
        ),
    )


def _one_to_two(raw: dict[str, Any]) -> None:
    """Version 2 has several models, and comparisons."""
    evaluation = raw["evaluation"]
    evaluation["references"] = {"model": evaluation.pop("reference")}
    evaluation["comparisons"] = []
    for variant in evaluation["variants"]:
        variant |= {"model": "model", "calibration_error": None, "agreement": None}
    raw["models"] = {
        "model": {
            "model_type": None,
            "layers": None,
            "parameters": None,
            "checkpoint_sha256": None,
            "parity": raw.pop("parity"),
        }
    }
    raw["distillation"] = None
    raw["report_version"] = 2


def _two_to_three(raw: dict[str, Any]) -> None:
    """Version 3 has quantisation for GPUs, engines, and intervals of flips."""
    rows = raw["evaluation"]["rows"]
    for variant in raw["evaluation"]["variants"]:
        variant["devices"] = [variant.pop("device")]
        low, high = wilson(variant["flips"], rows)
        variant |= {"flip_rate_low": low, "flip_rate_high": high}
    raw["quantisation"] = {}
    raw["engines"] = {"profiles": [], "skipped": "this edgebert had none yet"}
    raw["budget"] = None
    raw["report_version"] = 3


def _three_to_four(raw: dict[str, Any]) -> None:
    """Version 4 says when, at which commit, what to take, and what was not done."""
    raw["measured_at"] = raw["stages"]["evaluate"]["finished_at"]
    raw["commit"] = None
    raw["recommended"] = {"variant": None, "reason": ""}  # by _conclude, as the next
    raw["not_done"] = []
    raw["report_version"] = 4


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], None]] = {
    1: _one_to_two,
    2: _two_to_three,
    3: _three_to_four,
}
