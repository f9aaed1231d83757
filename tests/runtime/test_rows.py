"""Labelled rows on a device, and the hash that says whether two measurements saw the same ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebert_runtime.errors import InputError
from edgebert_runtime.manifest import Task
from edgebert_runtime.rows import pack_right, read_labelled, row_order, rows_sha256, unpack_right

SINGLE = Task(kind="single_label", labels=("no", "yes"), text_pair=False, thresholds=None)
MULTI = Task(kind="multi_label", labels=("food", "work"), text_pair=False, thresholds=(0.5, 0.5))
PAIRS = Task(kind="single_label", labels=("no", "yes"), text_pair=True, thresholds=None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", 'id,text,label\n1,"good, really",yes\n2, NA ,no\n'),
        ("rows.TSV", "text\tlabel\ngood, really\tyes\nNA\tno\n"),
        ("rows.jsonl", '{"text": "good, really", "label": "yes"}\n\n{"text": "NA", "label": "no"}'),
    ],
)
def test_formats_say_the_same(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    found = read_labelled(tmp_path / name, SINGLE)
    assert found == [("good, really", ("yes",)), ("NA", ("no",))]


def test_several_labels_a_text(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "label": ["work", "food"]},
        {"text": "b", "label": []},
        {"text": "c", "label": "food, work"},
        {"text": "d", "label": ""},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = [labels for _, labels in read_labelled(path, MULTI)]
    assert found == [("work", "food"), (), ("food", "work"), ()]


def test_pairs(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,text_pair,label\none,two,yes\n")
    assert read_labelled(tmp_path / "rows.csv", PAIRS) == [(("one", "two"), ("yes",))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"text,label\na,maybe\n", "rows.csv, line 2: label 'maybe' is not one of"),
        ("rows.csv", b"words,label\na,no\n", "line 2: there is no 'text'; columns: 'words'"),
        ("rows.csv", b"text,label\na,no,more\n", "line 2 has 3 fields, not 2"),
        ("rows.csv", b"text,label\n", "has no rows"),
        ("rows.csv", b"", "has no rows"),
        ("rows.jsonl", b'{"text": "a"}', "line 1: there is no 'label'"),
        ("rows.jsonl", b'{"text": 7, "label": "no"}', "line 1: column 'text' holds a int"),
        ("rows.jsonl", b'{"text": "\\ud800", "label": "no"}', "half a surrogate pair"),
        ("rows.jsonl", b'["text"]', "line 1 is not a JSON object"),
        ("rows.jsonl", b"{}\n\xff", "line 1: there is no 'text'"),
        ("rows.csv", b"text,label\na,no\n\xff,no\n", "line 3, is not UTF-8"),
        ("rows.parquet", b"PAR1", "its name must end in one of .csv"),
        ("rows.csv", None, "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_labelled(tmp_path / name, SINGLE)
    assert message in str(caught.value)


ROWS = st.lists(
    st.tuples(st.text() | st.tuples(st.text(), st.text()), st.lists(st.text()).map(tuple))
)


@given(ROWS, st.randoms())
def test_the_hash_is_of_the_rows_whatever_their_order(rows, random) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert rows_sha256(rows) == rows_sha256(shuffled)


@given(ROWS, ROWS)
def test_other_rows_have_another_hash(rows, others) -> None:
    def content(rows):
        return sorted(repr((text, sorted(labels))) for text, labels in rows)

    assert (rows_sha256(rows) == rows_sha256(others)) == (content(rows) == content(others))


def test_a_row_that_is_there_twice_counts() -> None:
    row = ("a", ("no",))
    assert len({rows_sha256([row]), rows_sha256([row, row]), rows_sha256([])}) == 3


@given(st.lists(st.tuples(st.text(), st.just(("no",)), st.booleans())), st.randoms())
def test_rows_answered_right_are_paired_whatever_their_order(rows, random) -> None:
    rows = list({text: (text, labels, right) for text, labels, right in rows}.values())

    def packed(rows):
        order = row_order([(text, labels) for text, labels, _ in rows])
        return pack_right(order, [right for _, _, right in rows])

    shuffled = list(rows)
    random.shuffle(shuffled)
    assert packed(rows) == packed(shuffled)
    assert unpack_right(packed(rows), len(rows)).sum() == sum(right for _, _, right in rows)


@pytest.mark.parametrize(("packed", "count"), [("AA==", 9), ("AAA=", 8), ("!", 1), ("", 1)])
def test_a_note_of_other_rows_is_refused(packed: str, count: int) -> None:
    with pytest.raises(ValueError, match="the note of rows answered right is"):
        unpack_right(packed, count)
