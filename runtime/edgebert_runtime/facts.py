"""What a machine offers: its GPU, driver, TensorRT, ONNX Runtime, and what a Jetson says of itself.

Gathering looks at files first and imports what it must: a machine without a GPU pays for none of
it. Nothing here raises for what is missing; the reason takes its place.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from edgebert_runtime.errors import EdgebertError, MissingExtraError

__all__ = [
    "DeviceFacts",
    "GpuFacts",
    "Jetson",
    "TensorRTFacts",
    "gather_facts",
    "import_onnxruntime",
    "onnxruntime_distributions",
]

_WHEELS = ("onnxruntime", "onnxruntime-gpu")
_METADATA = (".dist-info", ".egg-info")
_TENSORRT = ("tensorrt", "tensorrt-rtx")
_BUILT_FOR = re.compile(r"(tensorrt(?:-rtx)?)-cu(\d+)")
_JETPACKS = {"35": "5", "36": "6", "38": "7", "39": "7"}
"""JetPack by the major release of Jetson Linux that it brings."""


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU, as its driver describes it.

    Attributes:
        name: Of the GPU.
        compute_capability: Major and minor.
        integrated: Whether it shares the processor's memory.
        cuda: The newest CUDA that the driver supports: major and minor.
        free_bytes: Of its memory, what is free.
        total_bytes: All of its memory.
    """

    name: str
    compute_capability: tuple[int, int]
    integrated: bool
    cuda: tuple[int, int]
    free_bytes: int
    total_bytes: int


class TensorRTFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A flavour of TensorRT; ``version`` or ``fault`` is ``None``.

    Attributes:
        version: Its version.
        cuda: The CUDA that it was built for, major; ``None`` if the packages do not tell.
        fault: Why it cannot be used.
    """

    version: str | None = None
    cuda: int | None = None
    fault: str | None = None


class Jetson(msgspec.Struct, frozen=True, kw_only=True):
    """What a Jetson says of itself.

    Attributes:
        release: Of Jetson Linux, for instance ``36.4.3``.
        jetpack: The JetPack that brings it, major; ``None`` if this edgebert does not know.
        power_mode: Name or number of the power mode; ``None`` if it does not say.
    """

    release: str
    jetpack: str | None
    power_mode: str | None


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What this machine offers; the only input to ``choose`` besides the bundle and engines.

    Attributes:
        system: Operating system, for instance ``linux``.
        machine: Processor architecture, for instance ``x86_64``.
        cpu_count: Logical processors this process may use.
        memory_bytes: Memory of the machine; ``None`` if it does not say.
        onnxruntime: Installed ONNX Runtime distributions, ``name version`` each.
        onnxruntime_fault: Why ONNX Runtime cannot be used; ``None`` if it can.
        providers: ONNX Runtime's execution providers.
        gpu: The GPU; ``None`` if there is none that can be used, or nobody asked.
        gpu_fault: Why there is no ``gpu``.
        driver: Version of the NVIDIA driver, if the system tells.
        gpus: Models of the GPUs, as far as the driver's files tell; empty on a Jetson.
        tensorrt: Flavours that are installed, by name.
        jetson: On a Jetson, what it says of itself.
    """

    machine: str
    cpu_count: int
    onnxruntime: tuple[str, ...]
    providers: tuple[str, ...]
    system: str = "linux"
    memory_bytes: int | None = None
    onnxruntime_fault: str | None = None
    gpu: GpuFacts | None = None
    gpu_fault: str | None = None
    driver: str | None = None
    gpus: tuple[str, ...] = ()
    tensorrt: dict[str, TensorRTFacts] = msgspec.field(default_factory=dict)
    jetson: Jetson | None = None

    @property
    def platform(self) -> str:
        """Operating system and processor, as an engine's key has it."""
        return f"{self.system}-{self.machine}"


def _distributions() -> dict[str, str]:
    """Returns versions of installed distributions that matter here, by normalised name."""
    return _distributions_in(tuple(sys.path))


@functools.lru_cache(maxsize=1)
def _distributions_in(directories: tuple[str, ...]) -> dict[str, str]:
    """Returns the same of some directories.

    Looks for their metadata where Python looks for packages: ``importlib.metadata`` would tell,
    too, but importing it takes longer than the rest of the start.
    """
    found: dict[str, str] = {}
    for directory in directories:
        try:
            entries = os.listdir(directory or ".")  # noqa: PTH208 - names are all it needs
        except OSError:  # not a directory, or not there
            continue
        for entry in entries:
            name, _, rest = entry.partition("-")
            name = name.lower().replace("_", "-")
            if rest.endswith(_METADATA) and name.startswith(("onnxruntime", "tensorrt")):
                found.setdefault(name, rest.rpartition(".")[0].partition("-")[0])
    return dict(sorted(found.items()))


def onnxruntime_distributions() -> dict[str, str]:
    """Returns which of ONNX Runtime's wheels, which overwrite each other, are installed.

    Returns:
        Versions by name.
    """
    return {name: version for name, version in _distributions().items() if name in _WHEELS}


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
        if exc.name != "onnxruntime":  # broken, or interrupted while it was imported
            raise MissingExtraError(f"ONNX Runtime cannot be imported: {exc}") from exc
        raise MissingExtraError(
            "ONNX Runtime is not installed. Install it with: pip install 'edgebert-runtime[cpu]' "
            "(or [gpu] for CUDA)"
        ) from exc
    return onnxruntime


