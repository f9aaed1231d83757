"""What an engine is built from and for: the key that finds it, and what keeps it from being used.

An engine is a disposable cache of a model. It belongs to one TensorRT and one kind of GPU, and
what it was built for is checked before any of its bytes reach TensorRT.
"""

from __future__ import annotations

import hashlib

import msgspec

from edgebert_runtime.facts import DeviceFacts
from edgebert_runtime.manifest import EngineEntry, Manifest, Profile, Variant
from edgebert_runtime.profiles import profiles_of
from edgebert_runtime.tensorrt_api import Flavour
from edgebert_runtime.tensorrt_build import BuildOptions

__all__ = [
    "EngineKey",
    "bundled_keys",
    "difference",
    "lean_runtimes",
    "unbuildable",
    "unusable",
    "wanted_key",
]

_RTX_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
"""GPUs that an engine of TensorRT for RTX 1.7 runs on, besides newer ones (so its library says on
any other); Orin's 8.7 and Hopper's 9.0 are none of them. Turing (7.5) would need an engine that is
built for it alone, so it is served by TensorRT."""
_RTX_PLATFORMS = {("linux", "x86_64"), ("linux", "aarch64"), ("win32", "amd64")}
"""What ``tensorrt-rtx`` 1.7.1 has wheels for; on aarch64 they need glibc 2.35."""
_OLDEST_CAPABILITY = (7, 5)
"""GPUs from Turing on: TensorRT dropped Volta with 10.5, and edgebert does so for all of them."""
_AMPERE = 8
_JETSON_CAPABILITIES = ((7, 2), (8, 7), (11, 0))
"""Xavier, Orin and Thor, which TensorRT's hardware compatibility leaves out."""


class EngineKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that decides whether an engine serves; its digest names it in the cache.

    Attributes:
        flavour: ``tensorrt`` or ``rtx``.
        version: Of the TensorRT that built it.
        platform: Operating system and processor.
        compute_capability: Of the GPU it was built on; empty for ``rtx``, whose engines run on
            every GPU that it supports.
        model_sha256: Of the ONNX model.
        profiles: What it was built for.
        options: How it was built.
    """

    flavour: Flavour
    version: str
    platform: str
    compute_capability: str
    model_sha256: str
    profiles: tuple[Profile, ...]
    options: BuildOptions

    @property
    def digest(self) -> str:
        """SHA-256 of the key."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def __str__(self) -> str:
        name = "TensorRT-RTX" if self.flavour == "rtx" else "TensorRT"
        gpu = f", compute capability {self.compute_capability}" if self.compute_capability else ""
        return f"{name} {self.version} on {self.platform}{gpu}"


def wanted_key(
    manifest: Manifest,
    variant: Variant,
    flavour: Flavour,
    facts: DeviceFacts,
    options: BuildOptions | None = None,
) -> EngineKey:
    """Returns the key of the engine that would serve a variant on this machine.

    The machine must have the flavour and, but for ``rtx``, a GPU; ``unusable`` says so.
    """
    version = facts.tensorrt[flavour].version
    assert version is not None
    capability = ""
    if flavour == "tensorrt":
        assert facts.gpu is not None
        capability = ".".join(map(str, facts.gpu.compute_capability))
    (sha256,) = (entry.sha256 for entry in manifest.files if entry.path == variant.model)
    return EngineKey(
        flavour=flavour,
        version=version,
        platform=facts.platform,
        compute_capability=capability,
        model_sha256=sha256,
        profiles=profiles_of(flavour, manifest.profiles),
        options=options or BuildOptions(),
    )


def bundled_keys(manifest: Manifest) -> dict[EngineKey, EngineEntry]:
    """Returns the engines that a bundle brings, by their keys."""
    hashes = {entry.path: entry.sha256 for entry in manifest.files}
    models = {variant.name: variant.model for variant in manifest.variants}
    return {
        EngineKey(
            flavour=entry.flavour,
            version=entry.version,
            platform=entry.platform,
            compute_capability="",
            model_sha256=hashes[models[entry.variant]],
            profiles=profiles_of(entry.flavour, manifest.profiles),
            options=BuildOptions(),
        ): entry
        for entry in manifest.engines
    }


def difference(found: EngineKey, wanted: EngineKey) -> str | None:
    """Says why an engine of the same flavour cannot be used; ``None`` if it can.

    An engine that was built to be compatible serves later releases of the same major version
    (where the lean runtime of its own release is installed, too: TensorRT looks for it when the
    engine is loaded), or every GPU from Ampere on.
    """
    if not (
        found.platform == wanted.platform
        and (found.version == wanted.version or _serves_version(found, wanted))
        and (found.compute_capability == wanted.compute_capability or _serves_gpu(found, wanted))
    ):
        return f"engine built for {found}, found {wanted}"
    if found.profiles != wanted.profiles:
        return "engine built for other shapes than the bundle lists"
    if found.model_sha256 != wanted.model_sha256:
        return "engine built from another model"
    return None


