"""Types a graph as FP16, as TensorRT's strongly typed networks want it: FP32 graph in, FP16 out.

Tensors are FP16. What must not be: LayerNorm's mean and variance are computed in FP32
(``stash_type``), and so is softmax; raw outputs leave as FP32, token ids stay integers. Masks
become a number from which no score can bring FP16 to infinity.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from edgebert_export.errors import ExportError
from edgebert_export.graph import add_constant, constant, copy_of, set_constant

__all__ = ["MASKED", "to_half", "with_input_type"]

MASKED = -30_000.0
"""What a mask adds to the scores of padding: far below any score, its sum with one in range."""

_LARGEST = float(np.finfo(np.float16).max)
_INTEGERS = {"int32": ir.DataType.INT32, "int64": ir.DataType.INT64}


def to_half(model: ir.Model) -> ir.Model:
    """Returns a copy of a graph, with Q/DQ or without, that is typed FP16.

    Raises:
        ExportError: A weight is outside FP16's range.
    """
    typed = copy_of(model)
    for name, value in typed.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
            _halve(typed, name)
    for node in list(typed.graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
        elif node.op_type == "LayerNormalization":
            node.attributes["stash_type"] = ir.AttrInt64("stash_type", ir.DataType.FLOAT)
        elif node.op_type == "Softmax":
            _in_single(typed, node)
            continue
        elif node.op_type == "Relu":
            _as_maximum(typed, node)
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(ir.DataType.FLOAT16)
    for index, value in enumerate(list(typed.graph.outputs)):
        _leave_as_single(typed, index, value)
    return typed


def _halve(model: ir.Model, name: str) -> None:
    array = constant(model, name)
    if array.size == 1:  # a mask's constant is as low as FP32 goes
        array = np.maximum(array, np.float32(MASKED))
    if not np.abs(array).max(initial=0) <= _LARGEST:
        raise ExportError(
            f"the weight {name} holds {float(np.abs(array).max()):.3g}, FP16 ends at "
            f"{_LARGEST:.0f}: this model cannot run in FP16"
        )
    set_constant(model, name, array.astype(np.float16))


def _in_single(model: ir.Model, node: ir.Node) -> None:
    """Computes a node in FP32: TensorRT fuses both casts into its attention kernel."""
    before, after = node.inputs[0], node.outputs[0]
    assert before is not None
    widened = _cast(before, ir.DataType.FLOAT, f"{after.name}_fp32_input")
    narrowed = _cast(after, ir.DataType.FLOAT16, f"{after.name}_fp16")
    model.graph.insert_before(node, widened)
    model.graph.insert_after(node, narrowed)
    after.replace_all_uses_with(narrowed.outputs[0])
    narrowed.replace_input_with(0, after)
    node.replace_input_with(0, widened.outputs[0])


def _as_maximum(model: ir.Model, node: ir.Node) -> None:
    """Writes a ReLU as the maximum with 0.

    ONNX Runtime (seen with 1.31.1) quantises the bias of a linear layer that is followed by
    ``Relu`` and Q to INT32, with scales in FP16, and overflows when it dequantises it.
    """
    zero = add_constant(model, "zero_fp16", np.array(0, dtype=np.float16))
    maximum = ir.node("Max", [node.inputs[0], zero], name=node.name)
    maximum.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    (result,) = node.outputs
    model.graph.insert_before(node, maximum)
    result.replace_all_uses_with(maximum.outputs[0])
    model.graph.remove(node, safe=True)
    maximum.outputs[0].name = result.name


def _leave_as_single(model: ir.Model, index: int, value: ir.Value) -> None:
    name, producer = value.name, value.producer()
    assert producer is not None
    value.name = f"{name}_fp16"
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    widened = _cast(value, ir.DataType.FLOAT, str(name))
    widened.outputs[0].shape = value.shape
    model.graph.insert_after(producer, widened)
    model.graph.outputs[index] = widened.outputs[0]


def with_input_type(model: ir.Model, dtype: Literal["int32", "int64"]) -> ir.Model:
    """Returns a copy of a graph whose inputs, token ids and masks, are of an integer type."""
    typed = copy_of(model)
    wanted = _INTEGERS[dtype]
    for value in typed.graph.inputs:
        if value.dtype == wanted:
            continue
        assert value.dtype is not None
        inner = _cast(value, value.dtype, f"{value.name}_{value.dtype.name.lower()}")
        value.replace_all_uses_with(inner.outputs[0])
        inner.replace_input_with(0, value)
        value.type = ir.TensorType(wanted)
        typed.graph.insert_before(typed.graph[0], inner)
    return typed


def _cast(value: ir.Value, to: ir.DataType, output: str) -> ir.Node:
    result = ir.Value(name=output, type=ir.TensorType(to))
    return ir.node("Cast", [value], {"to": int(to)}, outputs=[result], name=f"{output}_cast")
