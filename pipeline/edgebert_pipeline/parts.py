"""What reports are made of: sentences, tables, charts, figures; ``page`` and ``markdown`` show it.

A ``str`` is a paragraph, in which `` `code` ``, ``**strong**`` and ``*emphasis*`` mean what they do
in Markdown. The text of a cell is taken as it is. Charts are Vega-Lite; their colours are the
page's CSS variables (``COLOURS``, ``INK`` and so on), so they follow light, dark and print without
being drawn anew.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

__all__ = [
    "ACCENT",
    "BAD",
    "COLOURS",
    "GOOD",
    "INK",
    "MUTED",
    "RULE",
    "SURFACE",
    "Cell",
    "Chart",
    "Column",
    "Details",
    "Fact",
    "Facts",
    "Grid",
    "Heading",
    "Legend",
    "Notice",
    "Part",
    "Section",
    "Table",
    "shorten",
]

INK, MUTED, RULE, SURFACE, ACCENT, GOOD, BAD = (
    f"var(--{name})" for name in ("ink", "muted", "rule", "surface", "accent", "good", "bad")
)
COLOURS = tuple(f"var(--c{number})" for number in range(1, 9))
"""To tell things apart by; a shape or a name should tell them apart, too."""

_LONGEST_LABEL = 80


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers are set flush right."""

    name: str
    numeric: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it shows.
        value: What its column is sorted by, if that is not ``text``.
        mood: ``good``, ``bad``, ``muted`` or ``code``: how it is set off; words must say what
            colours say. Beside it or alone, a ``name`` is not broken into lines, and ``words``
            are given room.
    """

    text: str
    value: float | str | None = None
    mood: str = ""


@dataclass(frozen=True)
class Table:
    """A table that sorts by its columns; wide ones scroll inside themselves.

    Attributes:
        caption: What it shows; also its name for who does not see it.
        columns: Of every row; the first one is the row's header.
        rows: A cell for each column.
        marked: Rows that are set off, by their place.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: What it shows.
        label: What there is to be seen, in a sentence, for who does not see it.
        spec: Vega-Lite: data, marks, encodings. Size and look are the page's; ``height`` may be
            given.
        note: How to read it.
    """

    title: str
    label: str
    spec: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


@dataclass(frozen=True)
class Legend:
    """What the colours of the charts after it mean: ``names`` in the order of ``COLOURS``."""

    names: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """Parts side by side where there is room."""

    parts: Sequence[Part]


@dataclass(frozen=True)
class Details:
    """Parts that are folded away; in print they are shown, in Markdown they are left out."""

    summary: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Fact:
    """A figure that matters, with its name and a remark."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """Figures side by side."""

    facts: Sequence[Fact]


@dataclass(frozen=True)
class Notice:
    """A sentence that must not be missed; ``mood`` is ``good``, ``bad``, ``warn`` or nothing."""

    text: str
    mood: str = ""


Part = str | Markup | Heading | Legend | Table | Chart | Grid | Details | Facts | Notice
"""``Markup`` is for HTML alone, as it is."""


@dataclass(frozen=True)
class Section:
    """A section; ``id`` names it in links."""

    id: str
    title: str
    parts: Sequence[Part] = field(default_factory=tuple)


def shorten(text: str, most: int = _LONGEST_LABEL) -> str:
    """Cuts a label for a chart or a table, and shows control characters as U+FFFD.

    Characters that change the direction of writing are among these: in a chart nothing keeps
    them to themselves.
    """
    text = text if len(text) <= most else text[: most - 1] + "…"
    if text.isprintable():
        return text
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in text)
