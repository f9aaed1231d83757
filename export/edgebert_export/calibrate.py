"""Watches a model's activations on real texts, and derives from them where INT8 clips.

Texts stream through one batch at a time. What is kept of a tensor is a histogram of fixed size
and one number a channel, so memory does not grow with the number of texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgebert_export.errors import DataError
from edgebert_export.graph import Operand, copy_of, find_products, open_session, release_memory
from edgebert_export.qdq import LEVELS
from edgebert_export.quantise import Calibrator
from edgebert_runtime.encoder import Encoded, TextEncoder

__all__ = [
    "CALIBRATORS",
    "CalibrationTexts",
    "Histogram",
    "TensorStatistics",
    "calibrate",
    "describe_texts",
    "largest_magnitude",
    "largest_magnitudes",
    "second_moments",
    "threshold",
    "token_batches",
]

CALIBRATORS: tuple[Calibrator, ...] = ("max", "percentile", "mse", "entropy")

_BINS = 4096
_SMALLEST_WIDTH = 2.0**-100
_BATCH_TOKENS = 256
"""Tokens in a batch, padding included; what bounds the memory that activations take.

ONNX Runtime computes outputs that nothing follows last, so that all they are made of stays."""
_CANDIDATES = 256
"""Thresholds that MSE and entropy try, evenly spaced up to the largest magnitude."""
_LEAST_SIMILARITY = 0.1
_LARGEST_LEAST_SIMILARITY = 0.5
_TIMES_RANDOM = 2.0
"""How much more alike than random tokens texts must be, at least."""
_FEW_TEXTS = 8
_ENOUGH_TEXTS = 32
_MAGNIFYING = {"Add", "Div", "MatMul", "Mul", "Pow", "Sub"}
"""Operators whose results can be larger than what goes into them."""
_LEAST_COVERAGE = 0.5
_LARGEST_LENGTH_RATIO = 2.0


class Histogram:
    """Counts of magnitudes in bins of equal width, for values that come in any order.

    The width is the smallest power of two with which the bins hold the largest magnitude so far.
    When a larger one comes, neighbouring bins are merged, which is exact: how the values are
    shared out over calls makes no difference.

    Args:
        bins: How many; a power of two.

    Attributes:
        counts: ``int64[bins]``.
        width: Of a bin; 0 until a value other than 0 has come.
        largest: Largest magnitude so far.
    """

    def __init__(self, bins: int = _BINS) -> None:
        self.counts: NDArray[np.int64] = np.zeros(bins, dtype=np.int64)
        self.width = 0.0
        self.largest = 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        """Counts values, ``float32`` of any shape.

        Raises:
            DataError: A value is not finite.
        """
        magnitudes: NDArray[np.float32] = np.abs(values).ravel()
        if not np.isfinite(magnitudes).all():
            raise DataError("an activation is not finite on a calibration text: check the model")
        self.largest = max(self.largest, float(magnitudes.max(initial=0)))
        if self.largest > 0:
            self._widen()
            magnitudes = magnitudes / np.float32(self.width)  # a power of two, so this is exact
        self.counts += np.bincount(magnitudes.astype(np.int32), minlength=len(self.counts))

    def _widen(self) -> None:
        # frexp gives e with 2**(e-1) <= x < 2**e, so 2**e bins' width is just enough.
        exponent = int(np.frexp(self.largest / len(self.counts))[1])
        width = max(2.0**exponent, _SMALLEST_WIDTH)
        if self.width == 0:  # zeros so far; they are in the first bin whatever its width
            self.width = width
        while self.width < width:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([merged, np.zeros_like(merged)])
            self.width *= 2

    @property
    def total(self) -> int:
        """Values counted."""
        return int(self.counts.sum())

    @property
    def centres(self) -> NDArray[np.float64]:
        """The middle of each bin, ``float64[bins]``."""
        return (np.arange(len(self.counts), dtype=np.float64) + 0.5) * self.width

    def share_above(self, magnitude: float) -> float:
        """Share of the values that are larger, to within what one bin holds."""
        if self.total == 0 or magnitude >= self.largest:
            return 0.0
        position = magnitude / self.width
        whole = int(position)
        inside = self.counts[whole] * (position - whole)
        return float(1 - (self.counts[:whole].sum() + inside) / self.total)


class TensorStatistics:
    """What is kept of one activation.

    Attributes:
        histogram: Of the magnitudes of all its values.
        largest_by_channel: Largest magnitude in each entry of the last axis,
            ``float32[channels]``; empty if that axis is not of channels.
    """

    def __init__(self) -> None:
        self.histogram = Histogram()
        self.largest_by_channel: NDArray[np.float32] = np.zeros(0, dtype=np.float32)

    def add(self, values: NDArray[np.float32], *, channels: bool) -> None:
        """Takes in ``float32[tokens, ...]``, without padding."""
        self.histogram.add(values)
        if channels and len(values):
            largest = np.abs(values).max(axis=0)
            if self.largest_by_channel.size:
                largest = np.maximum(largest, self.largest_by_channel)
            self.largest_by_channel = largest


def calibrate(
    model: ir.Model,
    operands: Sequence[Operand],
    rows: Sequence[Encoded],
    encoder: TextEncoder,
) -> dict[str, TensorStatistics]:
    """Runs ``rows`` through an FP32 graph and watches activations, padding left out.

    Args:
        model: The graph.
        operands: Which activations.
        rows: Tokenised texts of any lengths; at least one.
        encoder: Pads them.

    Returns:
        What was seen, by the activation's name.

    Raises:
        DataError: An activation is not finite.
    """
    found = {operand.value: TensorStatistics() for operand in operands}
    for name, values, channels in _watch(model, operands, rows, encoder):
        found[name].add(values, channels=channels)
    return found


def second_moments(
    model: ir.Model,
    operands: Sequence[Operand],
    rows: Sequence[Encoded],
    encoder: TextEncoder,
) -> dict[str, NDArray[np.float32]]:
    """Runs ``rows`` through an FP32 graph and sums up how channels move together.

    Args:
        model: The graph.
        operands: Which activations; their last axis is of channels.
        rows: Tokenised texts of any lengths; at least one.
        encoder: Pads them.

    Returns:
        By the activation's name, the sum over all tokens of the products of each two channels,
        ``float32[channels, channels]``.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for name, values, _ in _watch(model, operands, rows, encoder):
        flat = values.reshape(-1, values.shape[-1])
        found[name] = found[name] + flat.T @ flat if name in found else flat.T @ flat
    return found


