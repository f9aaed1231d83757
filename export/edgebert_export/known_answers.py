"""Makes the known answers of a bundle: token ids, and what each variant should give for them.

Nothing that a user wrote goes into a bundle: rows are as long as real ones, and of the same tokens,
but each token is drawn by itself from all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgebert_export.emulate import open_emulated
from edgebert_export.errors import ExportError
from edgebert_runtime.encoder import Encoded, Text, TextEncoder
from edgebert_runtime.known_answers import Expected, KnownAnswers, KnownRow, inputs_of
from edgebert_runtime.onnx_session import OnnxSession
from edgebert_runtime.session import Session

__all__ = ["draw_batches", "encode_known_answers", "expect", "open_variant"]

Batches = tuple[tuple[KnownRow, ...], ...]

_ROWS = 6
_ALONE = (0, _ROWS // 2, _ROWS - 1)
"""Which of the rows, from the shortest to the longest, are batches of their own, too."""
_SEED = 5
_LEAST_SHARE = 0.01
"""Of the largest raw output: what TF32, FP16 and another order of adding up may change."""
_TIMES_OWN = 2.0
"""Of a variant's own distance from FP32: kernels that round a little otherwise move other values to
other steps of INT8, which comes to as much again."""
_LEAST = 1e-4
"""Another processor moves FP32 outputs by some millionths (docs/jetson.md)."""


def draw_batches(texts: Sequence[Text], encoder: TextEncoder) -> Batches:
    """Returns batches of rows that are like ``texts``: some alone, and all of them together.

    Args:
        texts: Real texts, at least one; their lengths and their tokens are taken, not their order.
        encoder: Tokenises them.
    """
    rows = sorted(encoder.encode(texts), key=lambda row: len(row.ids))
    special = encoder.special_ids
    tokens = np.array([number for row in rows for number in row.ids if number not in special])
    random = np.random.default_rng(_SEED)
    chosen = [rows[index] for index in np.linspace(0, len(rows) - 1, _ROWS).astype(int)]
    drawn = [_drawn(row, tokens, special, random) for row in chosen]
    return (*((drawn[index],) for index in _ALONE), tuple(drawn))


def _drawn(
    row: Encoded, tokens: NDArray[np.int64], special: frozenset[int], random: np.random.Generator
) -> KnownRow:
    ids = [number if number in special else int(random.choice(tokens)) for number in row.ids]
    return KnownRow(input_ids=tuple(ids), token_type_ids=tuple(row.type_ids))


def open_variant(model: bytes, devices: Sequence[str]) -> Session:
    """Opens a session that computes a variant as its devices should: on a CPU, or as a GPU stores.

    Args:
        model: The ONNX file's bytes.
        devices: That the variant is for.
    """
    return OnnxSession(model) if {"cpu", "cuda"} & set(devices) else open_emulated(model)


def expect(
    batches: Batches,
    session: Session,
    names: set[str],
    pad_token_id: int,
    reference: Expected | None,
) -> Expected:
    """Runs the batches, and says how far other sessions may be from what they give.

    The tolerance is a hundredth of the largest raw output, or twice as far as the variant itself is
    from FP32, whichever is more: a session that is right may be off by as much.

    Args:
        batches: Token ids.
        session: Computes the variant.
        names: Of the model's inputs.
        pad_token_id: What fills short rows.
        reference: The FP32 variant's; ``None`` for that variant itself.

    Raises:
        ExportError: An output is not a finite number.
    """
    found = [
        np.asarray(session.run(inputs_of(batch, names, pad_token_id))["logits"], dtype=np.float32)
        for batch in batches
    ]
    if not all(np.isfinite(logits).all() for logits in found):
        raise ExportError(
            "a variant's outputs are not finite numbers for rows of the validation texts' tokens: "
            "check the model"
        )
    own = 0.0
    if reference is not None:
        fp32 = [np.array(logits, dtype=np.float64) for logits in reference.logits]
        own = max(float(np.abs(one - other).max()) for one, other in zip(found, fp32, strict=True))
    largest = max(float(np.abs(logits).max()) for logits in found)
    return Expected(
        logits=tuple(tuple(tuple(row) for row in logits.tolist()) for logits in found),
        tolerance=max(_LEAST_SHARE * largest, _TIMES_OWN * own, _LEAST),
    )


def encode_known_answers(
    batches: Batches, expected: Mapping[str, Expected], reference: str
) -> bytes:
    """Writes known answers as JSON, with a newline at its end."""
    answers = KnownAnswers(batches=batches, reference=reference, expected=dict(expected))
    return msgspec.json.encode(answers) + b"\n"
