"""From the recipe's files to a ``Dataset``: labels checked, duplicates out, rows split by hash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgebert_export.dataset import Dataset, Example, label_counts, text_key
from edgebert_export.errors import DataError
from edgebert_pipeline.read_rows import read_rows
from edgebert_pipeline.recipe import DataConfig, RowsSource
from edgebert_runtime.encoder import Text
from edgebert_runtime.manifest import Task

__all__ = ["DataSummary", "load_dataset", "load_examples"]

_FEWEST_ROWS = 20
"""In a split; with fewer, one row is worth more than five points of accuracy."""

_CALIBRATION_ROWS = 4096
"""Rows of ``train`` that serve when the recipe names no calibration texts."""


class DataSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the rows.

    Attributes:
        rows: Rows in each split.
        labels: In each split, how many rows each label applies to.
        out_of_ranges: Rows whose number is in none of ``label_ranges``.
        duplicates: Rows dropped because their text was there before, with the same labels.
        contradictions: Rows dropped because their text is there with different labels.
        moved_out: Rows dropped because their text is also in another split's own file.
        sha256: Hash of all rows, with the split each belongs to.
    """

    rows: dict[str, int]
    labels: dict[str, dict[str, int]]
    out_of_ranges: int
    duplicates: int
    contradictions: int
    moved_out: int
    sha256: str


def load_dataset(config: DataConfig, base: Path) -> tuple[Dataset, DataSummary]:
    """Reads, checks and splits the rows.

    Args:
        config: From the recipe.
        base: Directory of the recipe.

    Raises:
        DataError: A file, a row or a label is wrong, or a split has too little.
        FetchError: A source cannot be fetched.
    """
    task = config.as_task(None)
    reader = _Reader(config, task, base)
    own = {
        name: reader.limited(reader.read(source))
        for name, source in (("test", config.test), ("validation", config.validation))
        if source is not None
    }
    train = reader.limited(reader.read(config.train))
    moved_out = 0
    seen: set[bytes] = set()
    for name in ("test", "validation"):
        if name in own:
            moved_out += _drop_seen(own[name], seen)
            seen |= {_side_key(example.text) for example in own[name].values()}
    moved_out += _drop_seen(train, seen)
    splits: dict[str, dict[bytes, Example]] = {"test": {}, "validation": {}, "train": {}, **own}
    for key, example in train.items():
        splits[_side(_side_key(example.text), config)][key] = example
    short = [f"{name} {len(rows)}" for name, rows in splits.items() if len(rows) < _FEWEST_ROWS]
    if short:
        raise DataError(
            f"too few rows in a split ({', '.join(short)}; {_FEWEST_ROWS} are needed): give more "
            "rows, or a larger data.test_share or data.validation_share"
        )
    for name, rows in splits.items():
        _check_labels(name, tuple(rows.values()), task)
    if config.calibration is None:
        calibration = dict(sorted(splits["train"].items())[:_CALIBRATION_ROWS])
    else:
        calibration = reader.limited(reader.read(config.calibration, labelled=False))
        moved_out += _drop_seen(calibration, {_side_key(e.text) for e in splits["test"].values()})
        if not calibration:
            raise DataError("every calibration text is also a test text; give other texts")
    unlabelled: dict[bytes, Example] = {}
    if config.unlabelled is not None:
        unlabelled = _read_unlabelled(config, config.unlabelled, base, splits)
    dataset = Dataset(
        task=task,
        train=tuple(splits["train"].values()),
        validation=tuple(splits["validation"].values()),
        test=tuple(splits["test"].values()),
        # By hash, so that any number of them from the front is a fair sample.
        calibration=tuple(example for _, example in sorted(calibration.items())),
        unlabelled=tuple(unlabelled.values()),
    )
    names = ["train", "validation", "test", "calibration"]
    names += ["unlabelled"] * (config.unlabelled is not None)
    summary = DataSummary(
        rows={name: len(getattr(dataset, name)) for name in names},
        labels={name: label_counts(task, getattr(dataset, name)) for name in names[:3]},
        out_of_ranges=reader.out_of_ranges,
        duplicates=reader.duplicates,
        contradictions=reader.contradictions,
        moved_out=moved_out,
        sha256=dataset.sha256(),
    )
    return dataset, summary


def _read_unlabelled(
    config: DataConfig,
    source: RowsSource,
    base: Path,
    splits: Mapping[str, Mapping[bytes, Example]],
) -> dict[bytes, Example]:
    """Reads the texts to distil on; what is also in another split is not among them."""
    # A reader of its own: what it counts as duplicates says nothing of the labelled rows.
    reader = _Reader(config, config.as_task(None), base)
    found = reader.read(source, labelled=False)
    for name in ("test", "validation"):
        _drop_seen(found, {_side_key(example.text) for example in splits[name].values()})
    found = {key: example for key, example in found.items() if key not in splits["train"]}
    if not found:
        raise DataError(
            "data.unlabelled: every text is also in train, validation or test; give other texts"
        )
    return reader.limited(found)


def load_examples(config: DataConfig, source: RowsSource, base: Path) -> tuple[Example, ...]:
    """Reads one labelled table as it is: every row kept, in order. Raises as ``load_dataset``."""
    return tuple(_Reader(config, config.as_task(None), base).rows(source))


