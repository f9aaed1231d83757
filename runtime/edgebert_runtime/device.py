"""Which variant runs where, decided from facts by a pure function that gives its reasons."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any, Literal

import msgspec

from edgebert_runtime.errors import DeviceError, InputError, MissingExtraError
from edgebert_runtime.manifest import Manifest, Variant

__all__ = [
    "DEVICES",
    "Choice",
    "DeviceFacts",
    "choose",
    "gather_facts",
    "import_onnxruntime",
    "onnxruntime_distributions",
]

DeviceName = Literal["cpu", "cuda"]
DEVICES = ("auto", "cpu", "cuda")
_BEST_FIRST: tuple[DeviceName, ...] = ("cuda", "cpu")
_WHEELS = ("onnxruntime", "onnxruntime-gpu")
_METADATA = (".dist-info", ".egg-info")


class DeviceFacts(msgspec.Struct, frozen=True):
    """What this machine offers; the only input to ``choose`` besides the bundle.

    Attributes:
        machine: Processor architecture, for instance ``x86_64``.
        cpu_count: Logical processors this process may use.
        onnxruntime: Installed ONNX Runtime distributions, ``name version`` each.
        providers: ONNX Runtime's execution providers.
    """

    machine: str
    cpu_count: int
    onnxruntime: tuple[str, ...]
    providers: tuple[str, ...]


class Choice(msgspec.Struct, frozen=True):
    """What ``choose`` decided.

    Attributes:
        device: Where the model runs.
        variant: Which model runs.
        passed_over: One line for each better choice, saying why it was not taken.
    """

    device: DeviceName
    variant: Variant
    passed_over: tuple[str, ...]


def onnxruntime_distributions() -> dict[str, str]:
    """Returns which of ONNX Runtime's wheels, which overwrite each other, are installed.

    Looks for their metadata where Python looks for packages: ``importlib.metadata`` would tell,
    too, but importing it takes longer than the rest of the start.

    Returns:
        Versions by name.
    """
    found: dict[str, str] = {}
    for directory in sys.path:
        try:
            entries = os.listdir(directory or ".")  # noqa: PTH208 - names are all it needs
        except OSError:  # not a directory, or not there
            continue
        for entry in entries:
            name, _, rest = entry.partition("-")
            name = name.lower().replace("_", "-")
            if name in _WHEELS and rest.endswith(_METADATA):
                found.setdefault(name, rest.rpartition(".")[0].partition("-")[0])
    return dict(sorted(found.items()))


def import_onnxruntime() -> Any:
    """Imports ONNX Runtime.

    Raises:
        MissingExtraError: It is not installed, or both of its wheels are: they overwrite each
            other's files, so that what loads depends on the order of installation
            (microsoft/onnxruntime#26996).
    """
    found = list(onnxruntime_distributions())
    if len(found) > 1:
        raise MissingExtraError(
            f"{' and '.join(found)} are both installed and overwrite each other's files. "
            f"Mend it with: pip uninstall -y {' '.join(found)} && pip install {found[0]}"
        )
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingExtraError(
            "ONNX Runtime is not installed. Install it with: pip install 'edgebert-runtime[cpu]' "
            "(or [gpu] for CUDA)"
        ) from exc
    return onnxruntime


def gather_facts() -> DeviceFacts:
    """Looks at this machine. Raises what importing ONNX Runtime raises."""
    ort = import_onnxruntime()
    found = onnxruntime_distributions()
    return DeviceFacts(
        machine=platform.machine(),
        cpu_count=_cpu_count(),
        onnxruntime=tuple(f"{name} {version}" for name, version in found.items()),
        providers=tuple(ort.get_available_providers()),
    )


def _cpu_count() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose(
    manifest: Manifest, facts: DeviceFacts, device: str = "auto", variant: str | None = None
) -> Choice:
    """Chooses a device and a variant.

    ``auto`` takes the best device that the machine offers and the bundle has a variant for; an
    explicit device is taken or refused, never replaced.

    Raises:
        InputError: ``device`` is not one of ``DEVICES``.
        BundleError: The bundle has no variant of that name.
        DeviceError: Nothing fits.
    """
    if device not in DEVICES:
        raise InputError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    candidates = manifest.variants if variant is None else (manifest.variant(variant),)
    passed_over: list[str] = []
    for name in _BEST_FIRST if device == "auto" else [n for n in _BEST_FIRST if n == device]:
        fitting = next((c for c in candidates if name in c.devices), None)
        if fitting is None:
            passed_over.append(f"{name}: the bundle has no variant for it")
        elif name == "cuda" and "CUDAExecutionProvider" not in facts.providers:
            wheels = ", ".join(facts.onnxruntime) or "ONNX Runtime"
            passed_over.append(f"cuda: {wheels} has no CUDAExecutionProvider")
        else:
            return Choice(device=name, variant=fitting, passed_over=tuple(passed_over))
    raise DeviceError("no way to run this bundle here: " + "; ".join(passed_over))
