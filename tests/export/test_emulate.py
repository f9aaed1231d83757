"""FP16 on a CPU: what is rounded, what overflows, and what an INT8 product stores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgebert_export.attention import merge_projections, scale_queries
from edgebert_export.calibrate import calibrate, largest_magnitudes
from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_tokenizer,
    save_checkpoint,
)
from edgebert_export.dataset import Dataset
from edgebert_export.emulate import emulate, open_emulated
from edgebert_export.fidelity import Judge
from edgebert_export.graph import (
    Product,
    constant,
    copy_of,
    find_products,
    open_graph,
    open_session,
    remove_unused_constants,
    set_constant,
    to_bytes,
)
from edgebert_export.precision import to_half
from edgebert_export.qdq import activation_scale, insert_qdq, quantise_weight
from edgebert_export.to_onnx import ExportConfig, OnnxModel, to_onnx
from edgebert_runtime.encoder import Encoded, TextEncoder
from edgebert_runtime.manifest import Task

LARGEST = float(np.finfo(np.float16).max)
Array = NDArray[np.float32]


def _half(values: NDArray[Any]) -> NDArray[Any]:
    """Rounds to FP16 and back: to the nearest, and to infinity beyond its range."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(values.dtype)


# ── One operator ──


def _table(table: Array, nodes: list[onnx.NodeProto], **weights: Array) -> ir.Model:
    """A graph that looks up rows ``x`` by ``input_ids: int64[batch, tokens]`` and gives ``y``."""
    rows = helper.make_node("Gather", ["table", "input_ids"], ["x"], name="/rows/Gather")
    made = helper.make_model(
        helper.make_graph(
            [rows, *nodes],
            "made",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", None])],
            [numpy_helper.from_array(w, n) for n, w in (("table", table), *weights.items())],
        ),
        ir_version=9,
        opset_imports=[helper.make_opsetid("", 20)],
    )
    inferred = onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
    return ir.from_proto(inferred)


def _every_row(model: ir.Model, rows: int) -> Array:
    """What an emulated graph makes of each row of its table."""
    session = open_session(model)
    result: Array = session.run({"input_ids": np.arange(rows, dtype=np.int64)[None]})["y"][0]
    session.close()
    return result


def test_what_is_beyond_fp16_becomes_infinite_and_stays_so() -> None:
    """A CPU would keep 80,000 where the graph says FP16, and the product would bring it back."""
    table = np.array([[40_000.0], [32_752.0], [-40_000.0], [1.0]], dtype=np.float32)
    nodes = [
        helper.make_node("Add", ["x", "x"], ["twice"], name="/twice/Add"),
        helper.make_node("Mul", ["twice", "small"], ["y"], name="/small/Mul"),
    ]
    half = to_half(_table(table, nodes, small=np.array([2.0**-10], dtype=np.float32)))
    plain = _every_row(half, 4)
    assert plain[:, 0].tolist() == [78.125, 63.96875, -78.125, 2.0**-9]
    assert _every_row(emulate(half), 4)[:, 0].tolist() == [np.inf, 63.96875, -np.inf, 2.0**-9]


