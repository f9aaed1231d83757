"""Accuracy, latency and size over many reports, in the order in which they were measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import msgspec

import edgebert_runtime
from edgebert_pipeline.compare import compare_sources
from edgebert_pipeline.compare_report import about_differences, differences_table
from edgebert_pipeline.markdown import render_document
from edgebert_pipeline.page import render_page
from edgebert_pipeline.parts import (
    COLOURS,
    MUTED,
    Cell,
    Chart,
    Column,
    Grid,
    Notice,
    Part,
    Section,
    Table,
    shorten,
)
from edgebert_pipeline.sources import LONGEST, Measured, Source, read_source
from edgebert_runtime.errors import InputError

__all__ = ["History", "read_history", "render_history_html", "render_history_markdown"]

_MARKS = (b'"report_version"', b'"device_report_version"')
_HEAD_BYTES = 4096


class History(msgspec.Struct, frozen=True, kw_only=True):
    """Reports over time.

    Attributes:
        directory: Where they were found.
        sources: The reports, the oldest first.
        skipped: Files that look like reports and cannot be read, and why.
    """

    directory: str
    sources: tuple[Source, ...]
    skipped: tuple[str, ...]


def read_history(directory: Path) -> History:
    """Reads every report of a build or a device under a directory, but for hidden ones.

    The same report in two places counts once: a file of just the same bytes.

    Raises:
        InputError: There is no such directory, or no report in it.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such directory")
    places = {path: path.relative_to(directory) for path in _candidates(directory)}
    short = {path: _label(place, directory) for path, place in places.items()}
    times = Counter(short.values())
    found: dict[str, Source] = {}
    skipped = []
    for path, place in places.items():
        label = short[path] if times[short[path]] == 1 else str(place)
        if any(source.label == shorten(label, LONGEST) for source in found.values()):
            label = f"{len(found) + 1}: {label}"
        try:
            digest = sha256(path.read_bytes()).hexdigest()
            source = read_source(path, label)
        except OSError as exc:
            skipped.append(f"{path} cannot be read: {exc.strerror}")
        except InputError as exc:
            skipped.append(str(exc))
        else:
            found.setdefault(digest, source)
    if not found:
        why = f": {skipped[0]}" if skipped else ""
        raise InputError(f"{directory} holds no report of a build or a device{why}")
    ordered = sorted(found.values(), key=lambda source: source.measured_at)
    return History(directory=str(directory), sources=tuple(ordered), skipped=tuple(skipped))


def _label(place: Path, directory: Path) -> str:
    if place.name != "report.json":
        return str(place.with_suffix(""))
    return directory.absolute().name if place.parent == Path() else str(place.parent)


