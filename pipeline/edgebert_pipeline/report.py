"""The report: what was measured, decided and left undone, as ``report.json`` holds it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from edgebert_export.distill import DistillationLog
from edgebert_export.fidelity import Budget
from edgebert_export.to_onnx import Parity
from edgebert_export.training import TrainingLog
from edgebert_pipeline.build import StageRecord
from edgebert_pipeline.data import DataSummary
from edgebert_pipeline.engines import EngineLog
from edgebert_pipeline.quantisation import Quantisation
from edgebert_pipeline.scores import Evaluation
from edgebert_runtime.manifest import Provenance, Task

__all__ = [
    "REPORT_VERSION",
    "Distillation",
    "GateCheck",
    "ModelSummary",
    "NotDone",
    "Recommendation",
    "Report",
]

REPORT_VERSION = 4


class GateCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One limit of the gate, held against one variant.

    Attributes:
        variant: Which variant.
        limit: Name of the limit in the recipe.
        allowed: The limit.
        measured: What was measured, in the same unit.
        passed: Whether it is within the limit.
    """

    variant: str
    limit: str
    allowed: float
    measured: float
    passed: bool


class ModelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One of the models that were exported.

    Attributes:
        model_type: ``bert`` or ``distilbert``; ``None``, as the next three, in version 1.
        layers: Transformer layers.
        parameters: Numbers in its weights.
        checkpoint_sha256: Of its checkpoint.
        parity: How far its ONNX export is from PyTorch.
    """

    model_type: str | None
    layers: int | None
    parameters: int | None
    checkpoint_sha256: str | None
    parity: Parity


class Distillation(msgspec.Struct, frozen=True, kw_only=True):
    """How the student was trained, and with ``--ablate`` the one without its teacher."""

    student: DistillationLog
    hard_label: DistillationLog | None


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """The variant to take, and why.

    Attributes:
        variant: Its full name; ``None`` if none can be recommended.
        reason: One sentence.
    """

    variant: str | None
    reason: str


class NotDone(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a reader may expect and that was not done.

    Attributes:
        what: What was not done.
        reason: Why not.
    """

    what: str
    reason: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of ``report.json``; ``read_report`` reads it, older versions too.

    Attributes:
        report_version: Of this format.
        name: Name of the model.
        measured_at: When measuring ended (UTC, ISO 8601).
        commit: Of the repository that the recipe lies in, whether or not files were changed
            since; ``None`` if it lies in none, or before version 4.
        bundle_digest: SHA-256 of the bundle's manifest: exactly what was measured.
        task: What it answers.
        data: What became of the rows.
        training: How fine-tuning went; ``None`` when the checkpoint was taken as it is.
        distillation: How distilling went; ``None`` without a student.
        models: Every model that was exported, by what it is; the one in the bundle first.
        quantisation: How each model was quantised, by what it is; empty if none was.
        engines: What became of TensorRT engines.
        budget: What INT8 was allowed to cost on validation rows; ``None`` before version 3.
        evaluation: Accuracy, flips, size and speed of each variant.
        gate: Every limit that the recipe sets, with what was measured.
        recommended: The variant to take, and why.
        not_done: What was not done, and why not.
        stages: When each stage ran, and for how long.
        provenance: Where the bundle comes from.
    """

    report_version: Annotated[int, Meta(ge=REPORT_VERSION, le=REPORT_VERSION)]
    name: str
    measured_at: str
    commit: str | None
    bundle_digest: str
    task: Task
    data: DataSummary
    training: TrainingLog | None
    distillation: Distillation | None
    models: Annotated[dict[str, ModelSummary], Meta(min_length=1)]
    quantisation: dict[str, Quantisation]
    engines: EngineLog
    budget: Budget | None
    evaluation: Evaluation
    gate: tuple[GateCheck, ...]
    recommended: Recommendation
    not_done: tuple[NotDone, ...]
    stages: dict[str, StageRecord]
    provenance: Provenance

    @property
    def passed(self) -> bool:
        """Whether every check of the gate passed."""
        return all(check.passed for check in self.gate)
