"""Calibration: whether answers are right as often as their confidence says."""

from __future__ import annotations

import math
from typing import Any

from edgebert_pipeline.intervals import wilson
from edgebert_pipeline.parts import COLOURS, MUTED, Cell, Chart, Column, Grid, Section, Table
from edgebert_pipeline.report import Report
from edgebert_pipeline.sections.labels import looked_at

__all__ = ["calibration_section"]


def calibration_section(report: Report) -> Section | None:
    """Returns the section; ``None`` for reports before version 2."""
    evaluation = report.evaluation
    rows: list[list[Cell | str]] = [
        [v.full_name, f"{v.calibration_error:.4f}"]
        for v in evaluation.variants
        if v.calibration_error is not None
    ]
    if not rows:
        return None
    columns = [Column("variant"), Column("expected calibration error", numeric=True)]
    table = Table("How far confidence is from being right", columns, rows)
    about = (
        "Answers are put into 15 bins by their confidence; the error is the mean gap between "
        "confidence and the share that is right, weighted by answers. It is biased upwards when "
        "bins hold few answers."
        + (
            " Each label of a row is a question of its own, and intervals take the labels of a row "
            "as independent, so they may be too narrow."
            if report.task.kind == "multi_label"
            else ""
        )
    )
    if not evaluation.variants[0].reliability:
        return Section("calibration", "Calibration", (about, table))
    return Section("calibration", "Calibration", (about, Grid((_chart(report), table))))


def _chart(report: Report) -> Chart:
    chosen = looked_at(report)
    names = [v.full_name for v in chosen]
    values: list[dict[str, Any]] = []
    for v in chosen:
        for item in v.reliability:
            low, high = wilson(item.correct, item.answers)
            values.append(
                {
                    "name": v.full_name,
                    "confidence": item.confidence,
                    "right": item.correct / item.answers,
                    "low": low,
                    "high": high,
                    "answers": item.answers,
                }
            )
    from_x, from_y = (
        math.floor(min(v[field] for v in values) * 10) / 10 for field in ("confidence", "low")
    )
    x = {
        "field": "confidence",
        "type": "quantitative",
        "title": "mean confidence",
        "scale": {"domain": [from_x, 1]},
    }
    y = {
        "field": "right",
        "type": "quantitative",
        "title": "share that is right",
        "scale": {"domain": [from_y, 1]},
    }
    errors = ", ".join(f"{v.full_name} {v.calibration_error:.3f}" for v in chosen)
    return Chart(
        "Reliability",
        "Share of answers that are right against their confidence, with 95 % intervals. Expected "
        f"calibration error: {errors}.",
        {
            "height": 300,
            "data": {"values": values},
            "layer": [
                {
                    "data": {"values": [{"a": end} for end in (max(from_x, from_y), 1)]},
                    "mark": {"type": "line", "stroke": MUTED, "strokeDash": [4, 4]},
                    "encoding": {
                        "x": {**x, "field": "a"},
                        "y": {**y, "field": "a"},
                    },
                },
                {
                    "encoding": {
                        "color": {
                            "field": "name",
                            "type": "nominal",
                            "title": None,
                            "scale": {"domain": names, "range": list(COLOURS[: len(names)])},
                        },
                        "tooltip": [
                            {"field": "name", "title": "variant"},
                            {"field": "confidence", "format": ".3f"},
                            {"field": "right", "title": "right", "format": ".3f"},
                            {"field": "low", "title": "95 % from", "format": ".3f"},
                            {"field": "high", "title": "to", "format": ".3f"},
                            {"field": "answers"},
                        ],
                    },
                    "layer": [
                        {
                            "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6},
                            "encoding": {
                                "x": x,
                                "y": {**y, "field": "low"},
                                "y2": {"field": "high"},
                            },
                        },
                        {
                            "mark": {"type": "line", "strokeWidth": 1.5},
                            "encoding": {"x": x, "y": y},
                        },
                        {
                            "mark": {"type": "point", "opacity": 1},
                            "encoding": {
                                "x": x,
                                "y": y,
                                "size": {
                                    "field": "answers",
                                    "type": "quantitative",
                                    "scale": {"range": [25, 220]},
                                    "legend": None,
                                },
                            },
                        },
                    ],
                },
            ],
        },
        "On the dashed line confidence is right; under it the model is too sure. Larger dots: more "
        "answers.",
    )
