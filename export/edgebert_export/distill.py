"""Distils a classifier into a smaller DistilBERT: Checkpoint and Dataset in, Checkpoint out.

The loss is that of DistilBERT (Sanh et al. 2019, section 3, without its language modelling): the
teacher's softened outputs (Hinton et al. 2015), the labels, and the direction of the teacher's
last hidden states.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edgebert_export import processes
from edgebert_export.checkpoint import (
    Checkpoint,
    check_matches,
    checkpoint_encoder,
    load_model,
    load_tokenizer,
    model_inputs,
    open_checkpoint,
    save_checkpoint,
)
from edgebert_export.dataset import Dataset, Example
from edgebert_export.errors import CheckpointError, TrainingError
from edgebert_export.student import check_layer_map, layer_maps, make_student
from edgebert_export.teach import TeacherOutputs, answers
from edgebert_export.training import TrainingConfig, TrainingLog, encode_all, target_of, train
from edgebert_runtime.encoder import Encoded
from edgebert_runtime.manifest import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = [
    "DistillConfig",
    "DistillationJob",
    "DistillationLog",
    "check_layers",
    "check_teacher",
    "distill",
]


class DistillConfig(TrainingConfig, frozen=True, kw_only=True):
    """How to distil."""

    layers: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Layers of the student; half of the teacher's if left out."),
    ] = None
    layer_map: Annotated[
        tuple[Annotated[int, Meta(ge=0)], ...] | Literal["auto"],
        Meta(
            description="Which of the teacher's layers the student starts from, counted from 0, "
            "for instance `[1, 3, 5]`. `auto` trains each sensible choice for `trial_steps` and "
            "takes the one that is closest to the teacher on validation rows."
        ),
    ] = "auto"
    trial_steps: Annotated[
        int, Meta(ge=1, description="Steps for each choice of layers, with `layer_map = auto`.")
    ] = 50
    temperature: Annotated[
        float, Meta(gt=0, description="Softens the outputs of teacher and student alike.")
    ] = 2.0
    kl_weight: Annotated[
        float, Meta(ge=0, description="Weight of the divergence from the teacher's outputs.")
    ] = 1.0
    hard_weight: Annotated[float, Meta(ge=0, description="Weight of the labels.")] = 0.5
    hidden_weight: Annotated[
        float,
        Meta(ge=0, description="Weight of the angle to the teacher's last hidden states."),
    ] = 1.0
    hidden_limit_mb: Annotated[
        int,
        Meta(
            ge=0,
            description="Most disk space for the teacher's hidden states, in megabytes (10^6 "
            "bytes). Texts past it do without that term.",
        ),
    ] = 2000
    dropout: Annotated[float, Meta(ge=0, lt=1, description="Of the student.")] = 0.1
    epochs: Annotated[
        int,
        Meta(ge=1, le=1000, description="Most passes over the rows, unlabelled ones included."),
    ] = 4
    learning_rate: Annotated[float, Meta(gt=0, description="Peak learning rate of AdamW.")] = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight + self.hard_weight == 0:
            raise ValueError("kl_weight and hard_weight are both 0: nothing trains the head")
        wanted = self.layers or len(self.layer_map)
        if self.layer_map != "auto" and len(self.layer_map) != wanted:
            raise ValueError(f"layer_map names {len(self.layer_map)} layers and layers is {wanted}")
        if self.layer_map == ():
            raise ValueError("layer_map names no layer")

    def layers_for(self, teacher: Checkpoint) -> int:
        """Layers of the student of ``teacher``."""
        if self.layer_map != "auto":
            return len(self.layer_map)
        return self.layers or max(1, teacher.architecture.layers // 2)

    def hard_labels_only(self, layer_map: tuple[int, ...]) -> DistillConfig:
        """The same training without the teacher: what distilling must be better than."""
        default = DistillConfig()
        return msgspec.structs.replace(
            self,
            layers=None,
            layer_map=layer_map,
            kl_weight=0.0,
            hidden_weight=0.0,
            hard_weight=1.0,
            # These then mean nothing; another value must not look like another training.
            temperature=default.temperature,
            trial_steps=default.trial_steps,
            hidden_limit_mb=default.hidden_limit_mb,
        )


class DistillationLog(msgspec.Struct, frozen=True, kw_only=True):
    """How distilling went.

    Attributes:
        layer_map: The teacher's layers that the student started from.
        trials: Divergence from the teacher on validation rows after ``trial_steps``, by choice of
            layers; empty when the recipe chose.
        texts: Texts learnt from.
        unlabelled: Of these, how many have no label.
        hidden: Of these, how many had the teacher's hidden states; ``None`` if not asked for.
        training: The training itself.
    """

    layer_map: tuple[int, ...]
    trials: dict[str, float]
    texts: int
    unlabelled: int
    hidden: int | None
    training: TrainingLog


@dataclass(frozen=True)
class _Row:
    """A text; ``index`` is its place in the teacher's outputs, ``None`` to validate on labels."""

    encoded: Encoded
    target: NDArray[Any] | None
    index: int | None


