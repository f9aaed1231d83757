"""Rows of text files (CSV, TSV, JSON Lines), and labelled texts with a hash that names them.

Read with the standard library, which names the line of a fault and leaves every value as it was
written; readers that guess types turn the text "NA" into nothing.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgebert_runtime.encoder import Text
from edgebert_runtime.errors import InputError
from edgebert_runtime.manifest import Task

__all__ = [
    "FORMATS",
    "Labelled",
    "Row",
    "pack_right",
    "read_labelled",
    "read_text_rows",
    "row_order",
    "rows_sha256",
    "unpack_right",
]

Row = tuple[str, Mapping[str, Any]]
"""Where a row is, for messages (``reviews.csv, line 7``), and its columns."""

Labelled = tuple[Text, tuple[str, ...]]
"""A text, or a pair of texts, and the names of the labels that apply, in any order."""

FORMATS = {".csv": "csv", ".tsv": "tsv", ".txt": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
"""Formats by what a file's name ends in."""


def read_text_rows(
    path: Path, format_: str, *, columns: Sequence[str] = (), quoting: bool = True
) -> Iterator[Row]:
    """Yields the rows of a text file.

    Args:
        path: An existing file.
        format_: ``csv``, ``tsv`` or ``jsonl``.
        columns: Names of the columns of a CSV or TSV file without a header line.
        quoting: Whether double quotes in a CSV or TSV file enclose fields.

    Raises:
        InputError: It is not UTF-8, or malformed; while iterating.
    """
    if format_ == "jsonl":
        return _read_jsonl(path)
    return _read_delimited(path, "," if format_ == "csv" else "\t", list(columns), quoting)


def _lines(path: Path) -> Iterator[str]:
    """Yields decoded lines, so that a fault of encoding is named by its line."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as exc:
                raise InputError(
                    f"{path.name}, line {number}, is not UTF-8 (byte {exc.object[exc.start]:#04x} "
                    f"at column {exc.start + 1}); convert the file to UTF-8"
                ) from exc
            yield line


def _read_delimited(path: Path, delimiter: str, names: list[str], quoting: bool) -> Iterator[Row]:
    csv.field_size_limit(64 * 1024 * 1024)
    reader = csv.reader(
        _lines(path),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
        strict=True,
    )
    try:
        for fields in reader:
            if not fields:
                continue
            where = f"{path.name}, line {reader.line_num}"
            if not names:
                names = fields
                if len(set(names)) != len(names):
                    raise InputError(f"{where}: a column name is there twice")
                continue
            if len(fields) != len(names):
                raise InputError(f"{where} has {len(fields)} fields, not {len(names)}")
            yield where, dict(zip(names, fields, strict=True))
    except csv.Error as exc:
        mend = ""
        if quoting:
            mend = "; if quotes are part of the text, set quoting = false, or use JSON Lines"
        raise InputError(f"{path.name}, line {reader.line_num}: {exc}{mend}") from exc


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise InputError(f"{where} is not JSON: {exc}") from exc
        if not isinstance(row, dict):
            raise InputError(f"{where} is not a JSON object")
        yield where, row


def read_labelled(path: Path, task: Task) -> list[Labelled]:
    """Reads rows with a label: columns ``text`` and ``label``, and ``text_pair`` for pairs.

    A label is one of the task's names. In a ``multi_label`` task it is a list of them (JSON
    Lines), or they are separated by commas. Other columns are ignored.

    Raises:
        InputError: The file or a row is not that; the message names the line.
    """
    format_ = FORMATS.get(path.suffix.lower())
    if format_ is None:
        raise InputError(f"{path.name}: its name must end in one of {', '.join(FORMATS)}")
    names = ["text", "text_pair"] if task.text_pair else ["text"]
    found: list[Labelled] = []
    try:
        for where, row in read_text_rows(path, format_):
            parts = [_text(row, name, where) for name in names]
            text: Text = parts[0] if len(parts) == 1 else (parts[0], parts[1])
            found.append((text, _labels(row, task, where)))
    except OSError as exc:
        raise InputError(f"{path} cannot be read: {exc.strerror}") from exc
    if not found:
        raise InputError(f"{path} has no rows")
    return found


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = _value(row, name, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: column {name!r} holds a {type(value).__name__}, not text")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(f"{where}: column {name!r} holds half a surrogate pair")
    return value.strip()


def _labels(row: Mapping[str, Any], task: Task, where: str) -> tuple[str, ...]:
    value = _value(row, "label", where)
    many = task.kind == "multi_label"
    if many and isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    labels = [
        str(item).strip() for item in (value if many and isinstance(value, list) else [value])
    ]
    for label in labels:
        if label not in task.labels:
            known = ", ".join(task.labels)
            raise InputError(f"{where}: label {label!r:.60} is not one of the bundle's: {known}")
    return tuple(dict.fromkeys(labels))


def _value(row: Mapping[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise InputError(f"{where}: there is no {name!r}; columns: {', '.join(map(repr, row))}")
    return row[name]


def rows_sha256(rows: Iterable[Labelled]) -> str:
    """Hash of labelled rows, whatever their order and wherever they came from.

    Measurements are of the same rows if and only if this is the same.
    """
    return hashlib.sha256(b"".join(sorted(map(_hash, rows)))).hexdigest()


def _hash(row: Labelled) -> bytes:
    text, labels = row
    return hashlib.sha256(json.dumps([text, sorted(labels)]).encode()).digest()


def row_order(rows: Sequence[Labelled]) -> NDArray[np.int64]:
    """Returns ``int64[rows]``: which row comes first, second and so on by the rows' hashes."""
    hashes = [_hash(row) for row in rows]
    return np.array(sorted(range(len(rows)), key=hashes.__getitem__), dtype=np.int64)


def pack_right(order: NDArray[np.int64], right: Sequence[bool] | NDArray[np.bool_]) -> str:
    """Notes which rows were answered right: a bit a row, in the order of their hashes, in base64.

    So measurements of the same rows can be paired row by row, in whatever order they were made.

    Args:
        order: From ``row_order``.
        right: ``bool[rows]``, as the rows were given.
    """
    return base64.b64encode(np.packbits(np.asarray(right, dtype=bool)[order]).tobytes()).decode()


def unpack_right(packed: str, count: int) -> NDArray[np.bool_]:
    """Returns ``bool[count]``, in the order of the rows' hashes, from what ``pack_right`` noted.

    Raises:
        ValueError: It is not of so many rows. Reports that are read have been checked for it.
    """
    try:
        found = np.frombuffer(base64.b64decode(packed, validate=True), dtype=np.uint8)
    except ValueError as exc:
        raise ValueError(f"the note of rows answered right is damaged: {exc}") from exc
    if len(found) != (count + 7) // 8:
        raise ValueError(f"the note of rows answered right is not of {count} rows")
    return np.unpackbits(found, count=count).astype(bool)
