"""A comparison of reports, as a page and as Markdown for a comment on a change."""

from __future__ import annotations

from collections.abc import Sequence

import edgebert_runtime
from edgebert_pipeline.compare import AccuracyDifference, Compared, Difference, LatencyRatio
from edgebert_pipeline.markdown import render_document
from edgebert_pipeline.page import render_page
from edgebert_pipeline.parts import (
    COLOURS,
    INK,
    MUTED,
    Cell,
    Chart,
    Column,
    Details,
    Grid,
    Notice,
    Part,
    Section,
    Table,
    shorten,
)
from edgebert_pipeline.report import GateCheck
from edgebert_pipeline.sections.latency import cells_table, latency_charts
from edgebert_pipeline.sources import Measured, Source
from edgebert_pipeline.wording import comparison_in_words
from edgebert_runtime.bench import Timing

__all__ = [
    "about_differences",
    "differences_table",
    "render_compared_html",
    "render_compared_markdown",
]

_SHORT_HASH = 12
_MOST_BARS, _MOST_CELLS = 60, 1000
"""With more, what is shown is each report's fastest variant."""


def render_compared_html(found: Compared) -> str:
    """Returns a comparison as a page that holds all it needs."""
    return render_page(
        title=_title(found),
        kind="Comparison",
        lead=_lead(found),
        sections=_sections(found),
        footer=f"edgebert {edgebert_runtime.__version__}",
    )


def render_compared_markdown(found: Compared) -> str:
    """Returns a comparison as Markdown, fit for a comment on a change: all but charts."""
    sections = [section for section in _sections(found) if section.id not in ("latency", "paired")]
    return render_document(_title(found), _lead(found), sections)


def _title(found: Compared) -> str:
    names = list(dict.fromkeys(source.name for source in found.sources))
    many = len(found.sources)
    return f"{', '.join(names[:3])}: {many} report{'s' * (many > 1)} compared"


def _lead(found: Compared) -> list[Part]:
    """Returns what is to be known first: whether limits were kept, and what bears on figures."""
    parts: list[Part] = []
    if found.checks:
        refused = [check for check in found.checks if not check.passed]
        parts.append(
            Notice(
                f"**Refused**: {len(refused)} of {len(found.checks)} checks against "
                f"{found.baseline} failed."
                if refused
                else f"**Passed**: {len(found.checks)} checks against {found.baseline}.",
                "bad" if refused else "good",
            )
        )
    return [*parts, *(Notice(warning, "warn") for warning in found.warnings)]


def _sections(found: Compared) -> list[Section]:
    """Returns the rest."""
    sections = [Section("variants", "Side by side", _side_by_side(found))]
    if found.differences:
        parts: list[Part] = [differences_table(found), about_differences(found)]
        sections.append(Section("differences", f"Against {found.baseline}", parts))
    if found.checks:
        sections.append(Section("checks", "Limits", (_checks(found.checks),)))
    charts = _by_length(found.sources)
    if charts:
        sections.append(Section("latency", "Latency by length and batch", charts))
    paired = [(source, item) for source in found.sources for item in source.comparisons]
    if paired:
        folded = Details("Paired tests that the reports made", [_paired(found.sources)])
        sections.append(Section("paired", "Inside each report", (folded,)))
    sections.append(Section("reports", "Reports", (_reports(found.sources), *found.notes)))
    return sections


def _variants(sources: Sequence[Source]) -> list[tuple[Source, Measured]]:
    return [(source, item) for source in sources for item in source.variants]


def _side_by_side(found: Compared) -> list[Part]:
    measured = _variants(found.sources)
    with_memory = any(item.memory_bytes is not None for _, item in measured)
    columns = [Column("report"), Column("variant"), Column("ran on")]
    columns += [
        Column(name, numeric=True)
        for name in (
            "size MB",
            "accuracy (95 % interval)",
            "p50 / p90 / p99 ms",
            "session p50 ms",
            "texts/s",
            *(["memory MB"] * with_memory),
        )
    ]
    rows = [_row(source, item)[: len(columns)] for source, item in measured]
    parts: list[Part] = [Table("", columns, rows)]
    charts = [chart for chart in (_accuracy_and_speed(found), _speed(found)) if chart is not None]
    if charts:
        parts.append(Grid(charts))
    parts.append(
        "Latency: one text a call, tokenising and labelling included; *session*: the model alone "
        "in the same calls. Intervals of accuracy are Wilson's."
        + (
            " Memory: what the process grew by when the variant was loaded and answered; the "
            "first one measured brings the libraries along."
            if with_memory
            else ""
        )
    )
    return parts


