"""Explicit Q/DQ: the arithmetic of INT8, where pairs are put, and what the graph then computes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from onnx import numpy_helper

from edgebert_export.calibrate import calibrate
from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder, load_model
from edgebert_export.graph import Product, find_products, open_graph, to_bytes
from edgebert_export.qdq import LEVELS, activation_scale, insert_qdq, quantise_weight
from edgebert_export.to_onnx import OnnxModel
from edgebert_runtime.manifest import Task

NAMES = ["single", "multi", "pairs"]
HALF_LARGEST = float(np.finfo(np.float16).max)
HALF_NORMAL = float(np.finfo(np.float16).smallest_normal)
Scales = dict[str, float]


def _is_half(values: NDArray[np.float32] | float) -> bool:
    return bool(np.array_equal(np.asarray(values, dtype=np.float16).astype(np.float64), values))


def _weights(*, subnormal: bool = False) -> st.SearchStrategy[NDArray[np.float32]]:
    numbers = st.floats(-HALF_LARGEST, HALF_LARGEST, width=32, allow_subnormal=subnormal)
    shapes = array_shapes(min_dims=2, max_dims=2, max_side=6)
    # Real weights are of one size; what Hypothesis makes of floats alone hardly ever is.
    small = st.floats(-1, 1, width=32, allow_subnormal=subnormal)
    return shapes.flatmap(
        lambda shape: st.sampled_from([numbers, small]).flatmap(
            lambda elements: arrays(np.float32, shape, elements=elements)
        )
    )


@given(_weights(), st.sampled_from([0, 1]))
def test_a_weight_comes_back_to_within_half_a_step_of_its_channel(
    weight: NDArray[np.float32], axis: int
) -> None:
    found = quantise_weight(weight, axis)
    steps, scales = found.steps, found.scales
    assert (steps.dtype, scales.dtype) == (np.int8, np.float32)
    assert (steps.shape, scales.shape) == (weight.shape, (weight.shape[axis],))
    assert (scales > 0).all()
    assert np.abs(steps.astype(int)).max() <= LEVELS == 127
    by_channel = np.expand_dims(scales, 1 - axis).astype(np.float64)
    error = np.abs(steps * by_channel - weight)
    assert (error <= 0.50001 * by_channel).all()


@given(_weights(), st.sampled_from([0, 1]))
def test_a_scale_is_a_power_of_two_times_a_normal_number_of_fp16(
    weight: NDArray[np.float32], axis: int
) -> None:
    """The first is what a product can be scaled by inside; the second, what is left for behind."""
    found = quantise_weight(weight, axis)
    assert _is_half(found.unit)
    assert found.unit >= HALF_NORMAL
    assert np.frexp(found.unit)[0] == 0.5
    assert (found.factors.dtype, found.factors.shape) == (np.float16, (weight.shape[axis],))
    assert (found.factors >= np.float16(HALF_NORMAL)).all()
    assert np.array_equal(found.scales, found.unit * found.factors.astype(np.float64))
    if axis == 0:
        assert found.unit == 1
    else:  # the smallest unit with which no factor makes a result larger
        assert found.factors.max() <= 1
        assert found.factors.max() >= 0.5 or found.unit == HALF_NORMAL


@given(_weights(), st.sampled_from([0, 1]))
def test_each_channel_uses_its_whole_range_unless_it_is_too_small_for_that(
    weight: NDArray[np.float32], axis: int
) -> None:
    found = quantise_weight(weight, axis)
    largest = np.abs(weight).max(axis=1 - axis)
    reached = np.abs(found.steps.astype(int)).max(axis=1 - axis)
    assert (reached[largest / LEVELS >= HALF_NORMAL * found.unit] == LEVELS).all()
    assert (reached[largest == 0] == 0).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_channels_numbers_depend_on_no_other_channel(axis: int) -> None:
    """All outputs of a layer share a power of two, which takes nothing from any of them."""
    weight = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    before = quantise_weight(weight, axis)
    weight[(2, slice(None)) if axis == 0 else (slice(None), 2)] *= 1000
    after = quantise_weight(weight, axis)
    others = [0, 1, 3, 4]
    assert np.array_equal(before.scales[others], after.scales[others])
    assert after.scales[2] > 900 * before.scales[2]
    assert np.array_equal(before.steps.take(others, axis), after.steps.take(others, axis))
    assert (after.unit > 500 * before.unit) == (axis == 1)


@pytest.mark.parametrize("number", [1e-45, 8e-44, 1e-39, 1e-10])
def test_a_channel_of_the_smallest_numbers_there_are_has_a_usable_scale(number: float) -> None:
    """Weight decay drives the weights of dead channels there."""
    weight = np.array([[number, 1.0], [-number, 0.5]], dtype=np.float32)
    found = quantise_weight(weight, 1)
    assert (found.scales > 0).all()
    error = np.abs(found.steps[:, 0] * found.scales[0] - weight[:, 0])
    assert error.max() <= HALF_NORMAL * found.unit
    assert found.steps[:, 1].tolist() == [127, 63]


@given(st.floats(0, HALF_LARGEST))
def test_an_activations_scale_is_a_positive_number_that_fp16_can_hold(threshold: float) -> None:
    scale = activation_scale(threshold)
    assert scale > 0
    assert _is_half(scale)
    if threshold >= LEVELS * HALF_NORMAL:
        assert scale * LEVELS == pytest.approx(threshold, rel=2**-11)
        assert round(threshold / scale) == LEVELS


def test_the_scale_of_nothing_is_a_normal_number() -> None:
    assert _is_half(activation_scale(0))
    assert activation_scale(0) >= HALF_NORMAL


@pytest.fixture(scope="module")
def graphs(onnx_models: dict[str, OnnxModel]) -> dict[str, ir.Model]:
    """The FP32 graph of each of the tasks; treat it as read-only."""
    return {name: open_graph(model.path) for name, model in onnx_models.items()}


@pytest.fixture(scope="module")
def batches(
    tiny_classifiers: dict[str, Checkpoint], tasks: dict[str, Task], texts_for: dict[str, list[Any]]
) -> dict[str, dict[str, NDArray[np.int64]]]:
    """A padded batch of texts of different lengths for each of the tasks."""
    found = {}
    for name, checkpoint in tiny_classifiers.items():
        encoder = checkpoint_encoder(checkpoint, max_length=64, text_pair=tasks[name].text_pair)
        found[name] = encoder.collate(encoder.encode(texts_for[name][:16]))
    return found


@pytest.fixture(scope="module")
def scales(
    graphs: dict[str, ir.Model],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
) -> dict[str, Scales]:
    """A scale of every activation that could be quantised; a tenth of the range is clipped."""
    found = {}
    for name, graph in graphs.items():
        encoder = checkpoint_encoder(
            tiny_classifiers[name], max_length=64, text_pair=tasks[name].text_pair
        )
        operands = [operand for product in find_products(graph) for operand in product.operands]
        seen = calibrate(graph, operands, encoder.encode(texts_for[name][16:32]), encoder)
        found[name] = {
            value: activation_scale(0.9 * statistics.histogram.largest)
            for value, statistics in seen.items()
        }
    return found


class _Walk:
    """A serialised graph, to look things up in."""

    def __init__(self, model: ir.Model) -> None:
        proto = onnx.ModelProto.FromString(to_bytes(model))
        onnx.checker.check_model(proto, full_check=True)
        self.nodes = {node.name: node for node in proto.graph.node}
        self.constants = {w.name: numpy_helper.to_array(w) for w in proto.graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.producers: dict[str, onnx.NodeProto] = {}
        for node in proto.graph.node:
            for value in node.input:
                self.readers[value].append(node)
            for value in node.output:
                self.producers[value] = node

    def of(self, operator: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes.values() if node.op_type == operator]

    def stored_behind(self, value: str) -> tuple[NDArray[np.int8], NDArray[np.float32], list[int]]:
        """What is stored of a weight: its steps, its scale or scales, and their axis if any."""
        node = self.producers[value]
        assert node.op_type == "DequantizeLinear"
        assert len(node.input) == 2  # symmetric
        axis = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
        return self.constants[node.input[0]], self.constants[node.input[1]], axis

    def factors_behind(self, product: onnx.NodeProto) -> tuple[NDArray[np.float32], str]:
        """What the results of a product are multiplied by, and the name of what comes of it."""
        (multiply,) = self.readers[product.output[0]]
        assert multiply.op_type == "Mul"
        assert multiply.input[0] == product.output[0]
        return self.constants[multiply.input[1]], multiply.output[0]


def _products(graph: ir.Model, *kinds: str) -> list[Product]:
    return [product for product in find_products(graph) if product.kind in kinds]


def _logits(model: ir.Model, batch: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    # As it is written: without VNNI, the fused 8-bit kernels saturate (docs/decisions/0016).
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        to_bytes(model), options, providers=["CPUExecutionProvider"]
    )
    logits: NDArray[np.float32] = session.run(["logits"], batch)[0]
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_quantising_nothing_gives_the_graph_as_it_was(
    graphs: dict[str, ir.Model], name: str
) -> None:
    assert to_bytes(insert_qdq(graphs[name], [], {})) == to_bytes(graphs[name])


@pytest.mark.parametrize("name", NAMES)
def test_each_activation_goes_through_one_pair_which_only_the_chosen_products_read(
    graphs: dict[str, ir.Model], scales: dict[str, Scales], name: str
) -> None:
    chosen = _products(graphs[name], "linear")
    walk = _Walk(insert_qdq(graphs[name], chosen, scales[name]))
    wanted = {product.node: product.operands[0].value for product in chosen}
    quantisers = walk.of("QuantizeLinear")
    assert sorted(node.input[0] for node in quantisers) == sorted(set(wanted.values()))
    assert len(quantisers) == 10  # 4 in each of 2 blocks, the pooler, and the head
    read = set()
    for quantise in quantisers:
        source, scale, zero = quantise.input
        assert walk.constants[scale].item() == scales[name][source]
        assert (walk.constants[zero].dtype, walk.constants[zero].item()) == (np.int8, 0)
        (dequantise,) = walk.readers[quantise.output[0]]
        assert dequantise.op_type == "DequantizeLinear"
        assert list(dequantise.input) == [quantise.output[0], scale, zero]
        readers = walk.readers[dequantise.output[0]]
        assert {node.name for node in readers} == {n for n, v in wanted.items() if v == source}
        assert all(node.input[0] == dequantise.output[0] for node in readers)
        read |= {node.name for node in readers}
    assert read == set(wanted)
    # Besides, one for each weight: neither biases nor results are quantised.
    assert len(walk.of("DequantizeLinear")) == len(quantisers) + len(chosen)


def test_queries_keys_and_values_share_one_pair(
    graphs: dict[str, ir.Model], scales: dict[str, Scales]
) -> None:
    chosen = _products(graphs["single"], "linear")
    walk = _Walk(insert_qdq(graphs["single"], chosen, scales["single"]))
    for layer in (0, 1):
        prefix = f"/bert/encoder/layer.{layer}/attention/self"
        products = [walk.nodes[f"{prefix}/{part}/MatMul"] for part in ("query", "key", "value")]
        assert len({product.input[0] for product in products}) == 1
        assert len({product.input[1] for product in products}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_residual_sums_norms_and_biases_read_what_was_never_quantised(
    graphs: dict[str, ir.Model], scales: dict[str, Scales], name: str
) -> None:
    graph = graphs[name]
    chosen = _products(graph, "linear", "attention", "embedding")
    products = {product.node for product in chosen}
    before, after = _Walk(graph), _Walk(insert_qdq(graph, chosen, scales[name]))
    kept = [node for node in before.nodes.values() if node.name not in products]
    assert {"Add", "LayerNormalization", "Softmax", "Gelu", "Tanh"} <= {n.op_type for n in kept}
    for node in kept:
        assert after.nodes[node.name] == node
    added = {node.op_type for node in after.nodes.values() if node.name not in before.nodes}
    assert added == {"QuantizeLinear", "DequantizeLinear", "Mul"}
    for product in chosen:
        node = after.nodes[product.node]
        (result,) = before.nodes[product.node].output
        if product.kind == "linear":  # what is read is scaled, under the name that it had
            assert after.factors_behind(node)[1] == result
        else:
            assert list(node.output) == [result]
        assert "QuantizeLinear" not in {reader.op_type for reader in after.readers[result]}


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_stored_in_int8_with_one_power_of_two_and_scaled_by_output_behind_the_product(
    graphs: dict[str, ir.Model], scales: dict[str, Scales], name: str
) -> None:
    graph = graphs[name]
    chosen = _products(graph, "linear")
    before, after = _Walk(graph), _Walk(insert_qdq(graph, chosen, scales[name]))
    for product in chosen:
        weight = before.constants[str(product.weight)]
        node = after.nodes[product.node]
        steps, unit, axis = after.stored_behind(node.input[1])
        factors, _ = after.factors_behind(node)
        assert steps.dtype == np.int8
        assert (steps.shape, unit.shape, axis) == (weight.shape, (), [])
        assert np.frexp(unit)[0] == 0.5
        assert factors.shape == weight.shape[1:]
        assert _is_half(factors)
        assert 0.5 <= factors.max() <= 1
        error = np.abs(steps * (unit * factors) - weight)
        assert (error <= 0.50001 * unit * factors).all()
        assert str(product.weight) not in after.constants


def test_giving_one_of_three_back_leaves_the_others_quantised(
    graphs: dict[str, ir.Model], scales: dict[str, Scales]
) -> None:
    graph = graphs["single"]
    everything = _products(graph, "linear")
    key = "bert.encoder.layer.0.attention.self.key"
    chosen = [product for product in everything if product.name != key]
    (left_out,) = [product for product in everything if product.name == key]
    before, after = _Walk(graph), _Walk(insert_qdq(graph, chosen, scales["single"]))
    assert after.nodes[left_out.node] == before.nodes[left_out.node]
    assert len(after.of("Mul")) == len(before.of("Mul")) + len(chosen)
    assert np.array_equal(
        after.constants[str(left_out.weight)], before.constants[str(left_out.weight)]
    )
    assert len(after.of("QuantizeLinear")) == 10
    prefix = "/bert/encoder/layer.0/attention/self"
    for part in ("query", "value"):
        activation, weight = after.nodes[f"{prefix}/{part}/MatMul"].input
        assert after.producers[activation].op_type == "DequantizeLinear"
        assert after.stored_behind(weight)[0].dtype == np.int8


def test_a_single_layer_is_quantised_alone(
    graphs: dict[str, ir.Model], scales: dict[str, Scales]
) -> None:
    (chosen,) = [p for p in find_products(graphs["single"]) if p.name == "classifier"]
    walk = _Walk(insert_qdq(graphs["single"], [chosen], scales["single"]))
    (quantise,) = walk.of("QuantizeLinear")
    assert quantise.input[0] == chosen.operands[0].value
    assert len(walk.of("DequantizeLinear")) == 2


def test_tables_are_stored_in_int8_with_a_scale_for_each_row(
    graphs: dict[str, ir.Model], scales: dict[str, Scales]
) -> None:
    graph = graphs["single"]
    chosen = _products(graph, "embedding")
    before, after = _Walk(graph), _Walk(insert_qdq(graph, chosen, scales["single"]))
    assert after.of("QuantizeLinear") == []
    assert len(after.of("DequantizeLinear")) == len(chosen) == 3
    for product in chosen:
        table = before.constants[str(product.weight)]
        steps, by_row, axis = after.stored_behind(after.nodes[product.node].input[0])
        assert (steps.dtype, steps.shape, by_row.shape) == (np.int8, table.shape, table.shape[:1])
        assert axis == [0]
        assert np.abs(steps * by_row[:, None] - table).max() <= 0.50001 * by_row.max()
        assert after.nodes[product.node].input[1] == before.nodes[product.node].input[1]


def test_both_operands_of_products_in_attention_are_quantised(
    graphs: dict[str, ir.Model], scales: dict[str, Scales]
) -> None:
    graph = graphs["single"]
    chosen = _products(graph, "attention")
    walk = _Walk(insert_qdq(graph, chosen, scales["single"]))
    assert len(walk.of("QuantizeLinear")) == len(walk.of("DequantizeLinear")) == 8
    for product in chosen:
        for index, operand in enumerate(product.operands):
            dequantise = walk.producers[walk.nodes[product.node].input[index]]
            quantise = walk.producers[dequantise.input[0]]
            assert quantise.op_type == "QuantizeLinear"
            assert quantise.input[0] == operand.value
    assert not [w for w, array in walk.constants.items() if array.dtype == np.int8 and array.ndim]


@pytest.mark.parametrize("kinds", [("linear",), ("attention",), ("embedding",)])
def test_the_graph_that_is_quantised_does_not_change(
    graphs: dict[str, ir.Model], scales: dict[str, Scales], kinds: tuple[str, ...]
) -> None:
    before = to_bytes(graphs["single"])
    products = _products(graphs["single"], *kinds)
    first = to_bytes(insert_qdq(graphs["single"], products, scales["single"]))
    assert to_bytes(graphs["single"]) == before
    assert to_bytes(insert_qdq(graphs["single"], products, scales["single"])) == first != before


@pytest.mark.parametrize("kinds", [("linear",), ("attention",), ("embedding",)])
@pytest.mark.parametrize("name", NAMES)
def test_the_quantised_graph_answers_nearly_as_before(
    graphs: dict[str, ir.Model],
    scales: dict[str, Scales],
    batches: dict[str, dict[str, NDArray[np.int64]]],
    name: str,
    kinds: tuple[str, ...],
) -> None:
    chosen = _products(graphs[name], *kinds)
    expected = _logits(graphs[name], batches[name])
    found = _logits(insert_qdq(graphs[name], chosen, scales[name]), batches[name])
    assert np.isfinite(found).all()
    assert not np.array_equal(found, expected)
    for column in range(expected.shape[1]):
        assert np.corrcoef(found[:, column], expected[:, column])[0, 1] > 0.8


def _in_steps(weight: Any, *, linear: bool) -> Any:
    """Fake-quantises a PyTorch weight ``[channels, ...]``, by the formula of the documentation."""
    import torch

    exact = weight.abs().amax(dim=1, keepdim=True).double() / 127
    unit = 2.0 ** exact.max().log2().ceil() if linear else torch.ones(())
    factor = (exact / unit).half()
    up = torch.nextafter(factor, torch.full_like(factor, float("inf")))
    factor = torch.where(factor.double() < exact / unit, up, factor)
    scale = (factor.clamp(min=2.0**-14).double() * unit).float()
    return (weight / scale).round().clamp(-127, 127) * scale


def _clip_input(scale: float) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return ((given[0] / scale).round().clamp(-128, 127) * scale, *given[1:])

    return hook


@pytest.mark.parametrize("kinds", [("linear",), ("linear", "embedding")])
@pytest.mark.parametrize("name", NAMES)
def test_the_quantised_graph_computes_what_a_simulation_in_pytorch_does(
    graphs: dict[str, ir.Model],
    scales: dict[str, Scales],
    batches: dict[str, dict[str, NDArray[np.int64]]],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    name: str,
    kinds: tuple[str, ...],
) -> None:
    import torch

    chosen = _products(graphs[name], *kinds)
    model = load_model(tiny_classifiers[name], tasks[name], attention="eager")
    modules = dict(model.named_modules())
    tensors = {key: torch.from_numpy(array) for key, array in batches[name].items()}
    with torch.inference_mode():
        for product in chosen:
            module = modules[product.name]
            steps = _in_steps(module.weight, linear=product.kind == "linear")
            module.weight = torch.nn.Parameter(steps, requires_grad=False)
            for operand in product.operands:
                module.register_forward_pre_hook(_clip_input(scales[name][operand.value]))
        simulated = model(**tensors).logits.numpy()
    found = _logits(insert_qdq(graphs[name], chosen, scales[name]), batches[name])
    assert np.abs(found - _logits(graphs[name], batches[name])).max() > 1e-2
    np.testing.assert_allclose(found, simulated, atol=1e-4)


def test_weights_take_a_quarter_and_a_factor_for_each_output(graphs: dict[str, ir.Model]) -> None:
    linear = _products(graphs["single"], "linear")
    once = dict.fromkeys((o.value for p in linear for o in p.operands), 0.01)
    before, after = _Walk(graphs["single"]), _Walk(insert_qdq(graphs["single"], linear, once))
    shapes = [before.constants[str(product.weight)].shape for product in linear]
    sizes = [sum(array.nbytes for array in walk.constants.values()) for walk in (before, after)]
    weights, outputs = sum(rows * columns for rows, columns in shapes), sum(s[1] for s in shapes)
    assert sizes[0] - sizes[1] == 3 * weights - 4 * outputs - 4 * len(linear) - 4 * len(once) - 1
