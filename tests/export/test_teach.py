"""What the teacher says is asked once, kept on disk, and bounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder, load_model
from edgebert_export.dataset import Dataset, Example
from edgebert_export.errors import CheckpointError
from edgebert_export.teach import TeacherOutputs, _halved, open_outputs, teach


def with_unlabelled(data: Dataset) -> Dataset:
    texts = tuple(Example(row.text, ()) for row in data.test)
    return Dataset(data.task, data.train, data.validation, (), (), texts)


def ask(teacher: Checkpoint, data: Dataset, out: Path, limit_mb: int = 100) -> TeacherOutputs:
    return teach(teacher, data, max_length=32, hidden_limit_mb=limit_mb, out=out)


@pytest.mark.parametrize("name", ["single", "multi", "pairs"])
def test_what_is_kept_is_what_the_teacher_says(
    tmp_path: Path,
    tiny_classifiers: dict[str, Checkpoint],
    datasets: dict[str, Dataset],
    name: str,
) -> None:
    data, teacher = with_unlabelled(datasets[name]), tiny_classifiers[name]
    outputs = ask(teacher, data, tmp_path / "outputs")
    rows = [*data.train, *data.unlabelled, *data.validation]
    assert outputs.logits.shape == (len(rows), len(data.task.labels))
    encoder = checkpoint_encoder(teacher, max_length=32, text_pair=data.task.text_pair)
    model = load_model(teacher, data.task)
    for index, row in enumerate(rows):
        inputs = encoder.collate(encoder.encode([row.text]))
        with torch.inference_mode():
            tensors = {key: torch.from_numpy(array) for key, array in inputs.items()}
            said = model(**tensors, output_hidden_states=True)
        state = said.hidden_states[-1][0].numpy()
        np.testing.assert_allclose(outputs.logits[index], said.logits[0].numpy(), atol=2e-4)
        kept = outputs.hidden_of(index)
        if index >= len(data.train) + len(data.unlabelled):
            assert kept is None  # nothing is learnt from validation rows
            assert index >= len(outputs.first_tokens)
        else:
            np.testing.assert_allclose(outputs.first_tokens[index], state[0], atol=2e-4)
            assert kept is not None
            assert kept.dtype == np.float16
            assert kept.shape == state.shape
            np.testing.assert_allclose(kept, state, atol=5e-3, rtol=1e-3)
    again = open_outputs(tmp_path / "outputs")
    assert np.array_equal(again.logits, outputs.logits)
    assert np.array_equal(again.hidden, outputs.hidden)


def test_hidden_states_stop_at_the_limit(
    tmp_path: Path, tiny_classifiers: dict[str, Checkpoint], datasets: dict[str, Dataset]
) -> None:
    data, teacher = datasets["single"], tiny_classifiers["single"]
    whole = ask(teacher, data, tmp_path / "whole")
    # The tiny model's states of all rows take less than one megabyte; more of the same take more.
    many = Dataset(data.task, data.train * 40, data.validation, (), ())
    bounded = ask(teacher, many, tmp_path / "bounded", limit_mb=1)
    assert bounded.hidden.nbytes <= 10**6
    kept = len(bounded.starts) - 1
    assert 0 < kept < len(many.train)
    assert bounded.starts[-1] == len(bounded.hidden)
    assert 10**6 - bounded.hidden.nbytes < 32 * 32 * 2  # one more text would not have fitted
    assert bounded.hidden_of(kept) is None
    for index in range(len(data.train)):
        np.testing.assert_allclose(bounded.hidden_of(index), whole.hidden_of(index), atol=1e-2)
    assert len(bounded.logits) == len(many.train) + len(data.validation)
    none = ask(teacher, data, tmp_path / "none", limit_mb=0)
    assert none.hidden.shape == (0, 32)
    assert none.hidden_of(0) is None
    assert np.array_equal(none.logits, whole.logits)


def test_a_teacher_for_other_labels_is_refused(
    tmp_path: Path, tiny_classifiers: dict[str, Checkpoint], datasets: dict[str, Dataset]
) -> None:
    with pytest.raises(CheckpointError, match="3 labels"):
        ask(tiny_classifiers["pairs"], datasets["single"], tmp_path / "outputs")
    assert not (tmp_path / "outputs").exists()


def test_a_state_too_large_for_half_precision_keeps_its_direction() -> None:
    state = np.array([[3e5, -6e5, 0.0], [1.0, 2.0, 3.0]], dtype=np.float32)
    halved = _halved(state)
    assert np.isfinite(halved).all()
    np.testing.assert_allclose(halved[0] / halved[0, 0], [1, -2, 0], rtol=1e-3)
    np.testing.assert_array_equal(halved[1], state[1])
