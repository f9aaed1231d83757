"""Counts what a graph has to compute and to read for one batch: ir.Model in, numbers out.

Only what cannot be avoided is counted, so that the numbers can carry a bound: multiply-accumulates
of matrix products, weights read once, rows of tables that are looked up, and the graph's inputs
and outputs. Softmax, LayerNorm, activation functions and all that lies between products is left
out: a backend may fuse it away.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import InferenceError
from onnx_ir.passes.common import IdentityEliminationPass, LiftConstantsToInitializersPass

from edgebert_export.errors import ModelError
from edgebert_export.graph import copy_of

__all__ = ["Precision", "ProductCount", "Work", "count"]

Precision = Literal["int8", "fp16", "fp32"]

_PRECISIONS: dict[int, Precision] = {TensorProto.FLOAT16: "fp16", TensorProto.FLOAT: "fp32"}
_BYTES = {TensorProto.INT8, TensorProto.UINT8}
_WEIGHTS = {*_BYTES, *_PRECISIONS}
"""Types of weights; other constants are what shapes and masks are made from."""

_PRODUCTS = {"Gemm", "MatMul", "MatMulInteger"}
_NOT_COUNTED = ("attention", "conv", "einsum", "gemm", "gru", "lstm", "matmul", "rnn")
"""What is in the names of other operators that multiply matrices, in lower case."""


@dataclass(frozen=True)
class ProductCount:
    """A matrix product.

    Attributes:
        node: Name of its node.
        kind: ``linear`` (an activation by a weight) or ``attention`` (two activations).
        precision: Of its operands.
        macs: Multiply-accumulates, for the whole batch.
    """

    node: str
    kind: Literal["linear", "attention"]
    precision: Precision
    macs: int


@dataclass(frozen=True)
class Work:
    """What one batch costs at least.

    Attributes:
        products: The matrix products, in the graph's order.
        weight_bytes: Weights, as the graph stores them, each read once; no tables, and no
            constants of a single number.
        embedding_bytes: Rows of tables that are looked up, if no two tokens are the same.
        activation_bytes: The graph's inputs and outputs; all between may stay on the chip.
    """

    products: tuple[ProductCount, ...]
    weight_bytes: int
    embedding_bytes: int
    activation_bytes: int

    @property
    def macs(self) -> dict[Precision, int]:
        """Multiply-accumulates of each precision that occurs."""
        total: Counter[Precision] = Counter()
        for product in self.products:
            total[product.precision] += product.macs
        return dict(total)

    @property
    def total_bytes(self) -> int:
        """All that has to be read or written once."""
        return self.weight_bytes + self.embedding_bytes + self.activation_bytes


@dataclass(frozen=True)
class _Tensor:
    """Shape and element type (of ``TensorProto``) of a value."""

    shape: tuple[int, ...]
    dtype: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * int(helper.tensor_dtype_to_np_dtype(self.dtype).itemsize)


def count(model: ir.Model, batch: int, tokens: int) -> Work:
    """Counts the work of one batch; shapes are inferred from the graph, weights not looked at.

    Args:
        model: FP32, FP16, with Q/DQ, or with ONNX Runtime's dynamic INT8. Its inputs are
            ``[batch, seq]``.
        batch: Texts in the batch.
        tokens: Tokens of each text, padding included.

    Raises:
        ModelError: It is damaged, a shape in it depends on more than the inputs' shapes, or it
            multiplies matrices in a way that is not known here.
    """
    try:
        graph, weights = _skeleton(model, batch, tokens)
        tensors = _infer(graph)
    except (InferenceError, ValueError, TypeError, RuntimeError) as exc:
        raise ModelError(f"the model's shapes cannot be inferred: {exc}") from exc
    return _Counter(graph.graph, weights, tensors).work()


def _skeleton(
    model: ir.Model, batch: int, tokens: int
) -> tuple[onnx.ModelProto, dict[str, _Tensor]]:
    """Returns a graph of fixed input shapes without its weights, and what the weights were.

    The weights become inputs, so that a graph of any size is cheap to serialise.
    """
    bare = copy_of(model)
    graphs = {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
    if bare.functions or any(a.type in graphs for n in bare.graph for a in n.attributes.values()):
        raise ModelError("the model holds functions or branches, whose work is not counted here")
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(bare)
    IdentityEliminationPass()(bare)  # the exporter stores equal weights once
    for value in bare.graph.inputs:
        if value.shape is None or len(value.shape) != 2:
            raise ModelError(f"the model's input {value.name} is not of the shape [batch, seq]")
        value.shape = ir.Shape((batch, tokens))
    weights: dict[str, _Tensor] = {}
    for name, value in list(bare.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and int(tensor.dtype) in _WEIGHTS:
            weights[name] = _Tensor(tuple(tensor.shape.numpy()), int(tensor.dtype))
            del bare.graph.initializers[name]
        elif isinstance(tensor, ir.ExternalTensor):  # no file is opened because a model says so
            raise ModelError(f"the model's constant {name} lies in another file; export it as one")
    proto = ir.to_proto(bare)
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    widened = _standardise(proto)
    proto.graph.input.extend(
        helper.make_tensor_value_info(
            name, TensorProto.FLOAT if name in widened else weight.dtype, weight.shape
        )
        for name, weight in weights.items()
    )
    return proto, weights


def _standardise(model: onnx.ModelProto) -> set[str]:
    """Puts operators of ONNX, whose shapes can be inferred, in the place of ONNX Runtime's fused.

    Their products of 8-bit weights become products of floating point, of the same shapes.

    Returns:
        Names of those weights.
    """
    widened: set[str] = set()
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.domain != "com.microsoft":
            continue
        if node.op_type in {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}:
            activation, weight = node.input[:2]
            if node.op_type == "MatMulIntegerToFloat":
                quantisation = producers.get(activation)
                if quantisation is None or quantisation.op_type != "DynamicQuantizeLinear":
                    continue
                activation = quantisation.input[0]
            widened.add(weight)
            _become(node, "MatMul", activation, weight)
        elif node.op_type == "FusedMatMul" and not any(
            _integer(node, name) for name in ("transA", "transB", "transBatchA", "transBatchB")
        ):
            _become(node, "MatMul", *node.input)
        elif node.op_type in {"BiasGelu", "FastGelu"} and len(node.input) == 2:
            _become(node, "Add", *node.input)
    return widened


def _become(node: onnx.NodeProto, op_type: str, *inputs: str) -> None:
    node.op_type, node.domain = op_type, ""
    del node.attribute[:]
    node.input[:] = inputs


def _infer(model: onnx.ModelProto) -> dict[str, _Tensor]:
    """Infers all shapes.

    ONNX's inference does not follow a ``Slice`` whose ends are computed (the positions that are
    looked up), so whatever depends on shapes alone is computed, until nothing is left to do.
    """
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    while True:
        found = onnx.shape_inference.infer_shapes(model, data_prop=True, strict_mode=True).graph
        tensors = {
            info.name: _Tensor(tuple(d.dim_value for d in kind.shape.dim), kind.elem_type)
            for info in (*found.input, *found.value_info, *found.output)
            if (kind := info.type.tensor_type).HasField("shape")
            and all(dimension.HasField("dim_value") for dimension in kind.shape.dim)
        }
        if not _fold(model, constants, tensors):
            break
    constant_tensors = {
        name: _Tensor(array.shape, helper.np_dtype_to_tensor_dtype(array.dtype))
        for name, array in constants.items()
    }
    return tensors | constant_tensors


def _fold(
    model: onnx.ModelProto,
    constants: dict[str, NDArray[Any]],
    tensors: Mapping[str, _Tensor],
) -> bool:
    """Replaces nodes that are known by now by their values; returns whether there were any."""
    folded = []
    for node in model.graph.node:
        inputs = [name for name in node.input if name]
        if node.op_type == "Shape" and inputs[0] in tensors:
            shape = tensors[inputs[0]].shape
            part = shape[_integer(node, "start") : _integer(node, "end", len(shape))]
            results = [np.array(part, dtype=np.int64)]
        elif inputs and all(name in constants for name in inputs):
            results = _compute(model, node, {name: constants[name] for name in inputs})
        else:
            continue
        folded.append(node)
        for name, array in zip(node.output, results, strict=True):
            constants[name] = np.asarray(array)
            model.graph.initializer.append(numpy_helper.from_array(constants[name], name))
    for node in folded:
        model.graph.node.remove(node)
    return bool(folded)


def _compute(
    model: onnx.ModelProto, node: onnx.NodeProto, inputs: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    values = [helper.make_empty_tensor_value_info(name) for name in inputs]
    results = [helper.make_empty_tensor_value_info(name) for name in node.output]
    alone = helper.make_graph([node], "alone", values, results)
    evaluator = ReferenceEvaluator(helper.make_model(alone, opset_imports=model.opset_import))
    found = evaluator.run(None, dict(inputs))
    assert isinstance(found, list)
    return found


class _Counter:
    """Walks over a graph whose shapes are known."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        weights: Mapping[str, _Tensor],
        tensors: Mapping[str, _Tensor],
    ) -> None:
        self._graph = graph
        self._weights = weights
        self._tensors = tensors
        self._producers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self._readers[name].append(node)

    def work(self) -> Work:
        weight_bytes, embedding_bytes = self._constant_bytes()
        ends = [value.name for value in self._graph.input if value.name not in self._weights]
        ends += [value.name for value in self._graph.output]
        return Work(
            products=tuple(self._products()),
            weight_bytes=weight_bytes,
            embedding_bytes=embedding_bytes,
            activation_bytes=sum(self._tensor(name).nbytes for name in ends),
        )

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise ModelError(f"the model's shapes cannot be inferred: that of {name} is not known")
        return self._tensors[name]

    def _products(self) -> Iterator[ProductCount]:
        for node in self._graph.node:
            if node.op_type in _PRODUCTS and node.domain in {"", "ai.onnx"}:
                depth = 0 if node.op_type == "Gemm" and _integer(node, "transA") else -1
                yield ProductCount(
                    node=node.name,
                    kind="linear" if self._is_weight(node.input[1]) else "attention",
                    precision=self._precision(node),
                    macs=self._tensor(node.output[0]).size
                    * self._tensor(node.input[0]).shape[depth],
                )
            elif any(part in node.op_type.lower() for part in _NOT_COUNTED):
                raise ModelError(f"the model holds {node.op_type}, whose work is not counted here")

    def _is_weight(self, name: str) -> bool:
        node = self._dequantisation(name)
        return (node.input[0] if node is not None else name) in self._weights

    def _dequantisation(self, name: str) -> onnx.NodeProto | None:
        """The node that dequantises what a value holds, if it is one of 8 bits."""
        node = self._producers.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        return node if self._tensor(node.input[0]).dtype in _BYTES else None

    def _precision(self, node: onnx.NodeProto) -> Precision:
        quantised = all(self._dequantisation(name) is not None for name in node.input[:2])
        weight = self._weights.get(node.input[1])
        if quantised or (weight is not None and weight.dtype in _BYTES):
            return "int8"
        dtype = self._tensor(node.output[0]).dtype
        if dtype not in _PRECISIONS:
            kind = TensorProto.DataType.Name(dtype)
            raise ModelError(f"the model multiplies {kind} matrices, whose work is not counted")
        return _PRECISIONS[dtype]

    def _constant_bytes(self) -> tuple[int, int]:
        """Bytes of the weights, and of the rows of tables that are looked up."""
        weight_bytes = embedding_bytes = 0
        for name, weight in self._weights.items():
            readers = self._readers[name]
            if not readers or weight.size < 2:
                continue
            rows = [self._rows(name, reader) for reader in readers]
            looked_up = [number for number in rows if number is not None]
            if len(looked_up) == len(readers):
                used = min(sum(looked_up), weight.shape[0])
                embedding_bytes += weight.nbytes // weight.shape[0] * used
            else:
                weight_bytes += weight.nbytes
        return weight_bytes, embedding_bytes

    def _rows(self, name: str, reader: onnx.NodeProto) -> int | None:
        """Rows of a constant that a node looks up; ``None`` if it reads all of it."""
        shape = self._weights[name].shape
        if reader.op_type == "Gather" and reader.input[0] == name and not _integer(reader, "axis"):
            return self._tensor(reader.input[1]).size if shape else None
        table = self._tensor(reader.input[0]) if reader.op_type == "DequantizeLinear" else None
        if table is None or not shape or shape[0] != table.shape[0]:
            return None
        if name != reader.input[0] and _integer(reader, "axis", 1) != 0:
            return None  # a scale for each column
        behind = self._readers[reader.output[0]]
        if not behind or any(
            user.op_type != "Gather" or user.input[0] != reader.output[0] or _integer(user, "axis")
            for user in behind
        ):
            return None
        return sum(self._tensor(user.input[1]).size for user in behind)


def _integer(node: onnx.NodeProto, name: str, default: int = 0) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)
