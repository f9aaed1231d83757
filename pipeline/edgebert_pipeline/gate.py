"""The gate: holds what was measured against the recipe's limits."""

from __future__ import annotations

from edgebert_pipeline.evaluate import Evaluation
from edgebert_pipeline.recipe import GateConfig
from edgebert_pipeline.report import GateCheck

__all__ = ["apply_gate", "describe_breach"]

_AT_LEAST = {"min_accuracy"}


def apply_gate(evaluation: Evaluation, config: GateConfig) -> tuple[GateCheck, ...]:
    """Checks every limit that is set.

    The reference is what the others are held against, so only ``min_accuracy`` applies to it,
    unless it is the only variant there is.
    """
    reference = next(v for v in evaluation.variants if v.name == evaluation.reference)
    checks = []
    for variant in evaluation.variants:
        measured = {
            "min_accuracy": variant.accuracy,
            "max_accuracy_drop": (reference.correct - variant.correct) / evaluation.rows,
            "max_flip_rate": variant.flips / evaluation.rows,
            "max_p99_ms": variant.timing.latency_p99_ms,
            "max_size_mb": variant.size_bytes / 1e6,
        }
        judged_in_full = variant is not reference or len(evaluation.variants) == 1
        for limit, value in measured.items():
            allowed = getattr(config, limit)
            if allowed is None or not (judged_in_full or limit in _AT_LEAST):
                continue
            checks.append(
                GateCheck(
                    variant=variant.name,
                    limit=limit,
                    allowed=allowed,
                    measured=value,
                    passed=value >= allowed if limit in _AT_LEAST else value <= allowed,
                )
            )
    return tuple(checks)


def describe_breach(check: GateCheck) -> str:
    """Returns one line with both numbers."""
    return (
        f"gate: {check.variant}: {check.limit} allows {check.allowed:g}, got {check.measured:.4g}"
    )
