"""Rounds the weights of linear layers so that the layers' results change least (GPTQ).

Rounding each weight to the nearest step makes errors that add up along a row of products. What
one input channel's rounding costs can be made up for in the channels that are not rounded yet,
as far as the channels move together on the calibration texts (Frantar et al. 2022, "GPTQ",
algorithm 1, with the order by size of its reference implementation). The scales stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgebert_export.calibrate import second_moments
from edgebert_export.graph import Product, constant
from edgebert_export.qdq import LEVELS, quantise_weight
from edgebert_runtime.encoder import Encoded, TextEncoder

__all__ = ["round_layers", "round_weight"]

_DAMPING = 0.01
"""What is added to the diagonal, of its mean: the paper's section 3.3, step 3."""
_BLOCK = 64
"""Channels after which the error is passed on to all that are left."""
_MOMENT_BYTES = 2**28
"""Second moments that are in memory at a time; for more, the texts run once more."""


def round_layers(
    model: ir.Model, products: Sequence[Product], rows: Sequence[Encoded], encoder: TextEncoder
) -> dict[str, NDArray[np.int8]]:
    """Rounds the weights of linear layers with a look at what the layers read.

    Args:
        model: An FP32 graph.
        products: Its layers; those that are not linear are passed over.
        rows: Tokenised calibration texts.
        encoder: Pads them.

    Returns:
        By the weight's name, ``int8[in, out]`` steps of the scales of ``quantise_weight``.
    """
    found: dict[str, NDArray[np.int8]] = {}
    for group in _groups(model, [product for product in products if product.kind == "linear"]):
        operands = [operand for product in group for operand in product.operands]
        moments = second_moments(model, operands, rows, encoder)
        for product in group:
            weight = constant(model, str(product.weight))
            found[str(product.weight)] = round_weight(weight, moments[product.operands[0].value])
    return found


def round_weight(weight: NDArray[np.float32], moments: NDArray[np.float32]) -> NDArray[np.int8]:
    """Rounds a matrix to steps of the scales that ``quantise_weight`` gives its columns.

    No column's result is further from the exact one, over the texts that ``moments`` are from,
    than it is with every weight rounded to the nearest step.

    Args:
        weight: ``float32[in, out]``.
        moments: Sum over tokens of the products of each two input channels, ``float32[in, in]``.

    Returns:
        ``int8[in, out]`` from -127 to 127.
    """
    quantised = quantise_weight(weight, 1)
    nearest, scales = quantised.steps, quantised.scales
    if not moments.any():
        return nearest
    # The largest channels first: their errors have the most others left to be made up in.
    order = np.argsort(-moments.diagonal(), kind="stable")
    upper = _inverse_factor(moments[np.ix_(order, order)])
    left = weight[order].astype(np.float64)
    steps = np.empty(weight.shape, dtype=np.int8)
    for start in range(0, len(left), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(left)))
        errors = np.empty_like(left[block])
        for row in range(block.start, block.stop):
            rounded = np.clip(np.rint(left[row] / scales), -LEVELS, LEVELS)
            steps[order[row]] = rounded
            error = (left[row] - rounded * scales) / upper[row, row]
            left[row + 1 : block.stop] -= np.outer(upper[row, row + 1 : block.stop], error)
            errors[row - start] = error
        left[block.stop :] -= upper[block, block.stop :].T @ errors
    better = _harm(weight, steps, scales, moments) < _harm(weight, nearest, scales, moments)
    return np.where(better, steps, nearest)


def _inverse_factor(moments: NDArray[np.float32]) -> NDArray[np.float64]:
    """Upper Cholesky factor of the inverse of the damped moments, ``float64[in, in]``."""
    damped = moments.astype(np.float64)
    damped[np.diag_indices_from(damped)] += _DAMPING * damped.diagonal().mean()
    factor: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor


def _harm(
    weight: NDArray[np.float32],
    steps: NDArray[np.int8],
    scales: NDArray[np.float32],
    moments: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Squared error of each column's result, summed over the tokens, ``float64[out]``."""
    error = weight.astype(np.float64) - steps * scales.astype(np.float64)
    harm: NDArray[np.float64] = (error * (moments.astype(np.float64) @ error)).sum(axis=0)
    return harm


def _groups(model: ir.Model, products: Sequence[Product]) -> Iterator[list[Product]]:
    """Yields layers whose second moments are in memory together; one reads them at least."""
    group: list[Product] = []
    read: dict[str, int] = {}
    for product in products:
        name, channels = product.operands[0].value, len(constant(model, str(product.weight)))
        needed = 4 * channels**2
        if group and name not in read and sum(read.values()) + needed > _MOMENT_BYTES:
            yield group
            group, read = [], {}
        group.append(product)
        read[name] = needed
    if group:
        yield group
