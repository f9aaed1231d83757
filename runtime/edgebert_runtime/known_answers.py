"""What a bundle's models are known to answer, and whether a session answers so.

A bundle carries a few batches of token ids with the raw outputs that each of its variants should
give. A session that computes something else, whatever the reason (a compiler, a driver, a kernel
for this very processor), is found before it serves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgebert_runtime.errors import BundleError, DeviceError
from edgebert_runtime.manifest import decode_strictly

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgebert_runtime.bundle import Bundle
    from edgebert_runtime.manifest import Manifest
    from edgebert_runtime.session import Session

__all__ = [
    "Deviation",
    "Expected",
    "KnownAnswers",
    "KnownRow",
    "deviation",
    "inputs_of",
    "read_known_answers",
    "verify",
]

_MOST_BYTES = 8 * 2**20
_MOST_BATCHES = 64
_MOST_ROWS = 64
_MOST_TOKENS = 32_768
"""Padding included, in all batches: they run before the first answer."""
_MOST_ID = 2**31 - 1


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As in the manifest: immutable, named fields, no others."""


class KnownRow(_Strict, frozen=True, kw_only=True):
    """One row of a batch, without padding.

    Attributes:
        input_ids: Token ids, special tokens included.
        token_type_ids: As many; empty where the model has no such input.
    """

    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...] = ()


class Expected(_Strict, frozen=True, kw_only=True):
    """What a variant should give.

    Attributes:
        logits: Raw outputs, ``float32[rows, width]`` of each batch in turn.
        tolerance: How far a raw output may be from that, at most.
    """

    logits: tuple[tuple[tuple[float, ...], ...], ...]
    tolerance: float


class KnownAnswers(_Strict, frozen=True, kw_only=True):
    """The whole of a bundle's file of known answers.

    Attributes:
        batches: Rows of each; they are padded to the longest of them.
        reference: Name of the variant that the others are held against; in FP32.
        expected: By the variant's name.
    """

    batches: tuple[tuple[KnownRow, ...], ...]
    reference: str
    expected: dict[str, Expected]


class Deviation(msgspec.Struct, frozen=True, kw_only=True):
    """How far a session's raw outputs are from what is known.

    Attributes:
        variant: That the session runs.
        largest: From the variant's own outputs; ``None`` if an output is not a finite number.
        tolerance: How far they may be.
        from_reference: From the FP32 variant's outputs; ``None`` as ``largest`` is.
        expected_from_reference: The same of the outputs that are expected.
    """

    variant: str
    largest: float | None
    tolerance: float
    from_reference: float | None
    expected_from_reference: float

    @property
    def passed(self) -> bool:
        """Whether the session answers as is known."""
        return self.largest is not None and self.largest <= self.tolerance


def read_known_answers(bundle: Bundle) -> KnownAnswers:
    """Reads a bundle's known answers.

    Raises:
        BundleError: The file was altered, or is not what the bundle's manifest needs.
    """
    manifest = bundle.manifest
    (size,) = (f.size_bytes for f in manifest.files if f.path == manifest.known_answers)
    if size > _MOST_BYTES:
        raise BundleError(
            f"{bundle.path}: {manifest.known_answers} has {size} bytes, more than any bundle needs"
        )
    source = f"{bundle.path}: {manifest.known_answers}"
    found = decode_strictly(bundle.read(manifest.known_answers), KnownAnswers, source)
    try:
        _check(found, manifest)
    except ValueError as exc:
        raise BundleError(f"{source}: {exc}") from exc
    return found


def _check(found: KnownAnswers, manifest: Manifest) -> None:
    """Raises ``ValueError`` for what cannot be run, or would prove nothing."""
    if not 1 <= len(found.batches) <= _MOST_BATCHES:
        raise ValueError(f"known answers are of 1 to {_MOST_BATCHES} batches")
    typed = any(spec.name == "token_type_ids" for spec in manifest.inputs)
    for batch in found.batches:
        if not 1 <= len(batch) <= _MOST_ROWS:
            raise ValueError(f"a batch of known answers has 1 to {_MOST_ROWS} rows")
        for row in batch:
            if not 1 <= len(row.input_ids) <= manifest.max_length:
                raise ValueError(f"a row has 1 to {manifest.max_length} tokens")
            if not all(0 <= number <= _MOST_ID for number in row.input_ids):
                raise ValueError("an input id is no token id")
            if len(row.token_type_ids) != len(row.input_ids) * typed:
                raise ValueError("token_type_ids are as many as input_ids, where a model has them")
            if not {0, 1}.issuperset(row.token_type_ids):
                raise ValueError("a token's type is 0 or 1")
    tokens = sum(len(batch) * max(len(r.input_ids) for r in batch) for batch in found.batches)
    if tokens > _MOST_TOKENS:
        raise ValueError(f"known answers are of at most {_MOST_TOKENS} tokens, padding included")
    names = {variant.name for variant in manifest.variants}
    if found.expected.keys() != names or found.reference not in names:
        raise ValueError(f"known answers must be of each variant: {', '.join(sorted(names))}")
    width = len(manifest.task.labels)
    for name, expected in found.expected.items():
        if not (0 < expected.tolerance < math.inf):
            raise ValueError(f"the tolerance of {name} must be above 0")
        if [len(rows) for rows in expected.logits] != [len(batch) for batch in found.batches]:
            raise ValueError(f"the logits of {name} must be of each row")
        for logits in (row for rows in expected.logits for row in rows):
            if len(logits) != width or not all(map(math.isfinite, logits)):
                raise ValueError(f"the logits of {name} must be {width} finite numbers a row")


