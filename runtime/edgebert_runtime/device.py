"""Which variant runs where, decided from facts by a pure function that gives its reasons."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import msgspec

from edgebert_runtime.errors import DeviceError, InputError, MissingExtraError
from edgebert_runtime.facts import (
    DeviceFacts,
    gather_facts,
    import_onnxruntime,
    onnxruntime_distributions,
)
from edgebert_runtime.manifest import Manifest, Variant

if TYPE_CHECKING:
    from edgebert_runtime.engine import EngineKey
    from edgebert_runtime.tensorrt_api import Flavour

__all__ = [
    "DEVICES",
    "Choice",
    "DeviceFacts",
    "DeviceName",
    "choose",
    "gather_facts",
    "import_onnxruntime",
    "onnxruntime_distributions",
]

DeviceName = Literal["cpu", "cuda", "tensorrt", "rtx"]
DEVICES = ("auto", "cpu", "cuda", "tensorrt", "rtx")
_NO_VARIANT = "the bundle has no variant for it"
_BEST_FIRST: tuple[DeviceName, ...] = ("tensorrt", "rtx", "cuda", "cpu")


class Choice(msgspec.Struct, frozen=True):
    """What ``choose`` decided.

    Attributes:
        device: Where the model runs.
        variant: Which model runs.
        passed_over: One line for each better choice, saying why it was not taken.
        engine: For TensorRT, the engine that serves it.
        engine_missing: Whether that engine is still to be built.
    """

    device: DeviceName
    variant: Variant
    passed_over: tuple[str, ...]
    engine: EngineKey | None = None
    engine_missing: bool = False

    @property
    def faults(self) -> list[str]:
        """Those of ``passed_over`` that lie in TensorRT or the GPU, not in the bundle."""
        found = [line for line in self.passed_over if line.startswith(("tensorrt:", "rtx:"))]
        return [line for line in found if _NO_VARIANT not in line]


def choose(
    manifest: Manifest,
    facts: DeviceFacts,
    device: str = "auto",
    variant: str | None = None,
    *,
    engines: Collection[EngineKey] = (),
    preferred: Mapping[str, str] = MappingProxyType({}),
    failed: Mapping[tuple[str, str], str] = MappingProxyType({}),
    build_engine: bool = False,
) -> Choice:
    """Chooses a device and a variant.

    ``auto`` takes the best device that the machine offers and the bundle has a variant for; an
    explicit device is taken or refused, never replaced.

    Args:
        manifest: Of the bundle.
        facts: About this machine.
        device: One of ``DEVICES``.
        variant: Name of the variant to run, instead of the device's best.
        engines: Those that are there, in the bundle and in the cache.
        preferred: The variant that was measured to be the fastest here, by device; it comes first.
        failed: Why what was chosen before did not start, by device and variant.
        build_engine: Whether TensorRT may be chosen without an engine, to build one.

    Raises:
        InputError: ``device`` is not one of ``DEVICES``, or ``variant`` is not for it.
        BundleError: The bundle has no variant of that name.
        MissingExtraError: Nothing fits, and ONNX Runtime is not installed.
        DeviceError: Nothing fits.
    """
    if device not in DEVICES:
        raise InputError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    candidates = manifest.variants if variant is None else (manifest.variant(variant),)
    on_onnxruntime = {"cpu", "cuda"}
    if device in on_onnxruntime and not any(on_onnxruntime & set(c.devices) for c in candidates):
        others = [item.name for item in manifest.variants if device in item.devices]
        raise InputError(
            f"{candidates[0].name} is for {' or '.join(candidates[0].devices)}, not for {device}; "
            f"take one that runs there: {', '.join(others) or 'this bundle has none'}"
        )
    passed_over: list[str] = []
    for name in _BEST_FIRST if device == "auto" else [n for n in _BEST_FIRST if n == device]:
        fitting = [candidate for candidate in candidates if name in candidate.devices]
        fitting.sort(key=lambda item: item.name != preferred.get(name))
        tried = [failed[name, item.name] for item in fitting if (name, item.name) in failed]
        fitting = [item for item in fitting if (name, item.name) not in failed]
        passed_over += [f"{name}: {reason}" for reason in tried]
        if name in {"tensorrt", "rtx"} and device == "auto" and name not in facts.tensorrt:
            continue  # nobody who did not install it wants to hear of it
        if not fitting:
            if not tried:
                passed_over.append(f"{name}: {_NO_VARIANT}{_hint(candidates, variant)}")
        elif name == "tensorrt" or name == "rtx":
            found = _with_engine(
                manifest, facts, name, fitting, engines=engines, build_engine=build_engine
            )
            if isinstance(found, Choice):
                return msgspec.structs.replace(found, passed_over=tuple(passed_over))
            passed_over.append(f"{name}: {found}")
        elif facts.onnxruntime_fault is not None:
            passed_over.append(f"{name}: {facts.onnxruntime_fault}")
        elif name == "cuda" and "CUDAExecutionProvider" not in facts.providers:
            wheels = ", ".join(facts.onnxruntime) or "ONNX Runtime"
            passed_over.append(f"cuda: {wheels} has no CUDAExecutionProvider")
        else:
            return Choice(device=name, variant=fitting[0], passed_over=tuple(passed_over))
    if facts.onnxruntime_fault is not None and device not in {"tensorrt", "rtx"}:
        devices = {device for device, _ in failed}
        others = [r for r in passed_over if r.startswith(("tensorrt", "rtx", *devices))]
        raise MissingExtraError("; ".join([facts.onnxruntime_fault, *others]))
    raise DeviceError("no way to run this bundle here: " + "; ".join(passed_over))


def _with_engine(
    manifest: Manifest,
    facts: DeviceFacts,
    flavour: Flavour,
    variants: list[Variant],
    *,
    engines: Collection[EngineKey],
    build_engine: bool,
) -> Choice | str:
    """Chooses a variant that has an engine here; or says why there is none."""
    from edgebert_runtime.engine import difference, unusable, wanted_key  # few devices need it

    reason = unusable(flavour, facts)
    if reason is not None:
        return reason
    if not manifest.profiles:
        return "the bundle lists no shapes to build an engine for: export it anew"
    wanted = {v.name: wanted_key(manifest, v, flavour, facts) for v in variants}
    for variant in variants:
        exact = wanted[variant.name]  # what was built to serve other machines, too, is slower
        for engine in sorted(engines, key=lambda engine: engine != exact):
            if engine.flavour == flavour and difference(engine, exact) is None:
                return Choice(flavour, variant, (), engine)
    if build_engine:
        return Choice(flavour, variants[0], (), wanted[variants[0].name], engine_missing=True)
    models = {key.model_sha256: key for key in wanted.values()}
    near = [
        difference(engine, models[engine.model_sha256])
        for engine in engines
        if engine.flavour == flavour and engine.model_sha256 in models
    ]
    said = near[0] if near else "no engine was built for this device yet"
    return f"{said}; build one with: edgebert-rt engine BUNDLE --flavour {flavour}"


def _hint(candidates: tuple[Variant, ...], variant: str | None) -> str:
    """Says, of a variant asked for by name, where it runs."""
    return "" if variant is None else f" ({variant} is for {' or '.join(candidates[0].devices)})"