def _watch(
    model: ir.Model,
    operands: Sequence[Operand],
    rows: Sequence[Encoded],
    encoder: TextEncoder,
) -> Iterator[tuple[str, NDArray[np.float32], bool]]:
    """Runs ``rows`` and yields activations, batch by batch, padding left out.

    Yields:
        Its name, ``float32[tokens, ...]``, and whether the last axis is of channels.
    """
    wanted = {operand.value: operand for operand in operands}
    watched = copy_of(model)
    produced = {value.name: value for node in watched.graph for value in node.outputs}
    outputs = [value.name for value in watched.graph.outputs]
    for name in wanted:
        value = produced[name]
        value.type = ir.TensorType(ir.DataType.FLOAT)
        if name not in outputs:
            watched.graph.outputs.append(value)
    session = open_session(watched)
    del watched, produced
    for batch in token_batches(rows):
        inputs = encoder.collate([rows[index] for index in batch])
        lengths = np.array([len(rows[index].ids) for index in batch])
        real = np.arange(inputs["input_ids"].shape[1]) < lengths[:, None]
        results = session.run(inputs)
        for name, operand in wanted.items():
            values = results[name]
            if operand.over_keys:
                both = real[:, None, : values.shape[2], None] & real[:, None, None, :]
                values = values[np.broadcast_to(both, values.shape)]
            elif values.ndim > 2:
                values = np.moveaxis(values, operand.token_axis, 1)
                values = values[real[:, : values.shape[1]]]  # of the last layer, the first token
            yield name, values, results[name].ndim < 4
    session.close()
    release_memory()


