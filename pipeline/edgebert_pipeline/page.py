"""The look that every HTML page shares: one file that holds all it needs and fetches nothing.

A page is a title, what is to be known first, and sections of parts: sentences, tables, charts,
facts. Every text is escaped, wherever it comes from; what is meant as HTML is ``Markup``. A page
brings its scripts with it and forbids the browser everything else (a content security policy with
the hashes of these scripts), so even a mistake in escaping runs nothing and sends nothing.

Charts are Vega-Lite. Their colours are the page's CSS variables (``COLOURS``, ``INK`` and so on),
so they follow light, dark and print without being drawn anew.
"""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from edgebert_pipeline.vega import vega_script

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
    "Notice",
    "Part",
    "Section",
    "Table",
    "isolated",
    "render_page",
    "shorten",
    "to_script_json",
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
        mood: ``good``, ``bad`` or ``muted``: how it is set off; words must say it, too.
        lines: Whether line breaks in ``text`` are kept.
    """

    text: str | Markup
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
    note: str | Markup = ""


@dataclass(frozen=True)
class Grid:
    """Parts side by side where there is room."""

    parts: Sequence[Part]


@dataclass(frozen=True)
class Details:
    """Parts that are folded away; in print they are shown."""

    summary: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Fact:
    """A figure that matters, with its name and a remark."""

    name: str
    value: str
    note: str | Markup = ""


@dataclass(frozen=True)
class Facts:
    """Figures side by side."""

    facts: Sequence[Fact]


@dataclass(frozen=True)
class Notice:
    """A sentence that must not be missed; ``mood`` is ``good``, ``bad``, ``warn`` or nothing."""

    text: str | Markup
    mood: str = ""


Part = str | Markup | Table | Chart | Grid | Details | Facts | Notice
"""``str`` is a paragraph; ``Markup`` is taken as it is."""


@dataclass(frozen=True)
class Section:
    """A section; ``id`` names it in links."""

    id: str
    title: str
    parts: Sequence[Part] = field(default_factory=tuple)


def render_page(
    *, title: str, kind: str, lead: Sequence[Part], sections: Sequence[Section], footer: str = ""
) -> str:
    """Returns a page as one HTML document.

    Args:
        title: Of the page.
        kind: What kind of page it is, in a word or two above the title.
        lead: What is to be known first.
        sections: The rest.
        footer: Last line.
    """
    scripts = [Markup(vega_script()), Markup(_read("page.js"))]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            kind=kind,
            lead=lead,
            sections=sections,
            footer=footer,
            style=Markup(_read("page.css")),
            scripts=scripts,
            hashes=[_hash(script) for script in scripts],
        )
    )


def isolated(text: str) -> Markup:
    """Marks a text of unknown direction up, so that it changes nothing around it."""
    return Markup('<bdi class="text">{}</bdi>').format(text)


def shorten(text: str, most: int = _LONGEST_LABEL) -> str:
    """Cuts a label for a chart or a table, and shows control characters as U+FFFD.

    Characters that change the direction of writing are among these: in a chart nothing keeps
    them to themselves.
    """
    text = text if len(text) <= most else text[: most - 1] + "…"
    if text.isprintable():
        return text
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in text)


def to_script_json(value: object) -> Markup:
    """Returns JSON that can stand in a script element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # What could end the element or open a comment, and what older JavaScript takes for line ends.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgebert_pipeline"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = to_script_json
    environment.tests["kind"] = lambda part, name: type(part).__name__ == name
    return environment


@cache
def _read(name: str) -> str:
    return (resources.files("edgebert_pipeline") / "templates" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
