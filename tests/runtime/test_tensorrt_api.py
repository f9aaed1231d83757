"""What edgebert calls of TensorRT is there: in the real ``tensorrt_rtx``, and in the fake."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from edgebert_runtime import tensorrt_api as api
from edgebert_runtime.testing import FakeDriver, FakeTensorRT

CLASSES = {
    "Builder": api.Builder,
    "IBuilderConfig": api.BuilderConfig,
    "ICudaEngine": api.RtxEngine,
    "IExecutionContext": api.ExecutionContext,
    "INetworkDefinition": api.Network,
    "IOptimizationProfile": api.OptimizationProfile,
    "IRuntimeCache": api.RuntimeCache,
    "IRuntimeConfig": api.RuntimeConfig,
    "ITensor": api.NetworkTensor,
    "ITimingCache": api.TimingCache,
    "OnnxParser": api.OnnxParser,
    "ParserError": api.ParserError,
    "Runtime": api.Runtime,
}
ENUMERATIONS = {
    "BuilderFlag": api.BuilderFlagEnumeration,
    "CudaGraphStrategy": api.GraphStrategyEnumeration,
    "DynamicShapesKernelSpecializationStrategy": api.SpecializationStrategyEnumeration,
    "ExecutionContextAllocationStrategy": api.StrategyEnumeration,
    "HardwareCompatibilityLevel": api.HardwareCompatibilityEnumeration,
    "ILogger": api.SeverityEnumeration,
    "MemoryPoolType": api.MemoryPoolEnumeration,
    "ProfilingVerbosity": api.ProfilingVerbosityEnumeration,
    "TensorIOMode": api.TensorModeEnumeration,
}


def members(protocol: Any) -> set[str]:
    """Names that a protocol lists, those it inherits included."""
    found: set[str] = set()
    for parent in protocol.__mro__:
        if parent.__module__ == api.__name__:
            found |= {name for name in vars(parent) if not name.startswith("_")}
            found |= set(inspect.get_annotations(parent))
    return found


@pytest.fixture(scope="module")
def rtx() -> Any:
    if not api.is_installed("rtx"):
        pytest.skip("tensorrt-rtx has no wheel for this machine")
    return api.import_tensorrt("rtx")


def test_the_lists_are_not_empty() -> None:
    assert all(members(protocol) for protocol in (*CLASSES.values(), *ENUMERATIONS.values()))
    assert {"progress_monitor", "set_timing_cache"} <= members(api.BuilderConfig)
    specialisation = "dynamic_shapes_kernel_specialization_strategy"
    assert {"cuda_graph_strategy", specialisation} <= members(api.RuntimeConfig)
    assert {"get_tensor_name", "create_runtime_config"} <= members(api.RtxEngine)


def test_the_module_has_all_that_is_used_of_it(rtx: Any) -> None:
    missing = {name for name in members(api.TensorRTForRTX) if not hasattr(rtx, name)}
    assert not missing
    assert rtx.__version__ and rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED is not None


@pytest.mark.parametrize("name", [*CLASSES, *ENUMERATIONS])
def test_each_class_has_all_that_is_used_of_it(rtx: Any, name: str) -> None:
    protocol = {**CLASSES, **ENUMERATIONS}[name]
    missing = {member for member in members(protocol) if not hasattr(getattr(rtx, name), member)}
    assert not missing


def test_the_fake_has_all_that_is_used_of_the_module() -> None:
    fake: api.TensorRT = FakeTensorRT(FakeDriver())
    assert {name for name in members(api.TensorRTForRTX) if not hasattr(fake, name)} == set()


def test_deserialising_without_a_driver_gives_nothing(rtx: Any) -> None:
    """Which ``TensorRTSession`` turns into an error; here the library itself is asked."""
    from pathlib import Path

    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    from edgebert_runtime.tensorrt_build import make_logger

    errors: list[str] = []
    logger = make_logger(rtx, lambda line: None, errors)
    assert rtx.Runtime(logger).deserialize_cuda_engine(b"no engine") is None
    assert errors
