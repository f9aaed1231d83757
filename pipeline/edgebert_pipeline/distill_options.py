"""What ``edgebert distill`` is told on the command line, as a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgebert_export.checkpoint import Checkpoint, open_checkpoint
from edgebert_export.distill import DistillConfig, check_teacher
from edgebert_export.to_onnx import ExportConfig
from edgebert_pipeline.errors import RecipeError
from edgebert_pipeline.recipe import (
    DataConfig,
    Recipe,
    RowsSource,
    Source,
    in_toml_words,
    load_recipe,
)

__all__ = ["recipe_for"]

_Format = Literal["csv", "tsv", "jsonl", "parquet"]


def recipe_for(
    checkpoint: Path,
    data: Path,
    *,
    layers: int | None = None,
    layer_map: str | None = None,
    unlabelled: Path | None = None,
    max_length: int | None = None,
    format_: _Format | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    label_values: Sequence[str] = (),
    **training: Any,
) -> Recipe:
    """Returns the recipe to distil ``checkpoint`` by.

    Args:
        checkpoint: The teacher.
        data: A table of rows for the teacher's labels, or a recipe (``.toml``).
        layers: Of the student.
        layer_map: Teacher layers, as on the command line.
        unlabelled: A table of more texts.
        max_length: Longest text in tokens.
        format_: Of the table of rows; told by its suffix when left out.
        text: Column of the text; not with a recipe, as the next three.
        text_pair: Column of the second text.
        label: Column of the label.
        label_values: What the table says for each label.
        training: Keys of ``DistillConfig``; those that are ``None`` are left as they are.

    Raises:
        UsageError: An option, the checkpoint or the recipe is wrong.
    """
    teacher = open_checkpoint(checkpoint)
    try:
        columns = (text, text_pair, label, tuple(label_values) or None)
        if data.suffix != ".toml":
            base = _recipe_for_table(teacher, data, format_, *columns)
        elif any(columns) or format_:
            raise RecipeError(
                f"{data} says how its rows are read; leave out --format, --text, --text-pair, "
                "--label and --label-value"
            )
        else:
            base = load_recipe(data)
        config = _distill_config(base.distill or DistillConfig(), layers, layer_map, training)
        rows = base.data
        if unlabelled is not None:
            more = RowsSource(path=str(unlabelled.absolute()))
            rows = msgspec.structs.replace(rows, unlabelled=more)
        export = base.export
        if max_length is not None:
            export = msgspec.structs.replace(export, max_length=max_length)
        recipe = msgspec.structs.replace(
            base,
            model=Source(path=str(checkpoint.absolute())),
            data=rows,
            distill=config,
            export=export,
        )
    except ValueError as exc:  # msgspec's are, too
        raise RecipeError(in_toml_words(str(exc))) from exc
    check_teacher(teacher, rows.as_task(None), config)
    return recipe


def _recipe_for_table(
    teacher: Checkpoint,
    data: Path,
    format_: _Format | None,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    label_values: tuple[str, ...] | None,
) -> Recipe:
    several = teacher.problem_type == "multi_label_classification"
    return Recipe(
        name="distilled",
        model=Source(path=str(teacher.path.absolute())),
        data=DataConfig(
            task="multi_label" if several else "single_label",
            labels=teacher.labels or ("0", "1"),  # without labels it is refused, see check_teacher
            text=text or "text",
            text_pair=text_pair,
            label=label or "label",
            label_values=label_values,
            train=RowsSource(path=str(data.absolute()), format=format_),
        ),
        distill=DistillConfig(),
        export=ExportConfig(),
    )


def _distill_config(
    base: DistillConfig, layers: int | None, layer_map: str | None, training: dict[str, Any]
) -> DistillConfig:
    changed = {key: value for key, value in training.items() if value is not None}
    if layer_map == "auto":
        changed |= {"layers": layers, "layer_map": "auto"}
    elif layer_map is not None:
        try:
            changed["layer_map"] = [int(part) for part in layer_map.split(",")]
        except ValueError as exc:
            raise RecipeError(
                f"--layer-map {layer_map!r:.60} is not a list of layers such as 1,3,5"
            ) from exc
        changed["layers"] = layers
    elif layers is not None:
        changed |= {"layers": layers, "layer_map": "auto"}
    return msgspec.convert(msgspec.to_builtins(base) | changed, DistillConfig)
