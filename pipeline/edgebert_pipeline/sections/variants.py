"""Variants side by side: size, accuracy, flips, speed, and which are worth having."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgebert_pipeline.parts import (
    ACCENT,
    COLOURS,
    MUTED,
    Cell,
    Chart,
    Column,
    Section,
    Table,
)
from edgebert_pipeline.report import Report
from edgebert_pipeline.scores import TEACHER, Evaluation, VariantScores
from edgebert_pipeline.sections.names import place_names

__all__ = ["pareto_front", "variants_section", "variants_table"]

_SHAPES = {"fp32": "circle", "fp16": "diamond", "int8": "square"}


def variants_section(report: Report) -> Section:
    """Returns the section; every report has it."""
    evaluation = report.evaluation
    all_right = " (all labels of a text right)" if report.task.kind == "multi_label" else ""
    gpu = [v.full_name for v in evaluation.variants if v.timing is None]
    on_gpu = (
        f" Variants for a GPU ({', '.join(gpu)}) were answered by ONNX Runtime on this CPU, from "
        "the same graphs that TensorRT gets, and were not timed: **nothing here was run on a "
        "GPU**."
        if gpu
        else ""
    )
    return Section(
        "variants",
        "Variants",
        (
            variants_table(evaluation, report.recommended.variant),
            f"Accuracy on {evaluation.rows:,} test rows that nothing was chosen by{all_right}, "
            "with Wilson's 95 % interval; always giving the commonest answer would reach "
            f"{evaluation.baseline_accuracy:.4f}. *Flips* are test rows that a variant "
            f"answers unlike its own model's reference.{on_gpu}",
            *([_speed_and_accuracy(report)] if pareto_front(evaluation) else []),
            _sizes(evaluation),
        ),
    )


def variants_table(evaluation: Evaluation, recommended: str | None = None) -> Table:
    """Returns the variants as a table, the recommended one marked."""
    taught = TEACHER in evaluation.references
    columns = [
        Column("variant"),
        Column("size MB", numeric=True),
        Column("accuracy (95 % interval)", numeric=True),
        Column("flips vs FP32 (95 % interval)", numeric=True),
        *([Column("like teacher", numeric=True)] * taught),
        Column("p50 / p99 ms", numeric=True),
        Column("texts/s", numeric=True),
    ]
    rows = [_row(evaluation, item, taught) for item in evaluation.variants]
    marked = frozenset(
        index for index, v in enumerate(evaluation.variants) if v.full_name == recommended
    )
    return Table("", columns, rows, marked)


def _row(evaluation: Evaluation, item: VariantScores, taught: bool) -> list[Cell | str]:
    flips = (
        f"{item.flips} ({item.flips / evaluation.rows:.2%}, "
        f"{item.flip_rate_low:.2%}-{item.flip_rate_high:.2%})"
    )
    row: list[Cell | str] = [
        item.full_name,
        f"{item.size_bytes / 1e6:.1f}",
        Cell(
            f"{item.accuracy:.4f} ({item.accuracy_low:.4f}-{item.accuracy_high:.4f})",
            item.accuracy,
        ),
        Cell("reference" if evaluation.is_reference(item) else flips, item.flips),
    ]
    if taught:
        row.append("" if item.agreement is None else Cell(f"{item.agreement:.2%}", item.agreement))
    timing = item.timing
    if timing is None:
        return [*row, Cell("not timed", "", "muted"), ""]
    return [
        *row,
        Cell(f"{timing.latency_p50_ms:.2f} / {timing.latency_p99_ms:.2f}", timing.latency_p50_ms),
        f"{timing.throughput_texts_per_s:.0f}",
    ]


def pareto_front(evaluation: Evaluation) -> list[VariantScores]:
    """Returns the timed variants that none beats in both median latency and accuracy."""
    timed = sorted(
        ((v.timing.latency_p50_ms, v) for v in evaluation.variants if v.timing is not None),
        key=lambda item: (item[0], -item[1].accuracy),
    )
    front: list[VariantScores] = []
    for _, variant in timed:
        if not front or variant.accuracy > front[-1].accuracy:
            front.append(variant)
    return front


def model_scale(evaluation: Evaluation) -> dict[str, Any]:
    """Returns the colours of models, in Vega-Lite's words; no legend where there is one model."""
    models = list(dict.fromkeys(v.model for v in evaluation.variants))
    return {
        "field": "model",
        "type": "nominal",
        "title": None,
        "scale": {"domain": models, "range": list(COLOURS[: len(models)])},
        **({"legend": None} if len(models) == 1 else {}),
    }


