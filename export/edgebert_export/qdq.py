"""Puts explicit Q/DQ into a graph, at the inputs of products only: FP32 graph in, INT8 graph out.

A product's activation is quantised and dequantised right before it; products that read the same
activation share one pair. Everything is symmetric and signed, which is all that TensorRT takes.
Results are not quantised: TensorRT does not need it, and BERT's LayerNorm and residual sums cannot
bear it.

A linear layer's weights have a scale for each output, written as two factors: a power of two for
all of them, with which they are dequantised, and the rest as a multiplication behind the product.
TensorRT for RTX applies a single scale inside the product, before its 32-bit sum is stored as
FP16; scales by output it would apply to what was stored, which had overflowed by then
(docs/decisions/0013).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

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
from edgebert_export.quantise import ProductKind

__all__ = [
    "LEVELS",
    "QuantisedWeight",
    "activation_scale",
    "insert_qdq",
    "quantise_weight",
]

LEVELS = 127
"""Largest magnitude of a symmetric INT8 value; -128 is not used."""

_SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)
_SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
_LARGEST_SCALE = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class QuantisedWeight:
    """A matrix in INT8: ``steps * unit * factors``, the factors along one axis.

    Attributes:
        steps: ``int8[m, n]`` from -127 to 127.
        unit: A power of two that FP16 can hold.
        factors: ``float16`` of the channel axis' length, from 2 ** -14 to 1 where ``unit`` is
            that of the matrix.
    """

    steps: NDArray[np.int8]
    unit: float
    factors: NDArray[np.float16]

    @property
    def scales(self) -> NDArray[np.float32]:
        """The scale of each channel, ``float32``; exact."""
        return np.float32(self.unit) * self.factors.astype(np.float32)


def activation_scale(threshold: float) -> float:
    """Returns the scale that maps magnitudes up to ``threshold`` to ``LEVELS`` steps.

    It is a number that FP16 can hold, above 0 even if every activation was 0.
    """
    if threshold == 0:
        return _SMALLEST_NORMAL
    return float(np.float16(np.clip(threshold / LEVELS, _SMALLEST_SCALE, _LARGEST_SCALE)))


def quantise_weight(weight: NDArray[np.float32], channel_axis: int) -> QuantisedWeight:
    """Quantises a matrix with one scale for each entry of ``channel_axis``.

    Scales are rounded up, so that nothing is clipped. None is less than 2 ** -14 of the largest, so
    that each is a normal number of FP16 times the unit; what that adds to the error of the smallest
    channels is nothing beside the error of the largest.

    Args:
        weight: ``float32[m, n]``.
        channel_axis: 0, the rows of a table, whose unit is 1; or 1, the outputs of a linear layer.
    """
    largest = np.abs(weight).max(axis=1 - channel_axis)
    exact = largest.astype(np.float64) / LEVELS
    unit = _power_of_two(float(exact.max())) if channel_axis == 1 else 1.0
    factors = (exact / unit).astype(np.float16)
    below = factors.astype(np.float64) * unit < exact
    factors = np.where(below, np.nextafter(factors, np.float16(np.inf)), factors)
    factors = np.maximum(factors, np.float16(_SMALLEST_NORMAL))
    scales = (factors.astype(np.float64) * unit).astype(np.float32)
    steps = np.rint(weight / np.expand_dims(scales, 1 - channel_axis))
    return QuantisedWeight(np.clip(steps, -LEVELS, LEVELS).astype(np.int8), unit, factors)


def _power_of_two(number: float) -> float:
    """The smallest power of two from ``number`` on that is a normal number of FP16."""
    mantissa, exponent = np.frexp(max(number, _SMALLEST_NORMAL))
    return float(np.ldexp(1.0, exponent - (mantissa == 0.5)))


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
        steps: By name, weights of linear layers that are rounded already, to steps of the scales
            that ``quantise_weight`` gives them; others are rounded to the nearest step.
    """
    quantised = copy_of(model)
    nodes = {node.name: node for node in quantised.graph}
    pairs: dict[str, ir.Value] = {}
    for product in products:
        node = nodes[product.node]
        for operand in product.operands:
            if operand.value not in pairs:
                pairs[operand.value] = _activation_pair(
                    quantised, node, operand.value, scales[operand.value]
                )
        replacements = {operand.value: pairs[operand.value] for operand in product.operands}
        if product.weight is not None:
            name = product.weight
            axis = 0 if product.kind == "embedding" else 1
            weight = quantise_weight(constant(quantised, name), axis)
            if steps is not None and name in steps:
                weight = replace(weight, steps=steps[name])
            replacements[name] = _dequantised(quantised, node, name, weight, product.kind)
            if product.kind == "linear":
                _scale_outputs(quantised, node, name, weight)
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in replacements:
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


def _dequantised(
    model: ir.Model, reader: ir.Node, name: str, weight: QuantisedWeight, kind: ProductKind
) -> ir.Value:
    """Adds a weight in INT8 and its dequantisation, and returns what to read in its place."""
    stored = add_constant(model, f"{name}_int8", weight.steps)
    if kind == "embedding":
        scale = add_constant(model, f"{name}_scale", weight.scales)
        node = _node("DequantizeLinear", [stored, scale], f"{name}_dequantised", axis=0)
    else:
        scale = add_constant(model, f"{name}_scale", np.array(weight.unit, dtype=np.float32))
        node = _node("DequantizeLinear", [stored, scale], f"{name}_dequantised")
    model.graph.insert_before(reader, node)
    return node.outputs[0]


def _scale_outputs(model: ir.Model, product: ir.Node, name: str, weight: QuantisedWeight) -> None:
    """Multiplies the results of a linear layer's product by what the unit left of its scales."""
    result = product.outputs[0]
    factors = add_constant(model, f"{name}_factors", weight.factors.astype(np.float32))
    multiply = _node("Mul", [result, factors], str(result.name))
    multiply.outputs[0].type, multiply.outputs[0].shape = result.type, result.shape
    result.name = f"{result.name}_unscaled"
    result.replace_all_uses_with(multiply.outputs[0], replace_graph_outputs=True)
    multiply.replace_input_with(0, result)
    model.graph.insert_after(product, multiply)


def _node(op_type: str, inputs: list[ir.Value], output: str, **attributes: int) -> ir.Node:
    return ir.node(
        op_type, inputs, attributes or None, outputs=[ir.Value(name=output)], name=output
    )
