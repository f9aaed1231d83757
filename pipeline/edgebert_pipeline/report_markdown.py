"""The report as Markdown: for a terminal, a pull request, and who has no browser at hand."""

from __future__ import annotations

from collections.abc import Sequence

from edgebert_export.training import TrainingLog
from edgebert_pipeline.data import DataSummary
from edgebert_pipeline.engines import render_engines
from edgebert_pipeline.markdown import cell, table
from edgebert_pipeline.report import Report
from edgebert_pipeline.report_quantisation import render_quantisation
from edgebert_pipeline.scores import (
    HARD_LABEL,
    STUDENT,
    TEACHER,
    Evaluation,
    VariantScores,
)
from edgebert_pipeline.wording import ABOUT_COMPARISONS, comparison_in_words, difference

__all__ = ["NOTHING_LEARNED", "render_comparisons", "render_markdown", "render_table"]

NOTHING_LEARNED = "The model is not shown to be better than always giving the commonest answer."


def render_table(evaluation: Evaluation) -> str:
    """Returns the variants as a Markdown table that reads well on a terminal, too."""
    taught = TEACHER in evaluation.references
    header = ["variant", "size MB", "accuracy (95 % interval)", "flips vs FP32 (95 % interval)"]
    header += ["like teacher"] * taught + ["p50 / p99 ms", "texts/s"]
    rows = []
    for item in evaluation.variants:
        flips = (
            f"{item.flips} ({item.flips / evaluation.rows:.2%}, "
            f"{item.flip_rate_low:.2%}-{item.flip_rate_high:.2%})"
        )
        row = [
            item.full_name,
            f"{item.size_bytes / 1e6:.1f}",
            f"{item.accuracy:.4f} ({item.accuracy_low:.4f}-{item.accuracy_high:.4f})",
            "reference" if evaluation.is_reference(item) else flips,
        ]
        if taught:
            row.append("" if item.agreement is None else f"{item.agreement:.2%}")
        timing = item.timing
        row += (
            ["not timed", ""]
            if timing is None
            else [
                f"{timing.latency_p50_ms:.2f} / {timing.latency_p99_ms:.2f}",
                f"{timing.throughput_texts_per_s:.0f}",
            ]
        )
        rows.append(row)
    return table(header, rows)


