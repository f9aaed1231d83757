"""Writes attention as TensorRT fuses it best: FP32 graph in, FP32 graph out, the same numbers.

Queries are scaled before their product with the keys, and queries, keys and values are one product
where they read the same activation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from edgebert_export.graph import (
    Product,
    add_constant,
    bias_and_weight,
    constant,
    copy_of,
    find_products,
    remove_unused_constants,
    set_constant,
)

__all__ = ["Attention", "find_attentions", "merge_projections", "scale_queries"]

_FUSED_HEAD_SIZES = (16, 32, 64)
"""Sizes of a head with which TensorRT for RTX 1.7 fuses an attention in INT8."""


@dataclass(frozen=True)
class Attention:
    """A transformer layer's attention.

    Attributes:
        name: Path of its PyTorch module.
        products: Queries by keys, probabilities by values, and the linear layer that reads their
            result. TensorRT for RTX 1.7 fuses an attention only if all three are in INT8, or
            neither of the first two.
        head_size: Channels of a head; ``None`` where the graph does not tell.
        merged: Whether queries and keys come from one product, so that there are as many of both.
    """

    name: str
    products: tuple[Product, ...]
    head_size: int | None
    merged: bool

    @property
    def unfused_in_int8(self) -> str | None:
        """Why TensorRT would not fuse it if it was in INT8; ``None`` if it would."""
        if self.head_size not in _FUSED_HEAD_SIZES:
            sizes = ", ".join(map(str, _FUSED_HEAD_SIZES))
            return f"its heads are of {self.head_size} channels, and only {sizes} are fused"
        if len(self.products) < len(("scores", "context", "output")):
            return "no linear layer reads its result"
        return None if self.merged else "its queries are of other tokens than its keys"


_HEADS_FIRST, _HEADS_FIRST_TOKENS_LAST = (0, 2, 1, 3), (0, 2, 3, 1)


class _Projection(NamedTuple):
    """A linear layer whose outputs are split into heads, and the nodes from one to the other."""

    product: Product
    nodes: tuple[ir.Node, ir.Node, ir.Node, ir.Node]
    bias: ir.Value
    heads: tuple[int, int]

    @property
    def tokens_last(self) -> bool:
        return _permutation(self.nodes[-1]) == _HEADS_FIRST_TOKENS_LAST


def find_attentions(model: ir.Model, products: Sequence[Product]) -> list[Attention]:
    """Finds the attentions of a graph, in its order.

    Args:
        model: The graph.
        products: All of its products.
    """
    shaped = copy_of(model)
    ShapeInferencePass()(shaped)
    nodes = {node.name: node for node in shaped.graph}
    linear = {product.node: product for product in products if product.kind == "linear"}
    found = []
    attention = [product for product in products if product.kind == "attention"]
    for scores, context in itertools.pairwise(attention):
        if not (scores.name.endswith(".scores") and context.name.endswith(".context")):
            continue
        readers = _behind_moves(nodes[context.node])
        output = [linear[name] for name in readers if name in linear]
        queries, keys = nodes[scores.node].inputs
        assert queries is not None
        size = queries.shape[-1] if queries.shape is not None else None
        found.append(
            Attention(
                scores.name.removesuffix(".scores"),
                (scores, context, *output),
                size if isinstance(size, int) else None,
                _source(queries) is _source(keys),
            )
        )
    return found


def _source(value: ir.Value | None) -> ir.Node | None:
    """The product that a value comes from, through whatever moves, scales or adds to it."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in {
        "Add",
        "Div",
        "Gather",
        "Mul",
        "Reshape",
        "Transpose",
    }:
        made = [v.producer() for v in node.inputs if v is not None and not v.is_initializer()]
        node = made[0] if made else None
    return node


def _behind_moves(node: ir.Node) -> list[str]:
    """Names of the nodes that read a node's result, moved around or not."""
    found = []
    for user in node.successors():
        if user.op_type in {"Reshape", "Transpose"}:
            found += _behind_moves(user)
        elif user.op_type != "Shape":
            found.append(str(user.name))
    return found


def scale_queries(model: ir.Model, products: Sequence[Product]) -> ir.Model:
    """Returns a copy in which attention's division by the root of the head size is gone.

    The queries' weights and biases are divided instead, which gives the same scores. TensorRT
    wants queries scaled before their product with the keys, for its fused attention and so that
    FP16 does not overflow. Where a graph does it in a way that is not known here, it stays.
    """
    scaled = copy_of(model)
    nodes = {node.name: node for node in scaled.graph}
    for product in products:
        if product.kind == "attention":
            _scale_queries_of(scaled, nodes[product.node])
    remove_unused_constants(scaled)
    return scaled


def _scale_queries_of(model: ir.Model, scores: ir.Node) -> None:
    # DistilBERT divides the queries, BERT the scores.
    before, after = scores.inputs[0], [n for n in scores.successors() if n.op_type != "Shape"]
    assert before is not None
    candidates = [before.producer(), *(after if len(after) == 1 else [])]
    division = next((n for n in candidates if n is not None and n.op_type == "Div"), None)
    linear = _linear_behind(before)
    if division is None or linear is None:
        return
    numerator, divisor = division.inputs
    if numerator is None or divisor is None or divisor.const_value is None:
        return
    number = divisor.const_value.numpy()
    if number.size != 1:
        return
    for name in linear:
        set_constant(model, name, constant(model, name) / number.astype(np.float32).reshape(()))
    division.outputs[0].replace_all_uses_with(numerator)
    model.graph.remove(division, safe=True)


