"""The part of TensorRT's Python API that edgebert uses, as protocols, and how it is imported.

``tensorrt`` 10.x and 11.x and ``tensorrt_rtx`` have nearly the same API, so what uses it takes
the module as an argument. What is written here is all that edgebert calls: the type checker holds
each library's own types against it (``make types``), a test holds the real module against it, and
the fake in ``edgebert_runtime.testing`` implements it.

Objects of the library that go back into it are ``Any``: only the library can tell whether they
are of its own classes. So is ``IHostMemory``, bytes that the library holds. Where the library's
types promise an object, it may be ``None``; where they promise a ``bool``, it may raise.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeAlias, cast

from edgebert_runtime.errors import DeviceError, EdgebertError, MissingExtraError

__all__ = [
    "FLAVOURS",
    "Flavour",
    "TensorRT",
    "TensorRTForRTX",
    "faults_of_tensorrt",
    "import_tensorrt",
    "is_installed",
]

Flavour: TypeAlias = Literal["tensorrt", "rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "rtx")
_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
_INSTALL: dict[Flavour, str] = {
    "tensorrt": "it comes with JetPack, or from NVIDIA's package index",
    "rtx": "install it with: pip install 'edgebert-runtime[rtx]'",
}
_SAID = 5
"""How many of the library's last errors a message repeats."""


class Dims(Protocol):
    """``Dims``: a shape."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> int: ...


class NetworkTensor(Protocol):
    """``ITensor``."""

    @property
    def name(self) -> str: ...


class Network(Protocol):
    """``INetworkDefinition``."""

    @property
    def num_inputs(self) -> int: ...
    def get_input(self, index: int, /) -> NetworkTensor: ...


class ParserError(Protocol):
    """``IParserError``."""

    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    """``OnnxParser``."""

    @property
    def num_errors(self) -> int: ...
    def get_error(self, index: int, /) -> ParserError: ...
    def parse(self, model: Any, /) -> bool: ...


class OptimizationProfile(Protocol):
    """``IOptimizationProfile``."""

    # Positional: min and max would hide the built-in functions.
    def set_shape(self, input: str, min: Any, opt: Any, max: Any, /) -> None: ...  # noqa: A002


class TimingCache(Protocol):
    """``ITimingCache``."""

    def serialize(self) -> Any: ...


class BuilderConfig(Protocol):
    """``IBuilderConfig``."""

    progress_monitor: Any
    hardware_compatibility_level: Any
    max_aux_streams: int
    profiling_verbosity: Any

    def add_optimization_profile(self, profile: Any, /) -> int: ...
    def create_timing_cache(self, serialized_timing_cache: Any, /) -> TimingCache: ...
    def get_timing_cache(self) -> TimingCache: ...
    def set_flag(self, flag: Any, /) -> None: ...
    def set_memory_pool_limit(self, pool: Any, pool_size: int, /) -> None: ...
    def set_timing_cache(self, cache: Any, ignore_mismatch: bool, /) -> bool: ...


class Builder(Protocol):
    """``Builder``."""

    def create_network(self, flags: int, /) -> Network: ...
    def create_builder_config(self) -> BuilderConfig: ...
    def create_optimization_profile(self) -> OptimizationProfile: ...
    def build_serialized_network(self, network: Any, config: Any, /) -> Any: ...


class ExecutionContext(Protocol):
    """``IExecutionContext``."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int, /) -> bool: ...
    def set_device_memory(self, memory: int, size: int, /) -> None: ...
    def set_input_shape(self, name: str, shape: tuple[int, int], /) -> bool: ...
    def set_tensor_address(self, name: str, memory: int, /) -> bool: ...
    def execute_async_v3(self, stream_handle: int, /) -> bool: ...


class Engine(Protocol):
    """``ICudaEngine``."""

    @property
    def num_io_tensors(self) -> int: ...
    @property
    def num_optimization_profiles(self) -> int: ...
    def get_tensor_name(self, index: int, /) -> str: ...
    def get_tensor_mode(self, name: str, /) -> Any: ...
    def get_tensor_dtype(self, name: str, /) -> Any: ...
    def get_tensor_shape(self, name: str, /) -> Dims: ...
    def get_device_memory_size_for_profile_v2(self, profile_index: int, /) -> int: ...
    def create_execution_context(self, strategy: Any, /) -> ExecutionContext: ...


class Runtime(Protocol):
    """``Runtime``."""

    def deserialize_cuda_engine(self, serialized_engine: Any, /) -> Engine: ...
    def load_runtime(self, path: str, /) -> Runtime: ...


class Enumeration(Protocol):
    """An enumeration, or rather its class; members are looked up by name."""

    @property
    def __members__(self) -> Any: ...


class StrategyEnumeration(Protocol):
    """``ExecutionContextAllocationStrategy``."""

    @property
    def USER_MANAGED(self) -> Any: ...


class HardwareCompatibilityEnumeration(Protocol):
    """``HardwareCompatibilityLevel``."""

    @property
    def AMPERE_PLUS(self) -> Any: ...


class BuilderFlagEnumeration(Protocol):
    """``BuilderFlag``."""

    @property
    def EXCLUDE_LEAN_RUNTIME(self) -> Any: ...
    @property
    def VERSION_COMPATIBLE(self) -> Any: ...


