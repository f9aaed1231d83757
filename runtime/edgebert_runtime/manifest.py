"""The bundle's schema: ``manifest.json`` as typed, strict, frozen structs.

The export side writes these structs, the runtime reads them, and ``docs/bundle.md`` describes
them for readers in other languages. Unknown keys are refused: a reader that skips what it does
not understand would serve wrong answers quietly.
"""

from __future__ import annotations

import json
import re
from typing import Literal, TypeVar

import msgspec

from edgebert_runtime.errors import BundleError

__all__ = [
    "FORMAT_VERSION",
    "EngineEntry",
    "FileEntry",
    "Manifest",
    "Measured",
    "Profile",
    "Provenance",
    "Task",
    "TensorSpec",
    "Tuning",
    "Variant",
    "check_relative_path",
    "decode_manifest",
    "decode_strictly",
    "encode_manifest",
]

FORMAT_VERSION = 4

_MOST_TOKENS = 2**20
_MOST_ROWS = 2**16
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)
_PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every part of the manifest has in common: immutable, named fields, no others."""


class Task(_Strict, frozen=True, kw_only=True):
    """What the model answers.

    Attributes:
        kind: ``single_label`` (softmax, exactly one label) or ``multi_label`` (a sigmoid each).
        labels: Label names, in the order of the output's columns.
        text_pair: Whether an input is a pair of texts instead of one.
        thresholds: ``multi_label`` only: a label applies from this score on; one per label.
    """

    kind: Literal["single_label", "multi_label"]
    labels: tuple[str, ...]
    text_pair: bool
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        fewest = 2 if self.kind == "single_label" else 1
        if len(self.labels) < fewest:
            raise ValueError(f"a {self.kind} task needs at least {fewest} labels")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        if not all(label and label.isprintable() for label in self.labels):
            raise ValueError("labels must not be empty, nor hold control characters")
        if self.kind == "single_label":
            if self.thresholds is not None:
                raise ValueError("a single_label task has no thresholds")
        elif self.thresholds is None or len(self.thresholds) != len(self.labels):
            raise ValueError("a multi_label task needs one threshold per label")
        elif not all(0.0 <= threshold <= 1.0 for threshold in self.thresholds):
            raise ValueError("thresholds lie between 0 and 1")


class TensorSpec(_Strict, frozen=True, kw_only=True):
    """One input or output of the model; ``shape`` mixes names (free) and numbers (fixed)."""

    name: str
    dtype: Literal["int64", "float32"]
    shape: tuple[str | int, ...]


class Variant(_Strict, frozen=True, kw_only=True):
    """One model file in the bundle and where it is meant to run.

    Attributes:
        name: Unique in the bundle, for instance ``int8-cpu``.
        model: Path of the ONNX file in the bundle.
        precision: Of the weights of the linear layers.
        devices: Where it may run; for ``tensorrt`` and ``rtx`` (TensorRT for RTX) it is what
            an engine is built from. A device takes the first variant in the manifest that
            names it, so the order of the variants is the order of preference.
    """

    name: str
    model: str
    precision: Literal["fp32", "fp16", "int8"]
    devices: tuple[Literal["cpu", "cuda", "tensorrt", "rtx"], ...]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"variant name {self.name!r} is not of letters, digits, '.', '_', '-'")
        if not self.devices:
            raise ValueError(f"variant {self.name!r} names no device")


class Profile(_Strict, frozen=True, kw_only=True):
    """Shapes that an engine serves: 1 to ``max_batch`` rows of 1 to ``max_seq`` tokens.

    Attributes:
        max_batch: Most rows.
        opt_batch: Rows that it is fastest at.
        max_seq: Most tokens in a row.
        opt_seq: Tokens that it is fastest at.
    """

    max_batch: int
    opt_batch: int
    max_seq: int
    opt_seq: int

    def __post_init__(self) -> None:
        if not 1 <= self.opt_batch <= self.max_batch <= _MOST_ROWS:
            raise ValueError(f"a profile's rows must be 1 <= opt <= max <= {_MOST_ROWS}")
        if not 1 <= self.opt_seq <= self.max_seq <= _MOST_TOKENS:
            raise ValueError(f"a profile's tokens must be 1 <= opt <= max <= {_MOST_TOKENS}")


class EngineEntry(_Strict, frozen=True, kw_only=True):
    """An engine that was built ahead of time; a cache of a variant's model, never more.

    Attributes:
        path: Of the engine's file in the bundle.
        variant: Whose model it was built from.
        flavour: ``rtx``, as no other engine can be built without the GPU that runs it.
        version: Of the TensorRT that built it, and that alone can load it.
        platform: Operating system and processor, for instance ``linux-x86_64``.
    """

    path: str
    variant: str
    flavour: Literal["rtx"]
    version: str
    platform: str


class Measured(_Strict, frozen=True, kw_only=True):
    """What a tuning was measured to be worth, on the processor that it is for.

    Attributes:
        bundle_sha256: Digest of the bundle that was tuned, as it was before.
        before: The variant that the bundle ran there until then.
        rows: Labelled rows that the variant's answers were held against FP32's on; 0 if none
            were given, which only a variant that is not new can do without.
        flips: Of them, how many it answers unlike FP32.
        lost: How many FP32 answers right more than it does; less than 0 if it is better.
        latency_ratio: The latency of one text before, over that now; above 1 is faster now.
        throughput_ratio: Texts a second now, over those before; above 1 is faster now.
        onnxruntime: Version of the ONNX Runtime that ran.
    """

    bundle_sha256: str
    before: str
    rows: int
    flips: int
    lost: int
    latency_ratio: float
    throughput_ratio: float
    onnxruntime: str

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.bundle_sha256):
            raise ValueError("bundle_sha256 is not 64 lower-case hexadecimal digits")
        if not 0 <= self.flips <= self.rows or abs(self.lost) > self.rows:
            raise ValueError("a tuning has more flips, or more lost, than rows")
        if not (self.latency_ratio > 0 and self.throughput_ratio > 0):
            raise ValueError("a tuning's ratios must be above 0")


class Tuning(_Strict, frozen=True, kw_only=True):
    """What is fastest on a CPU of one kind; others run as if it was not there.

    Attributes:
        processor: The kind, as ``processor_kind`` names it.
        cores: Cores that were used.
        variant: What runs there.
        batch_tokens: Most tokens of a batch of several texts, padding included.
        call_tokens: What a call of the model takes besides its tokens, as so many tokens.
        by_core: Whether many texts are computed in batches one a core, or one after the other
            on all cores together.
        measured: What that is worth.
    """

    processor: str
    cores: int
    variant: str
    batch_tokens: int
    call_tokens: int
    by_core: bool
    measured: Measured

    def __post_init__(self) -> None:
        if not self.processor or not self.processor.isprintable():
            raise ValueError("a tuning's processor must be named, without control characters")
        if self.cores < 1:
            raise ValueError("a tuning's cores must be at least 1")
        if not (1 <= self.batch_tokens <= _MOST_TOKENS and 0 <= self.call_tokens <= _MOST_TOKENS):
            raise ValueError(f"a tuning's tokens must be at most {_MOST_TOKENS}, of a batch >= 1")


class FileEntry(_Strict, frozen=True, kw_only=True):
    """One file of the bundle: its POSIX path, its size and the SHA-256 of its bytes."""

    path: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_relative_path(self.path)
        if self.size_bytes < 0:
            raise ValueError(f"{self.path}: size_bytes is negative")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"{self.path}: sha256 is not 64 lower-case hexadecimal digits")


class Provenance(_Strict, frozen=True, kw_only=True):
    """Where the bundle comes from; nothing here changes what the runtime does.

    Attributes:
        edgebert: Version of edgebert that wrote the bundle.
        recipe_sha256: Of what the recipe says, without its evaluation and gate.
        model_sha256: Of the checkpoint that the export started from.
        data_sha256: Of all rows, in order, with the split each belongs to.
        seed: Seed of the training that made the model's weights; ``None`` when there was none.
        versions: Versions of the libraries that shaped the result.
    """

    edgebert: str
    recipe_sha256: str
    model_sha256: str
    data_sha256: str
    seed: int | None
    versions: dict[str, str]


class Manifest(_Strict, frozen=True, kw_only=True):
    """The whole of ``manifest.json``.

    Attributes:
        format_version: ``FORMAT_VERSION``; read before anything else.
        name: What the recipe calls the model.
        task: What the model answers.
        tokenizer: Path of the ``tokenizers`` JSON file in the bundle.
        max_length: Longest input in tokens, special tokens included; longer text is cut.
        pad_token_id: What fills short rows of ``input_ids``; their ``attention_mask`` is 0.
        inputs: The model's inputs, each ``int64[batch, seq]``.
        outputs: The model's outputs; ``logits`` is ``float32[batch, labels]``.
        variants: In order of preference.
        known_answers: Path of the file with what the variants are known to answer.
        profiles: Shapes that engines are built for, by the lengths of the calibration texts.
        engines: Engines that are in the bundle.
        tunings: What is fastest on the kinds of processor that the bundle was tuned on.
        files: Every file of the bundle but the manifest and its hash.
        provenance: Where the bundle comes from.
    """

    format_version: int
    name: str
    task: Task
    tokenizer: str
    max_length: int
    pad_token_id: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: tuple[Variant, ...]
    known_answers: str
    profiles: tuple[Profile, ...] = ()
    engines: tuple[EngineEntry, ...] = ()
    tunings: tuple[Tuning, ...] = ()
    files: tuple[FileEntry, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r} is not of letters, digits, '.', '_', '-'")
        paths = [entry.path for entry in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("a file is listed twice")
        models = (variant.model for variant in self.variants)
        engines = (engine.path for engine in self.engines)
        for needed in (self.tokenizer, self.known_answers, *models, *engines):
            if needed not in paths:
                raise ValueError(f"{needed} is used but not listed under files")
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) != len(names):
            raise ValueError("variants must be at least one, with distinct names")
        self._check_engines()
        self._check_tunings()
        if not 3 <= self.max_length <= _MOST_TOKENS:
            raise ValueError(f"max_length must be from 3 to {_MOST_TOKENS}")
        if not 0 <= self.pad_token_id < 2**31:
            raise ValueError("pad_token_id is no token id")
        self._check_tensors()

    def _check_engines(self) -> None:
        if self.profiles and max(profile.max_seq for profile in self.profiles) != self.max_length:
            raise ValueError("the longest profile must be as long as max_length")
        fitting = {v.name for v in self.variants if "rtx" in v.devices}
        for engine in self.engines:
            if engine.variant not in fitting:
                raise ValueError(f"{engine.path} is of {engine.variant!r}, no variant for rtx")
        if self.engines and not self.profiles:
            raise ValueError("engines need profiles")

    def _check_tunings(self) -> None:
        fitting = {v.name for v in self.variants if "cpu" in v.devices}
        for tuning in self.tunings:
            if tuning.variant not in fitting:
                raise ValueError(f"a tuning is of {tuning.variant!r}, no variant for cpu")
        kinds = {(tuning.processor, tuning.cores) for tuning in self.tunings}
        if len(kinds) != len(self.tunings):
            raise ValueError("two tunings are for the same processor and cores")

    def _check_tensors(self) -> None:
        inputs = [spec.name for spec in self.inputs]
        if "input_ids" not in inputs or len(set(inputs)) != len(inputs):
            raise ValueError("inputs must be distinct, input_ids among them")
        if any(spec.dtype != "int64" or len(spec.shape) != 2 for spec in self.inputs):
            raise ValueError("inputs must be int64[batch, seq]")
        logits = [spec for spec in self.outputs if spec.name == "logits"]
        if [(spec.dtype, spec.shape[1:]) for spec in logits] != [
            ("float32", (len(self.task.labels),))
        ]:
            raise ValueError("outputs must hold one logits, float32[batch, labels]")

    def variant(self, name: str) -> Variant:
        """Returns the variant called ``name``.

        Raises:
            BundleError: The bundle has no variant of that name.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = ", ".join(variant.name for variant in self.variants)
        raise BundleError(f"the bundle has no variant {name!r}; it has: {known}")

    def tuning(self, processor: str, cores: int) -> Tuning | None:
        """Returns what is fastest on a kind of processor; ``None`` if that was not measured.

        Of several, the one that was measured on the nearest number of cores.
        """
        fitting = [tuning for tuning in self.tunings if tuning.processor == processor]
        return min(fitting, key=lambda tuning: abs(tuning.cores - cores), default=None)


