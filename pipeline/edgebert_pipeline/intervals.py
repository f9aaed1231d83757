"""Intervals of confidence, all of 95 %, and the paired test that goes with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "bootstrap",
    "enough_rounds",
    "mcnemar",
    "paired_difference",
    "unpaired_difference",
    "wilson",
]

_Z = 1.959964  # the normal distribution's 97.5th percentile
_RESAMPLES = 1000


def wilson(count: int, rows: int) -> tuple[float, float]:
    """Wilson's interval of a share: ``count`` of ``rows``, of which there is at least one."""
    share, square = count / rows, _Z * _Z
    centre = share + square / (2 * rows)
    spread = _Z * math.sqrt(share * (1 - share) / rows + square / (4 * rows * rows))
    low, high = ((centre + sign * spread) / (1 + square / rows) for sign in (-1, 1))
    # Exact at the ends, where rounding would leave a little more or less than all.
    return (0.0 if count == 0 else low), (1.0 if count == rows else high)


def paired_difference(only_first: int, only_second: int, rows: int) -> tuple[float, float]:
    """Interval of how much larger a share the first of two is right on, on the same rows.

    Agresti and Min's (2005, "Simple improved confidence intervals for comparing matched
    proportions"): Wald's interval after half a row is added to each of the four outcomes.

    Args:
        only_first: Rows that the first alone answers right.
        only_second: Rows that the second alone answers right.
        rows: All rows, at least one.
    """
    total = rows + 2
    difference = (only_first - only_second) / total
    variance = (only_first + only_second + 1) / total - difference * difference
    spread = _Z * math.sqrt(variance / total)
    return max(difference - spread, -1.0), min(difference + spread, 1.0)


def unpaired_difference(first: int, rows: int, second: int, others: int) -> tuple[float, float]:
    """Interval of how much larger a share the first of two is right on, each on rows of its own.

    Newcombe's (1998, "Interval estimation for the difference between independent proportions",
    method 10). On the same rows, where pairs are not known, it is wider than need be if both tend
    to be right on the same ones.

    Args:
        first: Rows that the first answers right.
        rows: Rows of the first, at least one.
        second: Rows that the second answers right.
        others: Rows of the second, at least one.
    """
    one, two = first / rows, second / others
    (one_low, one_high), (two_low, two_high) = wilson(first, rows), wilson(second, others)
    low = one - two - math.hypot(one - one_low, two_high - two)
    high = one - two + math.hypot(one_high - one, two - two_low)
    return max(low, -1.0), min(high, 1.0)


def mcnemar(only_first: int, only_second: int) -> float:
    """P-value of McNemar's exact test, two-sided.

    How often rows that one of two alone answers right would be shared out so unevenly, or more
    so, if both were equally good: twice the smaller tail of a fair coin, and 1 at most.

    Args:
        only_first: Rows that the first alone answers right.
        only_second: Rows that the second alone answers right.
    """
    count = only_first + only_second
    log_all = math.lgamma(count + 1) - count * math.log(2)
    tail = math.fsum(
        math.exp(log_all - math.lgamma(k + 1) - math.lgamma(count - k + 1))
        for k in range(min(only_first, only_second) + 1)
    )
    return min(1.0, 2 * tail)


def enough_rounds(one: int, other: int) -> bool:
    """Whether rounds are too many for chance to make all of one slower, or all of one faster.

    Of all orders of the rounds of two that are equally fast, two have it so; they are to be less
    than 5 % of them: 4 rounds against 4, or 3 against 5.
    """
    return 2 / math.comb(one + other, one) < 0.05


def bootstrap(
    values: NDArray[np.bool_],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Percentile intervals of statistics that are computed from counts of rows.

    Rows are drawn with replacement, a thousand times, always the same ones for a ``seed``.

    Args:
        values: ``bool[rows, values]``: what is true of each row.
        statistic: From counts of rows, ``float64[n, values]``, to statistics,
            ``float64[n, statistics]``.
        seed: Of the draws.

    Returns:
        ``float64[statistics, 2]``: low and high. NaN where both are the same, as on a few rows
        that are all right: the draws say nothing of other rows then.
    """
    # Rows that count alike are interchangeable: how often each kind is drawn is all that matters.
    packed = np.ascontiguousarray(np.packbits(values, axis=1))
    keys = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    rows = len(values)
    drawn = np.random.default_rng(seed).multinomial(rows, counts / rows, size=_RESAMPLES)
    found = statistic(drawn.astype(np.float64) @ values[first])
    low_and_high: NDArray[np.float64] = np.percentile(found, (2.5, 97.5), axis=0).T
    low_and_high[low_and_high[:, 0] == low_and_high[:, 1]] = np.nan
    return low_and_high
