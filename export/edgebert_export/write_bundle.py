"""Writes the bundle that a device loads: models and a tokenizer in, a Bundle out."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder, load_tokenizer
from edgebert_export.known_answers import (
    draw_batches,
    encode_known_answers,
    expect,
    open_variant,
)
from edgebert_export.to_onnx import OnnxModel
from edgebert_runtime.bundle import MANIFEST, MANIFEST_HASH, Bundle
from edgebert_runtime.encoder import Text
from edgebert_runtime.known_answers import Expected, read_known_answers
from edgebert_runtime.manifest import (
    FORMAT_VERSION,
    EngineEntry,
    FileEntry,
    Manifest,
    Profile,
    Provenance,
    Task,
    TensorSpec,
    Variant,
    encode_manifest,
)

__all__ = ["KNOWN_ANSWERS", "EngineSource", "VariantSource", "write_bundle"]

KNOWN_ANSWERS = "known_answers.json"


@dataclass(frozen=True)
class VariantSource:
    """A model that goes into the bundle, and the devices that it is for."""

    model: OnnxModel
    devices: tuple[Literal["cpu", "cuda", "tensorrt", "rtx"], ...]


@dataclass(frozen=True)
class EngineSource:
    """A TensorRT-RTX engine that goes into the bundle."""

    path: Path
    variant: str
    version: str
    platform: str

    def sha256(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def write_bundle(
    out: Path,
    *,
    name: str,
    task: Task,
    checkpoint: Checkpoint,
    max_length: int,
    variants: Mapping[str, VariantSource],
    provenance: Provenance,
    texts: Sequence[Text],
    profiles: Sequence[Profile] = (),
    engines: Sequence[EngineSource] = (),
) -> Bundle:
    """Writes a bundle into the empty directory ``out`` and opens it as a device would.

    The same inputs give the same bytes: nothing in a bundle tells when or where it was made.

    Args:
        out: Where; created if it is not there.
        name: Name of the model.
        task: What it answers.
        checkpoint: Whose tokenizer the models share.
        max_length: Longest input in tokens.
        variants: By name, in order of preference; at least one, all with the same inputs.
        provenance: Where it comes from.
        texts: Real texts, whose lengths and tokens the known answers have.
        profiles: Shapes that engines are built for.
        engines: Engines that were built ahead of time.

    Raises:
        BundleError: What was written does not read back; a fault of ours.
    """
    (out / "models").mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(load_tokenizer(checkpoint).to_str(), encoding="utf-8")
    listed: list[Variant] = []
    for variant, source in variants.items():
        path = f"models/{variant}.onnx"
        shutil.copyfile(source.model.path, out / path)
        listed.append(
            Variant(
                name=variant, model=path, precision=source.model.precision, devices=source.devices
            )
        )
    inputs = next(iter(variants.values())).model.input_names()
    (out / KNOWN_ANSWERS).write_bytes(
        _known_answers(checkpoint, task, max_length, inputs, variants, texts)
    )
    listed_engines: list[EngineEntry] = []
    for engine in engines:
        (out / "engines").mkdir(exist_ok=True)
        path = f"engines/{engine.variant}-rtx.engine"
        shutil.copyfile(engine.path, out / path)
        listed_engines.append(
            EngineEntry(
                path=path,
                variant=engine.variant,
                flavour="rtx",
                version=engine.version,
                platform=engine.platform,
            )
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        task=task,
        tokenizer="tokenizer.json",
        max_length=max_length,
        pad_token_id=checkpoint.pad_token_id,
        inputs=tuple(
            TensorSpec(name=input_name, dtype="int64", shape=("batch", "seq"))
            for input_name in inputs
        ),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", len(task.labels))),),
        variants=tuple(listed),
        known_answers=KNOWN_ANSWERS,
        profiles=tuple(profiles),
        engines=tuple(listed_engines),
        files=_entries(
            out,
            [
                "tokenizer.json",
                KNOWN_ANSWERS,
                *(item.model for item in listed),
                *(item.path for item in listed_engines),
            ],
        ),
        provenance=provenance,
    )
    data = encode_manifest(manifest)
    (out / MANIFEST).write_bytes(data)
    (out / MANIFEST_HASH).write_text(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n")
    bundle = Bundle.open(out)
    bundle.verify()
    read_known_answers(bundle)
    return bundle


def _known_answers(
    checkpoint: Checkpoint,
    task: Task,
    max_length: int,
    inputs: Sequence[str],
    variants: Mapping[str, VariantSource],
    texts: Sequence[Text],
) -> bytes:
    encoder = checkpoint_encoder(
        checkpoint, max_length=max_length, text_pair=task.text_pair, input_names=inputs
    )
    batches = draw_batches(texts, encoder)
    precisions = {name: source.model.precision for name, source in variants.items()}
    reference = next((n for n, p in precisions.items() if p == "fp32"), next(iter(variants)))
    expected: dict[str, Expected] = {}
    for name in sorted(variants, key=lambda name: name != reference):
        source = variants[name]
        session = open_variant(source.model.path.read_bytes(), source.devices)
        expected[name] = expect(
            batches, session, set(inputs), checkpoint.pad_token_id, expected.get(reference)
        )
        session.close()
    return encode_known_answers(batches, expected, reference)


def _entries(root: Path, paths: Sequence[str]) -> tuple[FileEntry, ...]:
    entries = []
    for path in paths:
        data = (root / path).read_bytes()
        entries.append(
            FileEntry(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        )
    return tuple(entries)
