"""The ONNX export: what the file looks like, and that parity catches what is not faithful."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_tokenizer,
    open_checkpoint,
    save_checkpoint,
)
from edgebert_export.errors import CheckpointError, ExportError
from edgebert_export.to_onnx import ExportConfig, OnnxModel, Parity, measure_parity, to_onnx
from edgebert_runtime.manifest import Task
from edgebert_runtime.onnx_session import OnnxSession

CONFIG = ExportConfig(max_length=64, parity_texts=16)
NAMES = ["single", "multi", "pairs"]


@pytest.fixture(scope="module")
def distilbert(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_classifiers: dict[str, Checkpoint],
    random_distilbert: Callable[..., Any],
) -> Checkpoint:
    """A tiny DistilBERT for the task on single texts."""
    tokenizer = load_tokenizer(tiny_classifiers["single"])
    model = random_distilbert()
    return save_checkpoint(model, tokenizer, tmp_path_factory.mktemp("distilbert"))


def _dims(value: onnx.ValueInfoProto) -> list[str | int]:
    shape = value.type.tensor_type.shape.dim
    return [dim.dim_param or dim.dim_value for dim in shape]


def _tampered(
    model: OnnxModel, out: Path, change: Callable[[np.ndarray], np.ndarray], suffix: str
) -> OnnxModel:
    """Writes ``model`` with one weight changed."""
    proto = onnx.load(model.path)
    weight = next(w for w in proto.graph.initializer if w.name.endswith(suffix))
    changed = change(numpy_helper.to_array(weight).copy())
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    onnx.save(proto, out)
    return replace(model, path=out)


@pytest.mark.parametrize("name", NAMES)
def test_the_export_is_valid_onnx_with_free_batch_and_length(
    onnx_models: dict[str, OnnxModel], tasks: dict[str, Task], name: str
) -> None:
    assert onnx_models[name].precision == "fp32"
    onnx.checker.check_model(str(onnx_models[name].path), full_check=True)
    proto = onnx.load(onnx_models[name].path, load_external_data=False)
    assert {entry.domain: entry.version for entry in proto.opset_import}.get("") == 20
    inputs = {value.name: _dims(value) for value in proto.graph.input}
    assert sorted(inputs) == ["attention_mask", "input_ids", "token_type_ids"]
    assert all(isinstance(dim, str) for dims in inputs.values() for dim in dims)
    assert len({tuple(dims) for dims in inputs.values()}) == 1
    assert len(set(inputs["input_ids"])) == 2
    (output,) = proto.graph.output
    assert output.name == "logits"
    assert _dims(output) == [inputs["input_ids"][0], len(tasks[name].labels)]
    assert not [w.name for w in proto.graph.initializer if w.external_data]


@pytest.mark.parametrize("shape", [(1, 2), (1, 64), (5, 3), (33, 17)])
def test_the_export_runs_at_any_batch_and_length(
    onnx_models: dict[str, OnnxModel], shape: tuple[int, int]
) -> None:
    session = OnnxSession(onnx_models["single"].path.read_bytes())
    ids = np.arange(np.prod(shape)).reshape(shape) % 90
    ones = np.ones(shape, dtype=np.int64)
    outputs = session.run(
        {"input_ids": ids.astype(np.int64), "attention_mask": ones, "token_type_ids": ones * 0}
    )
    assert outputs["logits"].shape == (shape[0], 2)
    assert np.isfinite(outputs["logits"]).all()
    session.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_export_agrees_with_pytorch_on_short_and_long_texts(
    onnx_models: dict[str, OnnxModel],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
    name: str,
) -> None:
    seen: list[tuple[int, int]] = []
    texts = texts_for[name]
    parity = measure_parity(
        tiny_classifiers[name],
        tasks[name],
        onnx_models[name],
        texts,
        CONFIG,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    encoder = checkpoint_encoder(
        tiny_classifiers[name], max_length=64, text_pair=tasks[name].text_pair
    )
    lengths = [len(row.ids) for row in encoder.encode(texts)]
    assert parity.texts == 16
    assert (parity.shortest_tokens, parity.longest_tokens) == (min(lengths), max(lengths))
    assert 0 < parity.max_difference <= parity.limit == 1e-4
    assert seen == sorted(seen)
    assert seen[-1] == (32, 32)


def test_fewer_texts_than_asked_for_are_all_compared(
    onnx_models: dict[str, OnnxModel],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
) -> None:
    parity = measure_parity(
        tiny_classifiers["single"],
        tasks["single"],
        onnx_models["single"],
        ["", "a much longer text than the first one"],
        CONFIG,
    )
    assert parity.texts == 2
    assert parity.shortest_tokens == 2


def _measure(checkpoint: Checkpoint, task: Task, model: OnnxModel, texts: list[Any]) -> Parity:
    return measure_parity(checkpoint, task, model, texts[:40], CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda a: a + np.float32(1e-3), id="a little"),
        pytest.param(lambda a: a * 0, id="zeroed"),
        pytest.param(lambda a: a * np.float32("nan"), id="NaN"),
        pytest.param(lambda a: a + np.float32("inf"), id="infinity"),
    ],
)
def test_a_tampered_export_is_a_breach(
    onnx_models: dict[str, OnnxModel],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
    tmp_path: Path,
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    # BERT's head starts with a bias of zero, so its weight is what is tampered with.
    bad = _tampered(onnx_models["single"], tmp_path / "bad.onnx", change, "classifier.weight")
    with pytest.raises(ExportError, match=r"limit is 1e-04.* not faithful"):
        _measure(tiny_classifiers["single"], tasks["single"], bad, texts_for["single"])


def test_nan_for_a_few_texts_only_is_a_breach(
    onnx_models: dict[str, OnnxModel],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
    tmp_path: Path,
) -> None:
    """One position's embedding is NaN, so that only texts that long are affected."""

    def change(table: np.ndarray) -> np.ndarray:
        table[50] = np.nan
        return table

    bad = _tampered(
        onnx_models["single"], tmp_path / "bad.onnx", change, "position_embeddings.weight"
    )
    with pytest.raises(ExportError, match="not faithful"):
        _measure(tiny_classifiers["single"], tasks["single"], bad, texts_for["single"])


def test_the_export_of_another_checkpoint_is_a_breach(
    onnx_models: dict[str, OnnxModel],
    edited: Callable[..., Path],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
) -> None:
    other = open_checkpoint(
        edited(weights=lambda w: w | {"bert.pooler.dense.bias": w["bert.pooler.dense.bias"] + 0.1})
    )
    with pytest.raises(ExportError, match="not faithful"):
        _measure(other, tasks["single"], onnx_models["single"], texts_for["single"])


def test_a_checkpoint_for_another_task_is_not_exported(
    tiny_classifiers: dict[str, Checkpoint], tasks: dict[str, Task], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="food, travel, technology"):
        to_onnx(tiny_classifiers["single"], tasks["multi"], CONFIG, tmp_path / "no.onnx")
    assert not (tmp_path / "no.onnx").exists()


def test_a_distilbert_is_exported_without_token_types_and_agrees(
    distilbert: Checkpoint, tasks: dict[str, Task], texts_for: dict[str, list[Any]], tmp_path: Path
) -> None:
    model = to_onnx(distilbert, tasks["single"], CONFIG, tmp_path / "distilbert.onnx")
    names = [value.name for value in onnx.load(model.path).graph.input]
    assert sorted(names) == ["attention_mask", "input_ids"]
    parity = _measure(distilbert, tasks["single"], model, texts_for["single"])
    assert parity.max_difference <= 1e-4
