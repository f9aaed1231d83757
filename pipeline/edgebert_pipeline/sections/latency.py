"""Latency: percentiles, the session alone, the rounds' spread, and by length and batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgebert_pipeline.parts import (
    COLOURS,
    Cell,
    Chart,
    Column,
    Details,
    Grid,
    Legend,
    Notice,
    Part,
    Section,
    Table,
)
from edgebert_pipeline.report import Report
from edgebert_runtime.bench import NOISY, Timing

__all__ = ["cells_table", "latency_charts", "latency_section"]

_Timed = Sequence[tuple[str, Timing]]


def latency_section(report: Report) -> Section | None:
    """Returns the section; ``None`` if nothing was timed."""
    evaluation = report.evaluation
    timed = [(v.full_name, v.timing) for v in evaluation.variants if v.timing is not None]
    if not timed:
        return None
    first = timed[0][1]
    threads = evaluation.intra_op_threads or "ONNX Runtime's choice"
    warmup = (
        ""
        if first.warmup_calls is None
        else f" Before the first call that counts, each made {first.warmup_calls} others."
    )
    parts: list[Part] = [
        f"Latency: one text a call, tokenising and labelling included, {first.texts} test texts, "
        f"each the median of {first.repeats} rounds; percentiles are over texts. *Session* is the "
        "part of the same calls that the model takes, without tokenising, padding and labelling. "
        f"Throughput: the same texts in one call, batches of {first.batch_size}, the median round."
        f"{warmup} Variants were timed turn by turn in one process. Threads: {threads}.",
        _table(timed),
        *_noise(timed),
    ]
    shipped = {v.full_name for v in evaluation.shipped}
    shown = timed if len(timed) <= len(COLOURS) else [item for item in timed if item[0] in shipped]
    charts = latency_charts(shown[: len(COLOURS)])
    if charts:
        parts += [
            Legend([name for name, _ in shown[: len(COLOURS)]]),
            Grid(charts),
            Details("The figures by length and batch size", [cells_table(timed)]),
        ]
    return Section("latency", "Latency", parts)


def _table(timed: _Timed) -> Table:
    columns = [Column("variant")] + [
        Column(name, numeric=True)
        for name in (
            "p50 ms",
            "p90 ms",
            "p99 ms",
            "p50 ms, fastest to slowest round",
            "session p50 / p99 ms",
            "texts/s, slowest to fastest round",
            "variation",
        )
    ]
    return Table("One text a call, and throughput", columns, [_row(*item) for item in timed])


def _row(name: str, t: Timing) -> list[Cell | str]:
    def span(low: float | None, high: float | None, digits: int) -> str:
        return "" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"

    rounds = span(t.latency_p50_low_ms, t.latency_p50_high_ms, 2)
    session = "" if t.session_p50_ms is None else f"{t.session_p50_ms:.2f} / {t.session_p99_ms:.2f}"
    rates = span(t.throughput_low_texts_per_s, t.throughput_high_texts_per_s, 0)
    return [
        name,
        f"{t.latency_p50_ms:.2f}",
        "" if t.latency_p90_ms is None else f"{t.latency_p90_ms:.2f}",
        f"{t.latency_p99_ms:.2f}",
        Cell(rounds, t.latency_p50_low_ms or ""),
        Cell(session, t.session_p50_ms or ""),
        Cell(
            f"{t.throughput_texts_per_s:.0f}" + (f" ({rates})" if rates else ""),
            t.throughput_texts_per_s,
        ),
        ""
        if t.variation is None
        else Cell(f"{t.variation:.1%}{' noisy' * t.noisy}", t.variation, "bad" * t.noisy),
    ]


def _noise(timed: _Timed) -> Iterator[Part]:
    noisy = [name for name, timing in timed if timing.noisy]
    if noisy:
        yield Notice(
            f"**The machine was noisy**: the rounds of {', '.join(noisy)} vary by more than "
            f"{NOISY:.0%} (standard deviation over mean), so small differences of speed say "
            "nothing.",
            "warn",
        )


def cells_table(timed: _Timed) -> Table:
    """Returns latency by length and batch: a row for each cell of each of ``timed``."""
    columns = [Column("variant")] + [
        Column(name, numeric=True)
        for name in ("up to tokens", "texts a call", "p50 ms", "p90 ms", "p99 ms", "calls")
    ]
    rows = [
        [
            name,
            str(cell.max_tokens),
            str(cell.batch_size),
            *(f"{value:.2f}" for value in (cell.p50_ms, cell.p90_ms, cell.p99_ms)),
            str(cell.calls),
        ]
        for name, timing in timed
        for cell in timing.cells
    ]
    return Table("Milliseconds of a call, by length of its texts and their number", columns, rows)


def latency_charts(timed: _Timed) -> list[Chart]:
    """Returns a chart for each batch size: latency by length, each of ``timed`` in a colour."""
    sizes = sorted({cell.batch_size for _, timing in timed for cell in timing.cells})
    return [_chart(timed, size) for size in sizes]


def _chart(timed: _Timed, batch_size: int) -> Chart:
    values = [
        {
            "name": name,
            "tokens": f"≤ {cell.max_tokens}",
            "order": cell.max_tokens,
            "p50": cell.p50_ms,
            "p90": cell.p90_ms,
            "p99": cell.p99_ms,
            "calls": cell.calls,
        }
        for name, timing in timed
        for cell in timing.cells
        if cell.batch_size == batch_size
    ]
    names = [name for name, _ in timed]
    x = {
        "field": "tokens",
        "type": "ordinal",
        "sort": {"field": "order"},
        "title": "tokens of a text",
        "axis": {"labelAngle": 0},
    }
    offset = {"field": "name", "type": "nominal", "sort": names}
    y = {
        "field": "p50",
        "type": "quantitative",
        "title": "ms a call (log scale)",
        "scale": {"type": "log"},
    }
    colour = {
        "field": "name",
        "type": "nominal",
        "scale": {"domain": names, "range": list(COLOURS[: len(names)])},
        "legend": None,
    }
    hover = [
        {"field": "name", "title": "variant"},
        {"field": "tokens"},
        {"field": "p50", "title": "p50 ms", "format": ".2f"},
        {"field": "p90", "title": "p90 ms", "format": ".2f"},
        {"field": "p99", "title": "p99 ms", "format": ".2f"},
        {"field": "calls"},
    ]
    encoding = {"x": x, "xOffset": offset, "color": colour, "tooltip": hover}
    texts = "1 text" if batch_size == 1 else f"{batch_size} texts"
    return Chart(
        f"{texts} a call",
        f"Milliseconds of a call of {texts}, p50, p90 and p99, by length of the texts, for "
        f"{', '.join(names)}; the figures are in the table below.",
        {
            "height": 260,
            "data": {"values": values},
            "encoding": encoding,
            "layer": [
                {
                    "mark": {"type": "rule", "strokeWidth": 2},
                    "encoding": {"y": y, "y2": {"field": "p99"}},
                },
                {
                    "mark": {"type": "tick", "thickness": 2, "size": 9},
                    "encoding": {"y": {**y, "field": "p90"}},
                },
                {
                    "mark": {"type": "point", "size": 55, "opacity": 1},
                    "encoding": {"y": y},
                },
            ],
        },
        "Dot: p50; tick: p90; end of the line: p99.",
    )
