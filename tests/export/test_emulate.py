"""FP16 stores on a CPU: what is rounded, what overflows, and that INT8's old form does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgebert_export.attention import merge_projections, scale_queries
from edgebert_export.calibrate import calibrate
from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_tokenizer,
    save_checkpoint,
)
from edgebert_export.dataset import Dataset
from edgebert_export.emulate import emulate, open_emulated
from edgebert_export.fidelity import Budget, Judge
from edgebert_export.graph import (
    add_constant,
    constant,
    copy_of,
    find_products,
    open_graph,
    open_session,
    remove_unused_constants,
    to_bytes,
)
from edgebert_export.precision import to_half
from edgebert_export.qdq import activation_scale, insert_qdq, quantise_weight
from edgebert_export.to_onnx import ExportConfig, OnnxModel, to_onnx
from edgebert_runtime.manifest import Task

NAMES = ["single", "multi", "pairs"]
HALF_LARGEST = 65_504
OVERFLOW = 65_520
"""From here on a number is rounded to infinity."""
Inputs = dict[str, NDArray[np.int64]]


def _typed(nodes: list[onnx.NodeProto], weights: dict[str, NDArray[Any]], width: int) -> ir.Model:
    """A graph of ``x: int64[rows, width]``, cast to FP16 as ``h``, with ``y`` cast to FP32."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["h"], name="in", to=TensorProto.FLOAT16),
            *nodes,
            helper.make_node("Cast", ["y"], ["out"], name="out", to=TensorProto.FLOAT),
        ],
        "typed",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["rows", width])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["rows", None])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    made = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    onnx.checker.check_model(made, full_check=True)
    return ir.from_proto(made)


def _outputs(model: ir.Model, x: NDArray[np.int64]) -> NDArray[np.float32]:
    return open_session(model).run({"x": x})["out"]


def _watched(model: ir.Model, batch: Inputs) -> dict[str, NDArray[np.float32]]:
    """Every value that is stored, by the name that it has in the typed graph."""
    watched = emulate(model)
    values = {str(v.name): v for node in watched.graph for v in node.outputs}
    names = [name for name in values if name.endswith("_read")]
    watched.graph.outputs.extend(values[name] for name in names)
    found = open_session(watched).run(batch)
    return {name.removesuffix("_read"): found[name] for name in names}


def _half(array: Any) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(np.float16).astype(np.float32)


def _is_half(array: NDArray[np.float32]) -> bool:
    return np.array_equal(_half(array), array, equal_nan=True)


def test_what_is_too_large_for_fp16_becomes_infinite_though_it_comes_back_into_range() -> None:
    """Were the casts taken out, as ONNX Runtime does with its own, this would be ``x`` again."""
    weights = {"large": np.array(512, dtype=np.float16), "small": np.array(2**-9, dtype=np.float16)}
    nodes = [
        helper.make_node("Mul", ["h", "large"], ["z"], name="up"),
        helper.make_node("Mul", ["z", "small"], ["y"], name="down"),
    ]
    x = np.array([[0, 100, 127, 128, -128, 2000]])
    model = _typed(nodes, weights, 6)
    assert _outputs(emulate(model), x).tolist() == [[0, 100, 127, np.inf, -np.inf, np.inf]]
    # As it is typed, ONNX Runtime computes it in FP32: hence all of this.
    assert np.isfinite(open_session(model).run({"x": x})["out"]).all()


def test_what_is_added_to_a_large_number_is_rounded_away_as_fp16_does() -> None:
    weights = {"much": np.array(2048, dtype=np.float16)}
    nodes = [
        helper.make_node("Add", ["h", "much"], ["z"], name="add"),
        helper.make_node("Sub", ["z", "much"], ["y"], name="subtract"),
    ]
    x = np.arange(8)[None]
    expected = _half(_half(x + 2048.0) - 2048)
    assert expected.tolist() == [[0, 0, 2, 4, 4, 4, 6, 8]]
    np.testing.assert_array_equal(_outputs(emulate(_typed(nodes, weights, 8)), x), expected)


