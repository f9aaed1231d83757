"""The gate: holds what was measured against the recipe's limits."""

from __future__ import annotations

from collections.abc import Sequence

from edgebert_pipeline.recipe import GateConfig
from edgebert_pipeline.report import GateCheck
from edgebert_pipeline.scores import TEACHER, Evaluation, VariantScores

__all__ = ["apply_gate", "describe_breach", "keeps_all"]

_AT_LEAST = {"min_accuracy", "min_accuracy_kept"}  # the limits on accuracy itself


def apply_gate(evaluation: Evaluation, config: GateConfig) -> tuple[GateCheck, ...]:
    """Checks every limit that is set, on every variant in the bundle.

    The reference is what the others are held against, so only its accuracy is judged, unless it
    is the only variant for a CPU. Size and latency are limits on what a CPU loads.
    """
    reference = evaluation.reference(evaluation.shipped[0].model)
    checks = []
    for variant in evaluation.shipped:
        others = [v for v in evaluation.shipped if v is not reference and v.timing is not None]
        judged_in_full = variant is not reference or not others
        for limit, value in _measured(evaluation, variant).items():
            allowed = getattr(config, limit)
            if allowed is None or not (judged_in_full or limit in _AT_LEAST):
                continue
            checks.append(
                GateCheck(
                    variant=variant.name,
                    limit=limit,
                    allowed=allowed,
                    measured=value,
                    passed=_keeps(limit, value, allowed),
                )
            )
    return tuple(checks)


def keeps_all(evaluation: Evaluation, variant: VariantScores, checks: Sequence[GateCheck]) -> bool:
    """Whether a variant in the bundle keeps to every limit that ``checks`` hold others to.

    So the reference, too, is judged in full.
    """
    measured = _measured(evaluation, variant)
    return all(check.passed for check in checks if check.variant == variant.name) and all(
        _keeps(check.limit, measured[check.limit], check.allowed)
        for check in checks
        if check.limit in measured
    )


def _measured(evaluation: Evaluation, variant: VariantScores) -> dict[str, float]:
    """What the limits are held against, by limit."""
    reference = evaluation.reference(evaluation.shipped[0].model)
    measured = {
        "min_accuracy": variant.accuracy,
        "max_accuracy_drop": (reference.correct - variant.correct) / evaluation.rows,
        "max_flip_rate": variant.flips / evaluation.rows,
    }
    if variant.timing is not None:  # it is for a CPU
        measured["max_size_mb"] = variant.size_bytes / 1e6
        measured["max_p99_ms"] = variant.timing.latency_p99_ms
    if TEACHER in evaluation.references:
        teacher = evaluation.reference(TEACHER)
        measured["min_accuracy_kept"] = variant.correct / max(teacher.correct, 1)
    return measured


def _keeps(limit: str, value: float, allowed: float) -> bool:
    return value >= allowed if limit in _AT_LEAST else value <= allowed


def describe_breach(check: GateCheck) -> str:
    """Returns one line with both numbers."""
    return (
        f"gate: {check.variant}: {check.limit} allows {check.allowed:g}, got {check.measured:.4g}"
    )
