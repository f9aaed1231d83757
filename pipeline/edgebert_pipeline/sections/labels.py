"""How well each label is told: precision, recall, and what is taken for what."""

from __future__ import annotations

from collections.abc import Sequence

from edgebert_pipeline.intervals import wilson
from edgebert_pipeline.parts import (
    ACCENT,
    COLOURS,
    Cell,
    Chart,
    Column,
    Details,
    Grid,
    Part,
    Section,
    Table,
    shorten,
)
from edgebert_pipeline.report import Report
from edgebert_pipeline.scores import LabelScores, VariantScores

__all__ = ["labels_section", "looked_at"]

_MOST_AT_ONCE, _MOST_ROWS = 40, 400
_MOST_IN_CHART = 40
_MOST_IN_MATRIX = 30
_MOST_MISTAKES = 20


def looked_at(report: Report) -> tuple[VariantScores, ...]:
    """Returns what is looked at closely: the recommended variant, and what it is held against."""
    evaluation = report.evaluation
    reference = evaluation.reference(evaluation.variants[0].model)
    names = (report.recommended.variant, reference.full_name)
    found = [v for v in evaluation.variants if v.full_name in names]
    return tuple(sorted(found, key=lambda v: names.index(v.full_name)))


def labels_section(report: Report) -> Section:
    """Returns the section; every report has it."""
    evaluation, chosen = report.evaluation, looked_at(report)
    labels = evaluation.variants[0].labels
    every = [_row(v, label) for v in evaluation.variants for label in v.labels]
    few = len(every) <= _MOST_AT_ONCE
    shown = every if few else [_row(v, label) for v in chosen for label in v.labels]
    parts: list[Part] = [_table("", shown[:_MOST_ROWS])]
    if labels and labels[0].given is not None:
        parts.append(
            "Precision and recall with Wilson's 95 % intervals, F1 with one by the bootstrap "
            "(1,000 draws of the test rows, seed 0)."
        )
        if len(labels) <= _MOST_IN_CHART:
            parts.append(_f1_chart(chosen))
    parts += _confusion(chosen)
    if not few:
        what = "The same of all variants"
        what += f", the first {_MOST_ROWS} rows" if len(every) > _MOST_ROWS else ""
        parts.append(Details(what, [_table(what, every[:_MOST_ROWS])]))
    return Section("labels", "Per label", parts)


def _table(caption: str, rows: Sequence[Sequence[Cell | str]]) -> Table:
    columns = [Column("variant"), Column("label")] + [
        Column(name, numeric=True) for name in ("rows", "precision", "recall", "F1")
    ]
    return Table(caption, columns, rows)


def _row(variant: VariantScores, label: LabelScores) -> list[Cell | str]:
    precision = recall = ("", "")
    if label.given is not None and label.right is not None:
        precision = _interval(label.right, label.given)
        recall = _interval(label.right, label.rows)
    f1 = "" if label.given is None else " (too few to tell)"
    if label.f1_low is not None and label.f1_high is not None:
        f1 = f" ({label.f1_low:.3f}-{label.f1_high:.3f})"
    return [
        variant.full_name,
        shorten(label.label),
        str(label.rows),
        Cell(f"{label.precision:.4f}{''.join(precision)}", label.precision),
        Cell(f"{label.recall:.4f}{''.join(recall)}", label.recall),
        Cell(f"{label.f1:.4f}{f1}", label.f1),
    ]


def _interval(count: int, rows: int) -> tuple[str, str]:
    if not rows:
        return "", ""
    low, high = wilson(count, rows)
    return f" ({low:.3f}", f"-{high:.3f})"


