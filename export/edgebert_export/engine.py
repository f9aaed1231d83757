"""Builds TensorRT-RTX engines ahead of time: no GPU is needed, and any that it supports runs them.

The build runs in a process of its own, so that its peak memory can be told, all of it is given
back, and a crash of the library is an error with a message. ``python -m edgebert_export.engine``
is that process: its argument is a request, and it writes a line of JSON for each step.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgebert_export.audit import Audit
from edgebert_export.audit.log import SECTION
from edgebert_export.errors import ExportError, ModelError
from edgebert_runtime.engine import unusable
from edgebert_runtime.errors import EdgebertError, ModelRefusedError, UsageError
from edgebert_runtime.facts import gather_facts
from edgebert_runtime.manifest import Profile
from edgebert_runtime.profiles import profiles_of
from edgebert_runtime.tensorrt_api import import_tensorrt
from edgebert_runtime.tensorrt_build import build_engine

__all__ = [
    "EngineBuild",
    "EngineConfig",
    "build_rtx_engine",
    "engine_profiles",
    "kernels_log",
    "refusal",
    "rtx_or_reason",
]

_SHARE = 0.95
_MULTIPLE = 64

_Rows = Annotated[int, Meta(ge=1, le=65536)]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What engines are built for, and which are built ahead of time."""

    batch_sizes: Annotated[
        tuple[_Rows, ...],
        Meta(
            min_length=1,
            description="Most rows of a batch; an engine has kernels for each of these.",
        ),
    ] = (1, 32)
    rtx: Annotated[
        Literal["auto", "always", "never"],
        Meta(
            description="Whether TensorRT-RTX engines are built ahead of time; `auto` builds them "
            "where tensorrt-rtx is installed."
        ),
    ] = "auto"
    audit: Annotated[
        Literal["require", "report"],
        Meta(
            description="What the audit of an engine ahead of time decides: `require` fails the "
            "build if anything is wrong with it, or the compiler's log is not understood; "
            "`report` only if it may compute wrong numbers, and leaves what is merely slow, or "
            "not understood, to the report."
        ),
    ] = "require"