def _row(source: Source, item: Measured) -> list[Cell | str]:
    accuracy = item.accuracy
    return [
        Cell(source.label, mood="name"),
        Cell(item.variant, mood="name"),
        item.ran_on,
        f"{item.size_bytes / 1e6:.1f}",
        Cell("not measured", "", "muted")
        if accuracy is None
        else Cell(f"{accuracy.share:.4f} ({accuracy.low:.4f}-{accuracy.high:.4f})", accuracy.share),
        *_speed_cells(item.timing),
        "" if item.memory_bytes is None else f"{item.memory_bytes / 1e6:.0f}",
    ]


def _speed_cells(timing: Timing | None) -> list[Cell | str]:
    if timing is None:
        return [Cell("not timed", "", "muted"), "", ""]
    p90 = "?" if timing.latency_p90_ms is None else f"{timing.latency_p90_ms:.2f}"
    noisy = ", noisy" if timing.noisy else ""
    return [
        Cell(
            f"{timing.latency_p50_ms:.2f} / {p90} / {timing.latency_p99_ms:.2f}{noisy}",
            timing.latency_p50_ms,
        ),
        "" if timing.session_p50_ms is None else f"{timing.session_p50_ms:.2f}",
        f"{timing.throughput_texts_per_s:.0f}",
    ]


def differences_table(found: Compared) -> Table:
    """Returns every difference from the baseline, in figures and in words."""
    columns = [Column("report"), Column("variant")]
    columns += [
        Column("accuracy (95 % interval)", numeric=True),
        Column("in words"),
        Column("p50, times the baseline's", numeric=True),
        Column("in words "),
        Column("size, times", numeric=True),
    ]
    return Table("", columns, [_difference_row(item) for item in found.differences])


def _difference_row(item: Difference) -> list[Cell | str]:
    name = item.variant
    if item.variant != item.baseline_variant:
        name += f" (there {item.baseline_variant})"
    return [
        Cell(item.label, mood="name"),
        Cell(name, mood="name"),
        *_accuracy_cells(item.accuracy),
        *_latency_cells(item.latency),
        f"{item.size_ratio:.2f}",
    ]


def _accuracy_cells(found: AccuracyDifference | None) -> list[Cell]:
    if found is None:
        return [Cell("not measured", "", "muted"), Cell("")]
    better = found.difference > 0
    words = f"no difference shown at n = {found.rows:,}"
    if found.shown:
        words = f"shown: {'better' if better else 'worse'}"
    if found.p_value is not None:
        words += f" (p = {found.p_value:.2g})"
    if not found.same_rows:
        words = "measured on other rows"
    figures = f"{found.difference:+.2%} ({found.low:+.2%} to {found.high:+.2%})"
    return [Cell(figures, found.difference), Cell(words, mood=_mood(found.shown, better))]


def _latency_cells(found: LatencyRatio | None) -> list[Cell]:
    if found is None:
        return [Cell("not timed", "", "muted"), Cell("")]
    if found.low is None:
        figures, words = f"{found.ratio:.2f}", "spread of the rounds unknown"
    else:
        figures = f"{found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})"
        why = "rounds overlap" if found.enough_rounds else "too few rounds"
        words = f"no difference shown: {'noisy' if found.noisy else why}"
    if found.shown:
        words = f"{'faster' if found.ratio < 1 else 'slower'} in every round"
    if not found.same_texts:
        words = "timed on other texts"
    mood = _mood(found.shown and found.same_texts, found.ratio < 1)
    return [Cell(figures, found.ratio), Cell(words, mood=mood)]


def _mood(shown: bool, better: bool) -> str:
    return f"{'muted' if not shown else 'good' if better else 'bad'} words"