def _f1_chart(variants: Sequence[VariantScores]) -> Chart:
    names = [v.full_name for v in variants]
    values = [
        {
            "label": shorten(label.label, 40),
            "name": v.full_name,
            "f1": label.f1,
            "low": label.f1_low,
            "high": label.f1_high,
            "precision": label.precision,
            "recall": label.recall,
            "rows": label.rows,
        }
        for v in variants
        for label in v.labels
    ]
    x = {"field": "f1", "type": "quantitative", "title": "F1", "scale": {"zero": False}}
    worst = min(values, key=lambda item: float(str(item["f1"])))
    return Chart(
        "F1 of each label, with 95 % intervals",
        f"F1 of each label for {' and '.join(names)}; the lowest is {worst['f1']:.3f} "
        f"({worst['label']}).",
        {
            "height": (16 * len(names) + 10) * len(variants[0].labels),
            "data": {"values": values},
            "encoding": {
                "y": {"field": "label", "type": "nominal", "sort": None, "title": None},
                "yOffset": {"field": "name", "type": "nominal", "sort": names},
                "color": {
                    "field": "name",
                    "type": "nominal",
                    "title": None,
                    "scale": {"domain": names, "range": list(COLOURS[: len(names)])},
                },
                "tooltip": [
                    {"field": "name", "title": "variant"},
                    {"field": "label"},
                    {"field": "f1", "title": "F1", "format": ".4f"},
                    {"field": "low", "title": "95 % from", "format": ".4f"},
                    {"field": "high", "title": "to", "format": ".4f"},
                    {"field": "precision", "format": ".4f"},
                    {"field": "recall", "format": ".4f"},
                    {"field": "rows"},
                ],
            },
            "layer": [
                {
                    "mark": {"type": "rule", "strokeWidth": 2},
                    "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
                },
                {"mark": {"type": "point", "size": 70, "opacity": 1}, "encoding": {"x": x}},
            ],
        },
    )


def _confusion(variants: Sequence[VariantScores]) -> list[Part]:
    known = [v for v in variants if v.confusion is not None]
    if not known:
        return []
    labels = [label.label for label in known[0].labels]
    parts: list[Part] = []
    if len(labels) <= _MOST_IN_MATRIX:
        parts.append(Grid([_matrix(v, labels) for v in known]))
    mistakes = [
        (count, v, truth, given)
        for v in known
        for truth, answers in (v.confusion or {}).items()
        for given, count in answers.items()
        if truth != given
    ]
    mistakes.sort(key=lambda item: -item[0])
    rows = [
        [
            v.full_name,
            shorten(truth),
            shorten(given),
            str(count),
            f"{count / sum((v.confusion or {})[truth].values()):.1%}",
        ]
        for count, v, truth, given in mistakes[:_MOST_MISTAKES]
    ]
    if rows:
        columns = [
            Column("variant"),
            Column("label"),
            Column("answered"),
            Column("rows", numeric=True),
            Column("share of the label", numeric=True),
        ]
        parts.append(Table("The most frequent mistakes", columns, rows))
    return parts


def _matrix(variant: VariantScores, labels: Sequence[str]) -> Chart:
    found = variant.confusion or {}
    cells = [
        {
            "truth": shorten(truth, 30),
            "given": shorten(given, 30),
            "rows": (count := found.get(truth, {}).get(given, 0)),
            "share": count / max(sum(found.get(truth, {}).values()), 1),
        }
        for truth in labels
        for given in labels
    ]
    small = len(labels) <= 12
    axis = {"type": "nominal", "sort": None, "axis": {"labelLimit": 110, "grid": False}}
    right = sum(found.get(label, {}).get(label, 0) for label in labels)
    total = sum(sum(answers.values()) for answers in found.values())
    layers: list[object] = [
        {
            "mark": {"type": "rect", "fill": ACCENT, "stroke": ACCENT, "strokeOpacity": 0.35},
            "encoding": {
                "fillOpacity": {
                    "field": "share",
                    "type": "quantitative",
                    "scale": {"domain": [0, 1], "range": [0, 0.45]},
                    "legend": None,
                },
                "tooltip": [
                    {"field": "truth", "title": "label"},
                    {"field": "given", "title": "answered"},
                    {"field": "rows"},
                    {"field": "share", "title": "share of the label", "format": ".1%"},
                ],
            },
        }
    ]
    if small:
        layers.append({"mark": {"type": "text"}, "encoding": {"text": {"field": "rows"}}})
    return Chart(
        f"Confusion: {variant.full_name}",
        f"Confusion matrix of {variant.full_name}: {right} of {total} rows on the diagonal; the "
        "most frequent mistakes are in the table below.",
        {
            "height": max(18, 48 - 2 * len(labels)) * len(labels),
            "data": {"values": cells},
            "encoding": {
                "y": {"field": "truth", "title": "label", **axis},
                "x": {"field": "given", "title": "answered", **axis},
            },
            "layer": layers,
        },
    )