def largest_magnitude(
    model: ir.Model, rows: Sequence[Encoded], encoder: TextEncoder
) -> tuple[str, float]:
    """Returns which result in an FP32 graph gets largest on ``rows``, padding included.

    What a CPU computes in the place of FP16 does not overflow, what a GPU computes does: so this
    looks at every sum and product of activations, but for the sum of scores and mask.

    Returns:
        Its name, and its largest magnitude; infinite if it is not a number.
    """
    tables = {product.node for product in find_products(model) if product.kind == "embedding"}
    reached: set[str] = set()
    values: list[str] = []
    for node in model.graph:
        from_words = any(value is not None and value.name in reached for value in node.inputs)
        if node.op_type == "Shape" or not (from_words or node.name in tables):
            continue
        reached |= {str(value.name) for value in node.outputs}
        masked = any(user.op_type == "Softmax" for user in node.successors())
        if node.op_type in _MAGNIFYING and not (masked and node.op_type == "Add"):
            values.append(str(node.outputs[0].name))
    largest = largest_magnitudes(model, values, rows, encoder)
    name = max(largest, key=lambda name: largest[name])
    return name, largest[name]


def largest_magnitudes(
    model: ir.Model, values: Collection[str], rows: Sequence[Encoded], encoder: TextEncoder
) -> dict[str, float]:
    """Returns how large some results in an FP32 graph get on ``rows``, padding included.

    Returns:
        Their largest magnitudes, by name; infinite if one is not a number.
    """
    watched = copy_of(model)
    for node in list(watched.graph):
        (*_, value) = node.outputs
        if value.name not in values:
            continue
        size = ir.node("Abs", [value])
        most = ir.node("ReduceMax", [size.outputs[0]], {"keepdims": 0})
        size.outputs[0].name, most.outputs[0].name = f"{value.name}_abs", f"{value.name}_max"
        most.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        most.outputs[0].shape = ir.Shape([])
        watched.graph.insert_after(node, [size, most])
        watched.graph.outputs.append(most.outputs[0])
    session = open_session(watched)
    largest = dict.fromkeys(values, 0.0)
    for batch in token_batches(rows):
        results = session.run(encoder.collate([rows[index] for index in batch]))
        for name in values:
            found = float(results[f"{name}_max"])
            largest[name] = max(largest[name], found if np.isfinite(found) else np.inf)
    session.close()
    release_memory()
    return largest