@given(
    st.lists(
        st.tuples(*(st.floats(-LARGEST, LARGEST, width=16) for _ in range(3))),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=40)
def test_each_result_is_rounded_once_as_numpy_rounds_it(
    rows: list[tuple[float, float, float]],
) -> None:
    """Sums whose rounding shows: without it, taking away what was added would give it back."""
    table = np.array(rows, dtype=np.float32)
    added = np.array([1000.0, 0.125, -3000.0], dtype=np.float32)
    nodes = [
        helper.make_node("Add", ["x", "added"], ["more"], name="/more/Add"),
        helper.make_node("Sub", ["more", "added"], ["y"], name="/less/Sub"),
    ]
    expected = _half(_half(table + added) - added)
    found = _every_row(emulate(to_half(_table(table, nodes, added=added))), len(rows))
    np.testing.assert_array_equal(found, expected)


# ── One linear layer in INT8 ──


def _layer(table: Array, weight: Array) -> tuple[ir.Model, Product]:
    """A graph of one linear layer over a table's rows, and the layer."""
    model = _table(
        table, [helper.make_node("MatMul", ["x", "w"], ["y"], name="/layer/MatMul")], w=weight
    )
    (layer,) = [product for product in find_products(model) if product.kind == "linear"]
    return model, layer


def _by_channel(quantised: ir.Model) -> ir.Model:
    """The same numbers in the old form: a scale for each output, and nothing behind the product."""
    changed = copy_of(quantised)
    for node in list(changed.graph):
        if node.op_type != "Mul" or not str(node.inputs[1].name).endswith("_factors"):
            continue
        product, factors = node.inputs
        weight = str(factors.name).removesuffix("_factors")
        (dequantise,) = [n for n in changed.graph if n.name == f"{weight}_dequantised"]
        unit = constant(changed, f"{weight}_scale")
        set_constant(changed, f"{weight}_scale", unit * constant(changed, str(factors.name)))
        scales = changed.graph.initializers[f"{weight}_scale"]
        scales.shape = ir.Shape(constant(changed, f"{weight}_scale").shape)
        dequantise.attributes["axis"] = ir.AttrInt64("axis", 1)
        (result,) = node.outputs
        name = result.name
        result.name = f"{name}_scaled"
        result.replace_all_uses_with(product, replace_graph_outputs=True)
        changed.graph.remove(node, safe=True)
        product.name = name
    remove_unused_constants(changed)
    onnx.checker.check_model(to_bytes(changed), full_check=True)
    return changed


@given(st.integers(0, 10_000), st.integers(1, 200), st.integers(1, 9), st.floats(-6, 3))
@settings(max_examples=40)
def test_a_linear_layer_is_exact_but_for_two_roundings_to_fp16(
    seed: int, inputs: int, outputs: int, size: float
) -> None:
    """The 32-bit sum times the scale inside is stored, and so is that times its factor."""
    random = np.random.default_rng(seed)
    table = _half(random.normal(size=(4, inputs)).astype(np.float32))
    weight = random.normal(size=(inputs, outputs)) * np.exp(random.normal(size=outputs) + size)
    model, layer = _layer(table, weight.astype(np.float32))
    scale = activation_scale(float(np.abs(table).max()))
    found = _every_row(
        emulate(to_half(insert_qdq(model, [layer], {layer.operands[0].value: scale}))), 4
    )
    stored = quantise_weight(weight.astype(np.float32), 1)
    steps = np.clip(np.rint(table / np.float32(scale)), -128, 127).astype(np.int64)
    inside = (steps @ stored.steps.astype(np.int64)) * (scale * stored.unit)
    assume(np.abs(inside).max() < LARGEST)
    expected = _half(_half(inside) * stored.factors.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=2**-10, atol=2**-24)
    exact = inside * stored.factors
    np.testing.assert_allclose(found, exact, rtol=2**-9, atol=2**-23)


# ── A whole model ──


@dataclass(frozen=True)
class _Wide:
    """A model in which 32-bit sums of INT8 products are larger than FP16 can hold."""

    graph: ir.Model
    layers: list[Product]
    scales: dict[str, float]
    encoder: TextEncoder
    rows: list[Encoded]
    judge: Judge

    def quantised(self) -> ir.Model:
        return insert_qdq(self.graph, self.layers, self.scales)


@pytest.fixture(scope="module")
def wide(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    datasets: dict[str, Dataset],
) -> _Wide:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(2)
    task = tasks["single"]
    config = BertConfig(
        vocab_size=tiny_classifiers["single"].architecture.vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=128,
        initializer_range=0.1,
        id2label=dict(enumerate(task.labels)),
        label2id={label: index for index, label in enumerate(task.labels)},
    )
    root: Path = tmp_path_factory.mktemp("wide")
    model = BertForSequenceClassification(config).eval()
    checkpoint = save_checkpoint(model, load_tokenizer(tiny_classifiers["single"]), root / "model")
    exported = to_onnx(
        checkpoint, task, ExportConfig(max_length=64, fold_token_types=False), root / "fp32.onnx"
    )
    encoder = checkpoint_encoder(checkpoint, max_length=64, text_pair=False)
    graph = open_graph(exported.path)
    layers = [p for p in find_products(graph) if p.kind == "linear" and not p.head]
    rows = encoder.encode([example.text for example in datasets["single"].train[:24]])
    seen = calibrate(graph, [o for layer in layers for o in layer.operands], rows, encoder)
    scales = {name: activation_scale(found.histogram.largest) for name, found in seen.items()}
    examples = datasets["single"].validation[:16]
    judge = Judge(exported.path.read_bytes(), task, encoder, examples)
    return _Wide(graph, layers, scales, encoder, rows, judge)


def test_scales_by_output_inside_a_product_overflow_where_one_scale_does_not(wide: _Wide) -> None:
    """What INT8 engines did on a GPU: NaN for every text, though the graph is right in FP32."""
    new = wide.quantised()
    old = _by_channel(new)
    assert [n.op_type for n in old.graph].count("Mul") < [n.op_type for n in new.graph].count("Mul")
    # Both are the same numbers as long as nothing is stored in FP16.
    plain = [wide.judge.judge(model) for model in (new, old)]
    assert plain[0].divergence is not None
    assert plain[0].divergence == pytest.approx(plain[1].divergence, rel=0.05)
    stored = [wide.judge.judge(emulate(to_half(model))) for model in (new, old)]
    assert stored[1].divergence is None
    assert stored[0].divergence is not None
    assert stored[0].flips == 0
    assert stored[0].divergence < 0.01


def test_what_the_old_form_overflows_by_is_the_bare_sum(wide: _Wide) -> None:
    emulated = emulate(to_half(_by_channel(wide.quantised())))
    sums = [str(v.name) for n in emulated.graph for v in n.outputs if str(v.name).endswith("_sum")]
    assert len(sums) == len(wide.layers)
    largest = largest_magnitudes(emulated, sums[:1], wide.rows, wide.encoder)
    assert LARGEST < largest[sums[0]] < 2**24


@pytest.mark.parametrize("int8", [False, True])
def test_every_result_that_is_typed_fp16_lies_on_its_grid(wide: _Wide, int8: bool) -> None:
    """Nothing that is read was left unrounded, and rounding it is all that was done to it."""
    half = to_half(wide.quantised() if int8 else wide.graph)
    emulated = emulate(half)
    named = {v.name: v for node in emulated.graph for v in node.outputs}
    rounded = [str(name).removesuffix("_read") for name in named if str(name).endswith("_read")]
    computed = {n.op_type for n in half.graph} & {"Add", "Gelu", "LayerNormalization", "MatMul"}
    assert len(computed) == 4
    for node in half.graph:
        if node.op_type in {"Add", "Gelu", "LayerNormalization"}:
            assert node.outputs[0].name in rounded or node.outputs[0].dtype != ir.DataType.FLOAT16
    batch = wide.encoder.collate(wide.rows[:6])
    session = open_emulated(half)
    logits = session.run(batch)["logits"]
    session.close()
    np.testing.assert_array_equal(logits, _half(logits))
    watched = copy_of(emulated)
    values = {v.name: v for node in watched.graph for v in node.outputs}
    for name in rounded:
        watched.graph.outputs.extend([values[name], values[f"{name}_read"]])
    session = open_session(watched)
    results = session.run(batch)
    session.close()
    changed = 0
    for name in rounded:
        np.testing.assert_array_equal(results[f"{name}_read"], _half(results[name]))
        changed += not np.array_equal(results[f"{name}_read"], results[name])
    assert changed > len(rounded) / 2
    # That they were watched changes nothing: they are rounded when nobody looks, too.
    np.testing.assert_array_equal(results["logits"], logits)


def _everything(half: ir.Model, batch: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
    """Every value of a typed graph as the emulated one has it, by its name."""
    watched = emulate(half)
    values = {str(v.name): v for node in watched.graph for v in node.outputs if v.dtype is not None}
    names = {
        name: f"{name}_read" if f"{name}_read" in values else name
        for name in (str(v.name) for node in half.graph for v in node.outputs)
    }
    names = {name: there for name, there in names.items() if there in values}
    outputs = {value.name for value in watched.graph.outputs}
    watched.graph.outputs.extend(values[there] for there in names.values() if there not in outputs)
    session = open_session(watched)
    found = session.run(batch)
    session.close()
    return {**{name: found[there] for name, there in names.items()}, **batch}


@pytest.mark.parametrize("name", ["single", "multi", "pairs"])
def test_each_operator_gives_what_onnxs_own_reference_does_rounded_once(
    onnx_models: dict[str, OnnxModel],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
    name: str,
) -> None:
    """Computed by NumPy in FP32, of what was stored before, so that errors do not add up."""
    text_pair = tasks[name].text_pair
    encoder = checkpoint_encoder(tiny_classifiers[name], max_length=64, text_pair=text_pair)
    graph = open_graph(onnx_models[name].path)
    half = to_half(merge_projections(scale_queries(graph, find_products(graph))))
    model = onnx.ModelProto.FromString(to_bytes(half))
    held: dict[str, Any] = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    held |= _everything(half, encoder.collate(encoder.encode(texts_for[name][:6])))
    compared: list[str] = []
    for node in model.graph.node:
        if not set(node.input) <= set(held) or not set(node.output) <= set(held):
            continue
        inputs = {key: np.asarray(held[key]) for key in node.input if key}
        inputs = {
            key: array.astype(np.float32) if array.dtype == np.float16 else array
            for key, array in inputs.items()
        }
        alone = helper.make_graph(
            [node],
            "alone",
            [helper.make_empty_tensor_value_info(key) for key in inputs],
            [helper.make_empty_tensor_value_info(key) for key in node.output],
        )
        evaluator = ReferenceEvaluator(helper.make_model(alone, opset_imports=model.opset_import))
        results = evaluator.run(None, inputs)
        assert isinstance(results, list)
        result, stored = results[0], held[node.output[0]]
        types = {value.name: value.dtype for n in half.graph for value in n.outputs}
        if types[node.output[0]] == ir.DataType.FLOAT16:
            result = _half(np.asarray(result, dtype=np.float32))
            np.testing.assert_array_equal(stored, _half(stored), err_msg=node.name)
        np.testing.assert_allclose(stored, result, rtol=2**-10, atol=1e-4, err_msg=node.name)
        compared.append(node.op_type)
    # Four linear layers and two products of attention in each of two layers, and the head's two.
    assert compared.count("MatMul") == 2 * (4 + 2) + 2
    assert {"Add", "LayerNormalization", "Gelu", "Tanh", "Softmax", "Gather"} <= set(compared)
    assert len(compared) > 0.9 * len(model.graph.node)
