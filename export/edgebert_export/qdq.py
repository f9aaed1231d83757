"""Puts explicit Q/DQ into a graph, at the inputs of products only: FP32 graph in, INT8 graph out.

A product's activation is quantised and dequantised right before it; products that read the same
activation share one pair, so that queries, keys and values read one INT8 tensor. Weights are
stored in INT8 with a scale for each channel. Everything is symmetric and signed, which is all
that TensorRT takes. Results are not quantised: TensorRT does not need it, and BERT's LayerNorm
and residual sums cannot bear it (docs/decisions/0013).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgebert_export.graph import (
    Product,
    add_constant,
    constant,
    copy_of,
    remove_unused_constants,
)

__all__ = ["LEVELS", "activation_scale", "insert_qdq", "quantise_weight"]

LEVELS = 127
"""Largest magnitude of a symmetric INT8 value; -128 is not used."""

_SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)
_LARGEST_SCALE = float(np.finfo(np.float16).max)
_SCALE_OF_NOTHING = float(np.finfo(np.float16).smallest_normal)


def activation_scale(threshold: float) -> float:
    """Returns the scale that maps magnitudes up to ``threshold`` to ``LEVELS`` steps.

    It is a number that FP16 can hold, above 0 even if every activation was 0.
    """
    if threshold == 0:
        return _SCALE_OF_NOTHING
    return float(np.float16(np.clip(threshold / LEVELS, _SMALLEST_SCALE, _LARGEST_SCALE)))


def quantise_weight(
    weight: NDArray[np.float32], channel_axis: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantises a matrix with one scale for each entry of ``channel_axis``.

    The scales are numbers that FP16 can hold, rounded up, so that nothing is clipped.

    Args:
        weight: ``float32[m, n]``.
        channel_axis: 0 or 1.

    Returns:
        ``int8[m, n]`` from -127 to 127, and ``float32`` scales of the channel axis' length.
    """
    largest = np.abs(weight).max(axis=1 - channel_axis)
    exact = largest / np.float32(LEVELS)
    scales = exact.astype(np.float16)
    below = scales.astype(np.float32) < exact
    scales = np.where(below, np.nextafter(scales, np.float16(np.inf)), scales).astype(np.float32)
    scales = np.maximum(scales, np.float32(_SMALLEST_SCALE))
    scales = np.where(largest == 0, np.float32(_SCALE_OF_NOTHING), scales)
    steps = np.rint(weight / np.expand_dims(scales, 1 - channel_axis))
    return np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scales


def insert_qdq(
    model: ir.Model,
    products: Collection[Product],
    scales: Mapping[str, float],
    steps: Mapping[str, NDArray[np.int8]] | None = None,
) -> ir.Model:
    """Returns a copy of a graph in which ``products`` are quantised, the others as they were.

    Args:
        model: An FP32 graph.
        products: Which of its products to quantise; none of them gives the graph as it was.
        scales: For each activation that they read, its scale.
        steps: By name, weights that are rounded already, to steps of the scales that
            ``quantise_weight`` gives them; others are rounded to the nearest step.
    """
    quantised = copy_of(model)
    nodes = {node.name: node for node in quantised.graph}
    pairs: dict[str, ir.Value] = {}
    weights: dict[str, ir.Value] = {}
    for product in products:
        node = nodes[product.node]
        for operand in product.operands:
            if operand.value not in pairs:
                pairs[operand.value] = _activation_pair(
                    quantised, node, operand.value, scales[operand.value]
                )
        if product.weight is not None and product.weight not in weights:
            axis = 0 if product.kind == "embedding" else 1  # a table's rows, a layer's outputs
            rounded = (steps or {}).get(product.weight)
            weights[product.weight] = _stored_weight(quantised, node, product.weight, axis, rounded)
        replacements = pairs | weights
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in replacements:
                read = {operand.value for operand in product.operands} | {product.weight}
                if value.name in read:
                    node.replace_input_with(index, replacements[value.name])
    remove_unused_constants(quantised)
    return quantised


def _activation_pair(model: ir.Model, reader: ir.Node, name: str, scale: float) -> ir.Value:
    """Adds a Q/DQ pair for an activation, and returns what to read in its place."""
    value = next(value for value in reader.inputs if value is not None and value.name == name)
    step = add_constant(model, f"{name}_scale", np.array(scale, dtype=np.float32))
    zero = add_constant(model, "int8_zero", np.array(0, dtype=np.int8))
    quantise = _node("QuantizeLinear", [value, step, zero], f"{name}_quantised")
    dequantise = _node("DequantizeLinear", [quantise.outputs[0], step, zero], f"{name}_dequantised")
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(reader, [quantise, dequantise])
    else:  # right behind it, so that it comes before every reader
        model.graph.insert_after(producer, [quantise, dequantise])
    return dequantise.outputs[0]


def _stored_weight(
    model: ir.Model,
    reader: ir.Node,
    name: str,
    channel_axis: int,
    rounded: NDArray[np.int8] | None,
) -> ir.Value:
    """Adds a weight in INT8 and its dequantisation, and returns what to read in its place."""
    nearest, scales = quantise_weight(constant(model, name), channel_axis)
    stored = add_constant(model, f"{name}_int8", nearest if rounded is None else rounded)
    scale = add_constant(model, f"{name}_scale", scales)
    dequantise = _node(
        "DequantizeLinear", [stored, scale], f"{name}_dequantised", axis=channel_axis
    )
    model.graph.insert_before(reader, dequantise)
    return dequantise.outputs[0]


def _node(op_type: str, inputs: list[ir.Value], output: str, **attributes: int) -> ir.Node:
    return ir.node(
        op_type, inputs, attributes or None, outputs=[ir.Value(name=output)], name=output
    )