def token_batches(rows: Sequence[Encoded]) -> Iterator[list[int]]:
    """Yields indices of rows of like length, so many that a batch's tokens stay bounded."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index].ids)):
        if batch and (len(batch) + 1) * len(rows[index].ids) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def threshold(histogram: Histogram, calibrator: Calibrator, percentile: float) -> float:
    """Returns the magnitude from which on a tensor is clipped.

    ``max`` clips nothing. ``percentile`` clips what lies above it. ``mse`` minimises the mean
    squared difference between the values and what INT8 makes of them. ``entropy`` minimises the
    Kullback-Leibler divergence of their distributions, as TensorRT's entropy calibration does
    (Migacz, "8-bit Inference with TensorRT", GTC 2017).

    Args:
        histogram: Of the tensor's magnitudes.
        calibrator: Which of the four.
        percentile: For ``percentile``: share of the values, in percent, that is not clipped.
    """
    if histogram.largest == 0 or calibrator == "max":
        return histogram.largest
    if calibrator == "percentile":
        return _percentile_threshold(histogram, percentile)
    used = int(histogram.largest / histogram.width) + 1
    counts, centres = histogram.counts[:used].astype(np.float64), histogram.centres[:used]
    if calibrator == "mse":
        return _mse_threshold(counts, centres, histogram.largest)
    return _entropy_threshold(counts, histogram)


def _percentile_threshold(histogram: Histogram, percentile: float) -> float:
    below = np.cumsum(histogram.counts)
    wanted = below[-1] * (percentile / 100)
    index = int(np.searchsorted(below, wanted))
    inside = (wanted - (below[index] - histogram.counts[index])) / max(histogram.counts[index], 1)
    return min(float((index + inside) * histogram.width), histogram.largest)


def _mse_threshold(
    counts: NDArray[np.float64], centres: NDArray[np.float64], largest: float
) -> float:
    best, best_error = largest, np.inf
    for share in range(_CANDIDATES, _CANDIDATES // 32, -1):  # from the largest down
        candidate = largest * share / _CANDIDATES
        scale = candidate / LEVELS
        steps = np.minimum(np.rint(centres / scale), LEVELS)
        error = float((counts * (centres - steps * scale) ** 2).sum())
        if error < best_error:
            best, best_error = candidate, error
    return best


def _entropy_threshold(counts: NDArray[np.float64], histogram: Histogram) -> float:
    levels = LEVELS + 1
    if len(counts) < levels:
        return histogram.largest
    # Zero is exact at any scale, so what lies there is no reason to clip the rest; and after GELU
    # or ReLU most values do. NVIDIA's own calibrators flatten that bin, too.
    counts = counts.copy()
    counts[0] = counts[1]
    best, best_divergence = histogram.largest, np.inf
    for kept in np.unique(np.linspace(levels, len(counts), _CANDIDATES).astype(int))[::-1]:
        inside = counts[:kept]
        clipped = inside.copy()
        clipped[-1] += counts[kept:].sum()
        # What INT8 can tell apart: the bins of one level share their level's mean, but for
        # empty ones, which stay empty.
        edges = np.linspace(0, kept, levels + 1).astype(int)[:-1]
        occupied = np.add.reduceat((inside > 0).astype(np.float64), edges)
        mean = np.add.reduceat(inside, edges) / np.maximum(occupied, 1)
        level = np.searchsorted(edges, np.arange(kept), side="right") - 1
        coarse = np.where(inside > 0, mean[level], 0.0)
        divergence = _divergence(clipped, coarse)
        if divergence < best_divergence:
            best_divergence = divergence
            best = min(float(kept * histogram.width), histogram.largest)
    return best


def _divergence(counts: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Kullback-Leibler divergence of two histograms, an empty bin of the other one smoothed."""
    first = counts / counts.sum()
    smoothed = np.where((other == 0) & (counts > 0), 1e-4, other)
    second = smoothed / smoothed.sum()
    there = first > 0
    return float((first[there] * np.log(first[there] / second[there])).sum())


class CalibrationTexts(msgspec.Struct, frozen=True, kw_only=True):
    """What the calibration texts are like, beside those of the validation split.

    Attributes:
        texts: How many.
        tokens: In all of them, special tokens included.
        shortest_tokens: Length of the shortest.
        median_tokens: Median length.
        longest_tokens: Length of the longest.
        validation_median_tokens: Median length of the validation texts.
        coverage: Share of the validation texts' tokens (each as often as it is there) that the
            calibration texts hold, too.
        similarity: Cosine of both splits' token counts: 1 for the same distribution, 0 for
            nothing in common.
        warnings: What is far from the validation split, in words.
    """

    texts: int
    tokens: int
    shortest_tokens: int
    median_tokens: float
    longest_tokens: int
    validation_median_tokens: float
    coverage: float
    similarity: float
    warnings: tuple[str, ...]


