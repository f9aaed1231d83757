"""Paired comparisons: what differs between variants by more than chance."""

from __future__ import annotations

from edgebert_pipeline.intervals import paired_difference
from edgebert_pipeline.parts import ACCENT, INK, MUTED, Cell, Chart, Column, Part, Section, Table
from edgebert_pipeline.report import Report
from edgebert_pipeline.scores import Evaluation
from edgebert_pipeline.wording import ABOUT_COMPARISONS, comparison_in_words, difference

__all__ = ["comparisons_table", "differences_section"]

_MINUS = " − "


def differences_section(report: Report) -> Section:
    """Returns the section; every report has it."""
    evaluation = report.evaluation
    alone = len(evaluation.variants) == 1
    parts: list[Part] = ["There is only one variant." if alone else "None was made."]
    if evaluation.comparisons:
        parts = [comparisons_table(evaluation), ABOUT_COMPARISONS, _chart(evaluation)]
    return Section("differences", "Paired comparisons", parts)


def comparisons_table(evaluation: Evaluation) -> Table:
    """Returns the comparisons, in words that do not overclaim."""
    columns = [
        Column("first"),
        Column("second"),
        Column("first - second (95 % interval)", numeric=True),
        Column("only first right", numeric=True),
        Column("only second right", numeric=True),
        Column("p", numeric=True),
        Column("found"),
    ]
    rows: list[list[Cell | str]] = [
        [
            item.first,
            item.second,
            Cell(
                difference(item, evaluation.rows),
                item.only_first_correct - item.only_second_correct,
            ),
            str(item.only_first_correct),
            str(item.only_second_correct),
            Cell(f"{item.p_value:.2g}", item.p_value),
            Cell(comparison_in_words(item, evaluation.rows), mood="" if item.shown else "muted"),
        ]
        for item in evaluation.comparisons
    ]
    return Table("", columns, rows)


def _chart(evaluation: Evaluation) -> Chart:
    values = []
    for item in evaluation.comparisons:
        low, high = paired_difference(
            item.only_first_correct, item.only_second_correct, evaluation.rows
        )
        values.append(
            {
                "pair": f"{item.first}{_MINUS}{item.second}",
                "difference": (item.only_first_correct - item.only_second_correct)
                / evaluation.rows
                * 100,
                "low": low * 100,
                "high": high * 100,
                "p": item.p_value,
                "found": comparison_in_words(item, evaluation.rows),
                "shown": item.shown,
            }
        )
    x = {
        "field": "difference",
        "type": "quantitative",
        "title": "percentage points",
    }
    y = {
        "field": "pair",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelLimit": 150, "labelExpr": f"split(datum.label, '{_MINUS}')"},
    }
    colour = {"condition": {"test": "datum.shown", "value": ACCENT}, "value": MUTED}
    shown = sum(item.shown for item in evaluation.comparisons)
    return Chart(
        "Differences of accuracy, with 95 % intervals",
        f"Difference of accuracy of {len(values)} pairs of variants, in percentage points with "
        f"95 % intervals; {shown or 'none'} of them {'is' if shown == 1 else 'are'} shown to "
        "differ.",
        {
            "height": 36 * len(values),
            "data": {"values": values},
            "encoding": {
                "y": y,
                "color": colour,
                "tooltip": [
                    {"field": "pair"},
                    {"field": "difference", "title": "points", "format": "+.2f"},
                    {"field": "low", "title": "95 % from", "format": "+.2f"},
                    {"field": "high", "title": "to", "format": "+.2f"},
                    {"field": "p", "format": ".2g"},
                    {"field": "found"},
                ],
            },
            "layer": [
                {
                    "mark": {"type": "rule", "stroke": INK, "strokeDash": [3, 3], "tooltip": None},
                    "encoding": {"x": {"datum": 0}, "y": None, "color": None, "tooltip": None},
                },
                {
                    "mark": {"type": "rule", "strokeWidth": 2},
                    "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
                },
                {"mark": {"type": "point", "size": 70, "opacity": 1}, "encoding": {"x": x}},
            ],
        },
        "Left of the dashed line the first is less accurate, right of it more. Grey: no difference "
        "shown.",
    )
