"""Reads tables of rows: CSV, TSV, JSON Lines and Parquet files, and splits of hub data sets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgebert_export.errors import DataError
from edgebert_pipeline.errors import FetchError
from edgebert_pipeline.fetch import fetch_rows_file, reason_of, refuse_local_shadow
from edgebert_pipeline.recipe import RowsSource
from edgebert_runtime.errors import InputError
from edgebert_runtime.rows import FORMATS, Row, read_text_rows

__all__ = ["Row", "read_rows"]

_FORMATS = {**FORMATS, ".parquet": "parquet"}


def read_rows(source: RowsSource, base: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of ``source``.

    Args:
        source: From the recipe.
        base: Directory of the recipe.
        columns: Columns that must be there.

    Raises:
        DataError: The file is missing, empty, not UTF-8, malformed, or lacks a column.
        FetchError: The source cannot be fetched.
    """
    if source.hub is not None:
        name, rows = source.hub, _read_hub(source)
    else:
        path = fetch_rows_file(source, base)
        name, rows = path.name, _read_file(path, source)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{name} has no rows")
    for column in columns:
        if column not in first[1]:
            raise DataError(
                f"{name} has no column {column!r}; it has {', '.join(map(repr, first[1]))}"
            )
    return itertools.chain([first], rows)


def _read_file(path: Path, source: RowsSource) -> Iterator[Row]:
    if path.is_dir():
        raise DataError(f"{path} is a directory; name the file in it")
    if not path.is_file():
        raise DataError(f"{path}: there is no such data file")
    format_ = source.format or _FORMATS.get(path.suffix.lower())
    if format_ is None:
        raise DataError(
            f"{path.name}: cannot tell the format by its suffix; set format to csv, tsv, jsonl "
            "or parquet"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if format_ == "parquet":
        return _read_parquet(path)
    return _read_text(path, format_, source)


def _read_text(path: Path, format_: str, source: RowsSource) -> Iterator[Row]:
    try:
        yield from read_text_rows(path, format_, columns=source.columns, quoting=source.quoting)
    except InputError as exc:
        raise DataError(str(exc)) from exc


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}, row {number}", row
    except (pyarrow.ArrowException, OSError) as exc:
        raise DataError(f"{path.name} is not a Parquet file: {exc}") from exc


def _read_hub(source: RowsSource) -> Iterator[Row]:
    import datasets

    assert source.hub is not None
    refuse_local_shadow(source.hub)
    try:
        rows = datasets.load_dataset(
            source.hub, source.subset, split=source.split, revision=source.revision
        )
    except Exception as exc:  # it passes on whatever its HTTP library raises
        raise FetchError(
            f"hub data set {source.hub} at {source.revision} cannot be fetched: {reason_of(exc)}. "
            "Offline: save it as a file elsewhere and name it with path"
        ) from exc
    for number, row in enumerate(rows, start=1):
        yield f"{source.hub}, row {number}", row
