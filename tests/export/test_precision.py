"""Graphs typed as FP16: what stays FP32, that nothing overflows, and that TensorRT takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edgebert_export.attention import scale_queries
from edgebert_export.calibrate import calibrate
from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_model,
    load_tokenizer,
    save_checkpoint,
)
from edgebert_export.errors import ExportError
from edgebert_export.graph import (
    Operand,
    Product,
    constant,
    copy_of,
    find_products,
    open_graph,
    open_session,
    set_constant,
    to_bytes,
    write_graph,
)
from edgebert_export.precision import MASKED, to_half, with_input_type
from edgebert_export.qdq import activation_scale, insert_qdq
from edgebert_export.to_onnx import ExportConfig, to_onnx
from edgebert_runtime.encoder import TextEncoder
from edgebert_runtime.manifest import Task

MODELS = ["bert", "distilbert"]
KINDS = [(), ("linear",), ("linear", "attention"), ("linear", "attention", "embedding")]
Inputs = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class _Tiny:
    """A tiny model of which no two weights are equal, as in trained ones."""

    graph: ir.Model
    encoder: TextEncoder
    batch: Inputs
    scales: dict[str, float]

    def products(self, *kinds: str) -> list[Product]:
        return [product for product in find_products(self.graph) if product.kind in kinds]

    def quantised(self, *kinds: str) -> ir.Model:
        return insert_qdq(self.graph, self.products(*kinds), self.scales)


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
    random_distilbert: Callable[..., Any],
) -> dict[str, _Tiny]:
    """A BERT and a DistilBERT; treat them as read-only."""
    import torch

    root = tmp_path_factory.mktemp("precision")
    source, task = tiny_classifiers["single"], tasks["single"]
    tokenizer = load_tokenizer(source)
    models: dict[str, Any] = {
        "bert": load_model(source, task),
        "distilbert": random_distilbert(),
    }
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 0.5 if weight.ndim == 2 else 1  # as wide as it is, rounding decides
                weight += 0.05 * torch.randn(weight.shape)
        checkpoint = save_checkpoint(model, tokenizer, root / name)
        exported = to_onnx(
            checkpoint,
            task,
            ExportConfig(max_length=64, fold_token_types=False),
            root / f"{name}.onnx",
        )
        encoder = checkpoint_encoder(checkpoint, max_length=64, text_pair=False)
        rows = encoder.encode(texts_for["single"][:24])
        graph = open_graph(exported.path)
        operands = [operand for p in find_products(graph) for operand in p.operands]
        seen = calibrate(graph, operands, rows, encoder)
        scales = {v: activation_scale(s.histogram.largest) for v, s in seen.items()}
        found[name] = _Tiny(graph, encoder, encoder.collate(rows), scales)
    return found


def _logits(model: ir.Model, batch: Inputs) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = open_session(to_bytes(model)).run(batch)["logits"]
    return logits


def _unoptimised(model: ir.Model, batch: Inputs) -> NDArray[np.float32]:
    """What ONNX Runtime computes without its own fusions."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(to_bytes(model), options)
    logits: NDArray[np.float32] = session.run(["logits"], batch)[0]
    return logits


