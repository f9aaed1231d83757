"""The student before training: the teacher's own layers, and a head that says what its did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_model,
    load_tokenizer,
    model_inputs,
    open_checkpoint,
    save_checkpoint,
)
from edgebert_export.errors import TrainingError
from edgebert_export.student import check_layer_map, layer_maps, make_student
from edgebert_export.teach import answers
from edgebert_runtime.manifest import Task

TEXTS = 96


def said(
    checkpoint: Checkpoint, model: Any, task: Task, texts: list[Any], **kwargs: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Raw outputs, and last hidden states of the first token."""
    encoder = checkpoint_encoder(checkpoint, max_length=64, text_pair=task.text_pair, **kwargs)
    rows = encoder.encode(texts)
    logits = np.empty((len(rows), len(task.labels)), np.float32)
    first = np.empty((len(rows), model.config.hidden_size), np.float32)
    for indices, raw, states in answers(model, encoder, rows, hidden=True):
        logits[indices], first[indices] = raw, states[:, 0]
    return logits, first


def untrained(
    path: Path | Checkpoint, task: Task, texts: list[Any], layer_map: tuple[int, ...] | None = None
) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The student of a teacher, and raw outputs and first tokens of both."""
    teacher = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    model = load_model(teacher, task)
    logits, first = said(teacher, model, task, texts)
    student = make_student(
        teacher,
        model,
        task,
        layer_map or tuple(range(teacher.architecture.layers)),
        dropout=0.1,
        first_tokens=torch.from_numpy(first),
        logits=torch.from_numpy(logits),
    )
    own, own_first = said(teacher, student, task, texts, input_names=model_inputs("distilbert"))
    return student, logits, first, own, own_first


def scaled_pooler(factor: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Moves every unit of the pooler to where tanh is linear, or saturated."""

    def change(weights: dict[str, Any]) -> dict[str, Any]:
        for kind in ("weight", "bias"):
            weights[f"bert.pooler.dense.{kind}"] *= factor
        return weights

    return change


def test_with_all_layers_and_a_linear_pooler_raw_outputs_are_the_teachers(
    edited: Callable[..., Path], tasks: dict[str, Task], texts_for: dict[str, list[Any]]
) -> None:
    path = edited(weights=scaled_pooler(1e-3))
    _, logits, _, own, _ = untrained(path, tasks["single"], texts_for["single"][:TEXTS])
    assert np.abs(own - logits).max() < 1e-4
    assert np.ptp(logits, axis=0).max() > 1e-3  # far more than the tolerance


def test_a_unit_of_the_pooler_that_is_always_saturated_is_carried_over_exactly(
    edited: Callable[..., Path], tasks: dict[str, Task], texts_for: dict[str, list[Any]]
) -> None:
    """Units at 1 or -1 for every text, and one that works where tanh is linear."""

    def change(weights: dict[str, Any]) -> dict[str, Any]:
        weights["bert.pooler.dense.weight"] *= 1e-3
        bias = weights["bert.pooler.dense.bias"]
        bias[:] = 40.0
        bias[::2] = -40.0
        bias[5] = 0.0
        return weights

    path = edited(weights=change)
    _, logits, _, own, _ = untrained(path, tasks["single"], texts_for["single"][:TEXTS])
    assert np.abs(own - logits).max() < 1e-4
    assert np.ptp(logits, axis=0).max() > 1e-4


@pytest.mark.parametrize("name", ["single", "multi", "pairs"])
def test_a_distilbert_teacher_is_carried_over_exactly(
    tmp_path: Path,
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
    name: str,
) -> None:
    bert, task, texts = tiny_classifiers[name], tasks[name], texts_for[name][:TEXTS]
    student, *_ = untrained(bert, task, texts)
    teacher = save_checkpoint(student, load_tokenizer(bert), tmp_path / "distilbert")
    assert teacher.model_type == "distilbert"
    _, logits, _, own, _ = untrained(teacher, task, texts)
    assert np.array_equal(own, logits)
    fewer, *_ = untrained(teacher, task, texts, layer_map=(1,))
    old, new = (m.distilbert.transformer.layer for m in (student, fewer))
    assert len(new) == 1
    assert torch.equal(new[0].ffn.lin1.weight, old[1].ffn.lin1.weight)


