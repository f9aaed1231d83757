"""Fine-tuning: it learns, keeps the best weights, and an interruption changes nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
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
    open_checkpoint,
)
from edgebert_export.dataset import Dataset, Example
from edgebert_export.finetune import (
    FinetuneConfig,
    finetune,
    is_needed,
)
from edgebert_export.training import TrainingLog, validation_score
from edgebert_runtime.manifest import Task

# 48 rows in batches of 8: 6 steps an epoch, an evaluation and a Trainer checkpoint every 3.
CONFIG = FinetuneConfig(epochs=2, batch_size=8, learning_rate=1e-3)
STILL = FinetuneConfig(epochs=4, batch_size=8, learning_rate=1e-12, patience=2)
"""Learns nothing, so that no evaluation is better than the first."""

Run = Callable[..., tuple[Checkpoint, TrainingLog]]


class InterruptedRunError(Exception):
    """Raised out of a run, as Ctrl-C would be."""


@pytest.fixture
def run(tmp_path: Path, tiny_encoder: Path, datasets: dict[str, Dataset]) -> Run:
    """Fine-tunes the tiny encoder; each call with its own directories unless ``work`` is given."""
    made: list[Path] = []

    def start(
        data: Dataset | None = None,
        config: FinetuneConfig = CONFIG,
        *,
        work: Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Checkpoint, TrainingLog]:
        made.append(tmp_path / f"run-{len(made)}")
        return finetune(
            open_checkpoint(tiny_encoder),
            data or datasets["single"],
            config,
            max_length=32,
            work=work or made[-1] / "work",
            out=made[-1] / "out",
            on_progress=on_progress,
        )

    return start


def _weights(checkpoint: Checkpoint) -> bytes:
    return (checkpoint.path / "model.safetensors").read_bytes()


def _interrupt_at(step: int) -> Callable[[int, int], None]:
    def on_progress(done: int, total: int) -> None:
        if done == step:
            raise InterruptedRunError

    return on_progress


# The same run gives the same weights ------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run: Run) -> None:
    first, first_log = run()
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)  # what the caller did before does not matter
    second, second_log = run()
    assert first.sha256 == second.sha256
    assert first_log == second_log
    other, _ = run(config=FinetuneConfig(epochs=2, batch_size=8, learning_rate=1e-3, seed=8))
    assert other.sha256 != first.sha256


@pytest.mark.parametrize("step", [2, 4, 8, 11])
def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(
    run: Run, tmp_path: Path, step: int
) -> None:
    whole_work, work = tmp_path / "whole", tmp_path / "work"
    whole, whole_log = run(work=whole_work)
    with pytest.raises(InterruptedRunError):
        run(work=work, on_progress=_interrupt_at(step))
    steps: list[int] = []
    resumed, log = run(work=work, on_progress=lambda done, _: steps.append(done))
    assert steps[0] == (step - 1) // 3 * 3 + 1  # it went on from the checkpoint before
    assert log == whole_log
    assert _weights(resumed) == _weights(whole)
    # What is kept may be from before the interruption; the last step's weights never are.
    last = "checkpoint-12/model.safetensors"
    assert (work / last).read_bytes() == (whole_work / last).read_bytes()


_CHILD = """
import json, sys, time
from pathlib import Path
import msgspec
from edgebert_export.checkpoint import open_checkpoint
from edgebert_export.dataset import Dataset, Example
from edgebert_export.finetune import FinetuneConfig, finetune
from edgebert_runtime.manifest import Task

given = json.loads(Path(sys.argv[1]).read_text())
work = Path(given["work"])
rows = {n: tuple(Example(t, tuple(l)) for t, l in r) for n, r in given["rows"].items()}
def hold(done, total):
    if list(work.glob("checkpoint-*/edgebert-complete")):
        Path(given["ready"]).touch()
        time.sleep(120)
finetune(open_checkpoint(Path(given["checkpoint"])),
         Dataset(msgspec.convert(given["task"], Task), **rows, test=(), calibration=()),
         msgspec.convert(given["config"], FinetuneConfig),
         max_length=32, work=work, out=Path(given["out"]), on_progress=hold)