def test_a_whole_model_keeps_its_roundings_where_nobody_watches(
    halves: dict[str, ir.Model], batches: dict[str, Inputs]
) -> None:
    """Its outputs are those of a session all of whose stored values are watched."""
    model, batch = halves["single"], batches["single"]
    bare = open_emulated(model).run(batch)["logits"]
    np.testing.assert_array_equal(bare, _watched(model, batch)["logits_fp16"])
    assert _is_half(bare)
    assert not _is_half(open_session(to_bytes(model)).run(batch)["logits"])


def test_each_stored_result_is_what_numpy_stores(halves: dict[str, ir.Model]) -> None:
    random = np.random.default_rng(0)
    weight, bias = (random.normal(size=s).astype(np.float16) for s in ((24, 18), 18))
    nodes = [
        helper.make_node("MatMul", ["h", "weight"], ["product"], name="product"),
        helper.make_node("Add", ["product", "bias"], ["sum"], name="sum"),
        helper.make_node("Mul", ["sum", "sum"], ["square"], name="square"),
        helper.make_node("Reshape", ["square", "shape"], ["y"], name="moved"),
    ]
    shape = np.array([-1, 9], dtype=np.int64)
    model = _typed(nodes, {"weight": weight, "bias": bias, "shape": shape}, 24)
    before = to_bytes(model)
    x = random.integers(-300, 300, size=(40, 24))
    found = _watched(model, {"x": x})
    assert set(found) == {"h", "product", "sum", "square"}  # what only moves is not rounded again
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    # Sums are added up in FP32, so a number between two of FP16's may go either way.
    np.testing.assert_allclose(found["product"], exact, rtol=2**-11 * 1.01, atol=1e-3)
    sums = _half(found["product"] + bias.astype(np.float32))
    np.testing.assert_array_equal(found["sum"], sums)
    squares = _half(sums * sums)
    np.testing.assert_array_equal(found["square"], squares)
    assert 0 < np.isinf(squares).sum() < squares.size
    for values in found.values():
        assert _is_half(values)
    assert to_bytes(model) == before


@pytest.fixture(scope="module")
def halves(onnx_models: dict[str, OnnxModel]) -> dict[str, ir.Model]:
    """FP16 models for TensorRT; treat them as read-only."""
    found = {}
    for name, model in onnx_models.items():
        graph = open_graph(model.path)
        found[name] = to_half(merge_projections(scale_queries(graph, find_products(graph))))
    return found


@pytest.fixture(scope="module")
def batches(
    tiny_classifiers: dict[str, Checkpoint], tasks: dict[str, Task], texts_for: dict[str, list[Any]]
) -> dict[str, Inputs]:
    found = {}
    for name, checkpoint in tiny_classifiers.items():
        encoder = checkpoint_encoder(checkpoint, max_length=64, text_pair=tasks[name].text_pair)
        found[name] = encoder.collate(encoder.encode(texts_for[name][:6]))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_stored_result_of_a_model_is_a_number_of_fp16(
    halves: dict[str, ir.Model], batches: dict[str, Inputs], name: str
) -> None:
    before = to_bytes(halves[name])
    found = _watched(halves[name], batches[name])
    assert to_bytes(halves[name]) == before
    assert len(found) > 40
    for values in found.values():
        assert values.dtype == np.float32
        assert _is_half(values)
    computed = {node.outputs[0].name: node.op_type for node in halves[name].graph}
    assert {"MatMul", "Add", "LayerNormalization", "Gelu", "Tanh"} <= {
        computed[value] for value in found
    }


def _everything(model: ir.Model, batch: Inputs) -> dict[str, NDArray[Any]]:
    """Every value of a typed graph as the emulated one has it, by name."""
    watched = emulate(model)
    values = {str(v.name): v for node in watched.graph for v in node.outputs if v.dtype is not None}
    names = {
        name: f"{name}_read" if f"{name}_read" in values else name
        for name in (str(v.name) for node in model.graph for v in node.outputs)
    }
    names = {name: there for name, there in names.items() if there in values}
    outputs = {value.name for value in watched.graph.outputs}
    watched.graph.outputs.extend(values[there] for there in names.values() if there not in outputs)
    found = open_session(watched).run(batch)
    return {**{name: found[there] for name, there in names.items()}, **batch}


