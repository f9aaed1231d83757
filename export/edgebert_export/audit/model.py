"""What an ONNX model asks of a compiler: its INT8 products, and the attentions to be fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper

from edgebert_export.audit.log import NotUnderstoodError
from edgebert_export.errors import ModelError

__all__ = ["Asked", "Attention", "Int8Product", "read_asked"]

_PASSED_ON = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""What a product's operand may go through behind its dequantisation, unchanged."""
_OPAQUE = frozenset({"Attention", "MatMulInteger", "MultiHeadAttention", "QLinearMatMul"})
"""Products under other names, which this reader would not count."""
_TO_SOFTMAX = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Where"})
_FROM_SOFTMAX = frozenset(
    {"Cast", "DequantizeLinear", "Dropout", "Identity", "QuantizeLinear", "Where"}
)


class Int8Product(msgspec.Struct, frozen=True):
    """A matrix product both of whose operands are dequantised.

    Attributes:
        node: Name of the ONNX node.
        scale: What its integer sums are to be multiplied by; ``None`` if that differs between
            channels, so that no single number can do it.
        shape: Of its weight as it is multiplied, inputs and outputs; ``None`` if both operands
            are computed.
        weight: Name of the node that dequantises the weight, if there is one.
    """

    node: str
    scale: float | None
    shape: tuple[int, int] | None
    weight: str | None


class Attention(msgspec.Struct, frozen=True):
    """The three nodes of an attention that one kernel should compute.

    Attributes:
        scores: Name of the product of queries and keys.
        softmax: Name of what makes them probabilities.
        context: Name of the product of those with the values.
    """

    scores: str
    softmax: str
    context: str


class Asked(msgspec.Struct, frozen=True):
    """What a model asks.

    Attributes:
        products: Its INT8 products, in the graph's order.
        attentions: One for each transformer layer.
    """

    products: tuple[Int8Product, ...]
    attentions: tuple[Attention, ...]


def read_asked(model: Path) -> Asked:
    """Reads a model; weights in files of their own are not looked at.

    Raises:
        ModelError: It is not ONNX.
        NotUnderstoodError: What it asks cannot be told: a node that matters has no name of its
            own, or stands where this reader does not look.
    """
    try:
        read = onnx.load(model, load_external_data=False)
        graph = read.graph
    except Exception as exc:  # protobuf raises errors of its own
        raise ModelError(f"{model} is not an ONNX model: {' '.join(str(exc).split())}") from exc
    if read.functions:
        raise NotUnderstoodError("the model holds functions, whose products would not be counted")
    for node in graph.node:
        if node.op_type in _OPAQUE or any(
            attribute.HasField("g") or attribute.graphs for attribute in node.attribute
        ):
            raise NotUnderstoodError(f"what a node {node.op_type} of the model asks is not known")
    reader = _Reader(graph)
    for node in graph.node:
        if (odd := reader.unknown_reader(node)) is not None:
            raise NotUnderstoodError(
                f"{odd.op_type} {odd.name} reads what {node.name} dequantises: what a compiler "
                "makes of that is not known"
            )
    products = [product for node in graph.node if (product := reader.product(node)) is not None]
    attentions = [found for node in graph.node if (found := reader.attention(node)) is not None]
    names = Counter(node.name for node in graph.node)
    told = [product.node for product in products]
    told += [name for found in attentions for name in msgspec.structs.astuple(found)]
    for name in told:
        if not name or names[name] != 1:
            what = f"{names[name]} nodes are called {name}" if name else "a product has no name"
            raise NotUnderstoodError(f"kernels are told by the names of ONNX nodes, and {what}")
    return Asked(tuple(products), tuple(attentions))


