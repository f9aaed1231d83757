"""Rounding weights by GPTQ: the layer's results are never worse off, and nearly always better."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import edgebert_export.rounding as rounding_module
from edgebert_export.calibrate import second_moments
from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder
from edgebert_export.graph import (
    constant,
    copy_of,
    find_products,
    open_graph,
    open_session,
    to_bytes,
)
from edgebert_export.qdq import insert_qdq, quantise_weight
from edgebert_export.rounding import round_layers, round_weight
from edgebert_export.to_onnx import OnnxModel


def _layer(
    seed: int, tokens: int, inputs: int, outputs: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Activations whose channels move together, and weights."""
    random = np.random.default_rng(seed)
    causes = random.normal(size=(tokens, max(inputs // 4, 1)))
    activations = causes @ random.normal(size=(causes.shape[1], inputs))
    activations += 0.1 * random.normal(size=activations.shape)
    return activations.astype(np.float32), random.normal(size=(inputs, outputs)).astype(np.float32)


def _errors(
    activations: NDArray[np.float32], weight: NDArray[np.float32], steps: NDArray[np.int8]
) -> NDArray[np.float64]:
    """Squared error of each column's result over all tokens, computed from the results."""
    scales = quantise_weight(weight, 1).scales
    wide = activations.astype(np.float64)
    rounded = steps * scales.astype(np.float64)
    found: NDArray[np.float64] = ((wide @ rounded - wide @ weight.astype(np.float64)) ** 2).sum(0)
    return found


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000), st.integers(1, 150), st.integers(1, 140), st.integers(1, 9), st.data()
)
def test_no_columns_result_is_further_from_the_exact_one_than_with_the_nearest_steps(
    seed: int, tokens: int, inputs: int, outputs: int, data: st.DataObject
) -> None:
    activations, weight = _layer(seed, tokens, inputs, outputs)
    silent = data.draw(st.sets(st.integers(0, inputs - 1), max_size=3))
    activations[:, list(silent)] = 0
    steps = round_weight(weight, activations.T @ activations)
    nearest = quantise_weight(weight, 1).steps
    assert (steps.dtype, steps.shape) == (np.int8, weight.shape)
    assert np.abs(steps.astype(int)).max() <= 127
    allowed = _errors(activations, weight, nearest)
    assert (_errors(activations, weight, steps) <= allowed * 1.001 + 1e-4).all()


@pytest.mark.parametrize(("tokens", "inputs"), [(600, 200), (80, 200)])
def test_where_channels_move_together_most_of_the_error_is_made_up_for(
    tokens: int, inputs: int
) -> None:
    activations, weight = _layer(1, tokens, inputs, 30)
    nearest = quantise_weight(weight, 1).steps
    steps = round_weight(weight, activations.T @ activations)
    ratio = _errors(activations, weight, steps).sum() / _errors(activations, weight, nearest).sum()
    assert ratio < 0.4


def test_where_no_channel_moves_with_another_there_is_nothing_to_make_up() -> None:
    weight = np.random.default_rng(2).normal(size=(70, 5)).astype(np.float32)
    moments = np.diag(np.arange(1, 71)).astype(np.float32)
    np.testing.assert_array_equal(round_weight(weight, moments), quantise_weight(weight, 1).steps)


def test_an_activation_that_is_always_zero_leaves_the_nearest_steps() -> None:
    weight = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32)
    steps = round_weight(weight, np.zeros((6, 6), dtype=np.float32))
    np.testing.assert_array_equal(steps, quantise_weight(weight, 1).steps)


@pytest.fixture(scope="module")
def tiny(
    onnx_models: dict[str, OnnxModel],
    tiny_classifiers: dict[str, Checkpoint],
    texts_for: dict[str, list[Any]],
) -> tuple[Any, ...]:
    """A graph, its linear layers, texts of different lengths, and what pads them."""
    graph = open_graph(onnx_models["single"].path)
    encoder = checkpoint_encoder(tiny_classifiers["single"], max_length=64, text_pair=False)
    products = [product for product in find_products(graph) if product.kind == "linear"]
    return graph, products, encoder.encode(texts_for["single"][:24]), encoder


def test_moments_are_those_of_each_text_by_itself(tiny: tuple[Any, ...]) -> None:
    """Each text alone needs no padding, so nothing of it can be in the sums."""
    graph, products, rows, encoder = tiny
    assert len({len(row.ids) for row in rows}) > 3
    operands = [operand for product in products for operand in product.operands]
    found = second_moments(graph, operands, rows, encoder)
    watched = copy_of(graph)
    values = {value.name: value for node in watched.graph for value in node.outputs}
    watched.graph.outputs.extend(values[name] for name in found)
    session = open_session(to_bytes(watched))
    expected = dict.fromkeys(found, 0.0)
    for row in rows:
        for name, result in session.run(encoder.collate([row])).items():
            if name in expected:
                flat = result.reshape(-1, result.shape[-1]).astype(np.float64)
                expected[name] = expected[name] + flat.T @ flat
    assert len(found) == len({operand.value for operand in operands})
    for name, moments in found.items():
        assert moments.dtype == np.float32
        np.testing.assert_allclose(moments, expected[name], rtol=1e-3, atol=1e-3)


def test_every_linear_layer_is_rounded_however_few_fit_into_memory_at_a_time(
    tiny: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, products, rows, encoder = tiny
    together = round_layers(graph, find_products(graph), rows, encoder)
    assert set(together) == {product.weight for product in products}
    passes: list[int] = []

    def counted(*given: Any) -> Any:
        passes.append(len(given[1]))
        return second_moments(*given)

    monkeypatch.setattr(rounding_module, "second_moments", counted)
    monkeypatch.setattr(rounding_module, "_MOMENT_BYTES", 1)
    one_by_one = round_layers(graph, products, rows, encoder)
    # Queries, keys and values read the same activation, which is summed up once for all three.
    assert len(passes) == len({product.operands[0].value for product in products})
    assert sum(passes) == len(products)
    for name, steps in together.items():
        np.testing.assert_array_equal(one_by_one[name], steps)


def test_what_is_rounded_is_what_the_graph_stores(tiny: tuple[Any, ...]) -> None:
    graph, products, rows, encoder = tiny
    steps = round_layers(graph, products, rows, encoder)
    scales = {operand.value: 0.1 for product in products for operand in product.operands}
    plain, rounded = (insert_qdq(graph, products, scales, given) for given in (None, steps))
    changed = 0
    for product in products:
        stored = constant(rounded, f"{product.weight}_int8")
        np.testing.assert_array_equal(stored, steps[product.weight])
        for part in ("scale", "factors"):
            name = f"{product.weight}_{part}"
            np.testing.assert_array_equal(constant(rounded, name), constant(plain, name))
        changed += int((stored != constant(plain, f"{product.weight}_int8")).sum())
    assert changed > 0
