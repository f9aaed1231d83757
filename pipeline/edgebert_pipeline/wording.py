"""How differences are told: an interval and a test, in words that do not overclaim."""

from __future__ import annotations

from edgebert_pipeline.intervals import paired_difference
from edgebert_pipeline.scores import Comparison

__all__ = ["ABOUT_COMPARISONS", "NOTHING_LEARNED", "comparison_in_words", "difference"]

NOTHING_LEARNED = "The model is not shown to be better than always giving the commonest answer."

ABOUT_COMPARISONS = (
    "The same test rows for both; McNemar's exact test on the rows that one alone answers right, "
    "Agresti and Min's interval of the difference. *Shown* means p < 0.05; no correction for "
    "making several comparisons."
)


def comparison_in_words(item: Comparison, rows: int) -> str:
    """Returns which of two variants is shown to be better, if either is."""
    if not item.shown:
        return f"no difference shown at n = {rows:,}"
    better = "first" if item.only_first_correct > item.only_second_correct else "second"
    return f"shown: {better} is better"


def difference(item: Comparison, rows: int) -> str:
    """Returns how much more accurate the first of two variants is, with its interval."""
    low, high = paired_difference(item.only_first_correct, item.only_second_correct, rows)
    measured = (item.only_first_correct - item.only_second_correct) / rows
    return f"{measured:+.2%} ({low:+.2%} to {high:+.2%})"
