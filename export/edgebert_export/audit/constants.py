"""Finds the numbers that an engine multiplies whole tensors by, in the engine's bytes."""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np

__all__ = ["holds_scalar", "lone_words"]

_WORD = 4
_ALIGNMENT = 128
"""TensorRT for RTX 1.7 starts each constant at a multiple of so many bytes, and fills up with
zeros, so a constant of one number is told from four bytes inside a matrix."""
_PADDING = bytes(_ALIGNMENT - _WORD)
_NOT_ZERO = re.compile(rb"[^\0]")


def lone_words(engine: bytes) -> frozenset[bytes]:
    """Returns the four bytes before each run of zeros that is long enough to be such padding."""
    found = set()
    start = engine.find(_PADDING)
    while start >= 0:
        found.add(engine[max(start - _WORD, 0) : start])
        following = _NOT_ZERO.search(engine, start + len(_PADDING))
        start = -1 if following is None else engine.find(_PADDING, following.start())
    return frozenset(found)


def holds_scalar(words: Collection[bytes], value: float) -> bool:
    """Whether an FP32 constant of one number is there: ``value``, or a neighbour of it.

    The compiler may round the product of two scales once more, on the way from FP16.
    """
    exact = np.float32(value)
    with np.errstate(over="ignore"):
        half = np.float32(np.float16(exact))
    near = (
        exact,
        half,
        np.nextafter(exact, np.float32(0)),
        np.nextafter(exact, np.float32(np.inf)),
    )
    return any(number > 0 and number.tobytes() in words for number in near)
