"""Moves outliers of activations into the weights, exactly, so that INT8 fits both better.

An activation with a few large channels wastes INT8's steps on all others. Dividing a channel by
a number, and multiplying the weights that read it by the same number, changes nothing in the
product (SmoothQuant, Xiao et al. 2022, section 4). The division is folded into what makes the
activation where that is possible, and is a node of its own elsewhere. All numbers are powers of
two, so that not even rounding changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgebert_export.calibrate import TensorStatistics
from edgebert_export.graph import (
    Product,
    add_constant,
    bias_and_weight,
    constant,
    copy_of,
    set_constant,
)

__all__ = ["STRENGTH", "smooth"]

STRENGTH = 0.85
"""How much of the spread moves into the weights: alpha of the paper's equation 4. Weights have a
scale for each output, activations one in all, so weights bear more (docs/decisions/0015)."""
_LARGEST_EXPONENT = 8


def smooth(
    model: ir.Model,
    products: Sequence[Product],
    statistics: Mapping[str, TensorStatistics],
    *,
    strength: float = STRENGTH,
) -> ir.Model:
    """Returns a copy of an FP32 graph that computes the same with smaller outliers.

    A LayerNorm's weights and biases take the division for the linear layers behind it; whatever
    else reads the LayerNorm, such as the residual sum, reads it multiplied back. The linear layer
    that makes attention's values takes it for the one behind the attention, because the weighted
    sum in between treats every channel alike. Anywhere else, behind a GELU above all, it is a
    multiplication by constants, which TensorRT makes part of the GELU's kernel.

    Args:
        model: The graph.
        products: Its products.
        statistics: What was seen of the activations that linear layers read.
        strength: How much of the spread moves, from 0 to 1.
    """
    smoothed = copy_of(model)
    nodes = {node.name: node for node in smoothed.graph}
    readers: dict[str, list[Product]] = {}
    for product in products:
        if product.kind == "linear":
            readers.setdefault(product.operands[0].value, []).append(product)
    for name, linear in readers.items():
        value = nodes[linear[0].node].inputs[0]
        assert value is not None
        producer = value.producer()
        if producer is None or name not in statistics:
            continue
        divisors = _divisors(smoothed, linear, statistics[name], strength)
        values = _values_behind(value, {product.node for product in linear})
        if producer.op_type == "LayerNormalization" and _has_own_parameters(producer):
            _fold_into_layer_norm(smoothed, producer, value, linear, divisors)
        elif values is not None:
            for constant_name in values:  # bias[channels], weight[in, channels]
                divided = constant(smoothed, constant_name) / divisors
                set_constant(smoothed, constant_name, divided)
        else:
            _divide(smoothed, producer, value, linear, divisors)
        for product in linear:
            weight = str(product.weight)
            set_constant(smoothed, weight, constant(smoothed, weight) * divisors[:, None])
    return smoothed


def _divisors(
    model: ir.Model, linear: Sequence[Product], statistics: TensorStatistics, strength: float
) -> NDArray[np.float32]:
    """Powers of two by which to divide the channels, ``float32[channels]``."""
    activation = statistics.largest_by_channel.astype(np.float64)
    weights = [constant(model, str(product.weight)) for product in linear]
    weight = np.max([np.abs(array).max(axis=1) for array in weights], axis=0)
    usable = (activation > 0) & (weight > 0)
    exponents = np.zeros(len(activation))
    exponents[usable] = strength * np.log2(activation[usable]) - (1 - strength) * np.log2(
        weight[usable]
    )
    exponents[usable] -= np.median(exponents[usable]) if usable.any() else 0.0
    bounded = np.clip(np.rint(exponents), -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    powers: NDArray[np.float32] = np.exp2(bounded).astype(np.float32)
    return powers


def _fold_into_layer_norm(
    model: ir.Model,
    norm: ir.Node,
    value: ir.Value,
    linear: Sequence[Product],
    divisors: NDArray[np.float32],
) -> None:
    for given in norm.inputs[1:]:
        if given is not None:
            name = str(given.name)
            set_constant(model, name, constant(model, name) / divisors)
    nodes = {product.node for product in linear}
    others = [(user, index) for user, index in value.uses() if user.name not in nodes]
    others = [(user, index) for user, index in others if user.op_type != "Shape"]
    if not others:
        return
    factors = add_constant(model, f"{value.name}_smoothing", divisors)
    restored = ir.Value(name=f"{value.name}_restored")
    multiply = ir.node("Mul", [value, factors], outputs=[restored], name=restored.name)
    model.graph.insert_after(norm, multiply)
    for user, index in others:
        user.replace_input_with(index, restored)


def _has_own_parameters(norm: ir.Node) -> bool:
    parameters = [given for given in norm.inputs[1:] if given is not None]
    return all(given.is_initializer() and len(given.uses()) == 1 for given in parameters)


def _divide(
    model: ir.Model,
    producer: ir.Node,
    value: ir.Value,
    linear: Sequence[Product],
    divisors: NDArray[np.float32],
) -> None:
    factors = add_constant(model, f"{value.name}_smoothing", 1 / divisors)
    divided = ir.Value(name=f"{value.name}_smoothed")
    multiply = ir.node("Mul", [value, factors], outputs=[divided], name=divided.name)
    model.graph.insert_after(producer, multiply)
    names = {product.node for product in linear}
    for user, index in tuple(value.uses()):
        if user.name in names:
            user.replace_input_with(index, divided)


def _values_behind(context: ir.Value, readers: set[str]) -> tuple[str, str] | None:
    """Names of the bias and the weight that make the values which attention sums up.

    ``None`` if ``context`` is made otherwise, or if something else than ``readers`` needs it or
    what it is made of.
    """
    node = context.producer()
    for expected in ("Reshape", "Transpose", "MatMul", "Transpose", "Reshape", "Add"):
        if node is None or node.op_type != expected:
            return None
        users = {str(user.name) for user in node.successors() if user.op_type != "Shape"}
        if users - readers:
            return None
        readers = {str(node.name)}
        if expected == "Add":
            break
        value = node.inputs[1 if expected == "MatMul" else 0]
        node = value.producer() if value is not None else None
    return bias_and_weight(node)
