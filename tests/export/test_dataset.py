"""Keys and hashes of labelled texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebert_export.dataset import Dataset, Example, label_counts, text_key
from edgebert_runtime.manifest import Task

TASK = Task(kind="single_label", labels=("no", "yes"), text_pair=False)
ROWS = tuple(Example(f"text {index}", (index % 2,)) for index in range(8))
DATA = Dataset(TASK, ROWS[:2], ROWS[2:4], ROWS[4:6], ROWS[6:])

texts = st.text(st.characters(exclude_categories=["Cs"]))
spaces = st.text(" \t\n\r\f\v\u00a0\u2003\u3000\x1f", min_size=1)
words = st.lists(texts.map(lambda text: "".join(text.split())).filter(bool))


@given(words, st.data())
def test_the_layout_of_white_space_does_not_change_a_key(
    words: list[str], data: st.DataObject
) -> None:
    def laid_out() -> str:
        edge = st.one_of(st.just(""), spaces)
        middle = [word + data.draw(spaces) for word in words[:-1]]
        return data.draw(edge) + "".join([*middle, *words[-1:]]) + data.draw(edge)

    assert text_key(laid_out()) == text_key(" ".join(words))
    assert text_key((laid_out(), "b")) == text_key((" ".join(words), "b"))


@given(words, words)
def test_texts_with_other_words_have_other_keys(first: list[str], second: list[str]) -> None:
    same = text_key(" ".join(first)) == text_key(" ".join(second))
    assert same == (first == second)


@given(texts, texts, texts, texts)
def test_pairs_have_the_same_key_only_if_both_texts_do(a: str, b: str, c: str, d: str) -> None:
    same = (a.split(), b.split()) == (c.split(), d.split())
    assert (text_key((a, b)) == text_key((c, d))) == same


def test_where_a_pair_is_divided_changes_its_key() -> None:
    assert text_key(("a b", "c")) != text_key(("a", "b c"))
    assert text_key(("a b c", "")) != text_key(("", "a b c"))


@given(texts, texts, texts)
def test_no_single_text_has_the_key_of_a_pair(a: str, b: str, c: str) -> None:
    for single in (c, a + b, f"{a} {b}", f"{a}\x1f{b}", f"{a}\x00{b}"):
        assert text_key(single) != text_key((a, b))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(replace(DATA, train=DATA.train[::-1]), id="order of rows"),
        pytest.param(replace(DATA, train=DATA.validation, validation=DATA.train), id="splits"),
        pytest.param(replace(DATA, train=ROWS[:3], validation=ROWS[3:4]), id="where a split ends"),
        pytest.param(replace(DATA, test=(ROWS[4], replace(ROWS[5], text="text 5!"))), id="a text"),
        pytest.param(replace(DATA, test=(ROWS[4], replace(ROWS[5], labels=(0,)))), id="a label"),
        pytest.param(replace(DATA, test=(ROWS[4], replace(ROWS[5], labels=()))), id="no label"),
        pytest.param(replace(DATA, calibration=()), id="no calibration rows"),
        pytest.param(
            replace(DATA, task=Task(kind="single_label", labels=("yes", "no"), text_pair=False)),
            id="order of labels",
        ),
    ],
)
def test_whatever_changes_what_is_learnt_changes_the_hash_of_the_data(other: Dataset) -> None:
    assert other.sha256() != DATA.sha256()


def test_equal_data_has_an_equal_hash() -> None:
    same = Dataset(
        TASK,
        *(
            tuple(Example(r.text, r.labels) for r in rows)
            for rows in (DATA.train, DATA.validation, DATA.test, DATA.calibration)
        ),
    )
    assert same.sha256() == DATA.sha256()


def test_a_pair_and_its_concatenation_hash_differently() -> None:
    def data(text: str | tuple[str, str]) -> Dataset:
        return replace(DATA, train=(Example(text, (0,)),))

    seen = {data(text).sha256() for text in (("a b", "c"), ("a", "b c"), "a b c", "('a', 'b c')")}
    assert len(seen) == 4


def test_labels_are_counted_in_the_order_of_the_task_with_zeros() -> None:
    task = Task(kind="multi_label", labels=("a", "b", "c"), text_pair=False, thresholds=(0.5,) * 3)
    rows = [Example("x", (2, 0)), Example("y", (2,)), Example("z", ())]
    assert list(label_counts(task, rows).items()) == [("a", 1), ("b", 0), ("c", 2)]