"""


def test_a_run_killed_after_its_first_checkpoint_ends_with_the_same_weights(
    run: Run, tmp_path: Path, tiny_encoder: Path, datasets: dict[str, Dataset]
) -> None:
    import msgspec

    data = datasets["single"]
    work, ready, out = tmp_path / "work", tmp_path / "ready", tmp_path / "out"
    given = {
        "rows": {
            name: [(row.text, row.labels) for row in getattr(data, name)]
            for name in ("train", "validation")
        },
        "checkpoint": str(tiny_encoder),
        "task": msgspec.to_builtins(data.task),
        "config": msgspec.to_builtins(CONFIG),
        "work": str(work),
        "ready": str(ready),
        "out": str(out),
    }
    (tmp_path / "given.json").write_text(json.dumps(given))
    with (tmp_path / "child.txt").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(tmp_path / "given.json")], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 120
        while not ready.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert child.poll() is None, (tmp_path / "child.txt").read_text()
    finally:
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    steps: list[int] = []
    resumed, _ = run(work=work, on_progress=lambda done, _: steps.append(done))
    assert steps[0] == 4
    assert _weights(resumed) == _weights(run()[0])


def test_a_half_written_trainer_checkpoint_is_thrown_away_unread(run: Run, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.raises(InterruptedRunError):
        run(work=work, on_progress=_interrupt_at(4))
    half = work / "checkpoint-6"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 6')
    (half / "model.safetensors").write_bytes(b"half")
    resumed, _ = run(work=work)
    assert _weights(resumed) == _weights(run()[0])
    # With no whole one at all, training starts afresh.
    shutil.rmtree(work)
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    steps: list[int] = []
    again, _ = run(work=work, on_progress=lambda done, _: steps.append(done))
    assert steps[0] == 1
    assert _weights(again) == _weights(resumed)


def test_a_trainer_checkpoint_that_a_kill_left_half_deleted_is_not_read(
    run: Run, tmp_path: Path
) -> None:
    """The Trainer removes old checkpoints file by file, and the mark may be the last to go."""
    work = tmp_path / "work"
    with pytest.raises(InterruptedRunError):
        run(work=work, on_progress=_interrupt_at(8))
    newest = work / "checkpoint-6"
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth"):
        (newest / name).unlink()
    resumed, _ = run(work=work)
    assert _weights(resumed) == _weights(run()[0])


@pytest.mark.parametrize("config", [CONFIG, STILL], ids=["finished", "stopped early"])
def test_running_a_finished_training_again_gives_the_same_result(
    run: Run, tmp_path: Path, config: FinetuneConfig
) -> None:
    work = tmp_path / "work"
    first, first_log = run(config=config, work=work)
    second, second_log = run(config=config, work=work)
    assert second_log == first_log
    assert _weights(second) == _weights(first)


# Early stopping and what is kept ----------------------------------------------------------


def test_training_stops_after_as_many_evaluations_without_gain_as_patience_says(run: Run) -> None:
    _, log = run(config=STILL)
    assert list(log.validation_scores) == [3, 6, 9]
    assert log.steps == 9
    assert log.best_step == 3


def test_an_interruption_does_not_lengthen_patience(run: Run, tmp_path: Path) -> None:
    _, whole = run(config=STILL)
    work = tmp_path / "work"
    with pytest.raises(InterruptedRunError):
        run(config=STILL, work=work, on_progress=_interrupt_at(7))
    _, resumed = run(config=STILL, work=work)
    assert resumed == whole


def _score(checkpoint: Checkpoint, data: Dataset) -> float:
    """Scores a checkpoint on the validation rows, independently of the Trainer."""
    task = data.task
    encoder = checkpoint_encoder(checkpoint, max_length=32, text_pair=task.text_pair)
    inputs = encoder.collate(encoder.encode([row.text for row in data.validation]))
    model: Any = load_model(checkpoint, task)
    with torch.inference_mode():
        logits = model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.numpy()
    if task.kind == "single_label":
        return float(np.mean([r.labels[0] for r in data.validation] == logits.argmax(-1)))
    found = [
        (score, index in row.labels)
        for row, scores in zip(data.validation, logits, strict=True)
        for index, score in enumerate(scores)
    ]
    # Average precision: the mean, over the labels that apply, of the precision down to each.
    ranked = [applies for _, applies in sorted(found, key=lambda pair: -pair[0])]
    precisions = [sum(ranked[:n]) / n for n in range(1, len(ranked) + 1) if ranked[n - 1]]
    return float(np.mean(precisions))


@pytest.mark.parametrize(
    ("name", "metric"),
    [("single", "accuracy"), ("multi", "average precision"), ("pairs", "accuracy")],
)
def test_the_weights_kept_are_those_of_the_best_step(
    run: Run, datasets: dict[str, Dataset], name: str, metric: str
) -> None:
    data = datasets[name]
    config = FinetuneConfig(epochs=3, batch_size=8, learning_rate=5e-3, patience=9)
    tuned, log = run(data, config)
    assert log.metric == metric
    assert list(log.validation_scores) == [3, 6, 9, 12, 15, 18]
    best = max(log.validation_scores.values())
    assert log.validation_scores[log.best_step] == best
    assert min(s for s, v in log.validation_scores.items() if v == best) == log.best_step
    assert len(set(log.validation_scores.values())) > 1  # else this test shows nothing
    assert _score(tuned, data) == pytest.approx(best, abs=1e-6)
    assert tuned.labels == data.task.labels
    assert tuned.matches(data.task)


def test_an_easy_rule_is_learnt(run: Run, tasks: dict[str, Task]) -> None:
    """Which of two words a text starts with decides its label; chance would score 0.5."""
    rng = random.Random(0)
    filler = ["the", "work", "and", "my", "to", "it", "of", "with", "for", "in"]
    rows = [
        Example(" ".join([("not", "they")[label], rng.choice(filler)]), (label,))
        for label in rng.choices((0, 1), k=208)
    ]
    data = Dataset(tasks["single"], tuple(rows[:160]), tuple(rows[160:]), (), ())
    config = FinetuneConfig(
        epochs=6, batch_size=16, learning_rate=3e-3, evaluations_per_epoch=1, patience=9
    )
    tuned, log = run(data, config)
    assert log.validation_scores[log.best_step] > 0.9
    assert _score(tuned, data) > 0.9


def test_a_classifier_for_the_same_labels_is_trained_on_from_its_own_head(
    tiny_classifiers: dict[str, Checkpoint], datasets: dict[str, Dataset], tmp_path: Path
) -> None:
    data = datasets["single"]
    still = FinetuneConfig(epochs=1, batch_size=16, learning_rate=1e-12, weight_decay=0)
    tuned, _ = finetune(
        tiny_classifiers["single"],
        data,
        still,
        max_length=32,
        work=tmp_path / "work",
        out=tmp_path / "out",
    )
    before = load_model(tiny_classifiers["single"], data.task).state_dict()
    after = load_model(tuned, data.task).state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


# Progress, scores, modes ------------------------------------------------------------------


def test_progress_rises_step_by_step_to_the_total(run: Run) -> None:
    seen: list[tuple[int, int]] = []
    _, log = run(on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 12) for step in range(1, 13)]
    assert log.steps == 12


def test_progress_ends_where_training_stopped_early(run: Run) -> None:
    seen: list[tuple[int, int]] = []
    _, log = run(config=STILL, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 24) for step in range(1, log.steps + 1)]


def test_the_validation_score_is_accuracy_or_average_precision(tasks: dict[str, Task]) -> None:
    single = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]], dtype=np.float32)
    assert validation_score(tasks["single"], single, np.array([0, 1, 1])) == pytest.approx(2 / 3)
    multi = np.array([[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]], dtype=np.float32)
    targets = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    # From 1 on, one of two is right and half is found; from -1 on, two of six, and all.
    assert validation_score(tasks["multi"], multi, targets) == pytest.approx(0.5 / 2 + 0.5 / 3)
    assert validation_score(tasks["multi"], targets - 9, targets) == 1.0  # below any threshold
    assert validation_score(tasks["multi"], multi, targets * 0) == 0.0


@pytest.mark.parametrize(
    ("mode", "kind", "expected"),
    [
        ("auto", "encoder", True),
        ("auto", "same labels", False),
        ("auto", "other labels", False),
        ("always", "encoder", True),
        ("always", "same labels", True),
        ("always", "other labels", True),
        ("never", "encoder", False),
        ("never", "same labels", False),
        ("never", "other labels", False),
    ],
)
def test_whether_fine_tuning_is_needed(
    tiny_encoder: Path,
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    mode: Any,
    kind: str,
    expected: bool,
) -> None:
    checkpoint = {
        "encoder": open_checkpoint(tiny_encoder),
        "same labels": tiny_classifiers["single"],
        "other labels": tiny_classifiers["pairs"],
    }[kind]
    assert is_needed(checkpoint, tasks["single"], FinetuneConfig(mode=mode)) is expected
