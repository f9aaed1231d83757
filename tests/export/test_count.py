"""What is counted in a graph is what a BERT costs by hand, in each of the kinds of graph."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgebert_export.attention import scale_queries
from edgebert_export.checkpoint import Checkpoint
from edgebert_export.count import Precision, Work, count
from edgebert_export.errors import ModelError
from edgebert_export.graph import find_products, open_graph, to_bytes
from edgebert_export.precision import to_half, with_input_type
from edgebert_export.qdq import insert_qdq
from edgebert_export.quantise_cpu import with_fusions
from edgebert_export.rewrite import fold_token_types, keep_first_token
from edgebert_export.to_onnx import OnnxModel

LAYERS, HIDDEN, INNER, LABELS = 2, 32, 64, 2  # of the tiny BERT, see conftest.py
SHAPES = [(1, 1), (1, 32), (5, 1), (3, 17), (8, 64)]
SIZES = {"fp32": 4, "fp16": 2}


@pytest.fixture(scope="module")
def graph(onnx_models: dict[str, OnnxModel]) -> ir.Model:
    """The FP32 graph as it was exported: BERT's three inputs, all tokens in all layers."""
    return open_graph(onnx_models["single"].path)


def _linear_macs(batch: int, tokens: int, *, first: bool = False) -> int:
    """Of a BERT; ``first``: the last layer computes the first token, of all keys and values."""
    total = 0
    for layer in range(LAYERS):
        rows = 1 if first and layer == LAYERS - 1 else tokens
        total += 2 * HIDDEN * HIDDEN * tokens  # keys, values
        total += 2 * HIDDEN * HIDDEN * rows  # queries, and behind the attention
        total += 2 * HIDDEN * INNER * rows
    return batch * (total + HIDDEN * HIDDEN + HIDDEN * LABELS)  # the pooler, the classifier


def _attention_macs(batch: int, tokens: int, *, first: bool = False) -> int:
    rows = [tokens] * LAYERS
    if first:
        rows[-1] = 1
    return batch * sum(2 * row * tokens * HIDDEN for row in rows)  # scores, and their values


def _matrices() -> int:
    """Numbers in the weights of the linear layers."""
    layer = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER
    return LAYERS * layer + HIDDEN * HIDDEN + HIDDEN * LABELS


def _outputs() -> int:
    """Outputs of all linear layers; their biases, and the channels of their weights."""
    return LAYERS * (4 * HIDDEN + INNER + HIDDEN) + HIDDEN + LABELS


def _vectors() -> int:
    """Numbers in the biases and the LayerNorms, one of them behind the embeddings."""
    return _outputs() + (2 * LAYERS + 1) * 2 * HIDDEN


def _by_kind(work: Work) -> dict[tuple[str, Precision], int]:
    found: dict[tuple[str, Precision], int] = {}
    for product in work.products:
        key = (product.kind, product.precision)
        found[key] = found.get(key, 0) + product.macs
    return found


@pytest.mark.parametrize(("batch", "tokens"), SHAPES)
def test_a_bert_costs_what_its_formula_says(graph: ir.Model, batch: int, tokens: int) -> None:
    work = count(graph, batch, tokens)
    assert _by_kind(work) == {
        ("linear", "fp32"): _linear_macs(batch, tokens),
        ("attention", "fp32"): _attention_macs(batch, tokens),
    }
    assert len(work.products) == LAYERS * 8 + 2
    assert work.weight_bytes == 4 * (_matrices() + _vectors())
    looked_up = batch * tokens + tokens + min(batch * tokens, 2)  # words, positions, two types
    assert work.embedding_bytes == 4 * HIDDEN * looked_up
    assert work.activation_bytes == 3 * 8 * batch * tokens + 4 * batch * LABELS
    assert work.total_bytes == work.weight_bytes + work.embedding_bytes + work.activation_bytes


def test_an_exporters_own_graph_is_counted_alike_and_what_it_shares_once(
    graph: ir.Model, onnx_models: dict[str, OnnxModel]
) -> None:
    mended, exported = count(graph, 3, 17), count(ir.load(onnx_models["single"].path), 3, 17)
    assert _by_kind(exported) == _by_kind(mended)
    assert exported.embedding_bytes == mended.embedding_bytes
    assert exported.weight_bytes < mended.weight_bytes  # LayerNorms that are equal, untrained


def test_no_more_rows_are_read_than_a_table_has(
    graph: ir.Model, tiny_classifiers: dict[str, Checkpoint]
) -> None:
    rows = tiny_classifiers["single"].architecture.vocab_size
    work = count(graph, rows, 64)
    assert work.embedding_bytes == 4 * HIDDEN * (rows + 64 + 2)