def test_hidden_states_are_the_teachers_whatever_its_pooler_does(
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
) -> None:
    for name in ("single", "multi"):
        teacher, texts = tiny_classifiers[name], texts_for[name][:TEXTS]
        _, _, first, _, own_first = untrained(teacher, tasks[name], texts)
        assert np.abs(own_first - first).max() < 1e-4


def test_a_pooler_between_the_extremes_is_fitted(
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
) -> None:
    _, logits, _, own, _ = untrained(
        tiny_classifiers["single"], tasks["single"], texts_for["single"][:TEXTS]
    )
    explained = 1 - np.square(own - logits).sum() / np.square(logits - logits.mean(0)).sum()
    assert explained > 0.9
    assert not np.abs(own - logits).max() < 1e-4  # as the decision record says: not exact


def test_another_activation_and_padding_token_are_taken_along(
    edited: Callable[..., Path], tasks: dict[str, Task], texts_for: dict[str, list[Any]]
) -> None:
    path = edited(config={"hidden_act": "gelu_new", "pad_token_id": 1})
    student, _, first, _, own_first = untrained(path, tasks["single"], texts_for["single"][:TEXTS])
    assert student.config.activation == "gelu_new"
    assert student.config.pad_token_id == 1
    assert np.abs(own_first - first).max() < 1e-4


def test_the_layers_taken_are_those_of_the_map(
    tmp_path: Path, tiny_classifiers: dict[str, Checkpoint], tasks: dict[str, Task], texts_for: Any
) -> None:
    student, *_ = untrained(
        tiny_classifiers["single"], tasks["single"], texts_for["single"][:TEXTS], layer_map=(1,)
    )
    teacher: Any = load_model(tiny_classifiers["single"], tasks["single"])
    (layer,) = student.distilbert.transformer.layer
    taken = teacher.bert.encoder.layer[1]
    for own, its in (
        (layer.attention.q_lin, taken.attention.self.query),
        (layer.attention.k_lin, taken.attention.self.key),
        (layer.attention.v_lin, taken.attention.self.value),
        (layer.attention.out_lin, taken.attention.output.dense),
        (layer.sa_layer_norm, taken.attention.output.LayerNorm),
        (layer.ffn.lin1, taken.intermediate.dense),
        (layer.ffn.lin2, taken.output.dense),
        (layer.output_layer_norm, taken.output.LayerNorm),
    ):
        assert torch.equal(own.weight, its.weight)
        assert torch.equal(own.bias, its.bias)


def test_maps_are_the_known_ones_and_each_only_once() -> None:
    assert layer_maps(6, 3) == {
        "last of each block": (1, 3, 5),
        "first to last": (0, 2, 5),
        "first of each block": (0, 2, 4),
    }
    assert layer_maps(4, 4) == {"last of each block": (0, 1, 2, 3)}
    assert layer_maps(6, 1) == {"last of each block": (5,), "first of each block": (0,)}
    for teacher in range(1, 25):
        for student in range(1, teacher + 1):
            maps = list(layer_maps(teacher, student).values())
            assert len(set(maps)) == len(maps)
            for map_ in maps:
                assert len(map_) == student == len(set(map_))
                assert list(map_) == sorted(map_)
                assert 0 <= map_[0] <= map_[-1] < teacher


@pytest.mark.parametrize(
    ("layers", "layer_map", "message"),
    [
        (3, None, "a student of 3 layers cannot be made of a teacher of 2"),
        (2, (0,), "layer_map names 1 layers and the student has 2"),
        (2, (0, 2), "layer_map names layer 2; the teacher .* has layers 0 to 1"),
        (1, (-1,), "layer_map names layer -1"),
    ],
)
def test_layers_that_are_not_there_are_named(
    tiny_classifiers: dict[str, Checkpoint], layers: int, layer_map: Any, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        check_layer_map(tiny_classifiers["single"], layers, layer_map)
