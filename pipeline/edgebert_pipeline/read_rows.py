"""Reads tables of rows: CSV, TSV, JSON Lines and Parquet files, and splits of hub data sets.

Text files are read with the standard library, which names the line of a fault and leaves every
value as it was written; readers that guess types turn the text "NA" into nothing.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebert_export.errors import DataError
from edgebert_pipeline.errors import FetchError
from edgebert_pipeline.fetch import fetch_rows_file, reason_of, refuse_local_shadow
from edgebert_pipeline.recipe import RowsSource

__all__ = ["Row", "read_rows"]

Row = tuple[str, Mapping[str, Any]]
"""Where a row is, for messages (``reviews.csv, line 7``), and its columns."""

_FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}


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
    if format_ == "jsonl":
        return _read_jsonl(path)
    return _read_delimited(path, "," if format_ == "csv" else "\t", source)


def _lines(path: Path) -> Iterator[str]:
    """Yields decoded lines, so that a fault of encoding is named by its line."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as exc:
                raise DataError(
                    f"{path.name}, line {number}, is not UTF-8 (byte {exc.object[exc.start]:#04x} "
                    f"at column {exc.start + 1}); convert the file to UTF-8"
                ) from exc
            yield line


def _read_delimited(path: Path, delimiter: str, source: RowsSource) -> Iterator[Row]:
    csv.field_size_limit(64 * 1024 * 1024)
    reader = csv.reader(
        _lines(path),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if source.quoting else csv.QUOTE_NONE,
        strict=True,
    )
    names = list(source.columns)
    try:
        for fields in reader:
            if not fields:
                continue
            where = f"{path.name}, line {reader.line_num}"
            if not names:
                names = fields
                if len(set(names)) != len(names):
                    raise DataError(f"{where}: a column name is there twice")
                continue
            if len(fields) != len(names):
                raise DataError(f"{where} has {len(fields)} fields, not {len(names)}")
            yield where, dict(zip(names, fields, strict=True))
    except csv.Error as exc:
        mend = "; set quoting = false if quotes are part of the text" if source.quoting else ""
        raise DataError(f"{path.name}, line {reader.line_num}: {exc}{mend}") from exc


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise DataError(f"{where} is not JSON: {exc}") from exc
        if not isinstance(row, dict):
            raise DataError(f"{where} is not a JSON object")
        yield where, row


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