@pytest.mark.parametrize(("batch", "tokens"), SHAPES)
def test_a_last_layer_of_the_first_token_is_counted_as_such(
    graph: ir.Model, batch: int, tokens: int
) -> None:
    whole = count(graph, batch, tokens)
    work = count(fold_token_types(keep_first_token(graph)), batch, tokens)
    assert _by_kind(work) == {
        ("linear", "fp32"): _linear_macs(batch, tokens, first=True),
        ("attention", "fp32"): _attention_macs(batch, tokens, first=True),
    }
    assert work.weight_bytes == whole.weight_bytes
    assert work.embedding_bytes == 4 * HIDDEN * (batch * tokens + tokens)
    assert work.activation_bytes == 2 * 8 * batch * tokens + 4 * batch * LABELS


def test_fp16_halves_the_bytes_and_changes_no_operation(graph: ir.Model) -> None:
    single = count(graph, 3, 17)
    half = count(with_input_type(to_half(graph), "int32"), 3, 17)
    assert half.macs == {"fp16": single.macs["fp32"]}
    assert half.weight_bytes * 2 == single.weight_bytes
    assert half.embedding_bytes * 2 == single.embedding_bytes
    assert half.activation_bytes == 3 * 4 * 3 * 17 + 4 * 3 * LABELS  # outputs leave as FP32


def _with_qdq(graph: ir.Model, kinds: set[str], *, half: bool) -> ir.Model:
    products = [product for product in find_products(graph) if product.kind in kinds]
    scales = {operand.value: 0.1 for product in products for operand in product.operands}
    quantised = insert_qdq(graph, products, scales)
    return to_half(quantised) if half else quantised


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 17)])
def test_products_between_q_and_dq_are_int8_and_no_others(
    graph: ir.Model, precision: Precision, batch: int, tokens: int
) -> None:
    model = _with_qdq(keep_first_token(graph), {"linear"}, half=precision == "fp16")
    work = count(model, batch, tokens)
    assert _by_kind(work) == {
        ("linear", "int8"): _linear_macs(batch, tokens, first=True),
        ("attention", precision): _attention_macs(batch, tokens, first=True),
    }
    # A byte for each weight; biases, LayerNorms, and a scale for each output are not quantised.
    rest = SIZES[precision] * (_vectors() + _outputs())
    assert work.weight_bytes == _matrices() + rest


def test_quantised_attention_and_tables_are_counted_in_int8(graph: ir.Model) -> None:
    model = _with_qdq(graph, {"linear", "attention", "embedding"}, half=True)
    work = count(model, 3, 17)
    assert _by_kind(work) == {
        ("linear", "int8"): _linear_macs(3, 17),
        ("attention", "int8"): _attention_macs(3, 17),
    }
    assert work.embedding_bytes == (3 * 17 + 17 + 2) * (HIDDEN + 2)  # a row, and its scale in FP16
    assert work.weight_bytes == _matrices() + 2 * (_vectors() + _outputs())


def test_a_quantised_weight_alone_makes_no_int8_product(graph: ir.Model) -> None:
    model = _with_qdq(graph, {"linear"}, half=True)
    for node in list(model.graph):  # products read what was to be quantised as it is
        if node.op_type == "QuantizeLinear":
            (dequantise,) = node.outputs[0].consumers()
            source = node.inputs[0]
            assert source is not None
            dequantise.outputs[0].replace_all_uses_with(source)
    assert count(model, 3, 17).macs == {"fp16": _linear_macs(3, 17) + _attention_macs(3, 17)}


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 17)])
def test_onnx_runtimes_dynamic_int8_is_counted(
    graph: ir.Model, tmp_path: Path, batch: int, tokens: int
) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    products = [product for product in find_products(graph) if product.kind != "attention"]
    (tmp_path / "fp32.onnx").write_bytes(to_bytes(graph))
    quantize_dynamic(  # as quantise_cpu does
        tmp_path / "fp32.onnx",
        tmp_path / "int8.onnx",
        op_types_to_quantize=["MatMul", "Gather"],
        nodes_to_quantize=[product.node for product in products],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
    work = count(ir.load(tmp_path / "int8.onnx"), batch, tokens)
    assert _by_kind(work) == {
        ("linear", "int8"): _linear_macs(batch, tokens),
        ("attention", "fp32"): _attention_macs(batch, tokens),
    }
    # Scales and zero points, one for each output.
    assert work.weight_bytes == _matrices() + 4 * _vectors() + 5 * _outputs()
    assert work.embedding_bytes == HIDDEN * (batch * tokens + tokens + min(batch * tokens, 2))

    (tmp_path / "fused.onnx").write_bytes(with_fusions((tmp_path / "int8.onnx").read_bytes()))
    fused = count(ir.load(tmp_path / "fused.onnx"), batch, tokens)
    assert _by_kind(fused) == _by_kind(work)
    assert fused.embedding_bytes == work.embedding_bytes


def test_more_texts_and_more_tokens_are_more_work_but_no_more_weights(graph: ir.Model) -> None:
    one, texts, tokens = count(graph, 1, 16), count(graph, 4, 16), count(graph, 1, 64)
    assert texts.macs["fp32"] == 4 * one.macs["fp32"]
    assert tokens.macs["fp32"] > 4 * one.macs["fp32"] - one.macs["fp32"]  # but for the pooler
    assert _attention_macs(1, 64) == 16 * _attention_macs(1, 16)
    assert one.weight_bytes == texts.weight_bytes == tokens.weight_bytes
    assert one.total_bytes < texts.total_bytes


def test_counting_leaves_the_graph_as_it_was(graph: ir.Model) -> None:
    model = scale_queries(graph, find_products(graph))
    before = hashlib.sha256(to_bytes(model)).hexdigest()
    count(model, 2, 9)
    assert hashlib.sha256(to_bytes(model)).hexdigest() == before


def _model(nodes: list[onnx.NodeProto], rank: int = 2) -> ir.Model:
    """A graph of ``x: float32[rows, 4]``, with a weight ``w: float32[4, 4]``."""
    shape = ["rows", 4, 1][:rank]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "made",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
            [onnx.numpy_helper.from_array(np.ones((4, 4), dtype=np.float32), "w")],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("other", 1)],
    )
    return ir.from_proto(made)