def render_markdown(report: Report) -> str:
    """Returns the report as Markdown."""
    evaluation = report.evaluation
    timing = next(v.timing for v in evaluation.variants if v.timing is not None)
    on_gpu = any(item.timing is None for item in evaluation.variants)
    threads = evaluation.intra_op_threads or "ONNX Runtime's choice"
    parts = [
        f"# {report.name}",
        _verdict(report),
        _recommended(report),
        render_table(evaluation),
        f"Accuracy on {evaluation.rows} test rows that nothing was chosen by"
        + (" (all labels of a text right)" if report.task.kind == "multi_label" else "")
        + ", with Wilson's 95 % interval; always giving the commonest answer would reach "
        f"{evaluation.baseline_accuracy:.4f}. "
        + (f"**{NOTHING_LEARNED}** " if evaluation.learned_nothing else "")
        + "Flips are test rows that a variant answers unlike its own model's FP32. "
        f"Latency: one text a call, tokenising included, {timing.texts} test texts, median of "
        f"{timing.repeats} rounds; throughput: the same texts in one call, batches of "
        f"{timing.batch_size}. Variants were timed turn by turn in one process. "
        f"Threads: {threads}."
        + (
            " Variants for a GPU were answered by ONNX Runtime on this CPU, from the same graphs "
            "that TensorRT gets, and were not timed: **nothing here was run on a GPU**."
            if on_gpu
            else ""
        ),
        *(["## Distillation", _distillation(report)] if report.distillation else []),
        *(["## Quantisation", _quantisation(report)] if report.quantisation else []),
        *(["## Engines", render_engines(report.engines)] if report.engines.profiles else []),
        "## Paired comparisons",
        render_comparisons(evaluation),
        "## Per label",
        table(
            ("variant", "label", "rows", "precision", "recall", "F1"),
            [
                (
                    item.full_name,
                    cell(label.label),
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
        "## Not done",
        table(("what", "why"), [(cell(i.what), cell(i.reason)) for i in report.not_done]),
        "## Data",
        _data(report.data),
        "## How it was made",
        _making(report),
        "## Environment",
        table(("what", "value"), [(k, cell(v)) for k, v in evaluation.environment.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _distillation(report: Report) -> str:
    assert report.distillation is not None
    evaluation, log = report.evaluation, report.distillation.student
    rows = []
    for name, model in report.models.items():
        fp32 = evaluation.reference(name)
        timed = [v for v in evaluation.variants if v.model == name and v.timing is not None]
        smallest = min(timed, key=_size)
        rows.append(
            (
                name,
                str(model.layers),
                "" if model.parameters is None else f"{model.parameters / 1e6:.2f}",
                f"{fp32.accuracy:.4f} ({fp32.accuracy_low:.4f}-{fp32.accuracy_high:.4f})",
                "" if fp32.agreement is None else f"{fp32.agreement:.2%}",
                "" if fp32.calibration_error is None else f"{fp32.calibration_error:.4f}",
                f"{fp32.size_bytes / 1e6:.1f}",
                f"{smallest.size_bytes / 1e6:.1f}",
                _p50(fp32),
                _p50(smallest),
            )
        )
    header = (
        "model",
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
    parts = [table(header, rows)]
    student, teacher = (evaluation.reference(name) for name in (STUDENT, TEACHER))
    parts.append(
        f"The student keeps {student.correct / max(teacher.correct, 1):.2%} of its teacher's "
        f"accuracy (FP32 both, on {evaluation.rows} rows; the paired comparison below says "
        "whether that differs from all of it by more than chance). *Like teacher* is the share of "
        "test rows answered as the FP32 teacher answers them; *calibration error* is the "
        "expected one, with 15 bins; *smallest* is the CPU's variant with the smallest file."
        + (
            " *hard-label* is the same student, from the same start, trained on the labels alone."
            if HARD_LABEL in evaluation.references
            else ""
        )
    )
    lines = [
        f"- The student started from the teacher's layers {_listed(log.layer_map)} (from 0)"
        + (
            "; divergence from the teacher on validation rows after a short trial (less is "
            "closer): " + ", ".join(f"{name} {value:.4f}" for name, value in log.trials.items())
            if log.trials
            else ""
        )
        + ".",
        f"- It learnt from {log.texts} texts, {log.unlabelled} of them without a label.",
    ]
    if log.hidden is not None and log.hidden < log.texts:
        lines.append(
            f"- The teacher's hidden states were kept for {log.hidden} of them; the others did "
            "without that term of the loss (`hidden_limit_mb`)."
        )
    lines.append(_trained("Distilled", log.training))
    if report.distillation.hard_label is not None:
        lines.append(
            _trained("Trained on hard labels alone", report.distillation.hard_label.training)
        )
    return "\n\n".join([*parts, "\n".join(lines)])


def _p50(variant: VariantScores) -> str:
    return "" if variant.timing is None else f"{variant.timing.latency_p50_ms:.2f}"


def _size(variant: VariantScores) -> int:
    return variant.size_bytes


def _quantisation(report: Report) -> str:
    budget = report.budget
    assert budget is not None  # it came with quantisation
    limits = [
        f"at most {budget.max_accuracy_drop:.2%} accuracy lost",
        f"at most {budget.max_flip_rate:.2%} flips",
    ]
    if budget.max_divergence is not None:
        limits.append(f"a divergence of at most {budget.max_divergence:g}")
    parts = [
        "Decided on validation rows, which are not the test rows above; the budget against FP32: "
        f"{', '.join(limits)}. *Lost* is FP32's accuracy less the variant's; *divergence* is the "
        "mean Kullback-Leibler divergence of the outputs from FP32's, in nats."
    ]
    parts += [render_quantisation(name, log, budget) for name, log in report.quantisation.items()]
    return "\n\n".join(parts)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _trained(how: str, log: TrainingLog) -> str:
    many = f" in {log.processes} processes" if log.processes > 1 else ""
    scores = ", ".join(f"{step}: {score:.4f}" for step, score in log.validation_scores.items())
    return (
        f"- {how} for {log.steps} steps{many}; kept step {log.best_step}. Validation {log.metric} "
        f"by step: {scores}."
    )


def render_comparisons(evaluation: Evaluation) -> str:
    """Returns the paired comparisons as a Markdown table, and how to read it."""
    if not evaluation.comparisons:
        return "There is only one variant."
    rows = [
        (
            item.first,
            item.second,
            difference(item, evaluation.rows),
            str(item.only_first_correct),
            str(item.only_second_correct),
            f"{item.p_value:.2g}",
            comparison_in_words(item, evaluation.rows),
        )
        for item in evaluation.comparisons
    ]
    header = (
        "first",
        "second",
        "first - second (95 % interval)",
        "only first right",
        "only second right",
        "p",
        "",
    )
    return f"{table(header, rows)}\n\n{ABOUT_COMPARISONS}"


def _verdict(report: Report) -> str:
    if not report.gate:
        return "No gate: the recipe sets no limit."
    refused = [check for check in report.gate if not check.passed]
    if not refused:
        return f"**Gate passed**: {len(report.gate)} checks."
    return f"**Gate refused**: {len(refused)} of {len(report.gate)} checks failed."


def _recommended(report: Report) -> str:
    found = report.recommended
    if found.variant is None:
        return f"No variant is recommended. {found.reason}"
    return f"Recommended: **{found.variant}**. {found.reason}"


def _gate(report: Report) -> str:
    if not report.gate:
        return "The recipe sets no limit."
    return table(
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
    by_split = table(("split", "rows", *(cell(label) for label in labels)), rows)
    return (
        f"{by_split}\n\nLeft out of the labelled splits: {data.out_of_ranges} rows outside every "
        "label's range, "
        f"{data.duplicates} duplicates, {data.contradictions} rows whose text has two different "
        f"labels, {data.moved_out} rows whose text is in another split. Hash of the rows: "
        f"`{data.sha256}`."
    )


def _making(report: Report) -> str:
    lines = []
    if report.training is None:
        which = "teacher" if report.distillation else "checkpoint"
        lines.append(f"- The {which} was taken as it is.")
    else:
        lines.append(_trained("Fine-tuned", report.training))
    for name, model in report.models.items():
        parity = model.parity
        lines.append(
            f"- ONNX against PyTorch, {name}: raw outputs differ by at most "
            f"{parity.max_difference:.1e} (limit {parity.limit:.0e}) on {parity.texts} texts of "
            f"{parity.shortest_tokens} to {parity.longest_tokens} tokens, alone and in padded "
            "batches."
        )
    for name, record in report.stages.items():
        lines.append(f"- {name}: {record.seconds:.1f} s, ended {record.finished_at}")
    provenance = report.provenance
    lines += [
        f"- measured {report.measured_at}"
        + (f", recipe at commit `{report.commit}`" if report.commit else ""),
        *(
            [f"- test rows `{report.evaluation.rows_sha256}`"]
            if report.evaluation.rows_sha256
            else []
        ),
        f"- bundle `{report.bundle_digest}`",
        f"- recipe `{provenance.recipe_sha256}`, model `{provenance.model_sha256}`, "
        f"seed {provenance.seed}",
    ]
    return "\n".join(lines)
