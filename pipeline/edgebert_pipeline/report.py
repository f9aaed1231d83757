"""The report: what was measured, as ``report.json``, and for people as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from edgebert_export.finetune import TrainingLog
from edgebert_export.to_onnx import Parity
from edgebert_pipeline.build import StageRecord
from edgebert_pipeline.data import DataSummary
from edgebert_pipeline.evaluate import Evaluation
from edgebert_runtime.manifest import Provenance, Task

__all__ = [
    "NOTHING_LEARNED",
    "REPORT_VERSION",
    "GateCheck",
    "Report",
    "render_markdown",
    "render_table",
]

REPORT_VERSION = 1

NOTHING_LEARNED = "The model is not shown to be better than always giving the commonest answer."


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


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of ``report.json``.

    Attributes:
        report_version: ``REPORT_VERSION``.
        name: Name of the model.
        bundle_digest: SHA-256 of the bundle's manifest: exactly what was measured.
        task: What it answers.
        data: What became of the rows.
        training: How fine-tuning went; ``None`` when the checkpoint was taken as it is.
        parity: How far ONNX is from PyTorch.
        evaluation: Accuracy, flips, size and speed of each variant.
        gate: Every limit that the recipe sets, with what was measured.
        stages: When each stage ran, and for how long.
        provenance: Where the bundle comes from.
    """

    report_version: Annotated[int, Meta(ge=REPORT_VERSION, le=REPORT_VERSION)]
    name: str
    bundle_digest: str
    task: Task
    data: DataSummary
    training: TrainingLog | None
    parity: Parity
    evaluation: Evaluation
    gate: tuple[GateCheck, ...]
    stages: dict[str, StageRecord]
    provenance: Provenance

    @property
    def passed(self) -> bool:
        """Whether every check of the gate passed."""
        return all(check.passed for check in self.gate)


def render_table(evaluation: Evaluation) -> str:
    """Returns the variants as a Markdown table that reads well on a terminal, too."""
    header = (
        "variant",
        "size MB",
        "accuracy (95 % interval)",
        "flips vs FP32",
        "p50 / p99 ms",
        "texts/s",
    )
    rows = [
        (
            item.name,
            f"{item.size_bytes / 1e6:.1f}",
            f"{item.accuracy:.4f} ({item.accuracy_low:.4f}-{item.accuracy_high:.4f})",
            "reference"
            if item.name == evaluation.reference
            else f"{item.flips} ({item.flips / evaluation.rows:.2%})",
            f"{item.timing.latency_p50_ms:.2f} / {item.timing.latency_p99_ms:.2f}",
            f"{item.timing.throughput_texts_per_s:.0f}",
        )
        for item in evaluation.variants
    ]
    return _table(header, rows)


def render_markdown(report: Report) -> str:
    """Returns the report as Markdown."""
    evaluation = report.evaluation
    timing = evaluation.variants[0].timing
    threads = evaluation.intra_op_threads or "ONNX Runtime's choice"
    parts = [
        f"# {report.name}",
        _verdict(report),
        render_table(evaluation),
        f"Accuracy on {evaluation.rows} test rows that nothing was chosen by"
        + (" (all labels of a text right)" if report.task.kind == "multi_label" else "")
        + ", with Wilson's 95 % interval; always giving the commonest answer would reach "
        f"{evaluation.baseline_accuracy:.4f}. "
        + (f"**{NOTHING_LEARNED}** " if evaluation.learned_nothing else "")
        + "Flips are test rows that a variant answers unlike FP32. "
        f"Latency: one text a call, tokenising included, {timing.texts} test texts, median of "
        f"{timing.repeats} rounds; throughput: the same texts in one call, batches of "
        f"{timing.batch_size}. Variants were timed turn by turn in one process. "
        f"Threads: {threads}.",
        "## Per label",
        _table(
            ("variant", "label", "rows", "precision", "recall", "F1"),
            [
                (
                    item.name,
                    _cell(label.label),
                    str(label.rows),
                    f"{label.precision:.4f}",
                    f"{label.recall:.4f}",
                    f"{label.f1:.4f}",
                )
                for item in evaluation.variants
                for label in item.labels
            ],
        ),
        "## Gate",
        _gate(report),
        "## Data",
        _data(report.data),
        "## How it was made",
        _making(report),
        "## Environment",
        _table(("what", "value"), [(k, _cell(v)) for k, v in evaluation.environment.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _verdict(report: Report) -> str:
    if not report.gate:
        return "No gate: the recipe sets no limit."
    refused = [check for check in report.gate if not check.passed]
    if not refused:
        return f"**Gate passed**: {len(report.gate)} checks."
    return f"**Gate refused**: {len(refused)} of {len(report.gate)} checks failed."


def _gate(report: Report) -> str:
    if not report.gate:
        return "The recipe sets no limit."
    return _table(
        ("variant", "limit", "allowed", "measured", "passed"),
        [
            (c.variant, c.limit, f"{c.allowed:g}", f"{c.measured:.4g}", "yes" if c.passed else "NO")
            for c in report.gate
        ],
    )


def _data(data: DataSummary) -> str:
    labels = list(next(iter(data.labels.values())))
    rows = [
        (
            split,
            str(count),
            *(
                f"{data.labels[split][label]} ({data.labels[split][label] / max(count, 1):.1%})"
                if split in data.labels
                else ""
                for label in labels
            ),
        )
        for split, count in data.rows.items()
    ]
    table = _table(("split", "rows", *(_cell(label) for label in labels)), rows)
    return (
        f"{table}\n\nLeft out: {data.out_of_ranges} rows outside every label's range, "
        f"{data.duplicates} duplicates, {data.contradictions} rows whose text has two different "
        f"labels, {data.moved_out} rows whose text is in another split. Hash of the rows: "
        f"`{data.sha256}`."
    )


def _making(report: Report) -> str:
    lines = []
    if report.training is None:
        lines.append("- The checkpoint was taken as it is.")
    else:
        log = report.training
        best = log.validation_scores[log.best_step]
        lines.append(
            f"- Fine-tuned for {log.steps} steps; kept step {log.best_step}, validation "
            f"{log.metric} {best:.4f}."
        )
    parity = report.parity
    lines.append(
        f"- ONNX against PyTorch: raw outputs differ by at most {parity.max_difference:.1e} (limit "
        f"{parity.limit:.0e}) on {parity.texts} texts of {parity.shortest_tokens} to "
        f"{parity.longest_tokens} tokens, alone and in padded batches."
    )
    for name, record in report.stages.items():
        lines.append(f"- {name}: {record.seconds:.1f} s, ended {record.finished_at}")
    provenance = report.provenance
    lines += [
        f"- bundle `{report.bundle_digest}`",
        f"- recipe `{provenance.recipe_sha256}`, model `{provenance.model_sha256}`, "
        f"seed {provenance.seed}",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Keeps a label or a version from breaking out of its table cell."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