def check_layers(teacher: Checkpoint, config: DistillConfig) -> None:
    """Checks that a student as ``config`` wants it can be made of ``teacher``.

    Raises:
        TrainingError: It has not enough layers, or not those.
    """
    layers = config.layers_for(teacher)
    check_layer_map(teacher, layers, None if config.layer_map == "auto" else config.layer_map)


def check_teacher(teacher: Checkpoint, task: Task, config: DistillConfig) -> None:
    """Checks all that can be known of a teacher before its weights are loaded.

    Raises:
        CheckpointError: It is not fine-tuned, or for other labels.
        TrainingError: It has not enough layers, or not those.
    """
    if teacher.labels is None:
        raise CheckpointError(
            f"{teacher.path} has no classification head: a teacher must be fine-tuned first "
            "(edgebert export does, unless finetune.mode says never)"
        )
    check_matches(teacher, task, hint="")
    check_layers(teacher, config)


def distill(
    teacher: Checkpoint,
    data: Dataset,
    config: DistillConfig,
    *,
    outputs: TeacherOutputs,
    max_length: int,
    work: Path,
    out: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Checkpoint, DistillationLog]:
    """Trains a student on ``data.train`` and ``data.unlabelled``; keeps the best on validation.

    Args:
        teacher: A classifier for the task of ``data``.
        data: Rows to train and to validate on.
        config: How.
        outputs: What the teacher says of ``data``.
        max_length: Longest row in tokens.
        work: What an interrupted run leaves for the next; see ``training.train``.
        out: Where the student is written.
        on_progress: Called with steps done and steps in all.

    Raises:
        CheckpointError: The teacher cannot be loaded, or is no classifier for the task.
        TrainingError: The student cannot be made or trained as ``config`` says.
    """
    check_teacher(teacher, data.task, config)
    job = DistillationJob(teacher, data, config, outputs, max_length, work)
    maps = layer_maps(teacher.architecture.layers, config.layers_for(teacher))
    needs_trials = config.layer_map == "auto" and len(maps) > 1
    trial_steps = len(maps) * config.trial_steps if needs_trials else 0

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(done, trial_steps + total)

    trials: dict[str, float] = {}
    if config.layer_map != "auto":
        layer_map = config.layer_map
    elif not needs_trials:
        (layer_map,) = maps.values()
    else:
        trials = job.try_out(maps, lambda done, _: report(done, job.steps))
        layer_map = maps[min(trials, key=lambda name: trials[name])]

    student, training = job.train(
        layer_map, work / "student", lambda done, total: report(trial_steps + done, total)
    )
    if processes.is_leader():
        save_checkpoint(student.cpu(), load_tokenizer(teacher), out)
    processes.wait_for_all()
    log = DistillationLog(
        layer_map=layer_map,
        trials=trials,
        texts=len(job.rows),
        unlabelled=sum(row.target is None for row in job.rows),
        hidden=(
            sum(job.hidden_of(row) is not None for row in job.rows)
            if config.hidden_weight > 0
            else None
        ),
        training=training,
    )
    return open_checkpoint(out), log


