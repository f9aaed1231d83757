"""The part of the report that says how models were quantised, and what was decided why."""

from __future__ import annotations

from collections.abc import Sequence

from edgebert_export.closed_loop import Fit
from edgebert_export.fidelity import Budget, Fidelity
from edgebert_export.quantise_gpu import GpuLog, ScaleSummary
from edgebert_pipeline.intervals import wilson
from edgebert_pipeline.markdown import cell, table
from edgebert_pipeline.quantisation import Quantisation

__all__ = ["render_quantisation"]

_MOST_LISTED = 12


def render_quantisation(name: str, log: Quantisation, budget: Budget) -> str:
    """Returns what is to be told of one model, as Markdown."""
    parts = [f"### {name}"]
    worth = []
    if log.gpu is not None:
        parts.append(_gpu_in_words(log.gpu))
        if log.gpu.fp16 is not None:
            worth.append(("fp16-gpu", log.gpu.fp16))
        if log.gpu.fit is not None:
            worth.append(("int8-gpu", log.gpu.fit.last))
    if log.cpu is not None:
        there = "**int8-cpu**" if log.cpu.fits else "**There is no int8-cpu**"
        parts.append(f"{there}: {_fit_in_words(log.cpu, 'FP32')}.")
        worth.append(("int8-cpu", log.cpu.last))
    if worth:
        rows = [
            (
                variant if found.fits(budget) else f"{variant} (last try, not shipped)",
                *_fidelity(found),
                _yes(found.fits(budget)),
            )
            for variant, found in worth
        ]
        parts.append(table(("variant", *_FIDELITY, "in budget"), rows))
    if log.gpu is not None and log.gpu.trials:
        parts.append("How to choose the scales of `int8-gpu`, all that was tried:")
        rows = [
            (
                trial.calibrator,
                _yes(trial.smoothed),
                *_fidelity(trial.fidelity),
                "taken" if index == log.gpu.chosen else "",
            )
            for index, trial in enumerate(log.gpu.trials)
        ]
        parts.append(table(("calibrator", "smoothed", *_FIDELITY, ""), rows))
    fits = {"int8-gpu": log.gpu.fit if log.gpu else None, "int8-cpu": log.cpu}
    for variant, found in fits.items():
        if found is not None:
            parts += _layers(variant, found)
    if log.gpu is not None and log.gpu.scales:
        parts += _scales(log.gpu.scales)
    return "\n\n".join(parts)


_FIDELITY = ("rows", "accuracy", "lost", "flips (95 % interval)", "divergence")


def _fidelity(found: Fidelity) -> tuple[str, ...]:
    low, high = wilson(found.flips, found.rows)
    return (
        str(found.rows),
        f"{found.correct / found.rows:.4f}",
        f"{found.lost / found.rows:+.2%}",
        f"{found.flips} ({found.flips / found.rows:.2%}, {low:.2%}-{high:.2%})",
        "not a number" if found.divergence is None else f"{found.divergence:.2g}",
    )


def _gpu_in_words(log: GpuLog) -> str:
    texts = log.texts
    sentences = []
    if log.fit is None or log.chosen is None:
        sentences.append(f"**There is no model for TensorRT**: {log.refusal}.")
    else:
        trial = log.trials[log.chosen]
        if log.fit.fits:
            share = log.linear_int8 / log.linear_layers
            sentences.append(
                f"**int8-gpu**: {log.linear_int8} of {log.linear_layers} linear layers in INT8 "
                f"({share:.0%}); {_fit_in_words(log.fit, 'FP16')}."
            )
        else:
            sentences.append(f"**There is no int8-gpu**: {log.refusal}; `fp16-gpu` is shipped.")
        smoothed = ", with outliers moved into the weights" if trial.smoothed else ""
        if log.fit.fits:
            sentences.append(f"Scales by `{trial.calibrator}`{smoothed}.")
    sentences.append(
        f"Calibrated on {texts.texts} texts of {texts.shortest_tokens} to {texts.longest_tokens} "
        f"tokens (median {texts.median_tokens:g}, of the validation texts "
        f"{texts.validation_median_tokens:g}), which hold {texts.coverage:.0%} of the validation "
        "texts' tokens."
    )
    sentences += [f"**Warning**: {cell(warning)}." for warning in texts.warnings]
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


def _layers(variant: str, found: Fit) -> list[str]:
    parts = []
    if found.given_back:
        rows = [("none", *_fidelity(found.first))]
        rows += [(f"`{item.layer}`", *_fidelity(item.fidelity)) for item in found.given_back]
        parts += [
            f"`{variant}`, layer by layer given back:",
            table(("given back", *_FIDELITY), rows),
        ]
    if found.sensitivity:
        rows = [
            (
                f"`{damage.layer}`",
                "not a number" if damage.divergence is None else f"{damage.divergence:.2g}",
                str(damage.flips),
            )
            for damage in found.sensitivity[:_MOST_LISTED]
        ]
        parts += [
            f"`{variant}`, each layer alone in INT8, on {found.sensitivity[0].rows} rows"
            f"{_left_out(len(found.sensitivity))}:",
            table(("layer", "divergence", "flips"), rows),
        ]
    return parts


def _scales(scales: Sequence[ScaleSummary]) -> list[str]:
    worst = sorted(scales, key=lambda item: -item.clipped)[:_MOST_LISTED]
    rows = [(f"`{cell(s.activation)}`", f"{s.scale:.3g}", f"{s.clipped:.4%}") for s in worst]
    return [
        f"Scales of `int8-gpu`, the most clipped first{_left_out(len(scales))}:",
        table(("activation", "scale", "clipped"), rows),
    ]


def _left_out(count: int) -> str:
    if count <= _MOST_LISTED:
        return ""
    return f" (the worst {_MOST_LISTED} of {count}; all are in report.json)"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