def about_differences(found: Compared) -> str:
    """Says how the differences in ``differences_table`` were found."""
    pairs = {d.accuracy.p_value is not None for d in found.differences if d.accuracy is not None}
    sentences = []
    if True in pairs:
        sentences.append(
            "With p: the reports say which of the same rows they answer right; McNemar's exact "
            "test on the rows that one alone answers right, Agresti and Min's interval."
        )
    if False in pairs:
        sentences.append(
            "Without p: rows cannot be paired; Newcombe's interval of the difference of two "
            "shares, and a difference is shown if it leaves out 0. On the same rows that shows "
            "less than pairs would."
        )
    sentences.append(
        "No correction for making several comparisons. Latency in parentheses: from the fastest "
        "round over the baseline's slowest, to the slowest over its fastest; what changes from "
        "run to run is not in it."
    )
    return " ".join(sentences)


def _checks(checks: Sequence[GateCheck]) -> Table:
    """Returns limits, and what was measured."""
    columns = [Column("variant"), Column("limit")]
    columns += [Column("allowed", numeric=True), Column("measured", numeric=True), Column("passed")]
    rows: list[list[Cell | str]] = [
        [
            shorten(check.variant),
            check.limit,
            f"{check.allowed:g}",
            f"{check.measured:.4g}",
            Cell("yes", mood="good") if check.passed else Cell("NO", mood="bad"),
        ]
        for check in checks
    ]
    return Table("", columns, rows)


def _paired(sources: Sequence[Source]) -> Table:
    columns = [Column("report"), Column("first"), Column("second")]
    columns += [Column("first - second", numeric=True), Column("p", numeric=True), Column("found")]
    rows: list[list[Cell | str]] = []
    for source in sources:
        (count, *_) = [v.accuracy.rows for v in source.variants if v.accuracy is not None] or [0]
        for item in source.comparisons:
            difference = (item.only_first_correct - item.only_second_correct) / count
            rows.append(
                [
                    source.label,
                    item.first,
                    item.second,
                    Cell(f"{difference:+.2%}", difference),
                    Cell(f"{item.p_value:.2g}", item.p_value),
                    Cell(comparison_in_words(item, count), mood="" if item.shown else "muted"),
                ]
            )
    return Table("Paired tests of variants of one report, on the same rows", columns, rows)


def _reports(sources: Sequence[Source]) -> Table:
    columns = [
        Column(name)
        for name in ("report", "of", "model", "measured", "commit", "bundle", "machine", "notes")
    ]
    rows: list[list[Cell | str]] = [
        [
            source.label,
            source.kind,
            source.name,
            source.measured_at[:19],
            Cell((source.commit or "")[:_SHORT_HASH], mood="code"),
            Cell(source.bundle_digest[:_SHORT_HASH], mood="code"),
            source.machine,
            "; ".join(source.notes),
        ]
        for source in sources
    ]
    return Table("", columns, rows)


def _series(sources: Sequence[Source]) -> list[str]:
    """Returns what gets a colour: reports, if there are few enough."""
    return [source.label for source in sources[: len(COLOURS)]]


def _values(found: Compared) -> list[dict[str, object]]:
    known = _series(found.sources)
    values = []
    for source, item in _variants(found.sources):
        if item.timing is None:
            continue
        label = source.label
        values.append(
            {
                "report": label,
                "series": label if label in known else "others",
                "variant": item.variant,
                "precision": item.precision,
                "name": f"{label}: {item.variant}",
                "p50": item.timing.latency_p50_ms,
                "p90": item.timing.latency_p90_ms or item.timing.latency_p50_ms,
                "p99": item.timing.latency_p99_ms,
                "size": item.size_bytes / 1e6,
                **(
                    {}
                    if item.accuracy is None
                    else {
                        "accuracy": item.accuracy.share,
                        "low": item.accuracy.low,
                        "high": item.accuracy.high,
                    }
                ),
            }
        )
    return values


def _colour(found: Compared) -> dict[str, object]:
    names = _series(found.sources)
    colours = list(COLOURS[: len(names)])
    if len(found.sources) > len(names):
        names, colours = [*names, "others"], [*colours, MUTED]
    return {
        "field": "series",
        "type": "nominal",
        "title": None,
        "scale": {"domain": names, "range": colours},
    }


