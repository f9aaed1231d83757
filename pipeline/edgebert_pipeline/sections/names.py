"""Where the names of points go in a plot, so that none lies on another."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["place_names"]

_WIDTH, _HEIGHT = 860.0, 340.0
"""Pixels of a plot on a wide screen, for which names are placed."""

_CHARACTER, _LINE = 7.0, 15.0


def place_names(
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    log: bool,
) -> list[tuple[bool, bool] | None]:
    """Returns for each point whether its name goes to its left, and below it.

    ``None`` where there is no room on any side: names that come first have it. Points are in the
    order of ``names``; ``log`` says that x has a logarithmic scale.
    """
    across = math.log if log else float
    left, right = map(across, x_range)
    low, high = y_range
    taken: list[tuple[float, float, float, float]] = []
    spots = [
        (
            (across(x) - left) / ((right - left) or 1) * _WIDTH,
            (high - y) / ((high - low) or 1) * _HEIGHT,
        )
        for x, y in points
    ]
    taken += [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    found: list[tuple[bool, bool] | None] = []
    for (x, y), name in zip(spots, names, strict=True):
        wide = len(name) * _CHARACTER
        for to_left, below in ((False, False), (True, False), (False, True), (True, True)):
            start = x - 9 - wide if to_left else x + 9
            top = y + 7 if below else y - 9 - _LINE / 2
            box = (start, top, start + wide, top + _LINE)
            inside = box[0] >= 0 and box[2] <= _WIDTH
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found.append((to_left, below))
                break
        else:
            found.append(None)
    return found


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
