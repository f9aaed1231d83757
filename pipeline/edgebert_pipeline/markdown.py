"""Markdown tables that read well on a terminal, too."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["cell", "table"]


def cell(text: str) -> str:
    """Keeps a label or a version from breaking out of its table cell."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table whose columns are aligned in the source."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