_HOVER = [
    {"field": "report"},
    {"field": "variant"},
    {"field": "p50", "title": "p50 ms", "format": ".2f"},
    {"field": "p99", "title": "p99 ms", "format": ".2f"},
    {"field": "size", "title": "MB", "format": ".1f"},
]


def _accuracy_and_speed(found: Compared) -> Chart | None:
    values = [value for value in _values(found) if "accuracy" in value]
    if not values:
        return None
    x = {
        "field": "p50",
        "type": "quantitative",
        "title": "p50 ms a text (log scale)",
        "scale": {"type": "log", "nice": False, "padding": 20},
    }
    y = {
        "field": "accuracy",
        "type": "quantitative",
        "title": "accuracy",
        "scale": {"zero": False},
        "axis": {"format": ".3f"},
    }
    hover = [
        *_HOVER,
        {"field": "accuracy", "format": ".4f"},
        {"field": "low", "title": "95 % from", "format": ".4f"},
        {"field": "high", "title": "to", "format": ".4f"},
    ]
    legend = {"symbolFillColor": INK, "symbolStrokeColor": INK}
    return Chart(
        "Accuracy against latency",
        "Accuracy with 95 % intervals against median latency, of every variant that was timed and "
        "whose accuracy is known; the figures are in the table above.",
        {
            "height": 300,
            "data": {"values": values},
            "encoding": {"x": x, "color": _colour(found), "tooltip": hover},
            "layer": [
                {
                    "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6},
                    "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
                },
                {
                    "mark": {"type": "point", "size": 90, "opacity": 1},
                    "encoding": {
                        "y": y,
                        "shape": {"field": "precision", "title": None, "legend": legend},
                    },
                },
            ],
        },
        "Up and to the left is better. Lines: 95 % intervals.",
    )


def _speed(found: Compared) -> Chart | None:
    values = _values(found)
    if not values:
        return None
    if len(values) > _MOST_BARS:
        by_speed = sorted(values, key=lambda value: -float(str(value["p50"])))
        values = list({value["report"]: value for value in by_speed}.values())
    x = {"field": "p50", "type": "quantitative", "title": "ms a text"}
    y = {
        "field": "name",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelLimit": 200},
    }
    return Chart(
        "Latency",
        "Median, 90th and 99th percentile of the latency of every variant that was timed; the "
        "figures are in the table above.",
        {
            "height": 22 * len(values),
            "data": {"values": values},
            "encoding": {
                "y": y,
                "color": _colour(found),
                "tooltip": [
                    *_HOVER[:3],
                    {"field": "p90", "title": "p90 ms", "format": ".2f"},
                    *_HOVER[3:],
                ],
            },
            "layer": [
                {
                    "mark": {"type": "rule", "strokeWidth": 2},
                    "encoding": {"x": x, "x2": {"field": "p99"}},
                },
                {
                    "mark": {"type": "tick", "thickness": 2, "size": 9},
                    "encoding": {"x": {**x, "field": "p90"}},
                },
                {"mark": {"type": "point", "size": 55, "opacity": 1}, "encoding": {"x": x}},
            ],
        },
        "Dot: p50; tick: p90; end of the line: p99.",
    )


def _by_length(sources: Sequence[Source]) -> list[Part]:
    """Returns charts of each report's fastest variant, and the figures of all, folded away."""
    timed: list[tuple[str, Timing]] = []
    fastest: list[tuple[str, Timing]] = []
    for source in sources:
        found = [
            (f"{source.label}: {item.variant}", item.timing)
            for item in source.variants
            if item.timing is not None and item.timing.cells
        ]
        timed += found
        fastest += sorted(found, key=lambda item: item[1].latency_p50_ms)[:1]
    if not timed:
        return []
    shown = fastest[: len(COLOURS)]
    more = f" (of the first {len(shown)} reports)" if len(shown) < len(fastest) else ""
    listed, of = timed, "all variants"
    if sum(len(timing.cells) for _, timing in timed) > _MOST_CELLS:
        listed, of = fastest, "each report's fastest variant"
    return [
        f"Each report's fastest variant{more}.",
        Grid(latency_charts(shown)),
        Details(f"The figures by length and batch size, of {of}", [cells_table(listed)]),
    ]