class EngineBuild(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that was built ahead of time.

    Attributes:
        variant: Whose model it was built from.
        version: Of TensorRT-RTX.
        platform: Operating system and processor that it is for.
        model_bytes: Size of the ONNX model.
        size_bytes: Size of the engine.
        seconds: Of parsing and building.
        peak_bytes: Most memory that the process held, before it was audited.
        audit: What the compiler made of the model; ``None`` in a report of an older version.
    """

    variant: str
    version: str
    platform: str
    model_bytes: int
    size_bytes: int
    seconds: float
    peak_bytes: int
    audit: Audit | None = None


class _Request(msgspec.Struct):
    model: str
    out: str
    log: str
    kernels: str
    profiles: tuple[Profile, ...]


class _Answer(msgspec.Struct, omit_defaults=True):
    done: int = 0
    total: int = 0
    seconds: float | None = None
    peak_bytes: int = 0
    audit: Audit | None = None
    error: str | None = None
    refused: bool = False


def engine_profiles(
    lengths: Sequence[int], max_length: int, batch_sizes: Sequence[int]
) -> tuple[Profile, ...]:
    """Returns the shapes that engines are built for, by how long the texts of a task are.

    Nearly all texts are served by profiles up to the length that holds 95 % of them, one for each
    batch size; the rest by one up to ``max_length``, for the largest batch.

    Args:
        lengths: Of calibration texts, in tokens; at least one.
        max_length: Longest row in tokens.
        batch_sizes: Most rows of a batch, in any order.
    """
    ordered = sorted(min(length, max_length) for length in lengths)
    usual = ordered[min(int(_SHARE * len(ordered)), len(ordered) - 1)]
    usual = min(-(-usual // _MULTIPLE) * _MULTIPLE, max_length)
    median = min(-(-ordered[len(ordered) // 2] // 8) * 8, usual)
    sizes = sorted(set(batch_sizes))
    found = [
        Profile(max_batch=size, opt_batch=size, max_seq=usual, opt_seq=median) for size in sizes
    ]
    if usual < max_length:
        most = sizes[-1]
        found.append(
            Profile(max_batch=most, opt_batch=most, max_seq=max_length, opt_seq=max_length)
        )
    return tuple(found)


def rtx_or_reason() -> tuple[str, str] | str:
    """Returns the version of TensorRT-RTX and the platform that it builds for; or why it cannot."""
    facts = gather_facts("rtx")
    reason = unusable("rtx", facts, building=True)
    if reason is not None:
        return f"{reason}; install the extra rtx on x86-64 Linux or Windows"
    version = facts.tensorrt["rtx"].version
    assert version is not None
    return version, facts.platform


def build_rtx_engine(
    variant: str,
    model: Path,
    profiles: Sequence[Profile],
    out: Path,
    *,
    version: str,
    platform: str,
    log: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EngineBuild:
    """Builds the engine of a variant, and audits it; whether it is refused is the caller's.

    Args:
        variant: Its name.
        model: Its ONNX model, typed FP16 or with explicit Q/DQ.
        profiles: What the bundle lists.
        out: The file to write; the compiler's list of kernels goes beside it (``kernels_log``).
        version: Of TensorRT-RTX, for the result.
        platform: That it is for, for the result.
        log: The file that TensorRT's log is added to.
        on_progress: Called with steps done and steps known so far.

    Raises:
        ModelError: TensorRT-RTX does not take the model.
        ExportError: The build failed, or its process was ended.
    """
    request = _Request(
        str(model), str(out), str(log), str(kernels_log(out)), profiles_of("rtx", profiles)
    )
    answer = _Answer()
    with subprocess.Popen(
        [sys.executable, "-m", "edgebert_export.engine", msgspec.json.encode(request).decode()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            answer = msgspec.json.decode(line, type=_Answer)
            if answer.seconds is None and answer.error is None:
                on_progress(answer.done, answer.total)
    if answer.error is not None:
        raise (ModelError if answer.refused else ExportError)(f"{variant}: {answer.error}")
    if process.returncode or answer.seconds is None:
        raise ExportError(
            f"{variant}: the build of the engine was ended (status {process.returncode}); is "
            f"memory short? TensorRT's log: {log}"
        )
    return EngineBuild(
        variant=variant,
        version=version,
        platform=platform,
        model_bytes=model.stat().st_size,
        size_bytes=out.stat().st_size,
        seconds=answer.seconds,
        peak_bytes=answer.peak_bytes,
        audit=answer.audit,
    )


def kernels_log(engine: Path) -> Path:
    """Returns where the compiler's list of an engine's kernels is kept."""
    return engine.with_suffix(".kernels.log")


def refusal(built: EngineBuild, required: Literal["require", "report"]) -> str | None:
    """Says in one line why an engine must not ship; ``None`` if it may.

    Args:
        built: The engine.
        required: ``EngineConfig.audit``.
    """
    found = built.audit
    if found is None or found.not_understood is not None:
        if required == "report":
            return None
        reason = "it was not audited" if found is None else found.not_understood
        return (
            f"{built.variant}: what TensorRT-RTX {built.version} made of it is not understood "
            f"({reason}); install the release that edgebert was tested with, or set engine.audit "
            '= "report"'
        )
    wrong = found.wrong_numbers()
    said = found.breaches() if required == "require" else wrong
    if not said:
        return None
    mend = "" if wrong else '; engine.audit = "report" takes it as it is'
    return (
        f"{built.variant}: the engine by TensorRT-RTX {built.version} is refused: "
        f"{'; '.join(said)}{mend}"
    )


def _serve() -> None:
    """Builds the engine that the argument asks for."""
    # The library writes to standard output now and then; only answers may go there.
    import os

    from edgebert_export.audit.verdict import audit  # loads onnx, which reading a recipe need not

    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def tell(answer: _Answer) -> None:
        answers.write(msgspec.json.encode(answer) + b"\n")

    request = msgspec.json.decode(sys.argv[1], type=_Request)
    listed: list[str] = []

    def keep(message: str) -> None:
        if message.startswith(SECTION):
            listed.append(message)

    try:
        with Path(request.log).open("a", encoding="utf-8") as log:
            built = build_engine(
                import_tensorrt("rtx"),
                "rtx",
                Path(request.model).read_bytes(),
                request.profiles,
                log=lambda line: print(line, file=log, flush=True),
                verbose=keep,
                on_progress=lambda done, total: tell(_Answer(done=done, total=total)),
            )
        Path(request.out).write_bytes(built.engine)
        Path(request.kernels).write_text("".join(listed), encoding="utf-8")
        peak = _peak_bytes()
        found = audit(Path(request.model), listed, built.engine, len(request.profiles))
    except (EdgebertError, OSError) as exc:
        tell(_Answer(error=str(exc), refused=isinstance(exc, UsageError | ModelRefusedError)))
        return
    tell(_Answer(seconds=built.seconds, peak_bytes=peak, audit=found))


def _peak_bytes() -> int:
    """Most memory that this process held so far; 0 where the system does not say.

    ``getrusage`` would count what the parent held when it started this process.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # the process that waits gets it, too, and says so
        _serve()