class _Reader:
    """Looks through a graph, from a node to what it reads or what reads it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._constants: Mapping[str, onnx.TensorProto] = {
            tensor.name: tensor for tensor in graph.initializer
        } | {
            node.output[0]: attribute.t
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.HasField("t")
        }
        self._producer: dict[str, onnx.NodeProto] = {
            output: node for node in graph.node for output in node.output
        }
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def product(self, node: onnx.NodeProto) -> Int8Product | None:
        """Returns a node as an INT8 product; ``None`` if it is none."""
        if node.op_type not in {"Gemm", "MatMul"}:
            return None
        sources = [self._dequantised(name) for name in node.input[:2]]
        if sources[0] is None or sources[1] is None:
            return None
        scales = [self._scale(source) for source in sources if source is not None]
        scale = None
        if scales[0] is not None and scales[1] is not None:
            # As the compiler multiplies them, in FP32.
            scale = float(np.float32(scales[0]) * np.float32(scales[1]))
        weight = self._constants.get(sources[1].input[0])
        shape = None
        if weight is not None and len(weight.dims) == 2:
            rows, columns = weight.dims
            swapped = self._is_swapped(node, sources[1])
            shape = (columns, rows) if swapped else (rows, columns)
        return Int8Product(node.name, scale, shape, sources[1].name if weight is not None else None)

    def unknown_reader(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Returns what reads dequantised INT8 and is no product of two such, if anything does.

        What moves it around is followed. Tables that are looked up may be in INT8: nothing is
        added up then.
        """
        if node.op_type != "DequantizeLinear" or self._dequantised(node.output[0]) is None:
            return None
        waiting = [node.output[0]]
        while waiting:
            for reader in self._readers.get(waiting.pop(), []):
                if reader.op_type in _PASSED_ON:
                    waiting += reader.output
                elif reader.op_type != "Gather" and self.product(reader) is None:
                    return reader
        return None

    def _dequantised(self, name: str) -> onnx.NodeProto | None:
        """Returns the node that dequantises an INT8 operand, if one does."""
        node: onnx.NodeProto | None = self._producer.get(name)
        while node is not None and node.op_type in _PASSED_ON:
            node = self._producer.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        typed = [self._constants.get(name) for name in node.input[::2]]  # itself, its zero point
        is_int8 = all(t is None or t.data_type == onnx.TensorProto.INT8 for t in typed)
        return node if is_int8 else None

    def _scale(self, node: onnx.NodeProto) -> float | None:
        """Returns the one scale of a ``DequantizeLinear``; ``None`` if there are several."""
        tensor = self._constants.get(node.input[1])
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        values = np.unique(numpy_helper.to_array(tensor).astype(np.float32))
        return float(values[0]) if values.size == 1 else None

    def _is_swapped(self, node: onnx.NodeProto, weight: onnx.NodeProto) -> bool:
        """Whether a weight is transposed on its way into a product."""
        swaps = sum(attribute.i for attribute in node.attribute if attribute.name == "transB")
        between = self._producer[node.input[1]]
        while between is not weight:
            swaps += between.op_type == "Transpose"
            between = self._producer[between.input[0]]
        return bool(swaps % 2)

    def attention(self, node: onnx.NodeProto) -> Attention | None:
        """Returns the attention that a softmax is part of; ``None`` if it is part of none."""
        if node.op_type != "Softmax":
            return None
        scores = self._before(node)
        context = self._behind(node)
        if scores is None or context is None:
            return None
        return Attention(scores.name, node.name, context.name)

    def _before(self, softmax: onnx.NodeProto) -> onnx.NodeProto | None:
        """Returns the product whose scaled and masked result a softmax reads."""
        seen: set[str] = set()
        waiting = list(softmax.input)
        while waiting:
            name = waiting.pop(0)
            node = self._producer.get(name)
            if node is None or name in seen:
                continue
            seen.add(name)
            if node.op_type == "MatMul":
                return node
            if node.op_type in _TO_SOFTMAX:
                waiting += node.input
        return None

    def _behind(self, softmax: onnx.NodeProto) -> onnx.NodeProto | None:
        """Returns the product that reads a softmax' probabilities."""
        waiting = [softmax.output[0]]
        seen: set[str] = set()
        while waiting:
            name = waiting.pop(0)
            if name in seen:
                continue
            seen.add(name)
            for reader in self._readers.get(name, []):
                if reader.op_type == "MatMul":
                    return reader
                if reader.op_type in _FROM_SOFTMAX:
                    waiting += reader.output
        return None
