"""Which optimisation profile serves a batch, its shape there, and how what none holds is split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgebert_runtime.errors import InputError
from edgebert_runtime.manifest import Profile
from edgebert_runtime.tensorrt_api import Flavour

__all__ = ["TOKEN_MULTIPLE", "padded_length", "padded_rows", "parts", "profiles_of"]

TOKEN_MULTIPLE = 8
"""Rows are padded to a multiple of so many tokens: what FP16's and INT8's kernels are made for,
and few enough shapes for each to have a CUDA graph."""


def padded_length(tokens: int, profile: Profile) -> int:
    """Returns how many tokens a row of ``tokens`` gets in a profile that holds it."""
    return min(-(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE, profile.max_seq)


def padded_rows(rows: int, profile: Profile) -> int:
    """Returns how many rows a batch of ``rows`` gets in a profile that holds it.

    Powers of two up to the profile's largest batch. Each shape has a CUDA graph and a context, or
    kernels of its own in TensorRT for RTX, and texts come in batches of every size: a profile for
    32 rows would make 32 of them for each length, and makes 6.
    """
    return min(1 << (rows - 1).bit_length(), profile.max_batch)


def profiles_of(flavour: Flavour, profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """Returns those of a bundle's profiles that an engine of this flavour has.

    TensorRT for RTX makes kernels for a shape when it comes; a profile for small batches beside
    one for large ones would only make the engine larger.
    """
    if flavour == "tensorrt":
        return tuple(profiles)
    return tuple(
        profile
        for profile in profiles
        if not any(
            other.max_seq == profile.max_seq and other.max_batch > profile.max_batch
            for other in profiles
        )
    )


def parts(profiles: Sequence[Profile], rows: int, tokens: int) -> Iterator[tuple[int, int, int]]:
    """Splits a batch into parts, and chooses the smallest profile that holds each.

    Args:
        profiles: At least one.
        rows: Rows of the batch.
        tokens: Tokens of its rows.

    Yields:
        The first row of a part, the row after its last one, and its profile's index.

    Raises:
        InputError: No profile holds rows of so many tokens.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.max_seq >= tokens]
    if not fitting:
        longest = max(profile.max_seq for profile in profiles)
        raise InputError(f"a row has {tokens} tokens, the engine takes at most {longest}")
    shortest = min(profiles[index].max_seq for index in fitting)
    fitting = [index for index in fitting if profiles[index].max_seq == shortest]
    fitting.sort(key=lambda index: profiles[index].max_batch)
    most = profiles[fitting[-1]].max_batch
    for start in range(0, rows, most):
        stop = min(start + most, rows)
        chosen = next(i for i in fitting if profiles[i].max_batch >= stop - start)
        yield start, stop, chosen
