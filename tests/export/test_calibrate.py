"""Calibration: what is kept of activations, where INT8 clips them, and which texts will not do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm

import edgebert_export.calibrate as module
from edgebert_export.calibrate import (
    CALIBRATORS,
    Histogram,
    TensorStatistics,
    calibrate,
    describe_texts,
    threshold,
    token_batches,
)
from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder
from edgebert_export.errors import DataError
from edgebert_export.graph import Operand, Product, find_products, open_graph, to_bytes
from edgebert_export.quantise import Calibrator
from edgebert_export.to_onnx import OnnxModel
from edgebert_runtime.encoder import Encoded, TextEncoder
from edgebert_runtime.manifest import Task

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
PLAIN = st.floats(-8, 8, width=32)
VALUES = st.lists(FLOATS, max_size=60) | st.lists(PLAIN, max_size=60)


def _histogram(*batches: Sequence[float] | NDArray[np.float32]) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(np.asarray(batch, dtype=np.float32))
    return histogram


def _same(first: Histogram, second: Histogram) -> bool:
    return (
        np.array_equal(first.counts, second.counts)
        and first.width == second.width
        and first.largest == second.largest
    )


@given(VALUES, st.data())
def test_how_values_are_ordered_and_shared_out_makes_no_difference(
    values: list[float], data: st.DataObject
) -> None:
    whole = _histogram(values)
    shuffled = data.draw(st.permutations(values))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    edges = [0, *cuts, len(values)]
    parts = [shuffled[a:b] for a, b in pairwise(edges)]
    assert _same(_histogram(*parts), whole)
    assert _same(_histogram(*([value] for value in shuffled)), whole)


@given(VALUES)
@example([1.0])
@example([2.0**-149])
@example([0.5, -0.5, 0.0, -0.0])
def test_every_value_is_counted_once_in_the_bin_where_its_magnitude_lies(
    values: list[float],
) -> None:
    histogram = _histogram(values)
    magnitudes = np.abs(np.array(values, dtype=np.float32)).astype(np.float64)
    assert histogram.total == len(values)
    assert histogram.largest == magnitudes.max(initial=0)
    if histogram.largest == 0:
        assert histogram.counts[0] == len(values)
        return
    assert histogram.width > 0
    assert histogram.largest < histogram.width * len(histogram.counts)
    bins = np.floor(magnitudes / histogram.width).astype(int)
    assert np.array_equal(histogram.counts, np.bincount(bins, minlength=len(histogram.counts)))


@given(st.lists(FLOATS.filter(lambda value: abs(value) > 1e-20), min_size=1, max_size=20))
def test_bins_are_as_narrow_as_a_power_of_two_can_be(values: list[float]) -> None:
    histogram = _histogram(values)
    assert np.frexp(histogram.width)[0] == 0.5
    assert histogram.largest >= histogram.width * len(histogram.counts) / 2
    assert len(histogram.counts) == 4096


@given(VALUES, st.floats(0, 1e30))
def test_the_share_above_a_magnitude_is_right_to_within_one_bin(
    values: list[float], magnitude: float
) -> None:
    histogram = _histogram(values)
    share = histogram.share_above(magnitude)
    assert -1e-12 <= share <= 1
    if not values:
        assert share == 0
        return
    magnitudes = np.abs(np.array(values, dtype=np.float32)).astype(np.float64)
    width = histogram.width
    assert (magnitudes > magnitude + width).mean() <= share + 1e-12
    assert share <= (magnitudes > magnitude - width).mean() + 1e-12


def test_the_share_above_follows_numpys_on_many_values() -> None:
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    histogram = _histogram(values)
    for magnitude in (0.0, 0.1, 1.0, 2.5, 4.0, 100.0):
        share = histogram.share_above(magnitude)
        assert share == pytest.approx((np.abs(values) > magnitude).mean(), abs=1e-3)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_and_not_counted(number: float) -> None:
    histogram = _histogram([1.0, 2.0])
    before = histogram.counts.copy()
    with pytest.raises(DataError, match="not finite on a calibration text"):
        histogram.add(np.array([0.5, number], dtype=np.float32))
    assert np.array_equal(histogram.counts, before)
    assert histogram.largest == 2


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize("values", [[], [0.0], [0.0] * 100, [-0.0]])
def test_of_zeros_nothing_is_clipped(calibrator: Calibrator, values: list[float]) -> None:
    assert threshold(_histogram(values), calibrator, 99.9) == 0


@pytest.mark.filterwarnings("error")
@given(VALUES.filter(any), st.sampled_from(CALIBRATORS), st.sampled_from([90, 99.9, 99.99, 100]))
@settings(max_examples=60)
@example([1.0] * 10, "entropy", 99.9)
@example([0.5, 1.0], "mse", 99.9)
@example([1e-30, -2e-30], "entropy", 99.9)
@example([2.0**-149], "mse", 99.9)
def test_every_threshold_is_above_zero_and_at_most_the_largest(
    values: list[float], calibrator: Calibrator, percentile: float
) -> None:
    histogram = _histogram(values)
    found = threshold(histogram, calibrator, percentile)
    assert 0 < found <= histogram.largest


@given(VALUES)
def test_max_clips_nothing(values: list[float]) -> None:
    histogram = _histogram(values)
    assert threshold(histogram, "max", 50.1) == np.abs(np.float32([*values, 0])).max()


@given(VALUES.filter(any), st.sampled_from([50.5, 75, 90, 99, 99.9, 100]))
def test_a_percentile_is_numpys_to_within_one_bin(values: list[float], percentile: float) -> None:
    histogram = _histogram(values)
    found = threshold(histogram, "percentile", percentile)
    magnitudes = np.abs(np.array(values, dtype=np.float32)).astype(np.float64)
    expected = np.percentile(magnitudes, percentile, method="inverted_cdf")
    assert abs(found - expected) <= histogram.width * (1 + 1e-9)


def test_a_percentile_of_many_values_is_numpys() -> None:
    values = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    histogram = _histogram(values)
    for percentile in (60, 99, 99.9):
        expected = np.percentile(np.abs(values), percentile, method="inverted_cdf")
        found = threshold(histogram, "percentile", percentile)
        assert found == pytest.approx(expected, abs=histogram.width)


def _squared_error(values: NDArray[np.float32], limit: float) -> float:
    scale = limit / 127
    wide = values.astype(np.float64)
    return float(((np.clip(np.rint(wide / scale), -127, 127) * scale - wide) ** 2).mean())


SAMPLES = {
    "gaussian": lambda random: random.normal(size=20_000),
    "heavy tails": lambda random: random.standard_t(3, size=20_000),
    "an outlier": lambda random: np.append(random.normal(size=20_000), 39.9),
    "an outlier at the edge of a bin": lambda random: np.append(random.normal(size=20_000), 40.0),
    "mostly zero": lambda random: np.maximum(random.normal(size=20_000), 0),
    "saturated": lambda random: np.tanh(random.normal(scale=8, size=20_000)),
    "two values": lambda random: np.append(np.full(1000, 0.1), np.full(1000, 1.0)),
    "uniform": lambda random: random.uniform(-1, 1, size=20_000),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_mse_is_never_worse_than_clipping_nothing(sample: str) -> None:
    values = SAMPLES[sample](np.random.default_rng(0)).astype(np.float32)
    histogram = _histogram(values)
    limits = [threshold(histogram, kind, 99.9) for kind in ("mse", "max")]
    errors = [_squared_error(values, limit) for limit in limits]
    # What lies within a bin is taken for its middle: an error of the bin's own width.
    assert errors[0] <= errors[1] * 1.001 + histogram.width**2


def test_mse_clips_an_outlier_among_many_values_about_as_well_as_can_be() -> None:
    values = np.append(np.random.default_rng(0).normal(size=200_000), 24.9).astype(np.float32)
    limit = threshold(_histogram(values), "mse", 99.9)
    assert 8 < limit < 20
    tried = [_squared_error(values, candidate) for candidate in np.linspace(2, 24.9, 100)]
    assert _squared_error(values, limit) <= min(tried) * 1.02
    assert _squared_error(values, limit) < 0.7 * tried[-1]


@pytest.mark.filterwarnings("error")
def test_entropy_clips_an_outlier_among_a_gaussian() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    plain = threshold(_histogram(values), "entropy", 99.9)
    clipped = threshold(_histogram([*values, 60.0]), "entropy", 99.9)
    assert 2.5 < plain < 6
    assert 2.5 < clipped < 6


@pytest.mark.parametrize("activation", [lambda x: x * norm.cdf(x), lambda x: np.maximum(x, 0)])
def test_entropy_does_not_clip_most_of_what_a_gelu_or_a_relu_lets_through(
    activation: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> None:
    """Nearly all values lie in the first bin; that must not make the others outliers."""
    values = activation(np.random.default_rng(0).normal(-2, 1.5, size=100_000))
    found = threshold(_histogram(values), "entropy", 99.9)
    assert found > np.percentile(values, 99.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("calibrator", ["mse", "entropy"])
def test_values_at_the_very_end_of_the_range_count(calibrator: Calibrator) -> None:
    """A saturated tanh, which BERT's pooler has, gives many values of exactly 1."""
    values = np.append(np.full(1000, 0.1), np.full(1000, 1.0))
    assert threshold(_histogram(values), calibrator, 99.9) > 0.97


