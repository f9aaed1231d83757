"""Distilling: the loss says what it should, the student learns, an interruption changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder, load_model, open_checkpoint
from edgebert_export.dataset import Dataset, Example
from edgebert_export.distill import (
    DistillationJob,
    DistillationLog,
    DistillConfig,
    check_teacher,
    distill,
    divergence,
)
from edgebert_export.errors import CheckpointError, TrainingError
from edgebert_export.teach import TeacherOutputs, answers, teach
from edgebert_runtime.manifest import Task

# 48 rows and 16 texts in batches of 8: 8 steps an epoch, a save every 4; two trials of 3 steps.
CONFIG = DistillConfig(epochs=2, batch_size=8, learning_rate=1e-3, trial_steps=3)

Run = Callable[..., tuple[Checkpoint, DistillationLog]]


class InterruptedRunError(Exception):
    """Raised out of a run, as Ctrl-C would be."""


@pytest.fixture(scope="module")
def taught(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_classifiers: dict[str, Checkpoint],
    datasets: dict[str, Dataset],
) -> dict[str, tuple[Checkpoint, Dataset, TeacherOutputs]]:
    """A teacher, rows with some unlabelled texts, and what it says of them, by task."""
    root = tmp_path_factory.mktemp("taught")
    found = {}
    for name, teacher in tiny_classifiers.items():
        data = datasets[name]
        texts = tuple(Example(row.text, ()) for row in data.test)
        data = Dataset(data.task, data.train, data.validation, data.test, (), texts)
        outputs = teach(teacher, data, max_length=32, hidden_limit_mb=10, out=root / name)
        found[name] = (teacher, data, outputs)
    return found


@pytest.fixture
def run(tmp_path: Path, taught: Any) -> Run:
    """Distils a tiny classifier; each call with its own directories unless ``work`` is given."""
    made: list[Path] = []

    def start(
        name: str = "single",
        config: DistillConfig = CONFIG,
        *,
        work: Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Checkpoint, DistillationLog]:
        made.append(tmp_path / f"run-{len(made)}")
        teacher, data, outputs = taught[name]
        work = work or made[-1] / "work"
        work.mkdir(parents=True, exist_ok=True)
        return distill(
            teacher,
            data,
            config,
            outputs=outputs,
            max_length=32,
            work=work,
            out=made[-1] / "out",
            on_progress=on_progress,
        )

    return start


def _interrupt_at(step: int) -> Callable[[int, int], None]:
    def on_progress(done: int, total: int) -> None:
        if done == step:
            raise InterruptedRunError

    return on_progress


# What comes out ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single", "multi", "pairs"])
def test_a_student_is_a_distilbert_for_the_same_task(
    run: Run, taught: Any, tasks: dict[str, Task], name: str
) -> None:
    student, log = run(name)
    assert student.model_type == "distilbert"
    assert student.architecture.layers == 1
    assert student.matches(tasks[name])
    assert student.labels == tasks[name].labels
    load_model(student, tasks[name])
    assert log.layer_map in [(0,), (1,)]
    assert set(log.trials) == {"last of each block", "first of each block"}
    assert (log.texts, log.unlabelled, log.hidden) == (64, 16, 64)
    assert log.training.steps == 16


def test_the_choice_with_the_smallest_divergence_is_taken(run: Run) -> None:
    _, log = run()
    maps = {"last of each block": (1,), "first of each block": (0,)}
    assert log.layer_map == maps[min(log.trials, key=lambda name: log.trials[name])]
    _, given = run(config=DistillConfig(epochs=1, batch_size=8, layer_map=(0,)))
    assert given.layer_map == (0,)
    assert given.trials == {}


def test_all_layers_need_no_trial(run: Run) -> None:
    student, log = run(config=DistillConfig(epochs=1, batch_size=8, layers=2))
    assert (log.layer_map, log.trials) == ((0, 1), {})
    assert student.architecture.layers == 2


@pytest.mark.parametrize("name", ["single", "multi", "pairs"])
def test_the_student_comes_closer_to_its_teacher(run: Run, taught: Any, name: str) -> None:
    _, data, outputs = taught[name]
    weights = {"kl_weight": 1.0, "hard_weight": 0.0, "hidden_weight": 1.0}
    config = DistillConfig(
        epochs=12, batch_size=8, learning_rate=1e-3, layer_map=(1,), patience=99, **weights
    )
    student, log = run(name, config)
    short, _ = run(name, DistillConfig(epochs=1, batch_size=64, layer_map=(1,), learning_rate=1e-9))

    def distance(checkpoint: Checkpoint) -> float:
        """From the teacher, on the texts that both learnt from."""
        model = load_model(checkpoint, data.task)
        encoder = checkpoint_encoder(checkpoint, max_length=32, text_pair=data.task.text_pair)
        rows = encoder.encode([row.text for row in (*data.train, *data.unlabelled)])
        logits = np.empty((len(rows), len(data.task.labels)), np.float32)
        for indices, raw, _ in answers(model, encoder, rows):
            logits[indices] = raw
        said = torch.from_numpy(np.array(outputs.logits[: len(rows)]))
        return float(divergence(torch.from_numpy(logits), said, 2.0, data.task).mean())

    assert distance(student) < 0.7 * distance(short)
    assert log.training.steps == 12 * 8


# The loss ---------------------------------------------------------------------------------


def test_divergence_is_the_textbook_one_for_one_label(tasks: dict[str, Task]) -> None:
    student, teacher = np.array([[1.0, -2.0], [0.0, 0.0]]), np.array([[3.0, 0.5], [0.0, 0.0]])
    p, q = (np.exp(z / 4) / np.exp(z / 4).sum(1, keepdims=True) for z in (teacher, student))
    expected = 16 * (p * np.log(p / q)).sum(1)
    found = divergence(torch.tensor(student), torch.tensor(teacher), 4.0, tasks["single"])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert found[1] == 0


def test_divergence_is_per_label_where_several_may_apply(tasks: dict[str, Task]) -> None:
    student, teacher = np.array([[1.0, -2.0, 0.3]]), np.array([[3.0, 0.5, 0.3]])
    p, q = (1 / (1 + np.exp(-z / 2)) for z in (teacher, student))
    expected = 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(1)
    found = divergence(torch.tensor(student), torch.tensor(teacher), 2.0, tasks["multi"])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["single", "multi", "pairs"])
def test_the_loss_is_the_weighted_mean_over_rows(taught: Any, tmp_path: Path, name: str) -> None:
    """Against a sum by row; one is without a label, one without hidden states."""
    teacher, data, outputs = taught[name]
    few = TeacherOutputs(outputs.logits, outputs.first_tokens, outputs.hidden, outputs.starts[:50])
    config = DistillConfig(kl_weight=0.7, hard_weight=0.3, hidden_weight=1.9, temperature=3.0)
    job = DistillationJob(teacher, data, config, few, 32, tmp_path)
    student: Any = load_model(teacher, data.task)  # of the right shape, and not equal
    torch.manual_seed(5)
    for weight in student.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    rows = [job.rows[index] for index in (0, 47, 48, 63)]  # labelled, labelled, not, neither
    batch = job._collate(rows)
    found = job._loss(student, batch).item()
    expected = 0.0
    for position, row in enumerate(rows):
        real = int(batch["attention_mask"][position].sum())
        with torch.no_grad():
            said = student(
                input_ids=batch["input_ids"][position : position + 1, :real],
                output_hidden_states=True,
            )
        kl = divergence(said.logits, torch.tensor(few.logits[[row.index]]), 3.0, data.task)
        expected += 0.7 * float(kl)
        if row.target is not None:
            loss = (
                torch.nn.functional.cross_entropy(said.logits[0], torch.tensor(row.target))
                if data.task.kind == "single_label"
                else torch.nn.BCEWithLogitsLoss()(said.logits[0], torch.tensor(row.target))
            )
            expected += 0.3 * float(loss)
        state = few.hidden_of(row.index)
        if state is not None:
            other = torch.tensor(state.astype(np.float32))
            cosine = torch.cosine_similarity(said.hidden_states[-1][0], other, dim=-1)
            expected += 1.9 * float((1 - cosine).mean())
    assert [few.hidden_of(row.index) is None for row in rows] == [False, False, False, True]
    assert found == pytest.approx(expected / len(rows), rel=1e-4)


def test_without_the_teacher_unlabelled_texts_say_nothing(run: Run) -> None:
    alone = CONFIG.hard_labels_only((1,))
    _, log = run(config=alone)
    assert (log.texts, log.unlabelled, log.hidden, log.trials) == (48, 0, None, {})
    assert log.training.steps == 12


def test_a_text_of_which_nothing_is_known_is_left_out(taught: Any, tmp_path: Path) -> None:
    """Without the outputs' divergence, an unlabelled text counts by its hidden states alone."""
    teacher, data, outputs = taught["single"]
    few = TeacherOutputs(outputs.logits, outputs.first_tokens, outputs.hidden, outputs.starts[:60])
    config = DistillConfig(kl_weight=0.0)
    job = DistillationJob(teacher, data, config, few, 32, tmp_path)
    assert [row.index for row in job.rows] == list(range(59))
    assert all(few.hidden_of(index) is not None for index in range(59))


