"""Reports as Markdown that reads well on a terminal, too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from edgebert_pipeline.parts import Cell, Facts, Grid, Heading, Notice, Part, Section, Table

__all__ = ["cell", "render_document", "render_parts", "table"]


_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")
_MEANING = re.compile(r"([\\|*`\[])")
_LINK = re.compile(r"([\\\[])")
_CODE = re.compile(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)")  # as CommonMark finds it
_BLOCK = re.compile(r"[#>|]|~~~|```|[-+] ")


def _escape(text: str) -> str:
    """Keeps a text from being taken for HTML, for several lines, or for a call of somebody."""
    text = _MARKUP.sub(lambda found: {"<": "&lt;", "&": "&amp;"}[found.group()], text)
    return " ".join(text.replace("@", "@\u200b").split())


def cell(text: str) -> str:
    """Keeps a label or a version from breaking out of its table cell, or meaning anything else."""
    return _escape(_MEANING.sub(r"\\\1", text))


def _sentence(text: str) -> str:
    """Keeps the names in a sentence from being links, images or blocks.

    Code, strong and emphasis are what sentences are written with.
    """
    text, parts, end = " ".join(text.split()), [], 0
    for code in _CODE.finditer(text):
        parts += [_LINK.sub(r"\\\1", text[end : code.start()]), code.group()]
        end = code.end()
    escaped = _escape("".join([*parts, _LINK.sub(r"\\\1", text[end:])]))
    return f"\\{escaped}" if _BLOCK.match(escaped) else escaped


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table whose columns are aligned in the source."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def render_document(title: str, lead: Sequence[Part], sections: Sequence[Section]) -> str:
    """Returns a whole document as Markdown, all but charts and what is folded away.

    The counterpart of ``page.render_page``.
    """
    parts = [f"# {cell(title)}", render_parts(lead)]
    parts += [f"## {cell(section.title)}\n\n{render_parts(section.parts)}" for section in sections]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_parts(parts: Sequence[Part]) -> str:
    """Returns parts as Markdown: all but charts and what is folded away."""
    return "\n\n".join(text for part in parts for text in _blocks(part))


def _blocks(part: Part) -> Iterator[str]:
    if isinstance(part, Markup):
        return
    if isinstance(part, str):
        yield _sentence(part)
    elif isinstance(part, Heading):
        yield f"### {cell(part.text)}"
    elif isinstance(part, Notice):
        yield _sentence(part.text)
    elif isinstance(part, Facts):
        rows = [(cell(f.name), cell(f.value), cell(f.note)) for f in part.facts]
        yield table(("", "", ""), rows)
    elif isinstance(part, Table):
        if part.caption:
            yield f"{_sentence(part.caption)}:"
        yield table(
            [cell(column.name) for column in part.columns],
            [[_cell(item) for item in row] for row in part.rows],
        )
    elif isinstance(part, Grid):
        for inner in part.parts:
            yield from _blocks(inner)


def _cell(item: Cell | str) -> str:
    if isinstance(item, str):
        return cell(item)
    return f"`{cell(item.text)}`" if item.mood == "code" and item.text else cell(item.text)
