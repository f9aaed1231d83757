"""INT8 graphs in the forms that an audit must tell apart, made from a graph that is typed FP16.

``channels`` is what compilers take and compute wrongly: weights dequantised with a scale for each
channel, so that TensorRT-RTX 1.7 stores raw integer sums as FP16. ``tensor`` is the same numbers
in a form that it computes rightly: one power of two for the whole weight, and the rest of each
channel's scale as a factor behind the product. ``inputs`` has a scale for each input of a layer,
which no integer product can leave to the end: weights are dequantised at each run. ``attention`` is
``tensor`` with the products of attention in INT8, too.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["FORMS", "Form", "quantised"]

Form = Literal["channels", "tensor", "inputs", "attention"]
FORMS: tuple[Form, ...] = ("channels", "tensor", "inputs", "attention")
_FEWEST = 16


def quantised(model: onnx.ModelProto, form: Form) -> onnx.ModelProto:
    """Returns a copy whose linear layers are INT8; those with few outputs stay FP16."""
    made = onnx.ModelProto.FromString(model.SerializeToString())
    graph = made.graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    linear = [
        node
        for node in graph.node
        if node.op_type == "MatMul"
        and node.input[1] in held
        and min(held[node.input[1]].shape) >= _FEWEST
    ]
    computed = [
        node for node in graph.node if node.op_type == "MatMul" and not set(node.input) & set(held)
    ]
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in linear:
        readers.setdefault(node.input[0], []).append(node)
    new: dict[str, list[onnx.NodeProto]] = {}  # by the name of the node they stand before
    instead: dict[str, list[onnx.NodeProto]] = {}

    def constant(name: str, array: object) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    zero = constant("int8_zero", np.int8(0))
    for number, (activation, nodes) in enumerate(readers.items()):
        step = constant(f"{activation}_step", np.float16(0.021 + 0.0007 * number))
        pair = f"{activation}_q", f"{activation}_dq"
        new[nodes[0].name] = [
            helper.make_node("QuantizeLinear", [activation, step, zero], [pair[0]], name=pair[0]),
            helper.make_node("DequantizeLinear", [pair[0], step, zero], [pair[1]], name=pair[1]),
        ]
        for node in nodes:
            steps, scales = _rounded(held[node.input[1]], 1 if form == "inputs" else 0)
            weight_name = f"{node.name}_w"
            stored = constant(f"{node.name}_int8", steps)
            if form in {"channels", "inputs"}:
                scale, out, behind = scales, node.output[0], []
            else:
                scale = np.float16(2.0 ** np.ceil(np.log2(float(scales.max()))))
                out = f"{node.name}_raw"
                rest = (scales.astype(np.float32) / np.float32(scale)).astype(np.float16)
                inputs = [out, constant(f"{node.name}_rest", rest)]
                behind = [helper.make_node("Mul", inputs, [node.output[0]], f"{node.name}_mul")]
            axis = {"axis": 0 if form == "inputs" else 1} if scale.ndim else {}
            instead[node.name] = [
                helper.make_node(
                    "DequantizeLinear",
                    [stored, constant(f"{node.name}_scale", scale)],
                    [weight_name],
                    weight_name,
                    **axis,
                ),
                helper.make_node("MatMul", [pair[1], weight_name], [out], node.name),
                *behind,
            ]
    for node in computed if form == "attention" else []:
        for index, operand in enumerate(node.input):
            name = f"{node.name}_{index}"
            step = constant(f"{name}_step", np.float16(0.011))
            new.setdefault(node.name, []).extend(
                [
                    helper.make_node(
                        "QuantizeLinear", [operand, step, zero], [f"{name}_q"], f"{name}_q"
                    ),
                    helper.make_node(
                        "DequantizeLinear", [f"{name}_q", step, zero], [f"{name}_dq"], f"{name}_dq"
                    ),
                ]
            )
            node.input[index] = f"{name}_dq"
    nodes_now = []
    for node in graph.node:
        nodes_now += new.get(node.name, [])
        nodes_now += instead.get(node.name, [node])
    del graph.node[:]
    graph.node.extend(nodes_now)
    read = {name for node in graph.node for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(left)
    del graph.value_info[:]
    onnx.checker.check_model(made, full_check=True)
    return made


def _rounded(weight: np.ndarray, over: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a weight to INT8, with a scale for each of its outputs, or inputs."""
    largest = np.abs(weight.astype(np.float32)).max(axis=over)
    scales = (largest / 127).astype(np.float16)
    steps = np.rint(weight.astype(np.float32) / np.expand_dims(scales, over).astype(np.float32))
    return np.clip(steps, -127, 127).astype(np.int8), scales