def gather_facts(
    device: str = "auto", *, look_for_gpu: bool = False, root: str = ""
) -> DeviceFacts:
    """Looks at this machine.

    Args:
        device: What the facts are for: for ``cpu`` and ``cuda``, nobody looks for TensorRT.
        look_for_gpu: Whether to look for the GPU even if no TensorRT is there to run on it.
        root: What stands before the ``/`` of the system's files.
    """
    found = _distributions()
    providers: tuple[str, ...] = ()
    onnxruntime_fault = None
    if device in {"tensorrt", "rtx"} and not any(name in _WHEELS for name in found):
        onnxruntime_fault = "ONNX Runtime is not installed"
    else:
        try:
            providers = tuple(import_onnxruntime().get_available_providers())
        except MissingExtraError as exc:
            onnxruntime_fault = str(exc)
    looks = device not in {"cpu", "cuda"}
    gpu, gpu_fault, tensorrt = _look_for_tensorrt(found) if looks else (None, None, {})
    if look_for_gpu and gpu is None and gpu_fault is None:
        gpu, gpu_fault = _attempt(_gpu)
    return DeviceFacts(
        system=sys.platform,
        machine=platform.machine(),
        cpu_count=_cpu_count(),
        memory_bytes=_memory_bytes(root),
        onnxruntime=tuple(f"{name} {found[name]}" for name in _WHEELS if name in found),
        onnxruntime_fault=onnxruntime_fault,
        providers=providers,
        gpu=gpu,
        gpu_fault=gpu_fault,
        driver=_driver_version(root),
        gpus=_gpu_models(root),
        tensorrt=tensorrt,
        jetson=_jetson(root),
    )


def _look_for_tensorrt(
    distributions: dict[str, str],
) -> tuple[GpuFacts | None, str | None, dict[str, TensorRTFacts]]:
    """Looks for TensorRT and, if a flavour of it is installed, for the GPU."""
    from edgebert_runtime.tensorrt_api import FLAVOURS, is_installed

    installed = [flavour for flavour in FLAVOURS if is_installed(flavour)]
    if not installed:
        return None, None, {}
    gpu, fault = _attempt(_gpu)
    return gpu, fault, {name: _tensorrt(name, gpu, distributions) for name in installed}


def _tensorrt(flavour: str, gpu: GpuFacts | None, distributions: dict[str, str]) -> TensorRTFacts:
    from edgebert_runtime.tensorrt_api import import_tensorrt

    name = "tensorrt-rtx" if flavour == "rtx" else "tensorrt"
    cuda = None
    for distribution in distributions:
        match = _BUILT_FOR.match(distribution)
        if match and match[1] == name:
            cuda = int(match[2])
    if gpu is None and name in distributions:  # nothing will run: its libraries can stay unloaded
        return TensorRTFacts(version=distributions[name], cuda=cuda)
    module, fault = _attempt(lambda: import_tensorrt("rtx" if flavour == "rtx" else "tensorrt"))
    version = getattr(module, "__version__", None)
    return TensorRTFacts(version=version, cuda=cuda, fault=fault)


def _attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """Returns what a call gives, or why it fails."""
    try:
        return call(), None
    except EdgebertError as exc:
        return None, str(exc)


def _gpu() -> GpuFacts:
    from edgebert_runtime.cuda import Cuda

    with Cuda() as cuda:
        return gpu_facts(cuda)


def gpu_facts(cuda: Any) -> GpuFacts:
    """Asks a GPU's driver about it."""
    free, total = cuda.memory_bytes
    return GpuFacts(
        name=cuda.name,
        compute_capability=cuda.compute_capability,
        integrated=cuda.is_integrated,
        cuda=cuda.driver_cuda,
        free_bytes=free,
        total_bytes=total,
    )


def _driver_version(root: str) -> str | None:
    """Reads the driver's version from the kernel module, if that is loaded."""
    text = _read(f"{root}/proc/driver/nvidia/version")
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match[1] if match else None


def _gpu_models(root: str) -> tuple[str, ...]:
    """Reads which GPUs the kernel module found."""
    place = f"{root}/proc/driver/nvidia/gpus"
    try:
        entries = sorted(os.listdir(place))  # noqa: PTH208 - names are all it needs
    except OSError:
        return ()
    texts = [_read(f"{place}/{entry}/information") for entry in entries]
    return tuple(match[1] for text in texts if (match := re.search(r"Model:\s*(\S.*)", text)))


def _jetson(root: str) -> Jetson | None:
    """Reads what ``/etc/nv_tegra_release`` and the power mode's files say."""
    match = re.search(
        r"R(\d+) \(release\), REVISION: ([\d.]+)", _read(f"{root}/etc/nv_tegra_release")
    )
    if not match:
        return None
    mode = None
    number = re.search(r"pmode:(\d+)", _read(f"{root}/var/lib/nvpmodel/status"))
    if number:
        mode = str(int(number[1]))
        names = re.findall(
            r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _read(f"{root}/etc/nvpmodel.conf")
        )
        mode = dict(names).get(mode, mode)
    return Jetson(
        release=f"{match[1]}.{match[2]}", jetpack=_JETPACKS.get(match[1]), power_mode=mode
    )


def _memory_bytes(root: str) -> int | None:
    match = re.search(r"MemTotal:\s+(\d+) kB", _read(f"{root}/proc/meminfo"))
    return int(match[1]) * 1024 if match else None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _cpu_count() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