@pytest.mark.parametrize("name", NAMES)
def test_each_operator_gives_what_onnxs_own_reference_does_rounded_once(
    halves: dict[str, ir.Model], batches: dict[str, Inputs], name: str
) -> None:
    """Computed by NumPy in FP32, of what was stored before; so errors do not add up."""
    model = onnx.ModelProto.FromString(to_bytes(halves[name]))
    held: dict[str, Any] = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    held |= _everything(halves[name], batches[name])
    compared: list[str] = []
    for node in model.graph.node:
        if not set(node.input) <= set(held) or not set(node.output) <= set(held):
            continue
        inputs = {key: np.asarray(held[key]) for key in node.input if key}
        for key, array in inputs.items():
            if array.dtype == np.float16:
                inputs[key] = array.astype(np.float32)
        alone = helper.make_graph(
            [node],
            "alone",
            [helper.make_empty_tensor_value_info(key) for key in inputs],
            [helper.make_empty_tensor_value_info(key) for key in node.output],
        )
        evaluator = ReferenceEvaluator(helper.make_model(alone, opset_imports=model.opset_import))
        results = evaluator.run(None, inputs)
        assert isinstance(results, list)
        (result,) = results
        stored = held[node.output[0]]
        if stored.dtype == np.float32 and _is_half(stored):
            result = _half(result)
        np.testing.assert_allclose(stored, result, rtol=2**-10, atol=1e-4, err_msg=node.name)
        compared.append(node.op_type)
    assert compared.count("MatMul") == 2 * 4 + 2 * 2 - 2 + 2 - 2 + 2  # TODO
    assert {"Add", "LayerNormalization", "Gelu", "Tanh", "Softmax", "Gather"} <= set(compared)
    assert len(compared) > 0.9 * len(model.graph.node)


# ── INT8 ──


def _old_form(model: ir.Model) -> ir.Model:
    """Dequantises each weight with a scale for each output, and multiplies nothing behind it.

    The numbers are the same, and so is what FP32 makes of them. TensorRT for RTX 1.7 stores the
    bare sums of such a product as FP16 (docs/decisions/0013); so models were made once.
    """
    old = copy_of(model)
    for multiply in list(old.graph):
        factors = multiply.inputs[1] if multiply.op_type == "Mul" else None
        if factors is None or not str(factors.name).endswith("_factors"):
            continue
        result = multiply.inputs[0]
        assert result is not None
        product = result.producer()
        assert product is not None and product.inputs[1] is not None
        dequantise = product.inputs[1].producer()
        assert dequantise is not None and dequantise.inputs[1] is not None
        unit = str(dequantise.inputs[1].name)
        scales = constant(old, unit) * constant(old, str(factors.name))
        dequantise.replace_input_with(1, add_constant(old, f"{unit}s", scales))
        dequantise.attributes["axis"] = ir.AttrInt64("axis", 1)
        multiply.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
        old.graph.remove(multiply, safe=True)
    remove_unused_constants(old)
    return old


@dataclass(frozen=True)
class _Wide:
    """A model wide enough for its sums of 8-bit products to leave FP16, in INT8."""

    plain: ir.Model
    quantised: ir.Model
    judge: Judge


@pytest.fixture(scope="module")
def wide(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    datasets: dict[str, Dataset],
) -> _Wide:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    source, task = tiny_classifiers["single"], tasks["single"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=source.architecture.vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=128,
        initializer_range=0.05,
        id2label=dict(enumerate(task.labels)),
        label2id={label: index for index, label in enumerate(task.labels)},
    )
    root = tmp_path_factory.mktemp("wide")
    model = BertForSequenceClassification(config).eval()
    checkpoint = save_checkpoint(model, load_tokenizer(source), root / "model")
    exported = to_onnx(checkpoint, task, ExportConfig(max_length=64), root / "fp32.onnx")
    encoder = checkpoint_encoder(checkpoint, max_length=64, text_pair=False)
    graph = open_graph(exported.path)
    plain = merge_projections(scale_queries(graph, find_products(graph)))
    chosen = [p for p in find_products(plain) if p.kind == "linear" and not p.head]
    rows = encoder.encode([example.text for example in datasets["single"].train])
    seen = calibrate(plain, [o for p in chosen for o in p.operands], rows, encoder)
    scales = {name: activation_scale(found.histogram.largest) for name, found in seen.items()}
    judge = Judge(exported.path.read_bytes(), task, encoder, datasets["single"].validation)
    return _Wide(plain, insert_qdq(plain, chosen, scales), judge)


