"""Attention written as TensorRT fuses it: the same numbers from one product, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgebert_export.attention import find_attentions, merge_projections, scale_queries
from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder, load_tokenizer
from edgebert_export.checkpoint import save_checkpoint as save
from edgebert_export.graph import (
    Product,
    constant,
    find_products,
    open_graph,
    open_session,
    to_bytes,
    write_graph,
)
from edgebert_export.to_onnx import ExportConfig, to_onnx
from edgebert_runtime.encoder import TextEncoder
from edgebert_runtime.manifest import Task

MODELS = ["bert", "bert-first", "distilbert", "distilbert-first"]
"""Whole, and with a last layer that computes the first token alone."""
PREFIX = {
    "bert": "bert.encoder.layer.{}.attention.self",
    "distilbert": "distilbert.transformer.layer.{}.attention",
}
PARTS = {"bert": ("query", "key", "value"), "distilbert": ("q_lin", "k_lin", "v_lin")}
Inputs = dict[str, NDArray[np.int64]]


@pytest.fixture(scope="module")
def encoder(tiny_classifiers: dict[str, Checkpoint]) -> TextEncoder:
    return checkpoint_encoder(tiny_classifiers["single"], max_length=64, text_pair=False)


@pytest.fixture(scope="module")
def batch(encoder: TextEncoder, texts_for: dict[str, list[Any]]) -> Inputs:
    """A padded batch of texts of different lengths."""
    return encoder.collate(encoder.encode(texts_for["single"][:12]))


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    random_distilbert: Callable[..., Any],
) -> dict[str, Path]:
    """A BERT with heads of 8 channels, a DistilBERT with heads of 16, with biases of all sizes."""
    import torch

    from edgebert_export.checkpoint import load_model

    root, task = tmp_path_factory.mktemp("attention"), tasks["single"]
    tokenizer = load_tokenizer(tiny_classifiers["single"])
    models = {
        "bert": load_model(tiny_classifiers["single"], task),
        "distilbert": random_distilbert(heads=2),
    }
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.05 * torch.randn(weight.shape)
        checkpoint = save(model, tokenizer, root / name)
        for suffix, first_token in (("", False), ("-first", True)):
            path = root / f"{name}{suffix}.onnx"
            config = ExportConfig(max_length=64, first_token=first_token)
            found[f"{name}{suffix}"] = to_onnx(checkpoint, task, config, path).path
    return found


@pytest.fixture(scope="module")
def graphs(exported: dict[str, Path]) -> dict[str, ir.Model]:
    """Treat them as read-only."""
    return {name: open_graph(path) for name, path in exported.items()}


def _kind(name: str) -> str:
    return name.removesuffix("-first")


def _logits(model: ir.Model, batch: Inputs) -> NDArray[np.float32]:
    session = open_session(model)
    return session.run({name: batch[name] for name in session.input_names})["logits"]


def _linear(model: ir.Model) -> dict[str, Product]:
    return {p.name: p for p in find_products(model) if p.kind == "linear"}


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_merged_projections_compute_the_same(
    graphs: dict[str, ir.Model], batch: Inputs, tmp_path: Path, name: str, scaled: bool
) -> None:
    graph = graphs[name]
    before = to_bytes(graph)
    source = scale_queries(graph, find_products(graph)) if scaled else graph
    merged = merge_projections(source)
    write_graph(merged, tmp_path / "merged.onnx")
    expected = _logits(graph, batch)
    found = _logits(merged, batch)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    alone = {key: array[:1] for key, array in batch.items()}
    np.testing.assert_allclose(_logits(merged, alone), _logits(graph, alone), atol=1e-4)
    assert to_bytes(graph) == before
    assert [value.name for value in merged.graph.outputs] == ["logits"]


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_product_is_named_after_its_layers_and_holds_their_weights_side_by_side(
    graphs: dict[str, ir.Model], name: str
) -> None:
    graph, kind = graphs[name], _kind(name)
    merged = merge_projections(graph)
    before, after = _linear(graph), _linear(merged)
    expected = {0: [PARTS[kind]], 1: [PARTS[kind]]}
    if name.endswith("-first"):
        query, *others = PARTS[kind]
        expected[1] = [(query,), tuple(others)]
    left = dict(before)
    for layer, groups in expected.items():
        scope = PREFIX[kind].format(layer)
        for parts in groups:
            product = after.pop(f"{scope}.{'+'.join(parts)}")
            sources = [left.pop(f"{scope}.{part}") for part in parts]
            assert {source.operands for source in sources} == {product.operands}
            weights = [constant(graph, str(source.weight)) for source in sources]
            held = constant(merged, str(product.weight))
            np.testing.assert_array_equal(held, np.concatenate(weights, axis=1))
    assert after == left  # the other layers are what they were
    # Merging makes one pair of product and sum of each group, and leaves nothing behind.
    saved = 2 * 2 if not name.endswith("-first") else 2 + 1
    assert _operators(graph).count("MatMul") - _operators(merged).count("MatMul") == saved
    read = {value.name for node in merged.graph for value in node.inputs if value is not None}
    assert set(merged.graph.initializers) <= read


@pytest.mark.parametrize("name", MODELS)
def test_merging_what_is_merged_changes_nothing(graphs: dict[str, ir.Model], name: str) -> None:
    once = merge_projections(graphs[name])
    assert to_bytes(once) != to_bytes(graphs[name])
    assert to_bytes(merge_projections(once)) == to_bytes(once)
    assert to_bytes(merge_projections(graphs[name])) == to_bytes(once)


def _sum_behind(proto: onnx.ModelProto, product: str) -> onnx.NodeProto:
    (node,) = [node for node in proto.graph.node if node.name == product]
    (found,) = [n for n in proto.graph.node if n.op_type == "Add" and node.output[0] in n.input]
    return found


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_layer_that_something_else_reads_stays_apart(
    exported: dict[str, Path], batch: Inputs, tmp_path: Path, part: str
) -> None:
    proto = onnx.load(exported["bert"])
    scope = "/bert/encoder/layer.0/attention/self"
    result = _sum_behind(proto, f"{scope}/{part}/MatMul").output[0]
    proto.graph.node.append(helper.make_node("Neg", [result], ["seen"], name="reader"))
    proto.graph.output.append(
        helper.make_tensor_value_info("seen", onnx.TensorProto.FLOAT, ["batch", "seq", 32])
    )
    onnx.save(proto, tmp_path / "read.onnx")
    graph = open_graph(tmp_path / "read.onnx")
    merged = merge_projections(graph)
    others = "+".join(other for other in PARTS["bert"] if other != part)
    names = {name for name in _linear(merged) if ".layer.0.attention.self." in name}
    dotted = PREFIX["bert"].format(0)
    assert names == {f"{dotted}.{part}", f"{dotted}.{others}"}
    session = open_session(merged)
    inputs = {name: batch[name] for name in session.input_names}
    found, expected = session.run(inputs), open_session(graph).run(inputs)
    for name in ("logits", "seen"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4)


def test_layers_whose_heads_are_of_other_sizes_stay_apart(
    exported: dict[str, Path], batch: Inputs, tmp_path: Path
) -> None:
    """Values may have wider heads than queries and keys, which one reshape cannot give."""
    proto = onnx.load(exported["bert"])
    nodes = {node.name: node for node in proto.graph.node}
    held = {weight.name: weight for weight in proto.graph.initializer}
    scope = "/bert/encoder/layer.0/attention"

    def double(name: str, axis: int) -> None:
        array = numpy_helper.to_array(held[name])
        held[name].CopyFrom(numpy_helper.from_array(np.concatenate([array] * 2, axis), name))

    def resize(reshape: onnx.NodeProto, size: int) -> None:
        (shape,) = [node for node in nodes.values() if reshape.input[1] in node.output]
        proto.graph.initializer.append(numpy_helper.from_array(np.array([size]), f"size_{size}"))
        shape.input[-1] = f"size_{size}"

    value, output = nodes[f"{scope}/self/value/MatMul"], nodes[f"{scope}/output/dense/MatMul"]
    add = _sum_behind(proto, value.name)
    double(value.input[1], 1)
    double(next(name for name in add.input if name in held), 0)
    double(output.input[1], 0)
    (split,) = [n for n in nodes.values() if n.op_type == "Reshape" and n.input[0] == add.output[0]]
    resize(split, 16)
    (joined,) = [n for n in nodes.values() if output.input[0] in n.output]
    resize(joined, 64)
    onnx.save(proto, tmp_path / "heads.onnx")
    graph = open_graph(tmp_path / "heads.onnx")
    assert np.isfinite(_logits(graph, batch)).all()
    merged = merge_projections(graph)
    dotted = PREFIX["bert"].format(0)
    names = {name for name in _linear(merged) if name.startswith(f"{dotted}.")}
    assert names == {f"{dotted}.{part}" for part in PARTS["bert"]}


@pytest.mark.parametrize("name", MODELS)
def test_each_layers_attention_is_found_with_the_linear_layer_that_reads_it(
    graphs: dict[str, ir.Model], name: str
) -> None:
    kind, size = _kind(name), {"bert": 8, "distilbert": 16}[_kind(name)]
    output = {"bert": "attention.output.dense", "distilbert": "attention.out_lin"}[kind]
    merged = merge_projections(graphs[name])
    found = find_attentions(merged, find_products(merged))
    assert [attention.name for attention in found] == [PREFIX[kind].format(n) for n in (0, 1)]
    for layer, attention in enumerate(found):
        scope = PREFIX[kind].format(layer)
        behind = f"{scope.partition('.attention')[0]}.{output}"
        names = [product.name for product in attention.products]
        assert names == [f"{scope}.scores", f"{scope}.context", behind]
        assert attention.head_size == size
        assert attention.merged == (layer == 0 or not name.endswith("-first"))


def test_attention_is_fused_in_int8_with_heads_of_some_sizes_and_all_tokens_queries(
    graphs: dict[str, ir.Model],
) -> None:
    reasons = {}
    for name in MODELS:
        merged = merge_projections(graphs[name])
        found = find_attentions(merged, find_products(merged))
        reasons[name] = [attention.unfused_in_int8 for attention in found]
    small = "its heads are of 8 channels, and only 16, 32, 64 are fused"
    assert reasons["bert"] == reasons["bert-first"] == [small, small]
    assert reasons["distilbert"] == [None, None]
    other = "its queries are of other tokens than its keys"
    assert reasons["distilbert-first"] == [None, other]


def test_attention_is_not_fused_in_int8_unless_queries_and_keys_are_one_product(
    graphs: dict[str, ir.Model],
) -> None:
    graph = graphs["distilbert"]
    found = find_attentions(graph, find_products(graph))
    assert [attention.merged for attention in found] == [False, False]
    assert None not in [attention.unfused_in_int8 for attention in found]


def test_attention_is_not_fused_in_int8_if_no_linear_layer_reads_it(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    proto = onnx.load(exported["distilbert"])
    scope = "/distilbert/transformer/layer.0/attention"
    (out,) = [node for node in proto.graph.node if node.name == f"{scope}/out_lin/MatMul"]
    negated = helper.make_node("Neg", [out.input[0]], ["negated"], name="in_between")
    out.input[0] = "negated"
    proto.graph.node.insert(list(proto.graph.node).index(out), negated)
    onnx.save(proto, tmp_path / "negated.onnx")
    merged = merge_projections(open_graph(tmp_path / "negated.onnx"))
    first, second = find_attentions(merged, find_products(merged))
    assert [product.name.rpartition(".")[2] for product in first.products] == ["scores", "context"]
    assert first.unfused_in_int8 == "no linear layer reads its result"
    assert second.unfused_in_int8 is None
