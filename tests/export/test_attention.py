"""Queries, keys and values in one product: what is merged, what is not, and the same answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from edgebert_export.attention import find_attentions, merge_projections, scale_queries
from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_model,
    load_tokenizer,
    save_checkpoint,
)
from edgebert_export.graph import constant, find_products, open_graph, open_session, to_bytes
from edgebert_export.to_onnx import ExportConfig, to_onnx
from edgebert_runtime.manifest import Task

MODELS = [(kind, first) for kind in ("bert", "distilbert") for first in (False, True)]
LAYERS = {
    "bert": ("bert.encoder.layer.{}.attention.self.", ("query", "key", "value")),
    "distilbert": ("distilbert.transformer.layer.{}.attention.", ("q_lin", "k_lin", "v_lin")),
}


@dataclass(frozen=True)
class _Tiny:
    """A graph whose queries are scaled, and a padded batch of texts for it."""

    graph: ir.Model
    batch: dict[str, Any]

    def logits(self, graph: ir.Model) -> Any:
        session = open_session(graph)
        result = session.run(self.batch)["logits"]
        session.close()
        return result


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
    random_distilbert: Callable[..., Any],
) -> dict[tuple[str, bool], _Tiny]:
    """Both architectures, each with the first token alone in the last layer, and with all."""
    root, task = tmp_path_factory.mktemp("attention"), tasks["single"]
    tokenizer = load_tokenizer(tiny_classifiers["single"])
    models = {
        "bert": load_model(tiny_classifiers["single"], task),
        "distilbert": random_distilbert(heads=2),
    }
    found = {}
    for kind, first in MODELS:
        name = f"{kind}-{first}"
        checkpoint = save_checkpoint(models[kind], tokenizer, root / name)
        config = ExportConfig(max_length=64, first_token=first, fold_token_types=False)
        exported = to_onnx(checkpoint, task, config, root / f"{name}.onnx")
        encoder = checkpoint_encoder(checkpoint, max_length=64, text_pair=False)
        graph = open_graph(exported.path)
        batch = encoder.collate(encoder.encode(texts_for["single"][:9]))
        found[kind, first] = _Tiny(scale_queries(graph, find_products(graph)), dict(batch))
    return found


def _names(graph: ir.Model) -> list[str]:
    return [product.name for product in find_products(graph) if product.kind == "linear"]


@pytest.mark.parametrize("model", MODELS)
def test_merged_projections_compute_the_same(
    tiny: dict[tuple[str, bool], _Tiny], model: tuple[str, bool]
) -> None:
    given = tiny[model]
    merged = merge_projections(given.graph)
    expected = given.logits(given.graph)
    assert np.ptp(expected, axis=0).min() > 1e-3  # or else any graph would do
    np.testing.assert_allclose(given.logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_merged_is_named_after_its_parts_and_holds_their_weights(
    tiny: dict[tuple[str, bool], _Tiny], model: tuple[str, bool]
) -> None:
    """The queries of the first token alone read another activation, and stay as they were."""
    kind, first = model
    graph = tiny[model].graph
    merged = merge_projections(graph)
    scope, parts = LAYERS[kind]
    before = {product.name: product for product in find_products(graph)}
    after = {product.name: product for product in find_products(merged)}
    expected = _names(graph)
    for layer in (0, 1):
        apart = parts[:1] if first and layer == 1 else ()
        together = parts[len(apart) :]
        prefix = scope.format(layer)
        name = prefix + "+".join(together)
        wanted = [constant(graph, str(before[prefix + part].weight)) for part in together]
        stored = constant(merged, str(after[name].weight))
        np.testing.assert_array_equal(stored, np.concatenate(wanted, axis=1))
        assert after[name].operands == before[prefix + together[0]].operands
        expected = [n for n in expected if n not in {prefix + part for part in together}]
        expected.append(name)
    assert sorted(_names(merged)) == sorted(expected)
    assert len(expected) == (14 - 3 if first else 14 - 4)


@pytest.mark.parametrize("model", MODELS)
def test_the_graph_that_is_given_does_not_change_and_merging_again_changes_nothing(
    tiny: dict[tuple[str, bool], _Tiny], model: tuple[str, bool]
) -> None:
    graph = tiny[model].graph
    before = to_bytes(graph)
    merged = to_bytes(once := merge_projections(graph))
    assert to_bytes(graph) == before != merged
    assert to_bytes(merge_projections(graph)) == merged
    assert _names(merge_projections(once)) == _names(once)


@pytest.mark.parametrize("where", ["MatMul", "Add", "Reshape"])
def test_a_projection_that_something_else_reads_stays_by_itself(
    tiny: dict[tuple[str, bool], _Tiny], where: str
) -> None:
    """Its result would be gone from where the other reader looks for it."""
    given = tiny["bert", False]
    graph = given.graph.clone()
    nodes = {node.name: node for node in graph.graph}
    read = nodes["/bert/encoder/layer.0/attention/self/key/MatMul"]
    while read.op_type != where:
        (read,) = read.successors()
    watch = ir.node("Abs", [read.outputs[0]], name="/watch")
    watch.outputs[0].name, watch.outputs[0].type = "watched", ir.TensorType(ir.DataType.FLOAT)
    graph.graph.insert_after(read, watch)
    graph.graph.outputs.append(watch.outputs[0])
    merged = merge_projections(graph)
    prefix = "bert.encoder.layer.{}.attention.self."
    names = [name for name in _names(merged) if ".self." in name]
    assert set(names) == {
        prefix.format(0) + "query+value",
        prefix.format(0) + "key",
        prefix.format(1) + "query+key+value",
    }
    np.testing.assert_allclose(given.logits(merged), given.logits(graph), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_attentions_are_found_whole_with_the_size_of_their_heads(
    tiny: dict[tuple[str, bool], _Tiny], model: tuple[str, bool]
) -> None:
    kind, first = model
    merged = merge_projections(tiny[model].graph)
    found = find_attentions(merged, find_products(merged))
    scope, _ = LAYERS[kind]
    names = [scope.format(layer).removesuffix(".") for layer in (0, 1)]
    assert [attention.name for attention in found] == names
    output = {"bert": "{}.output.dense", "distilbert": "{}.out_lin"}[kind]
    for attention in found:
        module = attention.name.removesuffix(".self")
        assert [product.name for product in attention.products] == [
            f"{attention.name}.scores",
            f"{attention.name}.context",
            output.format(module),
        ]
    assert [a.head_size for a in found] == [{"bert": 8, "distilbert": 16}[kind]] * 2
    assert [a.merged for a in found] == [True, not first]


def test_queries_and_keys_that_are_two_products_are_not_merged(
    tiny: dict[tuple[str, bool], _Tiny],
) -> None:
    graph = tiny["distilbert", False].graph
    found = find_attentions(graph, find_products(graph))
    assert [attention.merged for attention in found] == [False, False]


def test_the_reason_why_an_attention_is_not_fused_is_the_first_that_holds(
    tiny: dict[tuple[str, bool], _Tiny],
) -> None:
    merged = merge_projections(tiny["distilbert", False].graph)
    whole, _ = find_attentions(merged, find_products(merged))
    assert whole.unfused_in_int8 is None
    for size in (16, 32, 64):
        assert replace(whole, head_size=size).unfused_in_int8 is None
    for size in (8, 24, 128, None):
        reason = replace(whole, head_size=size, merged=False).unfused_in_int8
        assert reason == f"its heads are of {size} channels, and only 16, 32, 64 are fused"
    headless = replace(whole, products=whole.products[:2], merged=False)
    assert headless.unfused_in_int8 == "no linear layer reads its result"
    apart = replace(whole, merged=False)
    assert apart.unfused_in_int8 == "its queries are of other tokens than its keys"


def test_projections_whose_heads_are_of_other_sizes_are_not_merged(
    tiny: dict[tuple[str, bool], _Tiny], tmp_path: Path
) -> None:
    """Values may have wider heads than queries and keys, which one reshape cannot give."""
    proto = onnx.ModelProto.FromString(to_bytes(tiny["bert", False].graph))
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
    (add,) = [node for node in nodes.values() if value.output[0] in node.input]
    double(value.input[1], 1)
    double(next(name for name in add.input if name in held), 0)
    double(output.input[1], 0)
    (split,) = [n for n in nodes.values() if n.op_type == "Reshape" and n.input[0] == add.output[0]]
    resize(split, 16)
    (joined,) = [node for node in nodes.values() if output.input[0] in node.output]
    resize(joined, 64)
    del proto.graph.value_info[:]  # shapes as they were
    onnx.save(proto, tmp_path / "heads.onnx")
    graph = open_graph(tmp_path / "heads.onnx")
    merged = merge_projections(graph)
    prefix, parts = LAYERS["bert"]
    names = [name for name in _names(merged) if name.startswith(prefix.format(0))]
    assert names == [prefix.format(0) + part for part in parts]
    logits = tiny["bert", False].logits
    np.testing.assert_allclose(logits(merged), logits(graph), rtol=1e-4, atol=1e-5)