class _Reader:
    """Turns rows into examples, and counts what is left out."""

    def __init__(self, config: DataConfig, task: Task, base: Path) -> None:
        self._config = config
        self._task = task
        self._base = base
        values = config.label_values or config.labels
        self._index = {str(value): index for index, value in enumerate(values)}
        self.out_of_ranges = 0
        self.duplicates = 0
        self.contradictions = 0

    def rows(self, source: RowsSource, *, labelled: bool = True) -> list[Example]:
        """Reads every row of ``source`` that has a label (or any, when not ``labelled``)."""
        config = self._config
        columns = [config.text, *([config.text_pair] if config.text_pair else [])]
        examples = []
        for where, row in read_rows(source, self._base, columns + [config.label] * labelled):
            labels = self._labels(row, where) if labelled else ()
            if labels is None:
                self.out_of_ranges += 1
            else:
                examples.append(Example(self._text(row, columns, where), labels))
        return examples

    def read(self, source: RowsSource, *, labelled: bool = True) -> dict[bytes, Example]:
        """Reads the distinct texts of ``source``, by the hash that splits them."""
        by_text: dict[bytes, list[Example]] = {}
        for example in self.rows(source, labelled=labelled):
            by_text.setdefault(text_key(example.text), []).append(example)
        found: dict[bytes, Example] = {}
        for key, copies in by_text.items():
            if all(copy.labels == copies[0].labels for copy in copies):
                found[key] = copies[0]
                self.duplicates += len(copies) - 1
            else:
                self.contradictions += len(copies)
        return found

    def limited(self, found: dict[bytes, Example]) -> dict[bytes, Example]:
        """Returns ``max_rows`` of ``found`` at most, chosen by hash."""
        if self._config.max_rows is None:
            return found
        # Another part of the hash than the one that splits, so that shares stay as they are.
        kept = set(sorted(found, key=lambda key: key[16:])[: self._config.max_rows])
        return {key: example for key, example in found.items() if key in kept}

    def _text(self, row: Mapping[str, Any], columns: Sequence[str], where: str) -> Text:
        parts = []
        for column in columns:
            value = row.get(column)
            if not isinstance(value, str):
                what = "nothing" if value is None else f"a {type(value).__name__}"
                raise DataError(f"{where}: column {column!r} holds {what}, not text")
            if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                raise DataError(f"{where}: column {column!r} holds half a surrogate pair")
            parts.append(value.strip())
        return parts[0] if len(parts) == 1 else (parts[0], parts[1])

    def _labels(self, row: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
        config = self._config
        value = row.get(config.label)
        if value is None:
            raise DataError(f"{where}: column {config.label!r} holds no label")
        if config.label_ranges is not None:
            return self._label_in_range(value, where)
        if self._task.kind == "single_label":
            return (self._label(value, where),)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(config.label_separator)]
            value = [part for part in value if part]
        if not isinstance(value, list):
            raise DataError(f"{where}: column {config.label!r} holds no list of labels")
        return tuple(sorted({self._label(item, where) for item in value}))

    def _label(self, value: object, where: str) -> int:
        index = self._index.get(str(value).strip())
        if index is None:
            raise DataError(
                f"{where}: label {str(value)!r:.60} is not one of {', '.join(self._index)}; "
                "if the file names labels otherwise, set data.label_values (--label-value)"
            )
        return index

    def _label_in_range(self, value: object, where: str) -> tuple[int, ...] | None:
        config = self._config
        assert config.label_ranges is not None
        try:
            number = float(str(value))
        except ValueError as exc:
            raise DataError(
                f"{where}: {str(value)!r:.60} in {config.label!r} is no number"
            ) from exc
        for index, label in enumerate(config.labels):
            low, high = config.label_ranges[label]
            if low <= number <= high:
                return (index,)
        return None


def _side_key(text: Text) -> bytes:
    """Hash that decides the side: of a pair, its first text, which rows often share."""
    return text_key(text if isinstance(text, str) else text[0])


def _drop_seen(rows: dict[bytes, Example], seen: set[bytes]) -> int:
    twice = [key for key, example in rows.items() if _side_key(example.text) in seen]
    for key in twice:
        del rows[key]
    return len(twice)


def _side(key: bytes, config: DataConfig) -> str:
    """Says which split a row of ``train`` belongs to, from the hash of its text alone."""
    position = int.from_bytes(key[:8], "big") / 2**64
    if config.test is None:
        if position < config.test_share:
            return "test"
        position -= config.test_share
    if config.validation is None and 0 <= position < config.validation_share:
        return "validation"
    return "train"


def _check_labels(name: str, rows: Sequence[Example], task: Task) -> None:
    counts = label_counts(task, rows)
    missing = [label for label, count in counts.items() if count == 0]
    if task.kind == "single_label" and len(counts) - len(missing) < 2:
        raise DataError(
            f"every row of the {name} split has the label "
            f"{next(label for label, count in counts.items() if count)!r}; a classifier needs two"
        )
    if missing and name == "train":
        raise DataError(f"no row of the {name} split has the label {missing[0]!r}")
