"""What the tests of the export stages share: edited checkpoints, exports, small datasets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loaded
import pytest

from edgebert_export.checkpoint import Checkpoint
from edgebert_export.dataset import Dataset, Example
from edgebert_export.to_onnx import ExportConfig, OnnxModel, to_onnx
from edgebert_runtime.manifest import Task

Weights = dict[str, Any]


@pytest.fixture(scope="session", autouse=True)
def _loaded_once() -> None:
    loaded.load()


@pytest.fixture(scope="session")
def tasks(tiny_classifiers: dict[str, Checkpoint]) -> dict[str, Task]:
    """The task that each of the tiny classifiers answers, by its name."""
    found = {}
    for name, checkpoint in tiny_classifiers.items():
        multi = checkpoint.problem_type == "multi_label_classification"
        assert checkpoint.labels is not None
        found[name] = Task(
            kind="multi_label" if multi else "single_label",
            labels=checkpoint.labels,
            text_pair=name == "pairs",
            thresholds=(0.5,) * len(checkpoint.labels) if multi else None,
        )
    return found


@pytest.fixture(scope="session")
def random_distilbert(
    tiny_classifiers: dict[str, Checkpoint], tasks: dict[str, Task]
) -> Callable[..., Any]:
    """Returns a function that makes a tiny DistilBERT for single texts, with random weights."""

    def make(initializer_range: float = 0.5, heads: int = 4) -> Any:
        import torch
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        labels = tasks["single"].labels
        torch.manual_seed(1)
        config = DistilBertConfig(
            vocab_size=tiny_classifiers["single"].architecture.vocab_size,
            dim=32,
            n_layers=2,
            n_heads=heads,
            hidden_dim=64,
            max_position_embeddings=128,
            initializer_range=initializer_range,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
        return DistilBertForSequenceClassification(config).eval()

    return make


@pytest.fixture
def edited(tmp_path: Path, tiny_classifiers: dict[str, Checkpoint]) -> Callable[..., Path]:
    """Copies a checkpoint and changes its configuration or its weights.

    A configuration value of ``...`` removes the key; ``weights`` gets the dict of tensors and
    returns the one to write.
    """
    from safetensors.torch import load_file, save_file

    made: list[Path] = []

    def edit(
        source: Path | None = None,
        *,
        config: dict[str, Any] | None = None,
        weights: Callable[[Weights], Weights] | None = None,
    ) -> Path:
        path = tmp_path / f"edited-{len(made)}"
        made.append(path)
        shutil.copytree(source or tiny_classifiers["single"].path, path)
        if config is not None:
            file = path / "config.json"
            values = json.loads(file.read_text()) | config
            values = {key: value for key, value in values.items() if value is not ...}
            file.write_text(json.dumps(values))
        if weights is not None:
            file = path / "model.safetensors"
            tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
            tensors = weights(tensors)
            save_file({k: v.contiguous() for k, v in tensors.items()}, file, {"format": "pt"})
        return path

    return edit


@pytest.fixture(scope="session")
def onnx_models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
) -> dict[str, OnnxModel]:
    """The FP32 export of each of the tiny classifiers, by task; treat it as read-only."""
    root = tmp_path_factory.mktemp("onnx")
    config = ExportConfig(max_length=64, first_token=False, fold_token_types=False)
    return {
        name: to_onnx(checkpoint, tasks[name], config, root / f"{name}.onnx")
        for name, checkpoint in tiny_classifiers.items()
    }


@pytest.fixture(scope="session")
def datasets(
    tasks: dict[str, Task], sentences: list[dict[str, Any]], pairs: list[dict[str, Any]]
) -> dict[str, Dataset]:
    """Real labelled rows for each of the tasks, few enough to train on in seconds."""

    def split(task: Task, rows: list[Example]) -> Dataset:
        return Dataset(task, tuple(rows[:48]), tuple(rows[48:80]), tuple(rows[80:96]), ())

    single = [
        Example(row["text"], (tasks["single"].labels.index(row["sentiment"]),))
        for row in sentences
        if row["sentiment"] in tasks["single"].labels
    ]
    multi = [
        Example(
            row["text"],
            tuple(i for i, label in enumerate(tasks["multi"].labels) if label in row["topics"]),
        )
        for row in sentences
    ]
    paired = [
        Example((row["premise"], row["hypothesis"]), (tasks["pairs"].labels.index(row["label"]),))
        for row in pairs
    ]
    return {
        "single": split(tasks["single"], single),
        "multi": split(tasks["multi"], multi),
        "pairs": split(tasks["pairs"], paired),
    }
