"""Rewrites compute the same with less work, and leave alone what they do not know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgebert_export.checkpoint import Checkpoint, load_tokenizer, save_checkpoint
from edgebert_export.graph import find_products, open_graph, open_session, to_bytes
from edgebert_export.rewrite import fold_token_types, keep_first_token
from edgebert_export.to_onnx import ExportConfig, OnnxModel, measure_parity, to_onnx
from edgebert_runtime.manifest import Task

REWRITES = {"first token": keep_first_token, "token types": fold_token_types}


@pytest.fixture(scope="module")
def graphs(
    onnx_models: dict[str, OnnxModel],
    random_distilbert: Callable[..., Any],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, ir.Model]:
    """FP32 graphs as they were exported: a BERT and a DistilBERT."""
    root = tmp_path_factory.mktemp("rewrite")
    tokenizer = load_tokenizer(tiny_classifiers["single"])
    checkpoint = save_checkpoint(random_distilbert(), tokenizer, root / "distilbert")
    config = ExportConfig(max_length=64, first_token=False, fold_token_types=False)
    exported = to_onnx(checkpoint, tasks["single"], config, root / "distilbert.onnx")
    paths = {"bert": onnx_models["single"].path, "distilbert": exported.path}
    return {name: open_graph(path) for name, path in paths.items()}


def _inputs(batch: int, length: int, *, seed: int = 0) -> dict[str, Any]:
    """Random ids, rows of different lengths padded to ``length``."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, length + 1, size=batch)
    lengths[0] = length
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    return {
        "input_ids": random.integers(5, 100, size=(batch, length)) * mask,
        "attention_mask": mask,
        "token_type_ids": np.zeros((batch, length), dtype=np.int64),
    }


def _run(graph: ir.Model, inputs: dict[str, Any]) -> Any:
    session = open_session(graph)
    found = session.run({name: inputs[name] for name in session.input_names})["logits"]
    session.close()
    return found


@pytest.mark.parametrize("model", ["bert", "distilbert"])
@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("shape", [(1, 2), (1, 64), (7, 33)])
def test_outputs_are_equal_to_a_hundred_thousandth(
    graphs: dict[str, ir.Model], model: str, rewrite: str, shape: tuple[int, int]
) -> None:
    inputs = _inputs(*shape)
    expected = _run(graphs[model], inputs)
    assert np.abs(_run(REWRITES[rewrite](graphs[model]), inputs) - expected).max() < 1e-5


@pytest.mark.parametrize("model", ["bert", "distilbert"])
def test_the_last_layer_has_one_row_for_each_text(graphs: dict[str, ir.Model], model: str) -> None:
    rewritten = keep_first_token(graphs[model])
    products = [p for p in find_products(rewritten) if p.kind == "linear"]
    nodes = {node.name: node for node in rewritten.graph}
    for product in products:
        value = nodes[product.node].outputs[0]
        value.type = ir.TensorType(ir.DataType.FLOAT)
        rewritten.graph.outputs.append(value)
    session = open_session(rewritten)
    inputs = _inputs(3, 20)
    results = session.run({name: inputs[name] for name in session.input_names})
    rows = {p.name: results[str(nodes[p.node].outputs[0].name)].shape[1:-1] for p in products}
    session.close()
    last = [name for name in rows if "layer.1." in name]
    kept_whole = [name for name in last if name.endswith((".key", ".value", ".k_lin", ".v_lin"))]
    assert len(last) == 6
    assert {rows[name] for name in kept_whole} == {(20,)}
    assert {rows[name] for name in last if name not in kept_whole} == {(1,)}
    assert {rows[name] for name in rows if "layer.0." in name} == {(20,)}


@pytest.mark.parametrize("model", ["bert", "distilbert"])
def test_products_keep_their_names(graphs: dict[str, ir.Model], model: str) -> None:
    before = [product.name for product in find_products(graphs[model])]
    assert [product.name for product in find_products(keep_first_token(graphs[model]))] == before


def test_a_model_that_reads_another_position_is_left_alone(graphs: dict[str, ir.Model]) -> None:
    changed = graphs["bert"].clone()
    (gather,) = [node for node in changed.graph if node.name == "/bert/pooler/Gather"]
    second = ir.Value(name="second", const_value=ir.tensor(np.array(1), name="second"))
    changed.graph.register_initializer(second)
    gather.replace_input_with(1, second)
    assert keep_first_token(changed) is changed


def test_a_model_that_reads_all_positions_is_left_alone(graphs: dict[str, ir.Model]) -> None:
    changed = graphs["bert"].clone()
    (gather,) = [node for node in changed.graph if node.name == "/bert/pooler/Gather"]
    mean = ir.node("ReduceMean", [gather.inputs[0]], {"keepdims": 0}, name="mean")
    mean.outputs[0].name = "mean"
    mean.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    changed.graph.insert_before(gather, mean)
    changed.graph.outputs.append(mean.outputs[0])
    assert keep_first_token(changed) is changed


def test_token_types_are_no_input_any_more_and_their_table_is_gone(
    graphs: dict[str, ir.Model],
) -> None:
    folded = fold_token_types(graphs["bert"])
    assert [value.name for value in folded.graph.inputs] == ["input_ids", "attention_mask"]
    assert not [name for name in folded.graph.initializers if "token_type" in name]
    assert fold_token_types(graphs["distilbert"]) is graphs["distilbert"]


@pytest.mark.parametrize("rewrite", REWRITES)
def test_the_graph_that_is_given_does_not_change(graphs: dict[str, ir.Model], rewrite: str) -> None:
    before = to_bytes(graphs["bert"])
    assert to_bytes(REWRITES[rewrite](graphs["bert"])) != before
    assert to_bytes(graphs["bert"]) == before


@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", ["single", "multi", "pairs"])
def test_the_export_does_what_it_is_told_and_stays_faithful(
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
    tmp_path: Path,
    name: str,
    first_token: bool,
    fold: bool,
) -> None:
    config = ExportConfig(
        max_length=64,
        parity_texts=16,
        first_token=first_token,
        fold_token_types=fold,
    )
    task = tasks[name]
    model = to_onnx(tiny_classifiers[name], task, config, tmp_path / "m.onnx")
    parity = measure_parity(tiny_classifiers[name], task, model, texts_for[name], config)
    assert parity.max_difference <= parity.limit
    kept = ["input_ids", "attention_mask", "token_type_ids"]
    folded = fold and not task.text_pair
    assert sorted(model.input_names()) == sorted(kept[:2] if folded else kept)
    slices = [
        node
        for node in open_graph(model.path).graph
        if str(node.outputs[0].name).endswith("_first")
    ]
    assert len(slices) == first_token


def test_no_note_of_a_shape_is_left_that_a_rewrite_made_wrong(
    graphs: dict[str, ir.Model],
) -> None:
    """ONNX Runtime plans its memory by them, and warns at each run when they are wrong."""
    for graph in graphs.values():
        rewritten = keep_first_token(graph)
        outputs = set(rewritten.graph.outputs)
        inner = [v for node in rewritten.graph for v in node.outputs if v not in outputs]
        assert inner and all(value.shape is None for value in inner)