class MemoryPoolEnumeration(Protocol):
    """``MemoryPoolType``."""

    @property
    def WORKSPACE(self) -> Any: ...


class ProfilingVerbosityEnumeration(Protocol):
    """``ProfilingVerbosity``."""

    @property
    def DETAILED(self) -> Any: ...


class TensorModeEnumeration(Protocol):
    """``TensorIOMode``."""

    @property
    def INPUT(self) -> Any: ...


class SeverityEnumeration(Protocol):
    """``ILogger.Severity``, whose members are ``ILogger``'s, too."""

    @property
    def ERROR(self) -> Any: ...
    @property
    def INFO(self) -> Any: ...
    @property
    def INTERNAL_ERROR(self) -> Any: ...
    @property
    def VERBOSE(self) -> Any: ...
    @property
    def WARNING(self) -> Any: ...


class TensorRT(Protocol):
    """The module ``tensorrt`` or ``tensorrt_rtx``."""

    @property
    def ILogger(self) -> SeverityEnumeration: ...
    @property
    def IProgressMonitor(self) -> type[Any]: ...
    @property
    def Dims(self) -> Callable[[list[int]], Any]: ...
    @property
    def Builder(self) -> Callable[[Any], Builder]: ...
    @property
    def OnnxParser(self) -> Callable[[Any, Any], OnnxParser]: ...
    @property
    def Runtime(self) -> Callable[[Any], Runtime]: ...
    @property
    def BuilderFlag(self) -> BuilderFlagEnumeration: ...
    @property
    def NetworkDefinitionCreationFlag(self) -> Enumeration: ...
    @property
    def MemoryPoolType(self) -> MemoryPoolEnumeration: ...
    @property
    def ProfilingVerbosity(self) -> ProfilingVerbosityEnumeration: ...
    @property
    def TensorIOMode(self) -> TensorModeEnumeration: ...
    @property
    def HardwareCompatibilityLevel(self) -> HardwareCompatibilityEnumeration: ...
    @property
    def ExecutionContextAllocationStrategy(self) -> StrategyEnumeration: ...


class RuntimeCache(Protocol):
    """``IRuntimeCache``: kernels that TensorRT for RTX compiled on this device."""

    def deserialize(self, blob: Any, /) -> bool: ...
    def serialize(self) -> Any: ...


class RuntimeConfig(Protocol):
    """``IRuntimeConfig`` of TensorRT for RTX."""

    cuda_graph_strategy: Any
    dynamic_shapes_kernel_specialization_strategy: Any

    def create_runtime_cache(self) -> RuntimeCache: ...
    def set_runtime_cache(self, cache: Any, /) -> bool: ...
    def set_execution_context_allocation_strategy(self, strategy: Any, /) -> None: ...


class RtxEngine(Engine, Protocol):
    """``ICudaEngine`` of TensorRT for RTX."""

    def create_runtime_config(self) -> RuntimeConfig: ...


class GraphStrategyEnumeration(Protocol):
    """``CudaGraphStrategy``."""

    @property
    def DISABLED(self) -> Any: ...
    @property
    def WHOLE_GRAPH_CAPTURE(self) -> Any: ...


class SpecializationStrategyEnumeration(Protocol):
    """``DynamicShapesKernelSpecializationStrategy``."""

    @property
    def EAGER(self) -> Any: ...
    @property
    def LAZY(self) -> Any: ...


class TensorRTForRTX(TensorRT, Protocol):
    """What ``tensorrt_rtx`` has besides."""

    @property
    def CudaGraphStrategy(self) -> GraphStrategyEnumeration: ...
    @property
    def DynamicShapesKernelSpecializationStrategy(self) -> SpecializationStrategyEnumeration: ...


def is_installed(flavour: Flavour) -> bool:
    """Whether a flavour of TensorRT can be imported; imports nothing."""
    spec = importlib.util.find_spec(_MODULES[flavour])
    return spec is not None and spec.origin is not None


def import_tensorrt(flavour: Flavour) -> TensorRT:
    """Imports a flavour of TensorRT.

    Raises:
        MissingExtraError: It is not installed.
        DeviceError: It is installed, and cannot be loaded.
    """
    name = _MODULES[flavour]
    if not is_installed(flavour):
        raise MissingExtraError(f"{name} is not installed: {_INSTALL[flavour]}")
    try:
        return cast("TensorRT", importlib.import_module(name))
    except (ImportError, OSError) as exc:
        raise DeviceError(f"{name} is installed and cannot be loaded: {exc}") from exc


@contextmanager
def faults_of_tensorrt(what: str, errors: Sequence[str] = ()) -> Iterator[None]:
    """Turns what the library raises inside into a ``DeviceError``.

    Some of its functions say by ``False`` or ``None`` that they failed, others raise what pybind11
    made of it; which do what differs between releases.

    Args:
        what: What fails then.
        errors: What the library has logged; its last lines say more than the exception.
    """
    try:
        yield
    except EdgebertError:
        raise
    except Exception as exc:
        said = "; ".join(errors[-_SAID:]) or str(exc)
        # Without its frames, which would keep the library's objects alive.
        raise DeviceError(f"{what}: {said}") from exc.with_traceback(None)
