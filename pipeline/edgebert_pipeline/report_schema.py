"""The JSON Schema of ``report.json``, from the types that write it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from edgebert_pipeline.report import REPORT_VERSION, Report

__all__ = ["render_schema"]

_ATTRIBUTE = re.compile(r"^(\w+): (.+?)(?=^\w+: |\Z)", flags=re.MULTILINE | re.DOTALL)


def render_schema() -> str:
    """Returns the schema of a report of this version, as indented JSON.

    Descriptions are the types' own: what a class says of itself and of its attributes.
    """
    schema = msgspec.json.schema(Report)
    for struct in _structs(msgspec.inspect.type_info(Report)):
        _describe(schema["$defs"][struct.__name__], struct)
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"report.json of edgebert, version {REPORT_VERSION}",
        **schema,
    }
    return msgspec.json.format(msgspec.json.encode(whole), indent=2).decode() + "\n"


def _structs(info: Any) -> Iterator[type[msgspec.Struct]]:
    """Yields every struct that a type is made of."""
    seen: set[type] = set()
    left = [info]
    while left:
        item = left.pop()
        if isinstance(item, msgspec.inspect.StructType):
            if item.cls in seen:
                continue
            seen.add(item.cls)
            yield item.cls
            left += [field.type for field in item.fields]
        elif isinstance(item, msgspec.inspect.Metadata):
            left.append(item.type)
        else:
            for name in ("types", "item_types"):
                left += getattr(item, name, ())
            for name in ("item_type", "key_type", "value_type"):
                left += [getattr(item, name)] if hasattr(item, name) else []


def _describe(schema: dict[str, Any], struct: type[msgspec.Struct]) -> None:
    about, _, attributes = inspect.cleandoc(struct.__doc__ or "").partition("\nAttributes:\n")
    schema["description"] = _plain(about)
    for name, text in _ATTRIBUTE.findall(inspect.cleandoc(attributes)):
        if name in schema.get("properties", {}):
            schema["properties"][name].setdefault("description", _plain(text))


def _plain(text: str) -> str:
    return " ".join(text.replace("``None``", "null").replace("``", "`").split())
