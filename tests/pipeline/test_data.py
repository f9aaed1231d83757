"""Rows: formats, labels, splits, and how what is wrong is named."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebert_export.dataset import Dataset, text_key
from edgebert_export.errors import DataError
from edgebert_pipeline.cli import main
from edgebert_pipeline.data import load_dataset
from edgebert_pipeline.read_rows import read_rows
from edgebert_pipeline.recipe import DataConfig, RowsSource, load_recipe
from edgebert_runtime.rows import read_labelled

LABELS = ("bad", "good")


def rows_of(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"text": f'row {i}, "quoted" — it’s ünïcode 🙂', "label": LABELS[i % 2]}
        for i in range(start, start + count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> RowsSource:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return RowsSource(path=path.name)


def config(train: RowsSource, **more: Any) -> DataConfig:
    return DataConfig(**{"labels": LABELS, "train": train, **more})


def texts(examples: Any) -> set[Any]:
    return {example.text for example in examples}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = rows_of(400)
    dataset, summary = load_dataset(config(write(tmp_path / f"d.{suffix}", rows)), tmp_path)
    found = texts(dataset.train) | texts(dataset.validation) | texts(dataset.test)
    assert found == {row["text"] for row in rows}
    assert summary.rows["train"] + summary.rows["validation"] + summary.rows["test"] == 400
    assert summary.labels["train"]["good"] + summary.labels["train"]["bad"] == len(dataset.train)


def test_words_that_other_readers_take_for_nothing_stay_text(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\nNA,bad\nnull,good\n007,bad\n1e5,good\n")
    found = [row["text"] for _, row in read_rows(RowsSource(path="d.csv"), tmp_path, ["text"])]
    assert found == ["NA", "null", "007", "1e5"]


def test_quotes_can_be_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text('1\ta 9" screen\n2\t"said"\n')
    source = RowsSource(path="d.tsv", columns=("id", "text"), quoting=False)
    found = [row["text"] for _, row in read_rows(source, tmp_path, ["text"])]
    assert found == ['a 9" screen', '"said"']


def splits_of(dataset: Dataset) -> dict[Any, str]:
    return {
        example.text: name
        for name in ("train", "validation", "test")
        for example in getattr(dataset, name)
    }


def test_a_row_never_changes_sides_when_others_come_and_go(tmp_path: Path) -> None:
    small, _ = load_dataset(config(write(tmp_path / "a.jsonl", rows_of(400))), tmp_path)
    rows = rows_of(300, start=250)[::-1]
    other, _ = load_dataset(config(write(tmp_path / "b.jsonl", rows)), tmp_path)
    one, two = splits_of(small), splits_of(other)
    common = one.keys() & two.keys()
    assert len(common) == 150
    assert {text: one[text] for text in common} == {text: two[text] for text in common}


def test_shares_are_what_the_recipe_says(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", rows_of(4000))
    _, summary = load_dataset(config(source, test_share=0.3, validation_share=0.2), tmp_path)
    assert summary.rows["test"] / 4000 == pytest.approx(0.3, abs=0.03)
    assert summary.rows["validation"] / 4000 == pytest.approx(0.2, abs=0.03)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.text("ab \n", max_size=6), st.booleans()), min_size=1, max_size=60),
    st.lists(st.text("ab ", max_size=6), max_size=20),
)
def test_no_text_is_in_two_splits(
    tmp_path: Path, random_rows: list[tuple[str, bool]], test_texts: list[str]
) -> None:
    rows = rows_of(300) + [{"text": t, "label": LABELS[g]} for t, g in random_rows]
    test = rows_of(60, start=280) + [{"text": t, "label": "bad"} for t in test_texts]
    dataset, summary = load_dataset(
        config(write(tmp_path / "a.jsonl", rows), test=write(tmp_path / "t.jsonl", test)), tmp_path
    )
    keys = [
        {text_key(example.text) for example in part}
        for part in (dataset.train, dataset.validation, dataset.test)
    ]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]
    assert not {text_key(e.text) for e in dataset.calibration} & keys[2]
    dropped = summary.duplicates + summary.contradictions + summary.moved_out
    assert sum(map(len, keys)) + dropped == len(rows) + len(test)
    assert summary.moved_out >= 20


def test_copies_are_dropped_and_contradictions_go_altogether(tmp_path: Path) -> None:
    rows = [
        *rows_of(400),
        {"text": "twice", "label": "good"},
        {"text": " twice\n", "label": "good"},
        {"text": "both", "label": "good"},
        {"text": "both", "label": "bad"},
    ]
    dataset, summary = load_dataset(config(write(tmp_path / "a.jsonl", rows)), tmp_path)
    assert (summary.duplicates, summary.contradictions) == (1, 2)
    assert "twice" in splits_of(dataset)
    assert "both" not in splits_of(dataset)


def test_a_number_becomes_a_label_by_its_range(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": str(i % 9 - 4)} for i in range(900)]
    source = write(tmp_path / "a.csv", rows)
    ranges = {"bad": (-4.0, -1.0), "good": (1.0, 4.0)}
    dataset, summary = load_dataset(config(source, label_ranges=ranges), tmp_path)
    assert summary.out_of_ranges == 100
    for example in dataset.train:
        assert example.labels == (int(int(example.text[1:]) % 9 - 4 > 0),)


def test_labels_can_have_other_names_in_the_file(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(300)]
    source = write(tmp_path / "a.jsonl", rows)
    dataset, _ = load_dataset(config(source, label_values=(1, 0)), tmp_path)
    for example in dataset.test:
        assert example.labels == (1 - int(example.text[1:]) % 2,)


def test_several_labels_come_as_a_list_or_separated(tmp_path: Path) -> None:
    sets = [[], ["bad"], ["good"], ["good", "bad"]]
    rows = [{"text": f"t{i}", "label": sets[i % 4]} for i in range(400)]
    listed = write(tmp_path / "a.jsonl", rows)
    joined = write(tmp_path / "a.csv", [{**r, "label": "; ".join(r["label"])} for r in rows])
    one, _ = load_dataset(config(listed, task="multi_label"), tmp_path)
    two, _ = load_dataset(config(joined, task="multi_label", label_separator=";"), tmp_path)
    assert one == two
    assert {example.labels for example in one.train} == {(), (0,), (1,), (0, 1)}


def test_max_rows_keeps_the_same_rows_and_the_shares(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", rows_of(3000))
    whole, _ = load_dataset(config(source), tmp_path)
    part, summary = load_dataset(config(source, max_rows=1000), tmp_path)
    assert sum(summary.rows[name] for name in ("train", "validation", "test")) == 1000
    assert splits_of(part).items() <= splits_of(whole).items()
    assert summary.rows["test"] / 1000 == pytest.approx(0.15, abs=0.05)


def test_calibration_texts_need_no_label_and_are_never_test_texts(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", rows_of(400))
    whole, _ = load_dataset(config(source), tmp_path)
    own = [{"text": text} for text in (*sorted(texts(whole.test)), "unseen")]
    calibration = write(tmp_path / "c.jsonl", own)
    dataset, _ = load_dataset(config(source, calibration=calibration), tmp_path)
    assert texts(dataset.calibration) == {"unseen"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"", "d.csv is empty"),
        ("d.csv", b"text,label\n", "d.csv has no rows"),
        ("d.jsonl", b"\n\n", "d.jsonl has no rows"),
        ("d.csv", b"text,label\nok,good\nca\xe9,bad\n", "d.csv, line 3, is not UTF-8 (byte 0xe9"),
        ("d.csv", b"words,label\nx,good\n", "d.csv has no column 'text'; it has 'words', 'label'"),
        ("d.csv", b"text,label\nx\n", "d.csv, line 2 has 1 fields, not 2"),
        ("d.csv", b"text,text\nx,y\n", "d.csv, line 1: a column name is there twice"),
        ("d.tsv", b'text\tlabel\n"open\tgood\n', "set quoting = false"),
        ("d.csv", b"text,label\nx,fine\n", "line 2: label 'fine' is not one of bad, good"),
        ("d.jsonl", b'{"text": "x", "label": "good"}\n{oops\n', "d.jsonl, line 2 is not JSON"),
        ("d.jsonl", b"[1]\n", "d.jsonl, line 1 is not a JSON object"),
        ("d.jsonl", b'{"text": 3, "label": "good"}\n', "column 'text' holds a int, not text"),
        ("d.jsonl", b'{"text": null, "label": "good"}\n', "column 'text' holds nothing, not text"),
        ("d.jsonl", b'{"text": "x", "label": null}\n', "column 'label' holds no label"),
        ("d.parquet", b"PAR1 not really", "d.parquet is not a Parquet file"),
        ("d.xlsx", b"PK", "cannot tell the format by its suffix"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        load_dataset(config(RowsSource(path=name)), tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: there is no such data file"):
        load_dataset(config(RowsSource(path="none.csv")), tmp_path)


def test_a_single_class_too_few_rows_and_an_unused_label(tmp_path: Path) -> None:
    same = write(tmp_path / "same.jsonl", [{**row, "label": "good"} for row in rows_of(400)])
    with pytest.raises(DataError, match="has the label 'good'; a classifier needs two"):
        load_dataset(config(same), tmp_path)
    few = write(tmp_path / "few.jsonl", rows_of(60))
    with pytest.raises(DataError, match=r"too few rows in a split \(test \d+, validation"):
        load_dataset(config(few), tmp_path)
    unused = write(tmp_path / "unused.jsonl", rows_of(400))
    with pytest.raises(DataError, match="no row of the train split has the label 'ugly'"):
        load_dataset(config(unused, labels=(*LABELS, "ugly")), tmp_path)


def test_a_label_that_is_no_number_where_ranges_are_wanted(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", rows_of(300))
    ranges = {"bad": (0.0, 1.0), "good": (2.0, 3.0)}
    with pytest.raises(DataError, match=r"line 2: 'bad' in 'label' is no number"):
        load_dataset(config(source, label_ranges=ranges), tmp_path)


def test_unlabelled_texts_are_those_in_no_other_split(tmp_path: Path) -> None:
    """The file of train again, with numbers in no range, a repeated and a contradicted text."""
    rows: list[dict[str, Any]] = [
        {"text": f"row {i}", "label": (-2.0, 0.0, 2.0)[i % 3]} for i in range(600)
    ]
    rows += [{"text": "row 1", "label": 0.0}, {"text": "row 0", "label": 2.0}]
    source = write(tmp_path / "rows.csv", rows)
    ranges = {"bad": (-4.0, -1.0), "good": (1.0, 4.0)}
    alone, _ = load_dataset(config(source, label_ranges=ranges), tmp_path)
    dataset, summary = load_dataset(
        config(source, label_ranges=ranges, unlabelled=source), tmp_path
    )
    left_out = {row["text"] for row in rows[:600] if row["label"] == 0.0} | {"row 0"}
    assert texts(dataset.unlabelled) == left_out
    assert {example.labels for example in dataset.unlabelled} == {()}
    assert summary.rows["unlabelled"] == len(left_out)
    assert (summary.duplicates, summary.contradictions) == (0, 2)  # of labelled rows alone
    assert dataset.without_unlabelled() == alone
    assert dataset.sha256() != alone.sha256()


def test_max_rows_counts_the_unlabelled_texts_that_are_in_no_other_split(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows_of(800))
    dataset, _ = load_dataset(config(source, unlabelled=source, max_rows=300), tmp_path)
    taken = texts(dataset.train) | texts(dataset.validation) | texts(dataset.test)
    assert len(taken) == len(dataset.unlabelled) == 300
    assert not taken & texts(dataset.unlabelled)


def test_unlabelled_pairs_keep_away_from_the_first_texts_of_the_test_split(tmp_path: Path) -> None:
    rows = [
        {"text": f"first {i // 2}", "other": f"second {i}", "label": LABELS[i % 2]}
        for i in range(600)
    ]
    more = [{"text": f"first {i}", "other": "new"} for i in range(300)]
    dataset, _ = load_dataset(
        config(
            write(tmp_path / "rows.jsonl", rows),
            text_pair="other",
            unlabelled=write(tmp_path / "more.jsonl", more),
        ),
        tmp_path,
    )
    taken = {text[0] for text in texts(dataset.test) | texts(dataset.validation)}
    assert texts(dataset.unlabelled) == {
        (row["text"], "new") for row in more if row["text"] not in taken
    }


def test_unlabelled_texts_that_are_all_in_other_splits_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows_of(400))
    with pytest.raises(DataError, match=r"data\.unlabelled: every text is also in train"):
        load_dataset(config(source, unlabelled=source), tmp_path)
    (tmp_path / "empty.csv").write_text("text\n")
    with pytest.raises(DataError, match=r"empty\.csv has no rows"):
        load_dataset(config(source, unlabelled=RowsSource(path="empty.csv")), tmp_path)


@pytest.mark.parametrize("task", ["single", "multi", "pairs"])
def test_a_device_gets_the_very_rows_that_the_report_is_about(
    tmp_path: Path, write_recipe, task: str
) -> None:
    path = write_recipe(task)
    done = CliRunner().invoke(main, ["rows", str(path)])
    assert done.exit_code == 0, done.stderr
    (tmp_path / "test.jsonl").write_text(done.stdout, encoding="utf-8")
    dataset, _ = load_dataset(load_recipe(path).data, path.parent)
    labels = dataset.task.labels
    expected = [(e.text, tuple(labels[index] for index in e.labels)) for e in dataset.test]
    assert read_labelled(tmp_path / "test.jsonl", dataset.task) == expected
