"""How models were quantised, and what was decided why."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from edgebert_export.closed_loop import Fit
from edgebert_export.fidelity import Budget, Fidelity
from edgebert_export.quantise_gpu import GpuLog, ScaleSummary
from edgebert_pipeline.intervals import wilson
from edgebert_pipeline.parts import Cell, Chart, Column, Heading, Part, Section, Table
from edgebert_pipeline.quantisation import Quantisation
from edgebert_pipeline.report import Report
from edgebert_pipeline.sections.variants import bars

__all__ = ["quantisation_section", "without_common_start"]

_MOST_LISTED = 12
_MOST_IN_CHART = 30


def quantisation_section(report: Report) -> Section | None:
    """Returns the section; ``None`` if nothing was quantised."""
    budget = report.budget
    if not report.quantisation or budget is None:
        return None
    limits = [
        f"at most {budget.max_accuracy_drop:.2%} accuracy lost",
        f"at most {budget.max_flip_rate:.2%} flips",
    ]
    if budget.max_divergence is not None:
        limits.append(f"a divergence of at most {budget.max_divergence:g}")
    parts: list[Part] = [
        "Decided on validation rows, which are not the test rows above; the budget against FP32: "
        f"{', '.join(limits)}. *Lost* is FP32's accuracy less the variant's; *divergence* is the "
        "mean Kullback-Leibler divergence of the outputs from FP32's, in nats."
    ]
    logs = [log.gpu for log in report.quantisation.values() if log.gpu is not None]
    if any(log.ranges or log.out_of_range for log in logs):  # not in reports of before
        parts.append(
            "What is for a GPU was computed on a CPU, with every result that its graph types FP16 "
            "stored as FP16, here and on the test rows; no GPU was asked."
        )
    for name, log in report.quantisation.items():
        parts += [Heading(name), *_model(name, log, budget)]
    return Section("quantisation", "Quantisation", parts)


def _model(name: str, log: Quantisation, budget: Budget) -> Iterator[Part]:
    worth = []
    if log.gpu is not None:
        yield _gpu_in_words(log.gpu)
        if log.gpu.fp16 is not None:
            worth.append(("fp16-gpu", log.gpu.fp16))
        if log.gpu.fit is not None:
            worth.append(("int8-gpu", log.gpu.fit.last))
    if log.cpu is not None:
        there = "**int8-cpu**" if log.cpu.fits else "**There is no int8-cpu**"
        yield f"{there}: {_fit_in_words(log.cpu, 'FP32')}."
        worth.append(("int8-cpu", log.cpu.last))
    if worth:
        rows = [
            [
                variant if found.fits(budget) else f"{variant} (last try, not shipped)",
                *_fidelity(found),
                "yes" if found.fits(budget) else Cell("no", mood="bad"),
            ]
            for variant, found in worth
        ]
        yield Table("", [Column("variant"), *_FIDELITY, Column("in budget")], rows)
    if log.gpu is not None and log.gpu.trials:
        yield _trials(log.gpu)
    fits = {"int8-gpu": log.gpu.fit if log.gpu else None, "int8-cpu": log.cpu}
    for variant, fit in fits.items():
        if fit is not None:
            yield from _layers(name, variant, fit)
    if log.gpu is not None and (log.gpu.ranges or log.gpu.out_of_range):
        yield _ranges(log.gpu)
    if log.gpu is not None and log.gpu.scales:
        yield _scales(log.gpu.scales)


_FIDELITY = tuple(
    Column(name, numeric=True)
    for name in ("rows", "accuracy", "lost", "flips (95 % interval)", "divergence")
)


def _fidelity(found: Fidelity) -> list[Cell | str]:
    low, high = wilson(found.flips, found.rows)
    return [
        str(found.rows),
        f"{found.correct / found.rows:.4f}",
        Cell(f"{found.lost / found.rows:+.2%}", found.lost),
        Cell(f"{found.flips} ({found.flips / found.rows:.2%}, {low:.2%}-{high:.2%})", found.flips),
        _divergence(found.divergence),
    ]


def _divergence(value: float | None) -> Cell:
    return Cell("not a number", "") if value is None else Cell(f"{value:.2g}", value)


def _trials(log: GpuLog) -> Table:
    rows = [
        [
            trial.calibrator,
            "yes" if trial.smoothed else "no",
            *_fidelity(trial.fidelity),
            "taken" if index == log.chosen else "",
        ]
        for index, trial in enumerate(log.trials)
    ]
    return Table(
        "How to choose the scales of int8-gpu, all that was tried",
        [Column("calibrator"), Column("smoothed"), *_FIDELITY, Column("chosen")],
        rows,
        frozenset() if log.chosen is None else frozenset([log.chosen]),
    )


def _gpu_in_words(log: GpuLog) -> str:
    texts = log.texts
    sentences = []
    if log.chosen is None and not log.out_of_range:
        sentences.append(f"**There is no model for TensorRT**: {log.refusal}.")
    elif log.chosen is None or log.refusal is not None:
        sentences.append(f"**There is no int8-gpu**: {log.refusal}; `fp16-gpu` is shipped.")
    elif log.fit is not None:
        trial = log.trials[log.chosen]
        share = f" ({log.linear_int8 / log.linear_layers:.0%})" if log.linear_layers else ""
        sentences.append(
            f"**int8-gpu**: {log.linear_int8} of {log.linear_layers} linear layers in INT8{share}; "
            f"{_fit_in_words(log.fit, 'FP16')}."
        )
        smoothed = ", with outliers moved into the weights" if trial.smoothed else ""
        rounded = "; weights rounded by GPTQ" if log.rounding == "gptq" else ""
        sentences.append(f"Scales by `{trial.calibrator}`{smoothed}{rounded}.")
    if log.head_layers and log.chosen is not None:
        one = log.head_layers == 1
        sentences.append(
            f"{log.head_layers} more, of the head or with few channels, "
            f"stay{'s' if one else ''} in FP16: INT8 saves nothing there."
        )
    sentences += [f"`{name}` stays in FP16: {why}." for name, why in log.unfused.items()]
    sentences.append(
        f"Calibrated on {texts.texts} texts of {texts.shortest_tokens} to {texts.longest_tokens} "
        f"tokens (median {texts.median_tokens:g}, of the validation texts "
        f"{texts.validation_median_tokens:g}), which hold {texts.coverage:.0%} of the validation "
        "texts' tokens."
    )
    sentences += [f"**Warning**: {' '.join(warning.split())}." for warning in texts.warnings]
    return " ".join(sentences)


def _fit_in_words(found: Fit, higher: str) -> str:
    if not found.fits and found.layers == 1:
        return "the one layer that may be in INT8 misses the budget"
    if not found.fits:
        return f"none of the {found.layers} sets of layers that were tried fits the budget"
    if not found.given_back:
        return f"all {found.layers} layers fit the budget at once"
    names = ", ".join(f"`{item.layer}`" for item in found.given_back)
    return f"{len(found.given_back)} of {found.layers} layers were given back to {higher}: {names}"


def _layers(model: str, variant: str, found: Fit) -> Iterator[Part]:
    if found.given_back:
        rows = [["none", *_fidelity(found.first)]]
        rows += [
            [Cell(item.layer, mood="code"), *_fidelity(item.fidelity)] for item in found.given_back
        ]
        yield Table(
            f"{variant}, layer by layer given back", [Column("given back"), *_FIDELITY], rows
        )
    if found.sensitivity:
        chart = _sensitivity_chart(model, variant, found)
        if chart is not None:
            yield chart
        yield Table(
            f"{variant}, each layer alone in INT8, on {found.sensitivity[0].rows} rows"
            f"{_left_out(len(found.sensitivity))}",
            [Column("layer"), Column("divergence", numeric=True), Column("flips", numeric=True)],
            [
                [Cell(damage.layer, mood="code"), _divergence(damage.divergence), str(damage.flips)]
                for damage in found.sensitivity[:_MOST_LISTED]
            ],
        )


def _sensitivity_chart(model: str, variant: str, found: Fit) -> Chart | None:
    shown = [d for d in found.sensitivity[:_MOST_IN_CHART] if d.divergence is not None]
    names = without_common_start([damage.layer for damage in shown])
    values = [
        {"name": name, "value": damage.divergence}
        for name, damage in zip(names, shown, strict=True)
    ]
    if not values:
        return None
    return bars(
        f"Sensitivity: {model} {variant}, each layer alone in INT8",
        values,
        "divergence from FP32, nats",
        ".2g",
    )


def without_common_start(layers: Sequence[str]) -> list[str]:
    """Returns paths without the parts that all of them begin with, so that each stays its own."""
    paths = [layer.split(".") for layer in layers]
    columns = zip(*[path[:-1] for path in paths], strict=False)  # as far as the shortest goes
    common = len([*itertools.takewhile(lambda parts: len(set(parts)) == 1, columns)])
    return [".".join(path[common:]) for path in paths]


def _scales(scales: Sequence[ScaleSummary]) -> Table:
    worst = sorted(scales, key=lambda item: -item.clipped)[:_MOST_LISTED]
    return Table(
        f"Scales of int8-gpu, the most clipped first{_left_out(len(scales))}",
        [Column("activation"), Column("scale", numeric=True), Column("clipped", numeric=True)],
        [
            [Cell(s.activation, mood="code"), f"{s.scale:.3g}", Cell(f"{s.clipped:.4%}", s.clipped)]
            for s in worst
        ],
    )


def _ranges(log: GpuLog) -> Table:
    found = [(item, "FP16: too near") for item in log.out_of_range]
    found += [(item, "INT8") for item in log.ranges]
    worst = sorted(found, key=lambda item: -item[0].share)[:_MOST_LISTED]
    return Table(
        "What INT8 products store as FP16 on the calibration texts: the largest sum, times the "
        f"scale inside the product; at most half of FP16's range{_left_out(len(found))}",
        [
            Column("product"),
            Column("largest", numeric=True),
            Column("of FP16's range", numeric=True),
            Column("computed in"),
        ],
        [
            [
                Cell(item.layer, mood="code"),
                Cell(f"{item.largest:.4g}", item.largest),
                Cell(f"{item.share:.2%}", item.share),
                kept,
            ]
            for item, kept in worst
        ],
    )


def _left_out(count: int) -> str:
    if count <= _MOST_LISTED:
        return ""
    return f" (the worst {_MOST_LISTED} of {count}; all are in report.json)"