def check_relative_path(path: str) -> None:
    """Checks that ``path`` is a plain relative POSIX path that stays in its directory.

    Raises:
        ValueError: It is absolute, climbs out, or has a part other than letters, digits,
            dots, underscores and hyphens.
    """
    if not all(_PATH_PART.fullmatch(part) for part in path.split("/")):
        raise ValueError(f"path {path!r} is not a plain path inside the bundle")


def decode_manifest(data: bytes, source: str) -> Manifest:
    """Reads ``manifest.json``; ``source`` names the bundle in messages.

    Raises:
        BundleError: Not JSON, an unknown ``format_version``, an unknown or missing key, or a
            value that contradicts another.
    """

    class Version(msgspec.Struct):
        format_version: int

    try:
        version = msgspec.json.decode(data, type=Version).format_version
    except _UNREADABLE as exc:
        raise BundleError(f"{source}: manifest.json is not a bundle's manifest: {exc}") from exc
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{source}: format_version {version} is unknown; this edgebert reads {FORMAT_VERSION}. "
            "Use the edgebert-runtime that belongs to the bundle, or export it anew."
        )
    return decode_strictly(data, Manifest, f"{source}: manifest.json")


def decode_strictly(data: bytes, kind: type[_Struct], source: str) -> _Struct:
    """Reads JSON as a struct; ``source`` names the file in messages.

    Raises:
        BundleError: Not JSON, or not what the struct holds; or a key is there twice.
    """
    try:
        json.loads(data, object_pairs_hook=_refuse_repeats)
        return msgspec.json.decode(data, type=kind)
    except _UNREADABLE as exc:
        raise BundleError(f"{source}: {exc}") from exc


def _refuse_repeats(pairs: list[tuple[str, object]]) -> None:
    """Refuses an object that has a key twice: two readers may take different ones."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise msgspec.DecodeError(f"key {key!r} is there twice")


def encode_manifest(manifest: Manifest) -> bytes:
    """Writes ``manifest`` as UTF-8 JSON, indented, with a newline at its end."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
