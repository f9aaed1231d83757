"""Thresholds chosen on validation rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sklearn.metrics import f1_score

from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder, open_checkpoint
from edgebert_export.dataset import Dataset, Example
from edgebert_export.thresholds import choose_thresholds
from edgebert_export.to_onnx import ExportConfig, OnnxModel, to_onnx
from edgebert_runtime.classifier import Classifier
from edgebert_runtime.manifest import Task
from edgebert_runtime.onnx_session import OnnxSession


def _classifier(
    checkpoint: Checkpoint, model: OnnxModel, task: Task, thresholds: tuple[float, ...]
) -> Classifier:
    encoder = checkpoint_encoder(checkpoint, max_length=64, text_pair=False)
    task = msgspec.structs.replace(task, thresholds=thresholds)
    return Classifier(OnnxSession(model.path.read_bytes()), encoder, task)


def _f1(classifier: Classifier, rows: list[Example]) -> list[float]:
    """F1 of each label, from the labels that a device would give."""
    names = classifier.task.labels
    given = [prediction.labels for prediction in classifier.predict([row.text for row in rows])]
    return [
        f1_score(
            [index in row.labels for row in rows],
            [name in labels for labels in given],
            zero_division=0,
        )
        for index, name in enumerate(names)
    ]


def _best_f1(classifier: Classifier, rows: list[Example]) -> list[float]:
    """The best F1 of each label over all thresholds, by trying them all."""
    scores = classifier.scores([row.text for row in rows])
    best = []
    for index in range(scores.shape[1]):
        truth = [index in row.labels for row in rows]
        tried = [f1_score(truth, scores[:, index] >= s) for s in np.unique(scores[:, index])]
        best.append(max(tried))
    return best


@pytest.fixture(scope="module")
def rows(datasets: dict[str, Dataset]) -> list[Example]:
    """Rows with topics: real ones, most of which have none of the three."""
    data = datasets["multi"]
    return [*data.train, *data.validation, *data.test]


@pytest.fixture
def choose(
    tiny_classifiers: dict[str, Checkpoint], onnx_models: dict[str, OnnxModel]
) -> Callable[..., tuple[float, ...]]:
    def run(task: Task, rows: list[Example]) -> tuple[float, ...]:
        return choose_thresholds(
            tiny_classifiers["multi"], task, onnx_models["multi"], rows, max_length=64
        )

    return run


def test_each_label_gets_the_threshold_with_the_best_f1(
    tiny_classifiers: dict[str, Checkpoint],
    onnx_models: dict[str, OnnxModel],
    tasks: dict[str, Task],
    rows: list[Example],
    choose: Any,
) -> None:
    task, checkpoint, model = tasks["multi"], tiny_classifiers["multi"], onnx_models["multi"]
    thresholds = choose(task, rows)
    assert len(thresholds) == 3
    assert all(0 <= threshold <= 1 for threshold in thresholds)
    with _classifier(checkpoint, model, task, (0.5, 0.5, 0.5)) as classifier:
        default, best = _f1(classifier, rows), _best_f1(classifier, rows)
    with _classifier(checkpoint, model, task, thresholds) as classifier:
        chosen = _f1(classifier, rows)
    assert all(new >= old for new, old in zip(chosen, default, strict=True))
    assert chosen != default  # else this test shows nothing
    assert chosen == pytest.approx(best, abs=1e-9)


def test_the_best_f1_holds_for_a_label_of_one_row_whichever_it_is(
    tiny_classifiers: dict[str, Checkpoint],
    onnx_models: dict[str, OnnxModel],
    tasks: dict[str, Task],
    rows: list[Example],
    choose: Any,
) -> None:
    """The threshold is then that row's own score, and the row must not fall just below it."""
    task, checkpoint, model = tasks["multi"], tiny_classifiers["multi"], onnx_models["multi"]
    texts = [row.text for row in rows[:24]]
    for only in range(len(texts)):
        marked = [Example(t, (0, 1, 2) if i == only else ()) for i, t in enumerate(texts)]
        with _classifier(checkpoint, model, task, choose(task, marked)) as classifier:
            assert _f1(classifier, marked) == pytest.approx(_best_f1(classifier, marked))


def test_scores_that_lie_close_together_are_still_told_apart(
    edited: Callable[..., Path],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    rows: list[Example],
    tmp_path: Path,
) -> None:
    """A rare label's scores are all small; a threshold rounded to 0 would give it to every text."""

    def shrink(weights: dict[str, Any]) -> dict[str, Any]:
        weights["classifier.weight"] *= 0.5
        weights["classifier.bias"] -= 12
        return weights

    checkpoint = open_checkpoint(edited(tiny_classifiers["multi"].path, weights=shrink))
    task = tasks["multi"]
    model = to_onnx(
        checkpoint,
        task,
        ExportConfig(max_length=64, fold_token_types=False),
        tmp_path / "rare.onnx",
    )
    thresholds = choose_thresholds(checkpoint, task, model, rows, max_length=64)
    with _classifier(checkpoint, model, task, thresholds) as classifier:
        assert _f1(classifier, rows) == pytest.approx(_best_f1(classifier, rows))


def test_a_label_without_examples_keeps_one_half(
    tasks: dict[str, Task], rows: list[Example], choose: Any
) -> None:
    without = [Example(row.text, tuple(i for i in row.labels if i != 1)) for row in rows]
    first, second, third = choose(tasks["multi"], without)
    assert second == 0.5
    assert (first, third) == choose(tasks["multi"], rows)[::2]


def test_a_label_that_every_example_has_applies_to_every_example(
    tiny_classifiers: dict[str, Checkpoint],
    onnx_models: dict[str, OnnxModel],
    tasks: dict[str, Task],
    rows: list[Example],
    choose: Any,
) -> None:
    everywhere = [Example(row.text, (0, 1, 2)) for row in rows]
    thresholds = choose(tasks["multi"], everywhere)
    with _classifier(
        tiny_classifiers["multi"], onnx_models["multi"], tasks["multi"], thresholds
    ) as classifier:
        assert _f1(classifier, everywhere) == [1.0, 1.0, 1.0]