def _proto(model: ir.Model) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(to_bytes(model))


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def _types(model: ir.Model) -> dict[str, int]:
    """The type of every tensor, as ONNX's own inference finds it."""
    inferred = onnx.shape_inference.infer_shapes(_proto(model), strict_mode=True).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {weight.name: weight.data_type for weight in inferred.initializer}


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_typed_as_fp16_is_valid_and_runs(
    tiny: dict[str, _Tiny], tmp_path: Path, name: str, kinds: tuple[str, ...]
) -> None:
    half = to_half(tiny[name].quantised(*kinds))
    write_graph(half, tmp_path / "half.onnx")
    onnx.checker.check_model(str(tmp_path / "half.onnx"), full_check=True)
    found, expected = (_logits(model, tiny[name].batch) for model in (half, tiny[name].graph))
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    for column in range(expected.shape[1]):
        assert np.corrcoef(found[:, column], expected[:, column])[0, 1] > 0.8


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_only_softmax_and_the_outputs_are_in_fp32(
    tiny: dict[str, _Tiny], name: str, kinds: tuple[str, ...]
) -> None:
    proto = _proto(to_half(tiny[name].quantised(*kinds)))
    single = {TensorProto.FLOAT, TensorProto.DOUBLE}
    assert not [w.name for w in proto.graph.initializer if w.data_type in single]
    assert TensorProto.FLOAT16 in {w.data_type for w in proto.graph.initializer}
    types = _types(ir.from_proto(proto))
    softmax = [node for node in proto.graph.node if node.op_type == "Softmax"]
    assert len(softmax) == 2
    expected = {value for node in softmax for value in (*node.input, *node.output)} | {"logits"}
    assert {value for value, kind in types.items() if kind in single} == expected
    norms = [node for node in proto.graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 5
    for node in norms:
        (precision,) = [a.i for a in node.attribute if a.name == "stash_type"]
        assert precision == TensorProto.FLOAT
        assert {types[value] for value in (*node.input, *node.output)} == {TensorProto.FLOAT16}


def test_norms_are_computed_in_fp32_even_if_the_source_says_otherwise(
    tiny: dict[str, _Tiny],
) -> None:
    graph = copy_of(tiny["bert"].graph)
    for node in graph.graph:
        if node.op_type == "LayerNormalization":
            node.attributes["stash_type"] = ir.AttrInt64("stash_type", TensorProto.BFLOAT16)
    norms = [node for node in to_half(graph).graph if node.op_type == "LayerNormalization"]
    assert [node.attributes["stash_type"].as_int() for node in norms] == [TensorProto.FLOAT] * 5


@pytest.mark.parametrize("name", MODELS)
def test_the_inputs_are_as_they_were_and_so_is_the_outputs_shape(
    tiny: dict[str, _Tiny], name: str
) -> None:
    before, after = _proto(tiny[name].graph).graph, _proto(to_half(tiny[name].graph)).graph
    assert list(after.input) == list(before.input)
    assert list(after.output) == list(before.output)


@pytest.mark.parametrize("name", MODELS)
def test_int8_weights_keep_their_values_and_their_scales_become_fp16(
    tiny: dict[str, _Tiny], name: str
) -> None:
    quantised = tiny[name].quantised("linear", "embedding")
    before, after = (
        {w.name: numpy_helper.to_array(w) for w in _proto(model).graph.initializer}
        for model in (quantised, to_half(quantised))
    )
    stored = [key for key, array in before.items() if array.dtype == np.int8]
    assert len(stored) > 14
    for key in stored:
        assert np.array_equal(after[key], before[key])
        assert after[key].dtype == np.int8
    scales = [key for key in before if key.endswith("_scale")]
    assert len(scales) > 14
    for key in scales:
        assert after[key].dtype == np.float16
        assert np.array_equal(after[key].astype(np.float32), before[key])  # nothing is rounded


@pytest.mark.parametrize("name", MODELS)
def test_what_masks_padding_is_in_fp16s_range_and_far_below_any_score(
    tiny: dict[str, _Tiny], name: str
) -> None:
    before, after = (
        {w.name: numpy_helper.to_array(w) for w in _proto(model).graph.initializer}
        for model in (tiny[name].graph, to_half(tiny[name].graph))
    )
    masks = [k for k, a in before.items() if a.dtype == np.float32 and a.size and a.min() < -1e30]
    assert masks
    for key in masks:
        assert after[key].dtype == np.float16
        assert after[key].item() == MASKED == -30_000
    lowest = [a.min() for a in after.values() if a.dtype == np.float16 and a.size]
    assert min(lowest) >= MASKED


@pytest.mark.parametrize("name", MODELS)
def test_fp16_answers_as_fp32_does_in_padded_batches(tiny: dict[str, _Tiny], name: str) -> None:
    batch = tiny[name].batch
    assert (batch["attention_mask"] == 0).any()
    expected = _logits(tiny[name].graph, batch)
    found = _logits(to_half(tiny[name].graph), batch)
    assert np.abs(found - expected).max() <= 2e-2 * np.abs(expected).max()
    assert not np.array_equal(found, expected)


@pytest.mark.parametrize("kinds", [(), ("linear", "attention", "embedding")])
@pytest.mark.parametrize("name", MODELS)
def test_a_single_token_among_long_padding_is_answered_as_it_is_alone(
    tiny: dict[str, _Tiny], name: str, kinds: tuple[str, ...]
) -> None:
    half = to_half(tiny[name].quantised(*kinds))
    encoder = tiny[name].encoder
    row = encoder.encode(["good"])[0]
    inputs = encoder.collate([row])
    alone = {key: array[:, :1] for key, array in inputs.items()}
    padded = {key: np.pad(array, ((0, 0), (0, 63))) for key, array in alone.items()}
    assert padded["attention_mask"].sum() == 1
    found = [_logits(half, batch) for batch in (alone, padded)]
    assert np.isfinite(found[0]).all()
    size = np.abs(_logits(tiny[name].graph, tiny[name].batch)).max()
    np.testing.assert_allclose(found[1], found[0], atol=2e-2 * size)


def test_scores_that_fill_half_of_fp16s_range_are_still_finite_when_they_are_masked(
    tiny: dict[str, _Tiny], texts_for: dict[str, list[Any]]
) -> None:
    model = tiny["bert"]
    rows = model.encoder.encode(texts_for["single"][:24])
    blown = copy_of(scale_queries(model.graph, find_products(model.graph)))

    def largest(graph: ir.Model, value: str) -> float:
        seen = calibrate(graph, [Operand(value, -2)], rows, model.encoder)
        return seen[value].histogram.largest

    products = {product.name: product for product in find_products(blown)}
    query = products["bert.encoder.layer.0.attention.self.query"]
    (scores,) = [
        str(node.outputs[0].name)
        for node in blown.graph
        if node.name == products["bert.encoder.layer.0.attention.self.scores"].node
    ]
    factor = np.float32(30_000 / largest(blown, scores))
    for name in (str(query.weight), f"{query.name}.bias"):
        set_constant(blown, name, constant(blown, name) * factor)
    assert largest(blown, scores) == pytest.approx(30_000, rel=1e-3)
    half = to_half(blown)
    masked = next(node for node in half.graph if node.op_type == "Softmax").inputs[0]
    assert masked is not None
    assert 45_000 < largest(half, str(masked.name)) < 65_504
    assert np.isfinite(_logits(half, model.batch)).all()


@pytest.mark.parametrize("name", MODELS)
def test_scaling_queries_removes_every_division_from_attention(
    tiny: dict[str, _Tiny], name: str
) -> None:
    graph = tiny[name].graph
    scaled = scale_queries(graph, find_products(graph))
    assert _operators(graph)["Div"] == 2
    assert _operators(scaled)["Div"] == 0
    expected = _logits(graph, tiny[name].batch)
    found = _logits(scaled, tiny[name].batch)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    before = {product.name: product.kind for product in find_products(graph)}
    assert {product.name: product.kind for product in find_products(scaled)} == before


def test_queries_are_scaled_in_a_model_whose_biases_are_all_equal_too(
    onnx_models: dict[str, Any], tiny: dict[str, _Tiny]
) -> None:
    """In a fresh model all biases are 0; the exporter stores one, behind ``Identity`` nodes."""
    graph = open_graph(onnx_models["single"].path)
    scaled = scale_queries(graph, find_products(graph))
    assert _operators(graph)["Div"] == 2
    assert _operators(scaled)["Div"] == 0
    expected = _logits(graph, tiny["bert"].batch)
    found = _logits(scaled, tiny["bert"].batch)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_only_the_scores_that_are_named_are_scaled(tiny: dict[str, _Tiny]) -> None:
    graph = tiny["bert"].graph
    assert to_bytes(scale_queries(graph, [])) == to_bytes(graph)
    first = [p for p in find_products(graph) if p.name.endswith("0.attention.self.scores")]
    assert len(first) == 1
    assert _operators(scale_queries(graph, first))["Div"] == 1


@pytest.mark.parametrize("kinds", [(), ("linear", "embedding")])
@pytest.mark.parametrize("name", MODELS)
def test_inputs_can_be_int32_while_the_session_takes_int64(
    tiny: dict[str, _Tiny], tmp_path: Path, name: str, kinds: tuple[str, ...]
) -> None:
    half = to_half(tiny[name].quantised(*kinds))
    narrow = with_input_type(half, "int32")
    write_graph(narrow, tmp_path / "narrow.onnx")
    types = {v.name: v.type.tensor_type.elem_type for v in _proto(narrow).graph.input}
    assert types == dict.fromkeys(tiny[name].batch, TensorProto.INT32)
    assert {array.dtype for array in tiny[name].batch.values()} == {np.dtype(np.int64)}
    assert np.array_equal(_logits(narrow, tiny[name].batch), _logits(half, tiny[name].batch))


def test_inputs_that_are_int64_already_stay_as_they_are(tiny: dict[str, _Tiny]) -> None:
    graph = tiny["bert"].graph
    assert to_bytes(with_input_type(graph, "int64")) == to_bytes(graph)


@pytest.mark.parametrize(
    ("number", "message"),
    [(65_536.0, "6.55e+04"), (-1e30, "1e+30"), (float("nan"), "nan"), (float("inf"), "inf")],
)
def test_a_weight_that_fp16_cannot_hold_is_an_error_that_names_it(
    tiny: dict[str, _Tiny], number: float, message: str
) -> None:
    blown = copy_of(tiny["bert"].graph)
    array = constant(blown, "bert.pooler.dense.bias").copy()
    array[3] = number
    set_constant(blown, "bert.pooler.dense.bias", array)
    with pytest.raises(ExportError) as caught:
        to_half(blown)
    assert "bert.pooler.dense.bias" in str(caught.value)
    assert message in str(caught.value)
    assert "cannot run in FP16" in str(caught.value)


def test_a_weight_at_the_end_of_fp16s_range_is_no_error(tiny: dict[str, _Tiny]) -> None:
    blown = copy_of(tiny["bert"].graph)
    array = constant(blown, "bert.pooler.dense.bias").copy()
    array[3] = -65_504.0
    set_constant(blown, "bert.pooler.dense.bias", array)
    assert constant(to_half(blown), "bert.pooler.dense.bias")[3] == -65_504


def test_an_int8_head_after_a_relu_is_computed_as_it_is_without_fusions(
    tiny: dict[str, _Tiny],
) -> None:
    """ONNX Runtime's fusion of ``Relu`` and Q overflowed; hence there is no ``Relu``."""
    model = tiny["distilbert"]
    head = [p for p in model.products("linear") if p.name in ("pre_classifier", "classifier")]
    assert len(head) == 2
    half = to_half(insert_qdq(model.graph, head, model.scales))
    assert _operators(model.graph)["Relu"] == 1
    assert (_operators(half)["Relu"], _operators(half)["Max"]) == (0, 1)
    expected = _unoptimised(half, model.batch)
    size = np.abs(expected).max()
    np.testing.assert_allclose(_logits(half, model.batch), expected, atol=1e-2 * size)
    single = _logits(insert_qdq(model.graph, head, model.scales), model.batch)
    np.testing.assert_allclose(expected, single, atol=2e-2 * size)


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_that_holds_the_types_of_its_tensors_becomes_fp16_too(
    tiny: dict[str, _Tiny], tmp_path: Path, name: str
) -> None:
    """Other exporters, and ONNX's own shape inference, write them into the file."""
    inferred = onnx.shape_inference.infer_shapes(_proto(tiny[name].graph))
    assert inferred.graph.value_info
    onnx.save(inferred, tmp_path / "typed.onnx")
    graph = open_graph(tmp_path / "typed.onnx")
    half = with_input_type(
        to_half(insert_qdq(graph, tiny[name].products("linear"), tiny[name].scales)), "int32"
    )
    write_graph(half, tmp_path / "half.onnx")
    expected = _logits(to_half(tiny[name].quantised("linear")), tiny[name].batch)
    np.testing.assert_array_equal(_logits(half, tiny[name].batch), expected)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(to_half, id="to_half"),
        pytest.param(lambda graph: with_input_type(graph, "int32"), id="with_input_type"),
        pytest.param(lambda graph: scale_queries(graph, find_products(graph)), id="scale_queries"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_that_is_given_does_not_change(
    tiny: dict[str, _Tiny], name: str, change: Callable[[ir.Model], ir.Model]
) -> None:
    before = to_bytes(tiny[name].graph)
    first = to_bytes(change(tiny[name].graph))
    assert to_bytes(tiny[name].graph) == before
    assert to_bytes(change(tiny[name].graph)) == first != before


@pytest.mark.parametrize("dtype", ["int64", "int32"])
@pytest.mark.parametrize("kinds", [*KINDS, ("linear", "embedding")])
@pytest.mark.parametrize("name", MODELS)
def test_tensorrts_parser_takes_it(
    tiny: dict[str, _Tiny], tmp_path: Path, name: str, kinds: tuple[str, ...], dtype: Any
) -> None:
    tensorrt_rtx = pytest.importorskip(
        "tensorrt_rtx",
        reason="tensorrt-rtx is not installed: the parser's acceptance is not checked",
    )
    scaled = scale_queries(tiny[name].graph, find_products(tiny[name].graph))
    products = [product for product in find_products(scaled) if product.kind in kinds]
    scales = dict.fromkeys((o.value for p in products for o in p.operands), 0.05)
    model = with_input_type(to_half(insert_qdq(scaled, products, scales)), dtype)
    write_graph(model, tmp_path / "model.onnx")
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    network = tensorrt_rtx.Builder(logger).create_network(0)
    parser = tensorrt_rtx.OnnxParser(network, logger)
    accepted = parser.parse_from_file(str(tmp_path / "model.onnx"))
    errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
    assert (accepted, errors) == (True, [])
    assert network.num_outputs == 1
    assert network.get_output(0).dtype == tensorrt_rtx.float32
    assert {network.get_input(i).dtype for i in range(network.num_inputs)} == {
        getattr(tensorrt_rtx, dtype)
    }