class DistillationJob:
    """What the trials and the training itself share: models, rows, and the loss.

    Args:
        teacher: A classifier for the task of ``data``.
        data: Rows to train and to validate on.
        config: How.
        outputs: What the teacher says of ``data``.
        max_length: Longest row in tokens.
        work: What an interrupted run leaves for the next.
    """

    def __init__(
        self,
        teacher: Checkpoint,
        data: Dataset,
        config: DistillConfig,
        outputs: TeacherOutputs,
        max_length: int,
        work: Path,
    ) -> None:
        self._teacher = teacher
        self._task = data.task
        self._config = config
        self._outputs = outputs
        self._work = work
        self._model = load_model(teacher, data.task)
        self.encoder = checkpoint_encoder(
            teacher,
            max_length=max_length,
            text_pair=data.task.text_pair,
            input_names=model_inputs("distilbert"),
        )
        self._validation_start = len(outputs.logits) - len(data.validation)

        def encoded(examples: Sequence[Example]) -> list[Encoded]:
            return encode_all(self.encoder, [example.text for example in examples])

        labelled = zip(encoded(data.train), data.train, strict=True)
        self.rows = [
            _Row(row, target_of(example, data.task), index)
            for index, (row, example) in enumerate(labelled)
        ]
        more = (
            _Row(row, None, index)
            for index, row in enumerate(encoded(data.unlabelled), start=len(data.train))
        )
        # A text without a label says something by what the teacher says of it, or nothing.
        self.rows += [r for r in more if config.kl_weight > 0 or self.hidden_of(r) is not None]
        self.validation = [
            _Row(row, target_of(example, data.task), None)
            for row, example in zip(encoded(data.validation), data.validation, strict=True)
        ]
        self.steps = config.epochs * -(-len(self.rows) // config.batch_size)

    def try_out(
        self, maps: Mapping[str, tuple[int, ...]], on_progress: Callable[[int, int], None]
    ) -> dict[str, float]:
        """Returns each map's divergence from the teacher on validation rows after a short run."""
        file = self._work / "trials.json"
        done: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
        done = processes.from_leader(done)
        steps = self._config.trial_steps
        for number, (name, layer_map) in enumerate(maps.items()):
            if name in done:
                continue
            work = self._work / ("trial-" + "-".join(map(str, layer_map)))
            report = partial(_report_after, number * steps, on_progress)
            student, _ = self.train(layer_map, work, report, max_steps=steps)
            done[name] = processes.from_leader(self._validation_divergence(student))
            if not math.isfinite(done[name]):
                raise TrainingError("the trial of a layer map diverged; lower learning_rate")
            if processes.is_leader():
                new = file.with_suffix(".new")
                new.write_text(json.dumps(done))
                new.replace(file)
                shutil.rmtree(work)
            processes.wait_for_all()
        return done

    def train(
        self,
        layer_map: tuple[int, ...],
        work: Path,
        on_progress: Callable[[int, int], None],
        max_steps: int | None = None,
    ) -> tuple[PreTrainedModel, TrainingLog]:
        """Makes a student of some of the teacher's layers, and trains it."""
        student = self.new_student(layer_map)
        log = train(
            student,
            self.rows,
            self.validation,
            task=self._task,
            config=self._config,
            collate=self._collate,
            length=lambda row: len(row.encoded.ids),
            loss=self._loss,
            max_steps=max_steps,
            work=work,
            on_progress=on_progress,
        )
        return student, log

    def new_student(self, layer_map: tuple[int, ...]) -> PreTrainedModel:
        """Returns a student before training; random numbers start from the seed."""
        import torch
        from transformers import set_seed

        set_seed(self._config.seed)
        return make_student(
            self._teacher,
            self._model,
            self._task,
            layer_map,
            dropout=self._config.dropout,
            first_tokens=torch.from_numpy(np.array(self._outputs.first_tokens)),
            logits=torch.from_numpy(
                np.array(self._outputs.logits[: len(self._outputs.first_tokens)])
            ),
        )

    def hidden_of(self, row: _Row) -> NDArray[np.float16] | None:
        """Returns the teacher's hidden states for a row, if the loss needs them and has them."""
        if row.index is None or self._config.hidden_weight == 0:
            return None
        return self._outputs.hidden_of(row.index)

    def _collate(self, batch: list[_Row]) -> dict[str, torch.Tensor]:
        import torch

        arrays: dict[str, NDArray[Any]] = dict(self.encoder.collate([row.encoded for row in batch]))
        none = _no_target(self._task)
        arrays["labels"] = np.stack([none if r.target is None else r.target for r in batch])
        indices = [row.index for row in batch if row.index is not None]
        if indices:
            arrays["is_labelled"] = np.array([row.target is not None for row in batch], np.float32)
            arrays["teacher_logits"] = np.array(self._outputs.logits[indices])
        if indices and self._config.hidden_weight > 0:
            shape = arrays["input_ids"].shape
            states = np.zeros((*shape, self._outputs.hidden.shape[1]), dtype=np.float16)
            known = np.zeros(shape, dtype=np.float32)
            for position, row in enumerate(batch):
                state = self.hidden_of(row)
                if state is not None:
                    states[position, : len(state)] = state
                    known[position, : len(state)] = 1 / len(state)
            arrays |= {"teacher_hidden": states, "token_weights": known}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _loss(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch
        from torch.nn import functional

        config = self._config
        found = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=config.hidden_weight > 0,
        )
        logits = found.logits.float()
        loss = torch.zeros(len(logits), device=logits.device)  # one term a row
        if config.kl_weight > 0:
            loss = loss + config.kl_weight * divergence(
                logits, batch["teacher_logits"], config.temperature, self._task
            )
        if config.hard_weight > 0:
            if self._task.kind == "single_label":
                hard = functional.cross_entropy(logits, batch["labels"], reduction="none")
            else:
                hard = functional.binary_cross_entropy_with_logits(
                    logits, batch["labels"], reduction="none"
                ).mean(dim=-1)
            loss = loss + config.hard_weight * hard * batch["is_labelled"]
        if config.hidden_weight > 0:
            angle = 1 - functional.cosine_similarity(
                found.hidden_states[-1].float(), batch["teacher_hidden"].float(), dim=-1
            )
            loss = loss + config.hidden_weight * (angle * batch["token_weights"]).sum(dim=-1)
        return loss.mean()

    def _validation_divergence(self, student: PreTrainedModel) -> float:
        import torch

        total = 0.0
        rows = [row.encoded for row in self.validation]
        for indices, logits, _ in answers(student, self.encoder, rows):
            said = self._outputs.logits[[self._validation_start + index for index in indices]]
            by_row = divergence(
                torch.from_numpy(logits),
                torch.from_numpy(np.array(said)),
                self._config.temperature,
                self._task,
            )
            total += float(by_row.sum())
        return total / len(rows)


def _report_after(
    before: int, on_progress: Callable[[int, int], None], done: int, total: int
) -> None:
    on_progress(before + done, total)


def _no_target(task: Task) -> NDArray[Any]:
    """Returns what stands where a label would, for a text that has none; its weight is 0."""
    if task.kind == "single_label":
        return np.asarray(0, dtype=np.int64)
    return np.zeros(len(task.labels), dtype=np.float32)


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, task: Task
) -> torch.Tensor:
    """Kullback-Leibler divergence of the softened outputs, times temperature squared.

    The square keeps the gradients' size when the temperature changes (Hinton et al. 2015,
    section 2). Where several labels may apply, each is a distribution of its own over yes and no;
    the mean over the labels is taken.

    Args:
        student: Raw outputs, ``float32[n, labels]``.
        teacher: Raw outputs, ``float32[n, labels]``.
        temperature: Divides both.
        task: What the columns mean.

    Returns:
        ``float32[n]``.
    """
    import torch
    from torch.nn import functional

    if task.kind == "multi_label":  # (no, yes) as two classes: softmax of (0, z) is sigmoid of z
        student, teacher = (torch.stack([torch.zeros_like(z), z], -1) for z in (student, teacher))
    by_class = functional.kl_div(
        functional.log_softmax(student / temperature, dim=-1),
        functional.log_softmax(teacher / temperature, dim=-1),
        log_target=True,
        reduction="none",
    )
    by_row = by_class.sum(dim=-1)
    if task.kind == "multi_label":
        by_row = by_row.mean(dim=-1)
    return by_row * temperature**2
