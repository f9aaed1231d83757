"""Which variant to take: the fastest that keeps to every limit and is not shown to be worse."""

from __future__ import annotations

from collections.abc import Sequence

from edgebert_pipeline.gate import keeps_all
from edgebert_pipeline.intervals import enough_rounds
from edgebert_pipeline.report import GateCheck, Recommendation
from edgebert_pipeline.scores import Evaluation, VariantScores
from edgebert_runtime.bench import Timing

__all__ = ["recommend"]


def recommend(evaluation: Evaluation, gate: Sequence[GateCheck]) -> Recommendation:
    """Chooses among the variants in the bundle that were timed.

    One that breaks a limit of the gate, or that the paired test shows to be less accurate than its
    reference, is not recommended; the reference is held to the limits that the gate spares it,
    too. Of the others, the one with the lowest median latency is; where rounds overlap with those
    of the fastest, or are too few to tell, the smallest of them.
    """
    timed = {v.full_name: v.timing for v in evaluation.shipped if v.timing is not None}
    if not timed:
        return Recommendation(variant=None, reason="No variant in the bundle was timed.")
    reference = evaluation.reference(evaluation.variants[0].model)
    worse = {
        item.first
        for item in evaluation.comparisons
        if item.second == reference.full_name
        and item.shown
        and item.only_second_correct > item.only_first_correct
    }
    left = [
        v
        for v in evaluation.shipped
        if v.full_name in timed and v.full_name not in worse and keeps_all(evaluation, v, gate)
    ]
    if not left:
        return Recommendation(
            variant=None,
            reason="Every variant that was timed breaks a limit of the gate, or is shown to be "
            f"less accurate than {reference.name}.",
        )
    fastest = min((timed[v.full_name] for v in left), key=lambda timing: timing.latency_p50_ms)
    best = min(
        (v for v in left if not _slower(timed[v.full_name], fastest)), key=lambda v: v.size_bytes
    )
    return Recommendation(
        variant=best.full_name, reason=_reason(evaluation, best, reference, left, timed)
    )


def _slower(timing: Timing, fastest: Timing) -> bool:
    """Whether a variant's median latency was higher in every one of enough rounds."""
    low, high = timing.latency_p50_low_ms, fastest.latency_p50_high_ms
    if low is None or high is None:
        return timing.latency_p50_ms > fastest.latency_p50_ms
    return low > high and enough_rounds(timing.repeats, fastest.repeats)


def _reason(
    evaluation: Evaluation,
    best: VariantScores,
    reference: VariantScores,
    left: Sequence[VariantScores],
    timed: dict[str, Timing],
) -> str:
    p50 = timed[best.full_name].latency_p50_ms
    fastest = min(timed[v.full_name].latency_p50_ms for v in left)
    first = "the fastest" if p50 == fastest else "the smallest of those not shown to be slower"
    if len(left) > 1:
        sentence = (
            f"Of {len(left)} variants that keep to every limit and are not shown to be less "
            f"accurate than {reference.name}, it is {first}: {p50:.2f} ms a text"
        )
    else:
        sentence = (
            "It is the only one timed that keeps to every limit and is not shown to be less "
            f"accurate than {reference.name}: {p50:.2f} ms a text"
        )
    if best is reference:
        return f"{sentence}."
    if reference.full_name in timed:
        times = timed[reference.full_name].latency_p50_ms / p50
        alike = 0.95 < times < 1.05
        sentence += f", {'about' if alike else f'{times:.1f} times'} as fast as {reference.name}"
    sentence += f" in {best.size_bytes / reference.size_bytes:.0%} of its size"
    return (
        f"{sentence}, with {best.flips / evaluation.rows:.1%} of {evaluation.rows:,} test rows "
        "answered otherwise."
    )