def _serves_version(found: EngineKey, wanted: EngineKey) -> bool:
    before, after = _release(found.version)[:3], _release(wanted.version)[:3]
    return found.options.version_compatible and before[:1] == after[:1] and before <= after


def _serves_gpu(found: EngineKey, wanted: EngineKey) -> bool:
    capability = _release(wanted.compute_capability)
    is_served = capability[:1] >= (_AMPERE,) and capability not in _JETSON_CAPABILITIES
    return found.options.hardware_compatible and is_served


def lean_runtimes(key: EngineKey, version: str) -> tuple[str, ...]:
    """Returns the names that the lean runtime which an engine needs may have, best first.

    None if TensorRT's ``version`` is of the release that built it. Else it must be the lean runtime
    of the very release that did (``IRuntime::loadRuntime``). Its file's name has the first three
    numbers of that release; the name with the major version alone is all that some packages have,
    and may be another release's: that one refuses the engine.
    """
    if _release(key.version)[:3] == _release(version)[:3]:
        return ()
    release = [str(number) for number in _release(key.version)]
    if key.platform.startswith("win32"):
        return (f"nvinfer_lean_{release[0]}.dll",)
    return (f"libnvinfer_lean.so.{'.'.join(release[:3])}", f"libnvinfer_lean.so.{release[0]}")


def unbuildable(flavour: Flavour, facts: DeviceFacts, options: BuildOptions) -> str | None:
    """Says why engines cannot be built with these options here; ``None`` if they can.

    The machine has the flavour and, but for ``rtx``, a GPU; ``unusable`` says so.
    """
    if flavour == "rtx":
        if not (options.version_compatible or options.hardware_compatible):
            return None
        return (
            "engines for TensorRT-RTX run on every GPU that it supports, and never with another "
            "release of it: leave out --version-compatible and --hardware-compatible"
        )
    gpu = facts.gpu
    if not options.hardware_compatible or gpu is None:
        return None
    # In a container, nothing but the GPU says that this is a Jetson.
    capability = gpu.compute_capability
    if facts.jetson or (gpu.integrated and capability in _JETSON_CAPABILITIES):
        return (
            f"TensorRT builds no engines for other GPUs on a Jetson, found {gpu.name}: leave out "
            "--hardware-compatible"
        )
    if capability[0] < _AMPERE:
        return (
            f"engines for every GPU from Ampere on (compute capability {_AMPERE}.0) are built on "
            f"one of those, found {gpu.name} with {'.'.join(map(str, capability))}: leave out "
            "--hardware-compatible"
        )
    return None


def unusable(flavour: Flavour, facts: DeviceFacts, *, building: bool = False) -> str | None:
    """Says why this machine cannot run a flavour of TensorRT; ``None`` if it can.

    A pure function of ``facts``; each reason names both sides. RTX engines are built without a
    GPU, so nothing about one matters for ``building``.
    """
    found = facts.tensorrt.get(flavour)
    module = "tensorrt_rtx" if flavour == "rtx" else "tensorrt"
    if found is None:
        return f"{module} is not installed"
    if found.version is None:
        return found.fault or f"{module} does not tell its version"
    if flavour == "rtx" and (facts.system, facts.machine.lower()) not in _RTX_PLATFORMS:
        return (
            f"TensorRT-RTX {found.version} runs on Linux (x86-64, aarch64) and on Windows "
            f"(x86-64), found {facts.platform}"
        )
    if flavour == "rtx" and building:
        return None
    if facts.gpu is None:
        return facts.gpu_fault or "no GPU was found"
    gpu, version = facts.gpu, found.version
    capability = ".".join(map(str, gpu.compute_capability))
    if flavour == "rtx":
        is_older = gpu.compute_capability < _RTX_CAPABILITIES[-1]
        if is_older and gpu.compute_capability not in _RTX_CAPABILITIES:
            known = ", ".join(f"{major}.{minor}" for major, minor in _RTX_CAPABILITIES)
            return (
                f"engines for TensorRT-RTX {version} run on compute capabilities {known} and "
                f"newer, found {gpu.name} with {capability}"
            )
    elif gpu.compute_capability < _OLDEST_CAPABILITY:
        oldest = ".".join(map(str, _OLDEST_CAPABILITY))
        return (
            f"edgebert needs compute capability {oldest} or newer for TensorRT, found {gpu.name} "
            f"with {capability}"
        )
    if _release(version) < (10, 3) and flavour == "tensorrt":
        return f"edgebert needs TensorRT 10.3 or newer, found {version}"
    if found.cuda is not None and gpu.cuda[0] < found.cuda:
        return (
            f"{module} {version} was built for CUDA {found.cuda}, the driver"
            f"{f' {facts.driver}' if facts.driver else ''} supports up to "
            f"{gpu.cuda[0]}.{gpu.cuda[1]}: update the driver, or install {module} for CUDA "
            f"{gpu.cuda[0]}"
        )
    return None


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())
