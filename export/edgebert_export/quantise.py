"""Quantises an ONNX model to INT8 for ONNX Runtime's CPU kernels: OnnxModel in, OnnxModel out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edgebert_export.to_onnx import OnnxModel

__all__ = ["QuantiseConfig", "quantise_cpu"]


class QuantiseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which INT8 models to make, and how."""

    cpu: Annotated[
        bool,
        Meta(
            description="Make `int8-cpu`: weights in INT8 with a scale per channel, activations "
            "quantised while running (dynamic), for ONNX Runtime's CPU kernels."
        ),
    ] = True
    embeddings: Annotated[
        bool,
        Meta(description="Store the embedding tables in INT8, too; most of a small BERT's size."),
    ] = True


def quantise_cpu(model: OnnxModel, config: QuantiseConfig, out: Path) -> OnnxModel:
    """Writes ``model`` with linear layers (and embeddings) in 8 bits for a CPU.

    Linear layers: signed, symmetric, one scale per output channel, which changes far fewer
    predictions than one per tensor (docs/decisions/0005). Embedding tables: unsigned, one scale
    per table, which is all that ONNX Runtime's quantiser makes of a ``Gather``. Products of two
    activations, inside attention, stay in FP32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    operators = ["MatMul", "Gemm"] + (["Gather"] if config.embeddings else [])
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends its own pre-processing on the root logger
    try:
        quantize_dynamic(
            model.path,
            out,
            op_types_to_quantize=operators,
            per_channel=True,
            reduce_range=False,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        root.setLevel(level)
    return OnnxModel(path=out, precision="int8")