def _candidates(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*.json")):
        if any(part.startswith(".") for part in path.relative_to(directory).parts):
            continue
        try:
            with path.open("rb") as stream:
                head = stream.read(_HEAD_BYTES)
        except OSError:
            continue
        if any(mark in head for mark in _MARKS):
            yield path


def render_history_html(history: History) -> str:
    """Returns a history as a page that holds all it needs."""
    return render_page(
        title=_title(history),
        kind="History",
        lead=_lead(history),
        sections=_sections(history),
        footer=f"edgebert {edgebert_runtime.__version__}",
    )


def render_history_markdown(history: History) -> str:
    """Returns a history as Markdown: all but charts."""
    sections = [section for section in _sections(history) if section.id != "charts"]
    return render_document(_title(history), _lead(history), sections)


def _title(history: History) -> str:
    names = list(dict.fromkeys(source.name for source in history.sources))
    many = len(history.sources)
    return f"{', '.join(names[:3])}: {many} report{'s' * (many > 1)} over time"


def _lead(history: History) -> list[Part]:
    parts: list[Part] = []
    with_accuracy = [source for source in history.sources if source.knows_accuracy]
    changed = [
        f"{now.label} ({now.measured_at[:10]})"
        for before, now in pairwise(with_accuracy)
        if not now.same_rows(before)
    ]
    if changed:
        parts.append(
            Notice(
                "Not known to be measured on the test rows of the report before: "
                f"{', '.join(changed)}. Accuracies on either side do not compare.",
                "warn",
            )
        )
    if len({source.machine for source in history.sources}) > 1:
        parts.append(
            Notice(
                "Not known to be measured on the same machine: lines of latency join what machines "
                "of one description measured.",
                "warn",
            )
        )
    return parts


def _sections(history: History) -> list[Section]:
    sections = [Section("charts", "Over time", (Grid(_charts(history.sources)),))]
    latest = history.sources[-1]
    earlier = [s for s in history.sources[-2::-1] if s.name == latest.name]
    if earlier:
        before = next((s for s in earlier if s.machine == latest.machine), earlier[0])
        compared = compare_sources([before, latest], allow_different_data=True)
        if compared.differences:
            title = f"The latest, {latest.label}, against {before.label}"
            rows: list[Part] = [Notice(warning, "warn") for warning in compared.warnings]
            rows += [differences_table(compared), about_differences(compared)]
            sections.append(Section("latest", title, rows))
    parts: list[Part] = [_table(history.sources)]
    parts += [f"Not read: {reason}" for reason in history.skipped]
    return [*sections, Section("reports", "All reports", parts)]


def _shipped(sources: Sequence[Source]) -> Iterator[tuple[Source, Measured]]:
    return ((source, item) for source in sources for item in source.variants if item.shipped)


def _table(sources: Sequence[Source]) -> Table:
    columns = [Column("measured"), Column("report"), Column("commit"), Column("variant")]
    columns += [
        Column(name, numeric=True)
        for name in ("accuracy (95 % interval)", "p50 / p99 ms", "size MB")
    ]
    columns += [Column("test rows"), Column("machine")]
    rows: list[list[Cell | str]] = []
    for source, item in _shipped(sources):
        accuracy, timing = item.accuracy, item.timing
        rows.append(
            [
                Cell(source.measured_at[:16], mood="name"),
                Cell(source.label, mood="name"),
                Cell((source.commit or "")[:12], mood="code"),
                Cell(item.variant, mood="name"),
                Cell("not measured", "", "muted")
                if accuracy is None
                else Cell(
                    f"{accuracy.share:.4f} ({accuracy.low:.4f}-{accuracy.high:.4f})", accuracy.share
                ),
                Cell("not timed", "", "muted")
                if timing is None
                else Cell(
                    f"{timing.latency_p50_ms:.2f} / {timing.latency_p99_ms:.2f}",
                    timing.latency_p50_ms,
                ),
                f"{item.size_bytes / 1e6:.1f}",
                Cell((source.rows_sha256 or "")[:8], mood="code"),
                Cell(source.machine, mood="name"),
            ]
        )
    return Table("", columns, rows)


def _charts(sources: Sequence[Source]) -> list[Part]:
    rows = [source for source in sources if source.knows_accuracy]
    # Accuracies are joined while the test rows stay the same.
    run, runs = 0, {}
    for index, source in enumerate(rows):
        run += index > 0 and not source.same_rows(rows[index - 1])
        runs[source.label] = run
    values = []
    for source, item in _shipped(sources):
        value: dict[str, object] = {
            "time": source.measured_at,
            "report": source.label,
            "commit": (source.commit or "")[:12],
            "variant": shorten(item.key),
            "machine": source.machine,
            "size": item.size_bytes / 1e6,
        }
        if item.accuracy is not None:
            value |= {
                "accuracy": item.accuracy.share,
                "low": item.accuracy.low,
                "high": item.accuracy.high,
                "rows": f"{item.accuracy.rows} ({runs[source.label] + 1})",
            }
        if item.timing is not None:
            value |= {"p50": item.timing.latency_p50_ms, "p99": item.timing.latency_p99_ms}
        values.append(value)
    return [
        chart
        for chart in (
            _chart(values, "accuracy", "Accuracy", "accuracy", "rows", ("low", "high")),
            _chart(values, "p50", "Latency", "p50 ms a text", "machine", ("p50", "p99")),
            _chart(values, "size", "Size", "MB", "variant", None),
        )
        if chart is not None
    ]


def _chart(
    values: Sequence[dict[str, object]],
    field: str,
    title: str,
    axis: str,
    joined_by: str,
    span: tuple[str, str] | None,
) -> Chart | None:
    shown = [value for value in values if field in value]
    if not shown:
        return None
    names = list(dict.fromkeys(str(value["variant"]) for value in shown))
    colours = [COLOURS[n] if n < len(COLOURS) else MUTED for n in range(len(names))]
    y = {
        "field": field,
        "type": "quantitative",
        "title": axis,
        "scale": {"zero": field == "size"},
    }
    hover = [
        {"field": "time", "type": "temporal", "timeUnit": "utcyearmonthdatehoursminutes"},
        *({"field": name} for name in ("report", "commit", "variant", "machine")),
        {"field": field, "format": ".4f" if field == "accuracy" else ".2f"},
        *({"field": name, "format": ".4f"} for name in span or () if name != field),
    ]
    layers: list[dict[str, object]] = [
        {
            "mark": {"type": "line", "strokeWidth": 1.5},
            "encoding": {"y": y, "detail": {"field": joined_by}, "tooltip": None},
        },
        {"mark": {"type": "point", "size": 60, "opacity": 1}, "encoding": {"y": y}},
    ]
    if span is not None:
        low, high = span
        layers.insert(
            0,
            {
                "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.5},
                "encoding": {"y": {**y, "field": low}, "y2": {"field": high}},
            },
        )
    notes = {
        "accuracy": "Vertical lines: 95 % intervals. Points are joined while the test rows stay "
        "the same.",
        "p50": "Vertical lines end at p99. Points of one description of a machine are joined.",
    }
    return Chart(
        title,
        f"{title} over time of {', '.join(names)}, in {len(shown)} measurements; the figures are "
        "in the table below.",
        {
            "height": 240,
            "data": {"values": shown},
            "encoding": {
                "x": {
                    "field": "time",
                    "type": "temporal",
                    "title": None,
                    "scale": {"type": "utc", "padding": 15},
                    "axis": {"tickCount": 5},
                },
                "color": {
                    "field": "variant",
                    "type": "nominal",
                    "title": None,
                    "scale": {"domain": names, "range": colours},
                },
                "tooltip": hover,
            },
            "layer": layers,
        },
        notes.get(field, ""),
    )