def test_statistics_of_channels_are_the_largest_of_each() -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(size=(5, 4)), random.normal(size=(7, 4))
    seen = TensorStatistics()
    for values in (first, np.zeros((0, 4)), second):
        seen.add(values.astype(np.float32), channels=True)
    expected = np.abs(np.concatenate([first, second])).max(axis=0).astype(np.float32)
    assert np.array_equal(seen.largest_by_channel, expected)
    assert seen.histogram.total == 48
    without = TensorStatistics()
    without.add(first.astype(np.float32), channels=False)
    assert without.largest_by_channel.size == 0


@pytest.fixture(scope="module")
def encoder(tiny_classifiers: dict[str, Checkpoint], tasks: dict[str, Task]) -> TextEncoder:
    return checkpoint_encoder(tiny_classifiers["single"], max_length=64, text_pair=False)


@pytest.fixture(scope="module")
def rows(encoder: TextEncoder, texts_for: dict[str, list[Any]]) -> list[Encoded]:
    """Tokenised real texts of many lengths."""
    return encoder.encode(texts_for["single"][:40])


@pytest.fixture(scope="module")
def products(onnx_models: dict[str, OnnxModel]) -> tuple[Product, ...]:
    return find_products(open_graph(onnx_models["single"].path))


@pytest.fixture(scope="module")
def operands(products: tuple[Product, ...]) -> list[Operand]:
    """Every activation that a product reads."""
    return [operand for product in products for operand in product.operands]


