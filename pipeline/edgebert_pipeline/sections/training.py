"""How models were trained: curves, and what distilling was worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgebert_export.training import TrainingLog
from edgebert_pipeline.parts import COLOURS, Cell, Chart, Column, Part, Section, Table
from edgebert_pipeline.report import Distillation, Report
from edgebert_pipeline.scores import HARD_LABEL, STUDENT, TEACHER, VariantScores

__all__ = ["training_section"]


def training_section(report: Report) -> Section:
    """Returns the section; every report has it."""
    parts: list[Part] = []
    if report.distillation is not None:
        parts += [_worth(report), *_distilled(report, report.distillation)]
    trainings = _trainings(report)
    if report.training is None:
        which = "teacher" if report.distillation else "checkpoint"
        parts.append(f"The {which} was taken as it is.")
    parts += [_trained(how, log) for how, log in trainings]
    if trainings:
        parts.append(_curves(trainings))
    title = "Distillation and training" if report.distillation else "Training"
    return Section("training", title, parts)


def _trainings(report: Report) -> list[tuple[str, TrainingLog]]:
    found = []
    if report.training is not None:
        found.append(("Fine-tuned", report.training))
    if report.distillation is not None:
        found.append(("Distilled", report.distillation.student.training))
        if report.distillation.hard_label is not None:
            alone = report.distillation.hard_label.training
            found.append(("Trained on hard labels alone", alone))
    return found


def _worth(report: Report) -> Table:
    evaluation = report.evaluation
    rows: list[list[Cell | str]] = []
    for name, model in report.models.items():
        fp32 = evaluation.reference(name)
        timed = [v for v in evaluation.variants if v.model == name and v.timing is not None]
        smallest = min(timed, key=lambda v: v.size_bytes)
        rows.append(
            [
                name,
                "" if model.layers is None else str(model.layers),
                "" if model.parameters is None else f"{model.parameters / 1e6:.2f}",
                Cell(
                    f"{fp32.accuracy:.4f} ({fp32.accuracy_low:.4f}-{fp32.accuracy_high:.4f})",
                    fp32.accuracy,
                ),
                "" if fp32.agreement is None else f"{fp32.agreement:.2%}",
                "" if fp32.calibration_error is None else f"{fp32.calibration_error:.4f}",
                f"{fp32.size_bytes / 1e6:.1f}",
                f"{smallest.size_bytes / 1e6:.1f}",
                _p50(fp32),
                _p50(smallest),
            ]
        )
    columns = [Column("model")] + [
        Column(name, numeric=True)
        for name in (
            "layers",
            "parameters (millions)",
            "accuracy, FP32 (95 % interval)",
            "like teacher",
            "calibration error",
            "MB, FP32",
            "MB, smallest",
            "p50 ms, FP32",
            "p50 ms, smallest",
        )
    ]
    return Table("What distilling was worth", columns, rows)


def _distilled(report: Report, distillation: Distillation) -> Iterator[Part]:
    evaluation, log = report.evaluation, distillation.student
    student, teacher = (evaluation.reference(name) for name in (STUDENT, TEACHER))
    yield (
        f"The student keeps {student.correct / max(teacher.correct, 1):.2%} of its teacher's "
        f"accuracy (FP32 both, on {evaluation.rows:,} rows; the paired comparison above says "
        "whether that differs from all of it by more than chance). *Like teacher* is the share of "
        "test rows answered as the FP32 teacher answers them; *calibration error* is the "
        "expected one, with 15 bins; *smallest* is the CPU's variant with the smallest file."
        + (
            " *hard-label* is the same student, from the same start, trained on the labels alone."
            if HARD_LABEL in evaluation.references
            else ""
        )
    )
    trials = (
        "; divergence from the teacher on validation rows after a short trial (less is closer): "
        + ", ".join(f"{name} {value:.4f}" for name, value in log.trials.items())
        if log.trials
        else ""
    )
    layers = ", ".join(map(str, log.layer_map))
    yield f"The student started from the teacher's layers {layers} (from 0){trials}."
    hidden = (
        f" The teacher's hidden states were kept for {log.hidden} of them; the others did without "
        "that term of the loss (`hidden_limit_mb`)."
        if log.hidden is not None and log.hidden < log.texts
        else ""
    )
    yield f"It learnt from {log.texts} texts, {log.unlabelled} of them without a label.{hidden}"


def _p50(variant: VariantScores) -> str:
    return "" if variant.timing is None else f"{variant.timing.latency_p50_ms:.2f}"


def _trained(how: str, log: TrainingLog) -> str:
    many = f" in {log.processes} processes" if log.processes > 1 else ""
    scores = ", ".join(f"{step}: {score:.4f}" for step, score in log.validation_scores.items())
    return (
        f"{how} for {log.steps} steps{many}; kept step {log.best_step}. Validation {log.metric} "
        f"by step: {scores}."
    )


def _curves(trainings: Sequence[tuple[str, TrainingLog]]) -> Chart:
    values = [
        {"run": how, "step": step, "score": score, "kept": step == log.best_step}
        for how, log in trainings
        for step, score in log.validation_scores.items()
    ]
    names = [how for how, _ in trainings]
    metric = trainings[0][1].metric
    x = {"field": "step", "type": "quantitative", "title": "step"}
    y = {
        "field": "score",
        "type": "quantitative",
        "title": f"validation {metric}",
        "scale": {"zero": False},
    }
    best = "; ".join(
        f"{how}: {log.validation_scores.get(log.best_step, float('nan')):.4f} at step "
        f"{log.best_step}"
        for how, log in trainings
    )
    return Chart(
        f"Validation {metric} while training",
        f"Validation {metric} by step. Kept: {best}.",
        {
            "height": 260,
            "data": {"values": values},
            "encoding": {
                "x": x,
                "y": y,
                "color": {
                    "field": "run",
                    "type": "nominal",
                    "title": None,
                    "scale": {"domain": names, "range": list(COLOURS[: len(names)])},
                },
                "tooltip": [
                    {"field": "run"},
                    {"field": "step"},
                    {"field": "score", "title": metric, "format": ".4f"},
                    {"field": "kept"},
                ],
            },
            "layer": [
                {"mark": {"type": "line", "strokeWidth": 2}},
                {
                    "mark": {"type": "point", "opacity": 1},
                    "encoding": {
                        "size": {"condition": {"test": "datum.kept", "value": 170}, "value": 40}
                    },
                },
            ],
        },
        "The large dot is the step whose weights were kept.",
    )