def test_a_shared_weight_is_a_weight_and_read_once() -> None:
    nodes = [
        onnx.helper.make_node("Identity", ["w"], ["same"]),
        onnx.helper.make_node("MatMul", ["x", "same"], ["z"]),
        onnx.helper.make_node("MatMul", ["z", "w"], ["y"]),
    ]
    work = count(_model(nodes), 3, 4)
    assert [(product.kind, product.macs) for product in work.products] == [("linear", 48)] * 2
    assert (work.weight_bytes, work.activation_bytes) == (64, 2 * 48)


def test_a_transposed_gemm_is_counted() -> None:
    nodes = [onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transA=1, transB=1)]
    (product,) = count(_model(nodes), 4, 6).products
    assert (product.kind, product.macs) == ("linear", 6 * 4 * 4)


@pytest.mark.parametrize(
    "node",
    [
        onnx.helper.make_node("Einsum", ["x", "w"], ["y"], equation="ij,jk->ik"),
        onnx.helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="other"),
        onnx.helper.make_node("QAttention", ["x", "w"], ["y"], domain="other"),
    ],
    ids=lambda node: node.op_type,
)
def test_products_that_are_not_known_are_refused_and_not_left_out(node: onnx.NodeProto) -> None:
    with pytest.raises(ModelError, match=f"holds {node.op_type}"):
        count(_model([node]), 3, 4)


def test_a_shape_that_depends_on_values_is_refused() -> None:
    nodes = [
        onnx.helper.make_node("NonZero", ["x"], ["places"]),
        onnx.helper.make_node("Cast", ["places"], ["numbers"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("MatMul", ["w", "numbers"], ["y"]),
    ]
    with pytest.raises(ModelError, match="cannot be inferred"):
        count(_model(nodes), 3, 4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    with pytest.raises(ModelError, match="cannot be inferred"):
        count(_model(nodes), 3, 5)
    with pytest.raises(ModelError, match=r"\[batch, seq\]"):
        count(_model(nodes, rank=3), 3, 4)


def test_what_is_hidden_in_a_branch_is_refused() -> None:
    result = onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, None)
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["r"])], "branch", [], [result]
    )
    nodes = [
        onnx.helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        onnx.helper.make_node("Cast", ["top"], ["choice"], to=onnx.TensorProto.BOOL),
        onnx.helper.make_node("If", ["choice"], ["y"], then_branch=branch, else_branch=branch),
    ]
    with pytest.raises(ModelError, match="functions or branches"):
        count(_model(nodes), 3, 4)


def test_no_other_file_is_read(graph: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(graph, path, external_data="weights.bin", size_threshold_bytes=1024)
    (tmp_path / "weights.bin").unlink()
    only_weights = ir.load(path)  # they are counted by their shapes
    assert count(only_weights, 2, 9) == count(graph, 2, 9)
    ir.save(graph, path, external_data="weights.bin", size_threshold_bytes=0)
    with pytest.raises(ModelError, match="lies in another file"):
        count(ir.load(path), 2, 9)