def inputs_of(
    batch: tuple[KnownRow, ...], names: set[str], pad_token_id: int
) -> dict[str, NDArray[np.int64]]:
    """Returns a batch as a model takes it, ``int64[batch, seq]`` for each of ``names``."""
    shape = len(batch), max(len(row.input_ids) for row in batch)
    found = {
        "input_ids": np.full(shape, pad_token_id, dtype=np.int64),
        "attention_mask": np.zeros(shape, dtype=np.int64),
        "token_type_ids": np.zeros(shape, dtype=np.int64),
    }
    for index, row in enumerate(batch):
        length = len(row.input_ids)
        found["input_ids"][index, :length] = row.input_ids
        found["attention_mask"][index, :length] = 1
        found["token_type_ids"][index, : len(row.token_type_ids)] = row.token_type_ids
    return {name: found[name] for name in names if name in found}


def deviation(
    session: Session, answers: KnownAnswers, manifest: Manifest, variant: str, *, turns: int = 1
) -> Deviation:
    """Runs the known batches on a session, and returns how far its outputs are off.

    Args:
        session: The loaded model.
        answers: The known answers.
        manifest: Of their bundle.
        variant: That the session runs.
        turns: How often each batch is run; the worst of all is told.

    Raises:
        DeviceError: The session failed.
        BundleError: The model has no output ``logits``.
        InputError: The session takes other inputs than the manifest says.
    """
    names = {spec.name for spec in manifest.inputs}
    expected, reference = answers.expected[variant], answers.expected[answers.reference]
    largest = [0.0, 0.0, 0.0]
    for index, batch in [*enumerate(answers.batches)] * turns:
        inputs = inputs_of(batch, names, manifest.pad_token_id)
        outputs = session.run(inputs)
        if "logits" not in outputs:
            raise BundleError(f"{variant} has no output logits; it has: {', '.join(outputs)}")
        found = np.asarray(outputs["logits"], dtype=np.float64)
        own, fp32 = (
            np.array(known.logits[index], dtype=np.float64) for known in (expected, reference)
        )
        if found.shape != own.shape:
            raise DeviceError(
                f"{variant} gives outputs of shape {list(found.shape)} for a batch whose known "
                f"outputs are of shape {list(own.shape)}"
            )
        for which, (one, other) in enumerate(((found, own), (found, fp32), (own, fp32))):
            apart = float(np.abs(one - other).max())
            # NaN is neither more nor less than anything; as infinity it is what it means.
            largest[which] = max(largest[which], apart if math.isfinite(apart) else math.inf)
    finite = math.isfinite(largest[0])
    return Deviation(
        variant=variant,
        largest=largest[0] if finite else None,
        tolerance=expected.tolerance,
        from_reference=largest[1] if finite else None,
        expected_from_reference=largest[2],
    )


def verify(
    session: Session, bundle: Bundle, variant: str, device: str, *, turns: int = 1
) -> Deviation:
    """Holds a session's answers against the bundle's known ones.

    Args:
        session: The loaded model.
        bundle: Where the known answers are.
        variant: That the session runs.
        device: Where, for the message.
        turns: How often each batch is run.

    Raises:
        DeviceError: The session failed, or does not answer as is known.
        BundleError: The known answers cannot be read.
    """
    found = deviation(session, read_known_answers(bundle), bundle.manifest, variant, turns=turns)
    if not found.passed:
        raise DeviceError(
            f"{variant} computes wrongly on {device}: its outputs for the bundle's known inputs "
            + (
                "are not finite numbers"
                if found.largest is None
                else f"are off by {found.largest:.3g}, at most {found.tolerance:.3g} is right"
            )
            + "; run edgebert-rt verify BUNDLE for the details, and another --variant or --device"
        )
    return found