def describe_texts(
    rows: Sequence[Encoded],
    validation: Sequence[Encoded],
    *,
    vocabulary_size: int,
    special: frozenset[int],
) -> CalibrationTexts:
    """Compares calibration texts with validation texts, and refuses what cannot calibrate.

    Args:
        rows: Tokenised calibration texts.
        validation: Tokenised validation texts; at least one.
        vocabulary_size: Rows of the model's embedding table.
        special: Ids of tokens that are in every text, and of padding.

    Raises:
        DataError: There are no texts; they hold no words; an id is not in the vocabulary; all
            are of one length while the validation texts are not; or they are no texts at all but
            random tokens.
    """
    if not rows:
        raise DataError("there are no calibration texts; give some, or leave data.calibration out")
    counts, expected = _token_counts(rows, special), _token_counts(validation, special)
    if not counts:
        raise DataError(f"none of the {len(rows)} calibration texts holds a word")
    highest = max(max(row.ids) for row in rows)
    lowest = min(min(row.ids) for row in rows)
    if not 0 <= lowest <= highest < vocabulary_size:
        wrong = lowest if lowest < 0 else highest
        raise DataError(
            f"a calibration text holds the token id {wrong}, the model's vocabulary ends at "
            f"{vocabulary_size - 1}: tokenise them with the model's own tokenizer"
        )
    lengths = np.array([len(row.ids) for row in rows])
    wanted = np.array([len(row.ids) for row in validation])
    if len(rows) >= _FEW_TEXTS and len(set(lengths)) == 1 and len(set(wanted)) > 1:
        cut = " (max_length, which all of them are cut to)" if rows[0].truncated else ""
        raise DataError(
            f"all {len(rows)} calibration texts are {lengths[0]} tokens long{cut}, the validation "
            f"texts {wanted.min()} to {wanted.max()}: give texts as they come"
        )
    occurrences = sum(expected.values())
    coverage = sum(n for token, n in expected.items() if token in counts) / max(occurrences, 1)
    similarity = _cosine(counts, expected)
    # What random tokens would reach: small for a large vocabulary, sizeable for a small one.
    concentration = sum((count / max(occurrences, 1)) ** 2 for count in expected.values())
    random = 1 / max(vocabulary_size * concentration, 1e-12) ** 0.5
    least = min(max(_LEAST_SIMILARITY, _TIMES_RANDOM * random), _LARGEST_LEAST_SIMILARITY)
    if similarity < least and occurrences:
        raise DataError(
            "the calibration texts have next to nothing in common with the validation texts "
            f"(similarity of their tokens {similarity:.3f} of 1): random or foreign texts cannot "
            "calibrate this model; give texts like those that the device will see"
        )
    median, expected_median = float(np.median(lengths)), float(np.median(wanted))
    warnings = []
    ratio = median / expected_median
    if not 1 / _LARGEST_LENGTH_RATIO <= ratio <= _LARGEST_LENGTH_RATIO:
        warnings.append(
            f"calibration texts are {median:g} tokens long in the median, validation texts "
            f"{expected_median:g}: the scales may not suit the texts that the model will see"
        )
    if len(rows) < _ENOUGH_TEXTS:
        warnings.append(f"only {len(rows)} different calibration texts: give some hundred")
    if coverage < _LEAST_COVERAGE:
        warnings.append(
            f"calibration texts hold only {coverage:.0%} of the validation texts' tokens: give "
            "more of them, or texts that are more alike"
        )
    return CalibrationTexts(
        texts=len(rows),
        tokens=int(lengths.sum()),
        shortest_tokens=int(lengths.min()),
        median_tokens=median,
        longest_tokens=int(lengths.max()),
        validation_median_tokens=expected_median,
        coverage=coverage,
        similarity=similarity,
        warnings=tuple(warnings),
    )


def _token_counts(rows: Sequence[Encoded], special: frozenset[int]) -> Counter[int]:
    return Counter(token for row in rows for token in row.ids if token not in special)


def _cosine(first: Counter[int], second: Counter[int]) -> float:
    dot = sum(count * second[token] for token, count in first.items() if token in second)
    norms = [sum(count**2 for count in counts.values()) ** 0.5 for counts in (first, second)]
    return float(dot / max(norms[0] * norms[1], 1e-12))
