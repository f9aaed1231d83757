"""Rows that variants answer differently, with their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import escape

from edgebert_pipeline.page import render_part
from edgebert_pipeline.parts import Part, Section, shorten
from edgebert_pipeline.report import Report
from edgebert_pipeline.scores import FlippedRow
from edgebert_runtime.encoder import Text

__all__ = ["flips_section"]

_MOST_NAMED = 6
_MOST_TEXT_BYTES = 800
_MOST_BYTES = 1_800_000
"""Of all rows that are shown: a page is under 3 MB, whatever the texts and labels are."""

_ROW_BYTES, _ANSWER_BYTES = 400, 80  # of the markup around them


def flips_section(report: Report) -> Section | None:
    """Returns the section; ``None`` if the report does not say which rows flipped."""
    found = report.evaluation.flips
    if found is None:
        return None
    if not found.count:
        return Section("flips", "Flipped rows", ("All variants answer every test row alike.",))
    variants = [v.full_name for v in report.evaluation.variants]
    rows = _rows(found.kept, variants)
    shown = (
        f"{len(rows):,} of the {found.count:,}" if len(rows) < found.count else f"{found.count:,}"
    )
    about = (
        f"Test rows that not all variants answer alike: {shown}, those first that a variant in the "
        "bundle answers unlike its reference. A score is the probability of the answer."
    )
    parts: list[Part] = [about]
    if found.kept and found.kept[0].text is None:
        parts.append("The recipe leaves the texts out; rows are counted from 0.")
    parts.append(render_part("flips.html.j2", rows=rows, variants=variants))
    return Section("flips", "Flipped rows", parts)


@dataclass(frozen=True)
class _Answer:
    labels: str
    right: bool
    by: str


@dataclass(frozen=True)
class _Row:
    """A row as it is shown.

    Attributes:
        number: Its place among the test rows.
        texts: None, one or two.
        truth: Its labels.
        answers: Who answered what.
        given: For each variant, the place of its answer in ``answers``.
        right: Place of the right answer; -1 if no variant gave it.
    """

    number: int
    texts: tuple[str, ...]
    truth: str
    answers: tuple[_Answer, ...]
    given: str
    right: int

    @property
    def size_bytes(self) -> int:
        """How much of the page it takes, at most."""
        size = _ROW_BYTES + _bytes(self.truth) + sum(map(_bytes, self.texts))
        for answer in self.answers:
            size += _ANSWER_BYTES + _bytes(answer.labels) + _bytes(answer.by)
        return size


def _rows(kept: Sequence[FlippedRow], variants: Sequence[str]) -> list[_Row]:
    rows: list[_Row] = []
    left = _MOST_BYTES
    for item in kept:
        row = _row(item, variants)
        left -= row.size_bytes
        if left < 0:
            break
        rows.append(row)
    return rows


def _row(item: FlippedRow, variants: Sequence[str]) -> _Row:
    answers = tuple(
        _Answer(
            _listed(answer.labels),
            set(answer.labels) == set(item.truth),
            _by(answer.scores),
        )
        for answer in item.answers
    )
    place = {name: n for n, answer in enumerate(item.answers) for name in answer.scores}
    return _Row(
        number=item.row,
        texts=() if item.text is None else _parts(item.text),
        truth=_listed(item.truth),
        answers=answers,
        given=" ".join(str(place.get(name, -1)) for name in variants),
        right=next((n for n, answer in enumerate(answers) if answer.right), -1),
    )


def _by(scores: Mapping[str, float]) -> str:
    """Says who gave an answer, and with what score; how many, if they are many."""
    if len(scores) > _MOST_NAMED:
        return f"{len(scores)} variants {min(scores.values()):.2f} to {max(scores.values()):.2f}"
    return ", ".join(f"{name} {score:.2f}" for name, score in scores.items())


def _parts(text: Text) -> tuple[str, ...]:
    return tuple(_cut(part) for part in ((text,) if isinstance(text, str) else text))


def _cut(text: str) -> str:
    """Cuts a text so that it takes few bytes of a page, however its characters are written."""
    if _bytes(text) <= _MOST_TEXT_BYTES:
        return text
    while _bytes(text) > _MOST_TEXT_BYTES:
        text = text[: max(len(text) * _MOST_TEXT_BYTES // (_bytes(text) + 1), 1)]
    return text + " …"


def _bytes(text: str) -> int:
    return len(str(escape(text)).encode("utf-8", "replace"))


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(map(shorten, labels)) if labels else "no label"