def _speed_and_accuracy(report: Report) -> Chart:
    evaluation = report.evaluation
    front = pareto_front(evaluation)
    points: list[dict[str, Any]] = []
    first = [v for v in evaluation.shipped if v.full_name == report.recommended.variant]
    for v in [*first, *(v for v in evaluation.variants if v not in first)]:  # it is named first
        if v.timing is None:
            continue
        t = v.timing
        points.append(
            {
                "name": v.full_name,
                "model": v.model,
                "precision": v.precision,
                "p50": t.latency_p50_ms,
                "fastest": t.latency_p50_low_ms or t.latency_p50_ms,
                "slowest": t.latency_p50_high_ms or t.latency_p50_ms,
                "accuracy": v.accuracy,
                "low": v.accuracy_low,
                "high": v.accuracy_high,
                "size": v.size_bytes / 1e6,
                "place": "on the Pareto front" if v in front else "behind the Pareto front",
            }
        )
    spread = max(p["slowest"] for p in points) / min(p["fastest"] for p in points)
    x = {
        "field": "p50",
        "type": "quantitative",
        "title": "p50 latency of one text, ms" + (" (log scale)" if spread > 8 else ""),
        "scale": {"type": "log" if spread > 8 else "linear", "zero": False, "padding": 30},
    }
    y = {
        "field": "accuracy",
        "type": "quantitative",
        "title": "accuracy",
        "scale": {"zero": False, "padding": 12},
        "axis": {"format": ".3f"},
    }
    colour = model_scale(evaluation)
    hover = [
        {"field": "name", "title": "variant"},
        {"field": "accuracy", "format": ".4f"},
        {"field": "low", "title": "95 % from", "format": ".4f"},
        {"field": "high", "title": "to", "format": ".4f"},
        {"field": "p50", "title": "p50 ms", "format": ".2f"},
        {"field": "fastest", "title": "fastest round", "format": ".2f"},
        {"field": "slowest", "title": "slowest round", "format": ".2f"},
        {"field": "size", "title": "MB", "format": ".1f"},
        {"field": "place", "title": "it is"},
    ]
    places = place_names(
        [(p["p50"], p["accuracy"]) for p in points],
        [p["name"] for p in points],
        (min(p["fastest"] for p in points), max(p["slowest"] for p in points)),
        (min(p["low"] for p in points), max(p["high"] for p in points)),
        log=spread > 8,
    )
    for point, place in zip(points, places, strict=True):
        to_left, below = place or (False, False)
        point |= {"text": point["name"] if place else "", "right": to_left, "below": below}
    precisions = [p for p in _SHAPES if any(item["precision"] == p for item in points)]
    spec = {
        "height": 340,
        "data": {"values": points},
        "encoding": {"x": x, "y": y},
        "layer": [
            {
                "transform": [{"filter": "datum.place === 'on the Pareto front'"}],
                "mark": {
                    "type": "line",
                    "interpolate": "step-after",
                    "stroke": MUTED,
                    "strokeDash": [4, 4],
                    "strokeWidth": 1.5,
                },
            },
            {
                "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.7},
                "encoding": {
                    "y": {**y, "field": "low"},
                    "y2": {"field": "high"},
                    "color": colour,
                },
            },
            {
                "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.7},
                "encoding": {
                    "x": {**x, "field": "fastest"},
                    "x2": {"field": "slowest"},
                    "color": colour,
                },
            },
            {
                "mark": {"type": "point", "size": 120, "opacity": 1},
                "encoding": {
                    "color": colour,
                    "shape": {
                        "field": "precision",
                        "type": "nominal",
                        "title": None,
                        "scale": {
                            "domain": precisions,
                            "range": [_SHAPES[p] for p in precisions],
                        },
                    },
                    "tooltip": hover,
                },
            },
            {
                "mark": {
                    "type": "text",
                    "align": {"expr": "datum.right ? 'right' : 'left'"},
                    "dx": {"expr": "datum.right ? -9 : 9"},
                    "dy": {"expr": "datum.below ? 15 : -9"},
                    "opacity": {"expr": "width > 400 ? 1 : 0"},  # they collide on a phone
                },
                "encoding": {"text": {"field": "text"}},
            },
        ],
    }
    names = ", ".join(
        f"{v.full_name} ({v.timing.latency_p50_ms:.2f} ms, {v.accuracy:.4f})"
        for v in front
        if v.timing is not None
    )
    return Chart(
        "Accuracy against latency",
        f"Accuracy against median latency of {len(points)} variants. On the Pareto front: {names}.",
        spec,
        "Upper left is better. Bars: 95 % interval of the accuracy; fastest and slowest round of "
        "the latency. The dashed line is the Pareto front: no other variant is both faster and "
        "more accurate than one on it. Where intervals overlap, the order may be chance.",
    )


def _sizes(evaluation: Evaluation) -> Chart:
    return bars(
        "Size of the model files",
        [
            {"name": v.full_name, "model": v.model, "value": v.size_bytes / 1e6}
            for v in evaluation.variants
        ],
        "MB (10⁶ bytes)",
        ".1f",
        model_scale(evaluation),
    )


def bars(
    title: str,
    values: Sequence[dict[str, Any]],
    unit: str,
    format_: str,
    colour: dict[str, Any] | None = None,
) -> Chart:
    """Returns horizontal bars with their figures: ``name`` and ``value`` of each of ``values``."""
    y = {"field": "name", "type": "nominal", "sort": None, "title": None}
    largest, smallest = (pick(values, key=lambda item: item["value"]) for pick in (max, min))
    return Chart(
        title,
        f"{title}, {unit}: from {smallest['value']:{format_}} ({smallest['name']}) to "
        f"{largest['value']:{format_}} ({largest['name']}).",
        {
            "height": 26 * len(values),
            "data": {"values": list(values)},
            "encoding": {
                "y": y,
                "x": {
                    "field": "value",
                    "type": "quantitative",
                    "title": unit,
                    "scale": {"domainMax": largest["value"] * 1.18 or 1},
                    "axis": {"tickCount": 5},
                },
                "tooltip": [
                    {"field": "name", "title": "of"},
                    {"field": "value", "title": unit, "format": format_},
                ],
            },
            "layer": [
                {"mark": "bar", "encoding": {"color": colour}}
                if colour
                else {"mark": {"type": "bar", "color": ACCENT}},
                {
                    "mark": {"type": "text", "align": "left", "dx": 5},
                    "encoding": {"text": {"field": "value", "format": format_}},
                },
            ],
        },
    )