def _linear_behind(queries: ir.Value) -> tuple[str, str] | None:
    """Names of the bias and the weight that make the queries, if they make nothing else."""
    node = queries.producer()
    while node is not None and node.op_type in {"Div", "Transpose", "Reshape"}:
        assert node.inputs[0] is not None
        node = node.inputs[0].producer()
    return bias_and_weight(node)


def merge_projections(model: ir.Model) -> ir.Model:
    """Returns a copy in which queries, keys and values are one product where they can be.

    Linear layers that read the same activation, and whose outputs are split into the same heads,
    become one with all of their outputs; what reads the heads reads them as before. The product is
    named after all of them, ``...self.query+key+value``. Where a last layer computes the first
    token alone, its queries read another activation and stay apart.
    """
    merged = copy_of(model)
    nodes = {node.name: node for node in merged.graph}
    groups: dict[str, list[_Projection]] = {}
    for product in find_products(merged):
        projection = _projection(product, nodes[product.node])
        if projection is not None:
            groups.setdefault(product.operands[0].value, []).append(projection)
    for group in groups.values():
        if len(group) > 1 and len({projection.heads for projection in group}) == 1:
            _merge(merged, group)
    remove_unused_constants(merged)
    RemoveUnusedNodesPass()(merged)
    return merged


def _projection(product: Product, node: ir.Node) -> _Projection | None:
    """Follows a linear layer to its heads; ``None`` if it does not lead there, or elsewhere too."""
    if product.kind != "linear":
        return None
    chain = [node]
    for expected in ("Add", "Reshape", "Transpose"):
        users = list(chain[-1].outputs[0].uses())
        if len(users) != 1 or users[0][0].op_type != expected:
            return None
        chain.append(users[0][0])
    matmul, add, reshape, transpose = chain
    biases = [value for value in add.inputs if value is not None and value.is_initializer()]
    heads = _heads(reshape)
    if len(biases) != 1 or heads is None:
        return None
    if _permutation(transpose) not in {_HEADS_FIRST, _HEADS_FIRST_TOKENS_LAST}:
        return None
    return _Projection(product, (matmul, add, reshape, transpose), biases[0], heads)


def _heads(reshape: ir.Node) -> tuple[int, int] | None:
    """How many heads a node makes of channels, and their size."""
    shape = reshape.inputs[1]
    concat = shape.producer() if shape is not None else None
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 4:
        return None
    sizes = [value.const_value for value in concat.inputs[2:] if value is not None]
    if len(sizes) != 2 or any(size is None or size.size != 1 for size in sizes):
        return None
    heads, size = (int(np.ravel(size.numpy())[0]) for size in sizes if size is not None)
    return heads, size


def _permutation(transpose: ir.Node) -> tuple[int, ...]:
    return tuple(transpose.attributes["perm"].as_ints())


def _merge(model: ir.Model, group: Sequence[_Projection]) -> None:
    """Puts one product in the place of several, and hands its parts to what read them."""
    first = group[0].nodes[0]
    scope = str(first.name).removesuffix("/MatMul").rpartition("/")[0]
    parts = [str(p.nodes[0].name).removesuffix("/MatMul").rpartition("/")[2] for p in group]
    name = f"{scope}/{'+'.join(parts)}"
    weights = [constant(model, str(projection.product.weight)) for projection in group]
    biases = [constant(model, str(projection.bias.name)) for projection in group]
    weight = add_constant(model, f"{name}.weight", np.concatenate(weights, axis=1))
    bias = add_constant(model, f"{name}.bias", np.concatenate(biases))
    shape = np.array([0, 0, len(group), *group[0].heads], dtype=np.int64)
    made: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value | None], label: str, **attributes: object) -> ir.Value:
        node = ir.node(op, inputs, attributes or None, name=f"{name}/{label}")  # type: ignore[arg-type]
        node.outputs[0].name = f"{name}/{label}_output"
        made.append(node)
        return node.outputs[0]

    product = add("MatMul", [first.inputs[0], weight], "MatMul")
    summed = add("Add", [product, bias], "Add")
    shaped = add("Reshape", [summed, add_constant(model, f"{name}.shape", shape)], "Reshape")
    apart = add("Transpose", [shaped], "Transpose", perm=[2, 0, 3, 1, 4])
    for index, projection in enumerate(group):
        which = add_constant(model, f"projection_{index}", np.array(index, dtype=np.int64))
        part = add("Gather", [apart, which], f"part_{index}", axis=0)
        if projection.tokens_last:
            part = add("Transpose", [part], f"part_{index}_transposed", perm=[0, 1, 3, 2])
        result = projection.nodes[-1].outputs[0]
        part.type, part.shape = result.type, result.shape
        result_name = result.name
        result.name = f"{result_name}_apart"
        result.replace_all_uses_with(part)
        part.name = result_name
    model.graph.insert_before(first, made)
    for projection in group:
        model.graph.remove(list(reversed(projection.nodes)), safe=True)
