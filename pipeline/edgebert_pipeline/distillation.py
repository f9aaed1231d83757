"""The stages that make a student, for the chain and for ``edgebert distill``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgebert_export.checkpoint import Checkpoint, open_checkpoint
from edgebert_export.dataset import Dataset
from edgebert_export.distill import DistillationLog, DistillConfig, check_teacher, distill
from edgebert_export.teach import open_outputs, teach
from edgebert_pipeline.build import LOADING, TRAINING, BuildDirectory, stage_key
from edgebert_pipeline.progress import Progress
from edgebert_pipeline.report import Distillation
from edgebert_pipeline.scores import HARD_LABEL, STUDENT, TEACHER

__all__ = ["Distilled", "run_distillation"]

_DISTILLING = (
    *LOADING,
    *TRAINING,
    "edgebert_pipeline.distillation",
    "edgebert_export.distill",
    "edgebert_export.student",
    "edgebert_export.teach",
)


@dataclass(frozen=True)
class Distilled:
    """The student first, then its teacher, then what it is compared with; and how it was made."""

    models: dict[str, Checkpoint]
    log: Distillation | None
    stages: dict[str, Path]


def run_distillation(
    build: BuildDirectory,
    config: DistillConfig,
    teacher: Checkpoint,
    dataset: Dataset,
    max_length: int,
    *,
    until: str | None = None,
    ablate: bool = False,
) -> Distilled:
    """Runs the stages that make a student of ``teacher``: teach, distill and, if wanted, ablate.

    Args:
        build: Where the stages' output is kept.
        config: How to distil.
        teacher: A classifier for the task of ``dataset``.
        dataset: Rows to learn from and to validate on.
        max_length: Longest row in tokens.
        until: Last stage to run; ``distill`` leaves an ablation out.
        ablate: Whether to train the student on hard labels alone, too.

    Raises:
        CheckpointError: The teacher is no classifier for the task.
        TrainingError: The student cannot be made as ``config`` says.
    """
    check_teacher(teacher, dataset.task, config)
    stages = {"teach": _teach_stage(build, config, teacher, dataset, max_length)}
    if until == "teach":
        return Distilled({}, None, stages)
    answers = stages["teach"]
    stages["distill"] = _StudentStage(
        build, "distill", config, teacher, dataset, max_length, answers
    ).run()
    student = open_checkpoint(stages["distill"] / "checkpoint")
    models = {STUDENT: student, TEACHER: teacher}
    log = build.result(stages["distill"], DistillationLog)
    ablation = None
    alone = _StudentStage(
        build,
        "ablate",
        config.hard_labels_only(log.layer_map),
        teacher,
        dataset.without_unlabelled(),
        max_length,
        answers,
    )
    build.keep("ablate", alone.key)  # hours of training, even if this run does not ask for it
    if ablate and until != "distill":
        stages["ablate"] = alone.run()
        models[HARD_LABEL] = open_checkpoint(stages["ablate"] / "checkpoint")
        ablation = build.result(stages["ablate"], DistillationLog)
    return Distilled(models, Distillation(student=log, hard_label=ablation), stages)


def _teach_stage(
    build: BuildDirectory,
    config: DistillConfig,
    teacher: Checkpoint,
    dataset: Dataset,
    max_length: int,
) -> Path:
    limit_mb = config.hidden_limit_mb if config.hidden_weight > 0 else 0
    key = stage_key(
        "teach",
        (*LOADING, "edgebert_pipeline.distillation", "edgebert_export.teach"),
        teacher.sha256,
        dataset.sha256("train", "unlabelled", "validation"),
        max_length,
        limit_mb,
    )

    def produce(out: Path, progress: Progress) -> None:
        teach(
            teacher,
            dataset,
            max_length=max_length,
            hidden_limit_mb=limit_mb,
            out=out / "outputs",
            on_progress=progress,
        )

    count = len(dataset.train) + len(dataset.unlabelled) + len(dataset.validation)
    return build.stage("teach", key, f"the teacher's answers to {count} texts", produce)


@dataclass(frozen=True)
class _StudentStage:
    """The stage that trains a student: with its teacher (distill), or without (ablate)."""

    build: BuildDirectory
    name: str
    config: DistillConfig
    teacher: Checkpoint
    dataset: Dataset
    max_length: int
    answers: Path

    @property
    def key(self) -> str:
        return stage_key(
            self.name,
            _DISTILLING,
            self.answers.name,
            self.dataset.sha256("train", "unlabelled", "validation"),
            self.config,
            self.max_length,
        )

    def run(self) -> Path:
        key, config, dataset = self.key, self.config, self.dataset

        def produce(out: Path, progress: Progress) -> DistillationLog:
            _, log = distill(
                self.teacher,
                dataset,
                config,
                outputs=open_outputs(self.answers / "outputs"),
                max_length=self.max_length,
                work=self.build.work(self.name, key),
                out=out / "checkpoint",
                on_progress=progress,
            )
            return log

        rows = f"{len(dataset.train)} rows"
        if dataset.unlabelled:
            rows += f" and {len(dataset.unlabelled)} unlabelled texts"
        if self.name == "ablate":
            rows += ", hard labels only"
        layers = f"{config.layers_for(self.teacher)} of {self.teacher.architecture.layers} layers"
        what = f"{layers}, {rows}, epochs: up to {config.epochs}"
        if config.layer_map == "auto":
            what += f", after short trials ({config.trial_steps} steps) of which layers to take"
        what += self.build.going_on(self.name, key)
        return self.build.stage(self.name, key, what, produce, together=True)