def test_the_old_form_of_int8_is_not_finite_and_the_new_one_answers_as_fp32_does(
    wide: _Wide,
) -> None:
    new, old = to_half(wide.quantised), to_half(_old_form(wide.quantised))
    assert len([n for n in old.graph if n.op_type == "Mul"]) < len(
        [n for n in new.graph if n.op_type == "Mul"]
    )
    refused = wide.judge.judge(emulate(old))
    assert refused.divergence is None
    assert not refused.fits(Budget(max_accuracy_drop=1, max_flip_rate=1))
    found, half = wide.judge.judge(emulate(new)), wide.judge.judge(emulate(to_half(wide.plain)))
    assert found.divergence is not None and half.divergence is not None
    assert half.divergence < found.divergence < 1e-2
    assert found.flips <= 2


def test_both_forms_are_the_same_to_a_session_that_stores_nothing_in_fp16(wide: _Wide) -> None:
    """So that the one's failure is that of the stores, and of nothing else."""
    forms = (wide.quantised, _old_form(wide.quantised))
    found = [wide.judge.judge(form) for form in forms]
    assert found[0].flips == found[1].flips
    assert found[0].divergence == pytest.approx(found[1].divergence, rel=0.05)
    typed = [wide.judge.judge(to_bytes(to_half(form))) for form in forms]
    assert None not in [fidelity.divergence for fidelity in typed]


def _layer(weight: NDArray[np.float32], scale: float) -> tuple[ir.Model, ir.Model]:
    """A linear layer that reads ``x``, quantised and typed FP16: the new form and the old one."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["h"], name="in", to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["h", "w"], ["out"], name="/layer/MatMul"),
        ],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["rows", len(weight)])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["rows", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    quantised = insert_qdq(model, find_products(model), {"h": scale})
    return to_half(quantised), to_half(_old_form(quantised))


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 300),
    st.integers(1, 20),
    st.floats(-8, 5),
    st.floats(0, 6),
    st.floats(-5, 3),
)
def test_a_linear_layer_in_int8_is_exact_but_for_two_roundings_while_it_is_in_range(
    seed: int, inputs: int, outputs: int, size: float, spread: float, step: float
) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=(inputs, outputs)) * 2.0**size
    weight *= 2.0 ** -(spread * random.random(outputs))
    scale = float(np.float16(2.0**step))
    x = random.integers(-120, 121, size=(4, inputs)) * max(1, round(scale))
    weight = weight.astype(np.float32)
    new, old = _layer(weight, scale)
    rounded = quantise_weight(weight, 1)
    whole = np.clip(np.rint(x.astype(np.float32) / np.float32(scale)), -128, 127).astype(np.int64)
    sums = whole @ rounded.steps.astype(np.int64)
    stored = sums * rounded.unit * scale
    exact = stored * rounded.factors.astype(np.float64)
    found = _outputs(emulate(new), x)
    inside = np.abs(stored) < HALF_LARGEST
    assert np.isinf(found[np.abs(stored) > OVERFLOW * 1.0001]).all()
    allowed = 2 * 2.0**-11 * 1.001 * np.abs(exact) + 2 * 2.0**-25
    assert (np.abs(found - exact)[inside] <= allowed[inside]).all()
    # The old form stores the bare sums, whatever their scale.
    before = _outputs(emulate(old), x)
    np.testing.assert_array_equal(np.isinf(before), (np.abs(sums) >= OVERFLOW) | np.isinf(before))
    assert np.isfinite(
        before[(np.abs(sums) <= HALF_LARGEST) & (np.abs(exact) < HALF_LARGEST)]
    ).all()
