"""Intervals of confidence."""

from __future__ import annotations

__all__ = ["wilson"]


def wilson(count: int, rows: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: ``count`` of ``rows``, of which there is at least one."""
    from scipy.stats import binomtest

    interval = binomtest(count, rows).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
