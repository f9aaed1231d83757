"""Computes on a CPU what FP16 holds on a GPU: a graph for TensorRT in, FP32 with FP16 stores out.

A CPU computes in FP32 what a graph types FP16, and keeps the results: nothing overflows, nothing
is rounded. Here every result that the graph types FP16 is rounded to FP16, once, where its
operator ends, so that what is too large becomes infinite. An INT8 product is what TensorRT for RTX
1.7 compiles it to (docs/decisions/0013): where its weights have a single scale, the 32-bit sum is
scaled inside the kernel and then stored; where they have a scale for each output, the bare sum is
stored as FP16, and scaled after that.

Real kernels store less often, as TensorRT fuses operators, and add up in another order.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from edgebert_export.graph import (
    Model,
    add_constant,
    constant,
    copy_of,
    open_session,
    set_constant,
)
from edgebert_runtime.onnx_session import OnnxSession

__all__ = ["emulate", "open_emulated"]

_MOVING = frozenset(
    {
        "Concat",
        "Expand",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
"""Operators whose results are among what goes in: rounded already."""


def open_emulated(model: Model) -> OnnxSession:
    """Opens a session that computes a graph for TensorRT with real FP16 stores.

    Raises what ``emulate`` raises.
    """
    graph = model
    if isinstance(graph, bytes):
        graph = ir.from_proto(onnx.ModelProto.FromString(graph))
    return open_session(emulate(graph))


def emulate(model: ir.Model) -> ir.Model:
    """Returns an FP32 graph that rounds to FP16 wherever a typed graph stores FP16.

    ONNX Runtime keeps both casts of a rounding, as the graph asks for them; those that it puts
    around an FP16 operator by itself it takes out again.

    Args:
        model: Typed FP16, with Q/DQ or without.
    """
    emulated = copy_of(model)
    ShapeInferencePass()(emulated)
    half = {
        str(value.name)
        for node in emulated.graph
        for value in node.outputs
        if value.dtype == ir.DataType.FLOAT16
    }
    for node in list(emulated.graph):
        if node.op_type == "MatMul":
            _compute_in_int8(emulated, node, half)
    RemoveUnusedNodesPass()(emulated)
    for name, value in emulated.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT16:
            set_constant(emulated, name, constant(emulated, name).astype(np.float32))
    for node in list(emulated.graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        for value in node.outputs:
            if value.name in half:
                value.type = ir.TensorType(ir.DataType.FLOAT)
                if node.op_type not in _MOVING:
                    _store(emulated, node, value)
    return emulated


def _compute_in_int8(model: ir.Model, product: ir.Node, half: set[str]) -> None:
    """Writes a product of dequantised operands as one of whole numbers, and what scales it.

    Their sums are exact in FP32 up to 2 ** 24, which 1,040 channels of the largest numbers reach.
    """
    dequantised = [_dequantisation(model, value) for value in product.inputs]
    scale: NDArray[np.float64] = np.ones(())
    for node in dequantised:
        if node is None:
            return
        assert node.inputs[1] is not None
        scale = np.asarray(scale * constant(model, str(node.inputs[1].name)).astype(np.float64))
    for index, node in enumerate(dequantised):
        assert node is not None
        product.replace_input_with(index, _whole_numbers(model, node))
    result = product.outputs[0]
    name = str(result.name)
    result.name, result.type = f"{name}_sum", ir.TensorType(ir.DataType.FLOAT)
    factors = scale.astype(np.float32)
    if scale.ndim and name in half:  # by output: the bare sum is stored, and so is each scale
        half.add(result.name)
        factors = scale.astype(np.float16).astype(np.float32)
    factor = add_constant(model, f"{name}_sum_scale", np.asarray(factors))
    scaled = ir.node("Mul", [result, factor], outputs=[ir.Value(name=name)], name=f"{name}_scaled")
    result.replace_all_uses_with(scaled.outputs[0], replace_graph_outputs=True)
    scaled.replace_input_with(0, result)
    model.graph.insert_after(product, scaled)


def _dequantisation(model: ir.Model, value: ir.Value | None) -> ir.Node | None:
    """What dequantises an operand, symmetrically, with one scale or one for each of its columns."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    scale, zero = (*node.inputs[1:], None)[:2]
    assert scale is not None
    if zero is not None and constant(model, str(zero.name)).any():
        return None
    by_column = "axis" not in node.attributes or node.attributes["axis"].as_int() in {1, -1}
    return node if by_column or not constant(model, str(scale.name)).ndim else None


def _whole_numbers(model: ir.Model, dequantise: ir.Node) -> ir.Value:
    """What a node dequantises, as FP32."""
    steps = dequantise.inputs[0]
    assert steps is not None
    name = f"{steps.name}_whole"
    if steps.is_initializer():
        return add_constant(model, name, constant(model, str(steps.name)).astype(np.float32))
    there = next((user for user in steps.consumers() if user.name == name), None)
    if there is None:
        there = _cast(steps, ir.DataType.FLOAT, name)
        producer = steps.producer()
        assert producer is not None
        model.graph.insert_after(producer, there)
    return there.outputs[0]


def _store(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    """Rounds a result to FP16 before anything reads it."""
    stored = _cast(value, ir.DataType.FLOAT16, f"{value.name}_stored")
    read = _cast(stored.outputs[0], ir.DataType.FLOAT, f"{value.name}_read")
    value.replace_all_uses_with(read.outputs[0], replace_graph_outputs=True)
    stored.replace_input_with(0, value)
    model.graph.insert_after(node, [stored, read])


def _cast(value: ir.Value, to: ir.DataType, output: str) -> ir.Node:
    result = ir.Value(name=output, type=ir.TensorType(to))
    return ir.node("Cast", [value], {"to": int(to)}, outputs=[result], name=output)