def test_rows_are_batched_by_length_each_of_them_once(rows: list[Encoded]) -> None:
    batches = list(token_batches(rows))
    lengths = [[len(rows[index].ids) for index in batch] for batch in batches]
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    assert [n for batch in lengths for n in batch] == sorted(len(row.ids) for row in rows)
    assert len(batches) > 1
    assert all(len(batch) * max(batch) <= 1024 for batch in lengths)


def test_a_row_too_long_for_a_batch_is_a_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_TOKENS", 10)
    rows = [Encoded([5] * length, [0] * length, False) for length in (30, 4, 6, 40)]
    assert list(token_batches(rows)) == [[1], [2], [0], [3]]


@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_padding_makes_no_difference_to_what_is_seen(
    onnx_models: dict[str, OnnxModel],
    products: tuple[Product, ...],
    rows: list[Encoded],
    encoder: TextEncoder,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    graph = open_graph(onnx_models["single"].path)
    wanted = [o for product in products if product.kind == kind for o in product.operands]
    found = []
    for tokens in (1, 100_000):  # each text alone, and all of them padded to the longest
        monkeypatch.setattr(module, "_BATCH_TOKENS", tokens)
        found.append(calibrate(graph, wanted, rows, encoder))
    alone, padded = found
    assert len({len(row.ids) for row in rows}) > 5
    assert alone.keys() == padded.keys() == {operand.value for operand in wanted}
    for value, seen in alone.items():
        first, second = seen.histogram, padded[value].histogram
        assert first.total == second.total, value
        assert first.largest == pytest.approx(second.largest, abs=1e-4), value
        np.testing.assert_allclose(
            seen.largest_by_channel, padded[value].largest_by_channel, atol=1e-4
        )
        for share in (0.01, 0.1, 0.5):
            magnitude = share * first.largest
            expected = second.share_above(magnitude)
            assert first.share_above(magnitude) == pytest.approx(expected, abs=1e-3), value


def _watched(model: OnnxModel, values: list[str], batch: dict[str, Any]) -> dict[str, Any]:
    """Runs a model, with some of its inner tensors as outputs, by ONNX Runtime itself."""
    proto = onnx.ModelProto.FromString(to_bytes(open_graph(model.path)))
    for value in values:
        proto.graph.output.append(onnx.ValueInfoProto(name=value))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return dict(zip(values, session.run(values, batch), strict=True))


@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_what_is_seen_is_what_onnx_runtime_computes_for_each_text_alone(
    onnx_models: dict[str, OnnxModel],
    products: tuple[Product, ...],
    rows: list[Encoded],
    encoder: TextEncoder,
    kind: str,
) -> None:
    wanted = [o for product in products if product.kind == kind for o in product.operands]
    found = calibrate(open_graph(onnx_models["single"].path), wanted, rows[:6], encoder)
    expected: dict[str, list[NDArray[np.float32]]] = {operand.value: [] for operand in wanted}
    for row in rows[:6]:
        results = _watched(onnx_models["single"], list(expected), encoder.collate([row]))
        for value, array in results.items():
            expected[value].append(np.abs(array))
    for value, arrays in expected.items():
        flat = np.concatenate([array.ravel() for array in arrays])
        histogram = found[value].histogram
        assert histogram.total == flat.size, value
        assert histogram.largest == pytest.approx(flat.max(), abs=1e-4), value
        middle = float(np.median(flat)) + 0.01
        share = histogram.share_above(middle)
        assert share == pytest.approx((flat > middle).mean(), abs=5e-3), value
        if kind == "linear":
            largest = [array.reshape(-1, array.shape[-1]).max(axis=0) for array in arrays]
            by_channel = found[value].largest_by_channel
            np.testing.assert_allclose(by_channel, np.max(largest, axis=0), atol=1e-4)
        else:
            assert found[value].largest_by_channel.size == 0


def test_what_is_kept_does_not_grow_with_the_number_of_texts(
    onnx_models: dict[str, OnnxModel],
    operands: list[Operand],
    rows: list[Encoded],
    encoder: TextEncoder,
) -> None:
    graph = open_graph(onnx_models["single"].path)
    kept = []
    for number in (2, 40):
        found = calibrate(graph, operands, rows[:number], encoder)
        kept.append(
            {
                value: (
                    seen.histogram.counts.nbytes,
                    seen.largest_by_channel.nbytes,
                    sorted(vars(seen)),
                    sorted(vars(seen.histogram)),
                )
                for value, seen in found.items()
            }
        )
    assert kept[0] == kept[1]
    assert {counts for counts, *_ in kept[0].values()} == {4096 * 8}


def test_the_order_of_the_texts_makes_no_difference(
    onnx_models: dict[str, OnnxModel],
    operands: list[Operand],
    rows: list[Encoded],
    encoder: TextEncoder,
) -> None:
    graph = open_graph(onnx_models["single"].path)
    before = to_bytes(graph)
    first = calibrate(graph, operands, rows, encoder)
    second = calibrate(graph, operands, rows[::-1], encoder)
    assert to_bytes(graph) == before
    for value, seen in first.items():
        assert seen.histogram.total == second[value].histogram.total
        assert seen.histogram.largest == pytest.approx(second[value].histogram.largest, abs=1e-4)


def _describe(
    rows: Sequence[Encoded],
    validation: Sequence[Encoded],
    encoder: TextEncoder,
    vocabulary_size: int = 30_522,
) -> module.CalibrationTexts:
    return describe_texts(
        rows, validation, vocabulary_size=vocabulary_size, special=encoder.special_ids
    )


@pytest.fixture(scope="module")
def real(encoder: TextEncoder, texts_for: dict[str, list[Any]]) -> tuple[list[Encoded], ...]:
    """Calibration and validation texts, none of them in both."""
    encoded = encoder.encode(texts_for["single"])
    return encoded[:200], encoded[200:300]


def test_real_texts_are_described_without_a_warning(
    real: tuple[list[Encoded], ...], encoder: TextEncoder
) -> None:
    calibration, validation = real
    found = _describe(calibration, validation, encoder)
    lengths = [len(row.ids) for row in calibration]
    assert found.texts == 200
    assert found.tokens == sum(lengths)
    assert (found.shortest_tokens, found.longest_tokens) == (min(lengths), max(lengths))
    assert found.median_tokens == np.median(lengths)
    assert found.validation_median_tokens == np.median([len(row.ids) for row in validation])
    assert 0.8 < found.coverage <= 1
    assert 0.8 < found.similarity <= 1
    assert found.warnings == ()


def test_the_same_texts_are_alike_in_every_way(
    real: tuple[list[Encoded], ...], encoder: TextEncoder
) -> None:
    found = _describe(real[1], real[1], encoder)
    assert found.coverage == 1
    assert found.similarity == pytest.approx(1)


def test_coverage_and_similarity_are_counted_by_occurrences() -> None:
    def row(*ids: int) -> Encoded:
        return Encoded([101, *ids, 102], [0] * (len(ids) + 2), False)

    found = describe_texts(
        [row(7, 7, 8), row(9)],
        [row(7, 7, 7), row(5, 8)],
        vocabulary_size=200,
        special=frozenset({0, 101, 102}),
    )
    assert found.coverage == pytest.approx(4 / 5)
    dot = 2 * 3 + 1 * 1
    assert found.similarity == pytest.approx(dot / np.sqrt((4 + 1 + 1) * (9 + 1 + 1)))
    assert (found.texts, found.tokens) == (2, 8)


def _refusal(
    rows: Sequence[Encoded], validation: Sequence[Encoded], encoder: TextEncoder, size: int = 30_522
) -> str:
    with pytest.raises(DataError) as caught:
        _describe(rows, validation, encoder, size)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


def test_no_texts_are_refused(real: tuple[list[Encoded], ...], encoder: TextEncoder) -> None:
    assert "there are no calibration texts" in _refusal([], real[1], encoder)


@pytest.mark.parametrize("length", [0, 6])
def test_texts_without_a_word_are_refused(
    real: tuple[list[Encoded], ...], encoder: TextEncoder, length: int
) -> None:
    empty = encoder.encode([""])[0]
    padded = [Encoded([*empty.ids, *[0] * length], [0] * (2 + length), False)] * 5
    message = _refusal(padded, real[1], encoder)
    assert message == "none of the 5 calibration texts holds a word"


@pytest.mark.parametrize("wrong", [2_100, 10**6, -1])
def test_a_token_that_is_not_in_the_vocabulary_is_refused(
    real: tuple[list[Encoded], ...], encoder: TextEncoder, wrong: int
) -> None:
    first = real[0][0]
    rows = [*real[0], Encoded([*first.ids[:-1], wrong, first.ids[-1]], [0] * 99, False)]
    highest = max(max(row.ids) for row in real[0])
    assert highest < 2_100
    message = _refusal(rows, real[1], encoder, 2_100)
    assert f"the token id {wrong}" in message
    assert "vocabulary ends at 2099" in message


def test_the_highest_token_of_the_vocabulary_is_allowed(
    real: tuple[list[Encoded], ...], encoder: TextEncoder
) -> None:
    highest = max(max(row.ids) for row in real[0])
    assert _describe(*real, encoder, highest + 1).texts == 200
    assert str(highest) in _refusal(*real, encoder, highest)


def test_texts_that_were_all_padded_or_cut_to_one_length_are_refused(
    real: tuple[list[Encoded], ...], encoder: TextEncoder
) -> None:
    rows = [Encoded([*row.ids, *[0] * (64 - len(row.ids))], [0] * 64, False) for row in real[0]]
    message = _refusal(rows, real[1], encoder)
    assert "all 200 calibration texts are 64 tokens long" in message
    assert "give texts as they come" in message
    cut = [Encoded(row.ids, row.type_ids, True) for row in rows]
    assert "max_length, which all of them are cut to" in _refusal(cut, real[1], encoder)


def test_one_length_is_fine_where_validation_texts_have_it_too(encoder: TextEncoder) -> None:
    rows = encoder.encode(["the food was good", "the food was bad", "the room was good"])
    assert len({len(row.ids) for row in rows}) == 1
    assert _describe(rows[:2], rows[2:], encoder).texts == 2


def test_a_single_text_has_one_length_of_course(
    real: tuple[list[Encoded], ...], encoder: TextEncoder
) -> None:
    assert _describe(real[0][:1], real[1], encoder).texts == 1


def test_random_tokens_are_refused(real: tuple[list[Encoded], ...], encoder: TextEncoder) -> None:
    random = np.random.default_rng(0)
    rows = [
        Encoded([2, *random.integers(5, 30_522, len(row.ids) - 2).tolist(), 3], row.type_ids, False)
        for row in real[0]
    ]
    message = _refusal(rows, real[1], encoder)
    assert "random or foreign texts cannot calibrate" in message


@pytest.mark.parametrize(("factor", "warned"), [(0.3, True), (0.6, False), (1.9, False), (3, True)])
def test_texts_much_shorter_or_longer_than_validations_are_warned_of(
    real: tuple[list[Encoded], ...], encoder: TextEncoder, factor: float, warned: bool
) -> None:
    words = [token for row in real[0] for token in row.ids[1:-1]]
    lengths = [round(len(row.ids) * factor) for row in real[1]]
    starts = np.cumsum([0, *lengths]) % 2_000
    rows = [
        Encoded([2, *words[start : start + length - 2], 3], [0] * length, False)
        for start, length in zip(starts[:-1].tolist(), lengths, strict=True)
    ]
    found = _describe(rows, real[1], encoder)
    said = [warning for warning in found.warnings if "tokens long in the median" in warning]
    assert len(said) == warned
    assert found.median_tokens == pytest.approx(factor * found.validation_median_tokens, abs=1)


def test_texts_that_hold_few_of_validations_words_are_warned_of(
    real: tuple[list[Encoded], ...], encoder: TextEncoder
) -> None:
    rows = encoder.encode(["a good film with the best of it and it was so", "the and a of it to"])
    found = _describe(rows, real[1], encoder)
    (warning,) = [warning for warning in found.warnings if "give more of them" in warning]
    assert f"only {found.coverage:.0%} of the validation texts' tokens" in warning
    assert found.coverage < 0.5