# The same run gives the same weights ------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run: Run) -> None:
    first, first_log = run()
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)  # what the caller did before does not matter
    second, second_log = run()
    assert first.sha256 == second.sha256
    assert first_log == second_log
    other, _ = run(
        config=DistillConfig(epochs=2, batch_size=8, learning_rate=1e-3, trial_steps=3, seed=8)
    )
    assert other.sha256 != first.sha256


@pytest.mark.parametrize("step", [2, 5, 8, 13, 21])
def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(
    run: Run, tmp_path: Path, step: int
) -> None:
    """In the first trial, in the second, before the first save, and after the first and third."""
    whole, whole_log = run()
    work = tmp_path / "work"
    with pytest.raises(InterruptedRunError):
        run(work=work, on_progress=_interrupt_at(step))
    steps: list[int] = []
    resumed, log = run(work=work, on_progress=lambda done, _: steps.append(done))
    trials_done = min((step - 1) // 3, 2) * 3
    assert steps[0] == 1 + (trials_done if step <= 6 else 6 + (step - 7) // 4 * 4)
    assert log == whole_log
    assert resumed.sha256 == whole.sha256


def test_progress_rises_to_the_total_trials_included(run: Run) -> None:
    seen: list[tuple[int, int]] = []
    run(on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, 23))
    assert {total for _, total in seen} == {22}


# Bad input --------------------------------------------------------------------------------


def test_a_teacher_must_be_fine_tuned_for_the_task_and_have_the_layers(
    tiny_encoder: Path, tiny_classifiers: dict[str, Checkpoint], tasks: dict[str, Task]
) -> None:
    with pytest.raises(CheckpointError, match=r"no classification head.*fine-tuned first"):
        check_teacher(open_checkpoint(tiny_encoder), tasks["single"], CONFIG)
    with pytest.raises(CheckpointError, match=r"3 labels .*entails"):
        check_teacher(tiny_classifiers["pairs"], tasks["single"], CONFIG)
    with pytest.raises(TrainingError, match="3 layers cannot be made of a teacher of 2"):
        check_teacher(tiny_classifiers["single"], tasks["single"], DistillConfig(layers=3))
    with pytest.raises(TrainingError, match="names layer 7"):
        check_teacher(tiny_classifiers["single"], tasks["single"], DistillConfig(layer_map=(7,)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_weight": 0, "hard_weight": 0}, "nothing trains the head"),
        ({"layers": 3, "layer_map": (1, 2)}, "names 2 layers and layers is 3"),
        ({"layer_map": ()}, "names no layer"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**values)
