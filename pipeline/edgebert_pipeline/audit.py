"""The command that audits models: builds each with TensorRT-RTX and says what became of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import onnx

from edgebert_export.audit import Audit
from edgebert_export.engine import build_rtx_engine, rtx_or_reason
from edgebert_export.errors import ExportError, ModelError
from edgebert_pipeline.errors import AuditRefusedError
from edgebert_pipeline.markdown import render_parts
from edgebert_pipeline.sections.audit import audit_parts
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.errors import DeviceError, InputError
from edgebert_runtime.manifest import Profile

__all__ = ["Audited", "audit_bundle", "audit_files", "check_audited", "render_audited"]


class Audited(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a model.

    Attributes:
        name: Of the variant or the file.
        compiler: That made an engine of it, and its version.
        verdict: ``fine``, ``refused`` or ``not understood``.
        breaches: What is wrong.
        audit: All that was found.
    """

    name: str
    compiler: str
    verdict: Literal["fine", "refused", "not understood"]
    breaches: tuple[str, ...]
    audit: Audit


def audit_files(
    models: Sequence[Path], batch: int, tokens: int, say: Callable[[str], None]
) -> tuple[Audited, ...]:
    """Audits ONNX models that take rows of tokens.

    Args:
        models: Files; the last part of their names is what they are called.
        batch: Most rows to build for.
        tokens: Most tokens of a row.
        say: Called with a line before each build.

    Raises:
        ModelError: One is not ONNX, or TensorRT-RTX does not take it.
        ExportError: A build failed.
        DeviceError: TensorRT-RTX is not here.
    """
    shapes = {str(model): _profiles_of(model, batch, tokens) for model in models}
    short = len({model.stem for model in models}) == len(shapes)
    found: list[Audited] = []
    for model in map(Path, shapes):
        name = model.stem if short else str(model)
        found += _audit_models({name: model}, shapes[str(model)], say)
    return tuple(found)


def audit_bundle(
    bundle: str | Path, names: Sequence[str], say: Callable[[str], None]
) -> tuple[Audited, ...]:
    """Audits the variants of a bundle that engines are built from, for the bundle's shapes.

    Args:
        bundle: Directory or archive.
        names: Variants to audit; all of them if empty.
        say: Called with a line before each build.

    Raises:
        InputError: It has no variant for TensorRT, or none of a name.
        DeviceError: TensorRT-RTX is not here.
    """
    opened = Bundle.open(bundle)
    opened.verify()
    manifest = opened.manifest
    variants = [manifest.variant(name) for name in names] or [
        variant for variant in manifest.variants if "rtx" in variant.devices
    ]
    for variant in variants:
        if "rtx" not in variant.devices:
            raise InputError(f"no engine is built from {variant.name}; name a variant for rtx")
    if not variants:
        raise InputError(f"{bundle} has no variant that engines are built from")
    with tempfile.TemporaryDirectory() as directory:
        models = {}
        for variant in variants:
            path = Path(directory) / f"{variant.name}.onnx"
            path.write_bytes(opened.read(variant.model))
            models[variant.name] = path
        return _audit_models(models, manifest.profiles, say)


def _audit_models(
    models: Mapping[str, Path], profiles: Sequence[Profile], say: Callable[[str], None]
) -> tuple[Audited, ...]:
    """Builds each model in a process of its own, and audits what came of it.

    Args:
        models: ONNX models by name.
        profiles: Shapes to build for.
        say: Called with a line before each build.

    Raises:
        ModelError: TensorRT-RTX does not take a model.
        ExportError: A build failed.
        DeviceError: TensorRT-RTX is not here.
    """
    here = rtx_or_reason()
    if isinstance(here, str):
        raise DeviceError(f"an audit needs TensorRT-RTX: {here}")
    version, platform = here
    found = []
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for name, model in models.items():
            say(f"{name}: building with TensorRT-RTX {version}")
            built = build_rtx_engine(
                name,
                model,
                profiles,
                work / "audit.engine",
                version=version,
                platform=platform,
                log=work / "tensorrt.log",
            )
            assert built.audit is not None
            found.append(
                Audited(
                    name=name,
                    compiler=f"TensorRT-RTX {version}",
                    verdict=built.audit.verdict,
                    breaches=built.audit.breaches(),
                    audit=built.audit,
                )
            )
    return tuple(found)


def check_audited(audited: Sequence[Audited]) -> None:
    """Does nothing if all is well.

    Raises:
        AuditRefusedError: Something is wrong with an engine.
        ExportError: A log is not understood, so nothing can be said.
    """
    refused = [found for found in audited if found.verdict == "refused"]
    if refused:
        raise AuditRefusedError(
            "; ".join(f"{found.name} is refused: {'; '.join(found.breaches)}" for found in refused)
        )
    unclear = [found for found in audited if found.verdict == "not understood"]
    if unclear:
        raise ExportError(
            "; ".join(
                f"what {found.compiler} made of {found.name} is not understood: "
                f"{found.audit.not_understood}"
                for found in unclear
            )
        )


def render_audited(audited: Sequence[Audited]) -> str:
    """Returns the table and its notes as Markdown."""
    return render_parts(audit_parts({found.name: found.audit for found in audited}))


def _profiles_of(model: Path, batch: int, tokens: int) -> tuple[Profile, ...]:
    """Returns the shapes to build a model for; it must take rows of tokens, of any number.

    Args:
        model: An ONNX model.
        batch: Most rows.
        tokens: Most tokens of a row.

    Raises:
        ModelError: It is not ONNX, keeps weights elsewhere, or has inputs of other shapes.
    """
    try:
        graph = onnx.load(model, load_external_data=False).graph
    except Exception as exc:  # protobuf raises errors of its own
        raise ModelError(f"{model} is not an ONNX model: {' '.join(str(exc).split())}") from exc
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in graph.initializer):
        raise ModelError(f"{model} keeps weights in other files; an audit takes it as one file")
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    for value in inputs:
        sizes = value.type.tensor_type.shape.dim
        if len(sizes) != 2 or any(size.HasField("dim_value") for size in sizes):
            shape = " x ".join(size.dim_param or str(size.dim_value) for size in sizes)
            raise ModelError(
                f"{model}: the input {value.name} is {shape or 'a scalar'}; an audit is of models "
                "that take rows of tokens, any number of both"
            )
    if not inputs:
        raise ModelError(f"{model} has no inputs")
    return (Profile(max_batch=batch, opt_batch=batch, max_seq=tokens, opt_seq=min(tokens, 64)),)
