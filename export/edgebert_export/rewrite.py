"""Rewrites an FP32 graph so that it computes the same with less work: ir.Model in, ir.Model out.

These rewrites are exact but for rounding, and good for every backend. What does not look as
expected stays as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgebert_export.graph import (
    Product,
    add_constant,
    constant,
    copy_of,
    find_products,
    remove_unused_constants,
    set_constant,
)

__all__ = ["fold_token_types", "keep_first_token"]

_BY_POSITION = frozenset(
    {"Add", "Div", "Erf", "Gelu", "LayerNormalization", "MatMul", "Mul", "Pow", "Relu", "Tanh"}
)
"""Operators that a last layer has behind its attention, each position computed for itself."""


def keep_first_token(model: ir.Model) -> ir.Model:
    """Returns a copy whose last layer computes the first position alone, all that is read of it.

    Its keys and values stay whole; queries, residual sums and the feed-forward shrink from
    ``[batch, seq, width]`` to ``[batch, 1, width]``. The graph stays as it is if anything but the
    first position of the last layer is read.
    """
    rewritten = copy_of(model)
    nodes = {node.name: node for node in rewritten.graph}
    products = find_products(rewritten)
    attention = [product for product in products if product.kind == "attention"]
    if len(attention) < 2:
        return model
    scores, context = (nodes[product.node] for product in attention[-2:])
    query = _linear_behind(scores.inputs[0], nodes, products)
    if query is None or not attention[-2].name.endswith(".scores"):
        return model
    layer_input = query.inputs[0]
    assert layer_input is not None
    residual = [user for user in layer_input.consumers() if user.op_type == "Add"]
    if len(residual) != 1 or not _leads_to_first(context, residual[0]):
        return model
    starts, ends, axes = (
        add_constant(rewritten, f"first_token_{name}", np.array([number], dtype=np.int64))
        for name, number in (("starts", 0), ("ends", 1), ("axes", 1))
    )
    first = ir.Value(name=f"{layer_input.name}_first", type=layer_input.type)
    cut = ir.node("Slice", [layer_input, starts, ends, axes], outputs=[first], name=first.name)
    producer = layer_input.producer()
    assert producer is not None
    rewritten.graph.insert_after(producer, cut)
    for reader in (query, residual[0]):
        for index, value in enumerate(reader.inputs):
            if value is layer_input:
                reader.replace_input_with(index, first)
    return rewritten


def _linear_behind(
    value: ir.Value | None, nodes: dict[str | None, ir.Node], products: tuple[Product, ...]
) -> ir.Node | None:
    """The product that makes the queries of an attention."""
    linear = {product.node for product in products if product.kind == "linear"}
    node = value.producer() if value is not None else None
    while node is not None and node.name not in linear:
        if node.op_type not in {"Add", "Div", "Mul", "Reshape", "Transpose"}:
            return None
        made = [v for v in node.inputs if v is not None and not v.is_initializer()]
        node = made[0].producer() if made else None
    return node


def _leads_to_first(context: ir.Node, residual: ir.Node) -> bool:
    """Whether all that is made of an attention's result keeps to its position, up to the first.

    The way from the product to the residual sum is merging the heads and a linear layer.
    """
    waiting, seen, ends = [context], {context}, 0
    while waiting:
        for user in waiting.pop().successors():
            if user in seen or user.op_type == "Shape":
                continue
            seen.add(user)
            if user.op_type == "Gather" and _is_first(user):
                ends += 1
                continue
            merging = user.op_type in {"Reshape", "Transpose"} and residual not in seen
            if not merging and user.op_type not in _BY_POSITION:
                return False
            waiting.append(user)
    return ends == 1 and residual in seen


def _is_first(gather: ir.Node) -> bool:
    index = gather.inputs[1]
    axis = gather.attributes["axis"].as_int() if "axis" in gather.attributes else 0
    return (
        axis == 1
        and index is not None
        and index.const_value is not None
        and index.const_value.numpy().tolist() == 0
    )


def fold_token_types(model: ir.Model) -> ir.Model:
    """Returns a copy without the input ``token_type_ids``, all of which are 0 for single texts.

    The first row of the table that they look up is added to every row of the table of positions.
    """
    rewritten = copy_of(model)
    inputs = rewritten.graph.inputs
    given = next((value for value in inputs if value.name == "token_type_ids"), None)
    look_up = _only(given)
    total = _only(look_up.outputs[0]) if look_up is not None else None
    if given is None or look_up is None or look_up.op_type != "Gather" or total is None:
        return model
    table = look_up.inputs[0]
    others = [value for value in total.inputs if value is not look_up.outputs[0]]
    positions = _position_table(rewritten)
    if table is None or not table.is_initializer() or positions is None:
        return model
    if total.op_type != "Add" or len(others) != 1 or others[0] is None:
        return model
    summed = constant(rewritten, str(positions.name)) + constant(rewritten, str(table.name))[0]
    total.outputs[0].replace_all_uses_with(others[0])
    rewritten.graph.remove([total, look_up], safe=True)
    set_constant(rewritten, str(positions.name), summed)
    inputs.remove(given)
    remove_unused_constants(rewritten)
    return rewritten


def _position_table(model: ir.Model) -> ir.Value | None:
    """The table that is looked up by position, if nothing else reads it."""
    for product in find_products(model):
        if product.kind == "embedding" and product.name.endswith("position_embeddings"):
            value = model.graph.initializers[str(product.weight)]
            return value if len(value.uses()) == 1 else None
    return None


def _only(value: ir.Value | None) -> ir.Node | None:
    """What reads a value, if it is one node."""
    readers = list(value.uses()) if value is not None else []
    return readers[0][0] if len(readers) == 1 else None
