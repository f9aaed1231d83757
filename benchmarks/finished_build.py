"""What scripts take from a finished build: one of its models, its rows, its FP32 export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder, open_checkpoint
from edgebert_export.dataset import Dataset
from edgebert_export.to_onnx import ExportConfig, to_onnx
from edgebert_pipeline.data import load_dataset
from edgebert_pipeline.read_report import read_report
from edgebert_pipeline.recipe import load_recipe
from edgebert_runtime.encoder import TextEncoder


@dataclass(frozen=True)
class FinishedModel:
    """A model of a build, and the rows that it was made from."""

    name: str
    checkpoint: Checkpoint
    dataset: Dataset

    @classmethod
    def of(cls, recipe_path: Path, build: Path, name: str | None) -> FinishedModel:
        """Opens ``teacher``, ``student`` or ``model``; the one in the bundle if ``None``."""
        dataset, _ = load_dataset(load_recipe(recipe_path).data, recipe_path.parent)
        report = read_report(build)
        name = name or next(iter(report.models))
        wanted = report.models[name].checkpoint_sha256
        found = map(open_checkpoint, (build / ".stages").glob("*/checkpoint"))
        return cls(name, next(c for c in found if c.sha256 == wanted), dataset)

    @property
    def encoder(self) -> TextEncoder:
        """Its tokenizer."""
        pairs = self.dataset.task.text_pair
        return checkpoint_encoder(self.checkpoint, max_length=128, text_pair=pairs)

    def export(self, work: Path) -> Path:
        """Writes its FP32 ONNX into ``work``, as Optimum makes it: nothing is rewritten."""
        plain = ExportConfig(first_token=False, fold_token_types=False)
        return to_onnx(self.checkpoint, self.dataset.task, plain, work / "fp32.onnx").path
