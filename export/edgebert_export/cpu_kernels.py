"""Writes one FP32 model for each kind of kernel that a CPU may run fastest: bytes out.

Which is the fastest depends on the processor and on the model's size, so ``edgebert tune`` makes
all of them and measures. Layers are all quantised or none: what that costs in answers is judged
afterwards, and what costs too much is left out (``quantise_cpu`` gives single layers back).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import onnx

from edgebert_export.errors import ExportError
from edgebert_export.graph import find_products, open_graph, write_graph
from edgebert_export.quantise_cpu import dynamic_int8, with_fusions
from edgebert_runtime.onnx_session import SLOWER_FUSED

__all__ = ["CANDIDATES", "CpuKernels", "write_for"]

_Products: TypeAlias = Literal["fp32", "per-channel", "per-tensor", "blocks"]
_INT8_ACTIVATIONS = 4
"""``accuracy_level`` of ``MatMulNBits``: products of 8-bit numbers, as activations are quantised
while running (ONNX Runtime, ContribOperators.md)."""


@dataclass(frozen=True)
class CpuKernels:
    """Which of ONNX Runtime's kernels a model is written for.

    Attributes:
        products: Of linear layers: in FP32; dynamic INT8 with a scale per output channel or per
            tensor; or ``MatMulNBits`` in 8 bits, with a scale per block of weights. In all but
            FP32, embedding tables are in INT8.
        block: Weights in a block, of one output channel; 0 without blocks.
        fused_norms: Whether a sum and the LayerNorm after it are one operator. All else that ONNX
            Runtime fuses is fused.
    """

    products: _Products
    block: int = 0
    fused_norms: bool = False

    @property
    def precision(self) -> Literal["fp32", "int8"]:
        """Of the weights of the linear layers."""
        return "fp32" if self.products == "fp32" else "int8"

    @property
    def name(self) -> str:
        """What a variant is called, for instance ``int8-cpu-per-tensor``."""
        parts = [self.precision, "cpu"]
        if self.products != "fp32":
            parts.append(self.products)
        if self.block:
            parts.append(str(self.block))
        if self.fused_norms:
            parts.append("fused-norms")
        return "-".join(parts)


_PRODUCTS: tuple[tuple[_Products, int], ...] = (
    ("fp32", 0),
    ("per-channel", 0),
    ("per-tensor", 0),
    ("blocks", 32),
    ("blocks", 64),
    ("blocks", 128),
)
CANDIDATES = tuple(
    CpuKernels(products, block, fused_norms)
    for products, block in _PRODUCTS
    for fused_norms in (False, True)
)
"""Every kind that is worth a try somewhere."""


def write_for(kernels: CpuKernels, model: Path) -> bytes:
    """Returns ``model`` written for some kernels, with ONNX Runtime's fusions.

    Args:
        kernels: Which.
        model: The FP32 model's file.

    Raises:
        ModelError: ``model`` is damaged, quantised already, or has no linear layer.
        ExportError: ONNX Runtime cannot write or load it in that way.
    """
    graph = open_graph(model)
    products = find_products(graph)
    linear = [product.node for product in products if product.kind == "linear"]
    tables = [product.node for product in products if product.kind == "embedding"]
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "fp32.onnx"
        write_graph(graph, source)  # the graph in which these are the names
        del graph
        try:
            if kernels.products == "fp32":
                written = source.read_bytes()
            elif kernels.products == "blocks":
                written = _in_blocks(source, linear, tables, kernels.block)
            else:
                per_channel = kernels.products == "per-channel"
                written = dynamic_int8(source, [*linear, *tables], per_channel=per_channel)
            left_out = [] if kernels.fused_norms else SLOWER_FUSED["cpu"]
            return with_fusions(written, left_out=left_out)
        except Exception as exc:  # whatever ONNX Runtime's quantisers and its session raise
            raise ExportError(f"{kernels.name} cannot be made: {exc}") from exc


def _in_blocks(source: Path, linear: list[str], tables: list[str], block: int) -> bytes:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    if tables:
        source.write_bytes(dynamic_int8(source, tables))
    quantiser = MatMulNBitsQuantizer(
        onnx.load(source),
        bits=8,
        block_size=block,
        is_symmetric=True,
        accuracy_level=_INT8_ACTIVATIONS,
        nodes_to_include=linear,
    )
    quantiser.process()
    data: bytes = quantiser.model.model.SerializeToString(deterministic=True)
    return data
