"""What ``check_tensorrt_types.py`` gives to mypy: each class of TensorRT fits its protocol."""

import tensorrt

from edgebert_runtime import tensorrt_api as api

module: api.TensorRT = tensorrt


def builder(found: tensorrt.Builder) -> api.Builder:
    return found


def builder_config(found: tensorrt.IBuilderConfig) -> api.BuilderConfig:
    return found


def engine(found: tensorrt.ICudaEngine) -> api.Engine:
    return found


def execution_context(found: tensorrt.IExecutionContext) -> api.ExecutionContext:
    return found


def network(found: tensorrt.INetworkDefinition) -> api.Network:
    return found


def optimization_profile(found: tensorrt.IOptimizationProfile) -> api.OptimizationProfile:
    return found


def parser(found: tensorrt.OnnxParser) -> api.OnnxParser:
    return found


def parser_error(found: tensorrt.ParserError) -> api.ParserError:
    return found


def runtime(found: tensorrt.Runtime) -> api.Runtime:
    return found


def timing_cache(found: tensorrt.ITimingCache) -> api.TimingCache:
    return found


# TensorRT for RTX alone.
rtx_module: api.TensorRTForRTX = tensorrt


def rtx_engine(found: tensorrt.ICudaEngine) -> api.RtxEngine:
    return found


def runtime_cache(found: tensorrt.IRuntimeCache) -> api.RuntimeCache:
    return found


def runtime_config(found: tensorrt.IRuntimeConfig) -> api.RuntimeConfig:
    return found
