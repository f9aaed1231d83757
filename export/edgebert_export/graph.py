"""Opens and writes ONNX graphs safely, and finds the matrix products in them.

Graphs are ``onnx_ir.Model`` objects. What changes one works on a copy: ``copy_of`` shares the
weights, so a copy costs next to nothing.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from edgebert_export.errors import ExportError, ModelError
from edgebert_export.quantise import ProductKind
from edgebert_runtime.onnx_session import OnnxSession

__all__ = [
    "OPSET",
    "Model",
    "Operand",
    "Product",
    "add_constant",
    "bias_and_weight",
    "constant",
    "copy_of",
    "find_products",
    "open_graph",
    "open_session",
    "release_memory",
    "remove_unused_constants",
    "set_constant",
    "to_bytes",
    "vocabulary_size",
    "write_graph",
]

OPSET = 20
"""Of every model that is written: what TensorRT 10's parsers are documented to take ends there, and
Q/DQ in FP16 is legal from 19 on."""
_FEWEST_CHANNELS = 16
"""A product with fewer inputs or outputs is no faster in INT8: kernels compute 16 at a time."""
_NORMS_OF_A_LAYER = 2
_QUANTISED = ("quantize", "qlinear", "qattention", "qgemm", "integer", "nbits")
"""What is in the names of operators that work on quantised numbers, in lower case."""
_CPU_PRODUCTS = (b"MatMulInteger", b"DynamicQuantizeMatMul", b"MatMulNBits")
_MOST_BYTES = 2**31 - 1  # of a protobuf message
_SHARED_BYTES = 1024
"""Smaller constants stay in the graph that a session gets, where shapes are computed from them."""

Model: TypeAlias = bytes | ir.Model
"""A model that can be run: an ONNX file's bytes, or a graph."""


@dataclass(frozen=True)
class Operand:
    """An activation that goes into a product.

    Attributes:
        value: Its name in the graph.
        token_axis: The axis along which its tokens lie, counted from the end; what a padding
            position holds there is not looked at. A tensor with fewer than three axes has one
            row for each text and no such axis.
        over_keys: Whether it is attention's probabilities, ``[batch, heads, queries, keys]``, in
            which padding lies along two axes.
    """

    value: str
    token_axis: int
    over_keys: bool = False


@dataclass(frozen=True)
class Product:
    """A node whose operands can be quantised.

    Attributes:
        name: Path of the PyTorch module it was exported from, unique in the graph.
        kind: ``linear`` (an activation by a weight), ``attention`` (two activations), or
            ``embedding`` (the look-up in a table).
        node: Name of its node.
        operands: The activations among its inputs.
        weight: Name of its constant input, if it has one: ``float32[in, out]`` of a linear layer,
            ``float32[rows, width]`` of a table.
        head: Whether it is a linear layer behind the last transformer layer, or one with fewer than
            16 inputs or outputs: INT8 costs kernels there, and saves next to nothing.
    """

    name: str
    kind: ProductKind
    node: str
    operands: tuple[Operand, ...]
    weight: str | None
    head: bool = False


def open_graph(path: Path) -> ir.Model:
    """Reads an FP32 model; weights in external files are checked before they are opened.

    Raises:
        ModelError: It is not ONNX, its external data is missing or outside its directory, or it
            is quantised or of another precision already.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as exc:  # protobuf raises errors of its own
        raise ModelError(f"{path} is not an ONNX model: {exc}") from exc
    attributes = [attribute for node in proto.graph.node for attribute in node.attribute]
    constants = [attribute.t for attribute in attributes if attribute.HasField("t")]
    for tensor in (*proto.graph.initializer, *constants):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path)
    operators = {node.op_type for node in proto.graph.node}
    quantised = sorted(
        name for name in operators if any(part in name.lower() for part in _QUANTISED)
    )
    if quantised:
        raise ModelError(
            f"{path} is quantised already (it holds {quantised[0]}); give the FP32 model"
        )
    known = {onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64}
    for tensor in proto.graph.initializer:
        if tensor.data_type not in known | {onnx.TensorProto.BOOL}:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            raise ModelError(f"{path}: {tensor.name} is {kind} already; give the FP32 model")
    opset = next((entry.version for entry in proto.opset_import if not entry.domain), 0)
    if opset != OPSET:
        raise ModelError(f"{path} has opset {opset}; export it with {OPSET}")
    del proto  # a large model is in memory once, not twice
    try:
        onnx.checker.check_model(str(path))
        model: ir.Model = ir.load(path)
        # One kind of constant, and one kind of linear layer, for what follows to look at.
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        ir.external_data.load_to_model(model)  # what is written is one file
        for name, value in model.graph.initializers.items():  # arrays: a proto copies at each look
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy(), name=name)
    except (ValidationError, ValueError, OSError) as exc:
        raise ModelError(f"{path} is damaged: {str(exc).splitlines()[0]}") from exc
    _unshare(model)
    _split_gemms(model)
    _forget_shapes(model)
    release_memory()
    return model


def _forget_shapes(model: ir.Model) -> None:
    """Forgets the exporter's notes of inner shapes: rewrites change some of them.

    ONNX Runtime infers shapes itself, and plans its memory by such notes where there are any.
    """
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = None


def release_memory() -> None:
    """Gives freed memory back to the system.

    Graphs are cyclic, so the collector frees them when it pleases, and glibc keeps what was freed
    in small pieces; a gigabyte, after a large model was read or a session closed.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _unshare(model: ir.Model) -> None:
    """Gives each reader of a matrix its own: a product's weight is then nobody else's affair.

    The exporter stores equal parameters once, with ``Identity`` nodes for the others.
    """
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Identity" else None
        if source is None or not source.is_initializer():
            continue
        result = node.outputs[0]
        name = str(result.name)
        result.name = f"{name}_shared"
        result.replace_all_uses_with(add_constant(model, name, constant(model, str(source.name))))
        model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        for count, (user, index) in enumerate(tuple(value.uses())[1:] if _is_matrix(value) else ()):
            own = add_constant(model, f"{name}_copy{count}", constant(model, name))
            user.replace_input_with(index, own)
    remove_unused_constants(model)


def _split_gemms(model: ir.Model) -> None:
    """Turns each ``Gemm`` by a constant into a ``MatMul`` and an ``Add``, as all others are."""
    for node in list(model.graph):
        if node.op_type != "Gemm" or not _is_plain_gemm(node):
            continue
        activation, weight, bias = (*node.inputs, None)[:3]
        assert activation is not None and weight is not None
        if _integer(node, "transB", 0):
            array = np.ascontiguousarray(constant(model, str(weight.name)).T)
            weight = add_constant(model, f"{weight.name}_transposed", array)
        result = node.outputs[0]
        made = [ir.node("MatMul", [activation, weight], name=node.name)]
        if bias is not None:
            made[0].outputs[0].name = f"{result.name}_product"
            made.append(ir.node("Add", [made[0].outputs[0], bias], name=f"{node.name}_bias"))
        name, last = result.name, made[-1].outputs[0]
        last.type, last.shape = result.type, result.shape
        model.graph.insert_before(node, made)
        result.replace_all_uses_with(last, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        last.name = name
    remove_unused_constants(model)


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if "\0" in location:
        raise ModelError(f"{path}: the weight {tensor.name} lies in {location!r}, no file's name")
    root = path.parent.resolve()
    file = root / location
    if not location or not file.resolve().is_relative_to(root) or Path(location).is_absolute():
        raise ModelError(
            f"{path}: the weight {tensor.name} lies in {location!r}, outside the model's directory"
        )
    if file.is_symlink() or not file.is_file():
        raise ModelError(f"{path}: there is no file {location!r} beside it, for {tensor.name}")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError as exc:
        raise ModelError(f"{path}: {tensor.name}: {exc}") from exc
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        raise ModelError(f"{path}: {location!r} is too short for the weight {tensor.name}")


def copy_of(model: ir.Model) -> ir.Model:
    """Returns a copy whose graph can be changed; the weights are shared."""
    return model.clone()


def to_bytes(model: ir.Model) -> bytes:
    """Serialises a graph; the same graph gives the same bytes.

    Raises:
        ExportError: It is larger than 2 GB.
    """
    proto = ir.to_proto(model)
    if proto.ByteSize() > _MOST_BYTES:
        raise ExportError("the model is larger than 2 GB, more than one ONNX file can hold")
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def open_session(model: Model) -> OnnxSession:
    """Opens a session over a graph, which shares the graph's weights, or over a model's bytes.

    A graph, and a model without a CPU's 8-bit products, is computed as it is written.
    """
    if isinstance(model, bytes):
        return OnnxSession(model, simulated=not any(name in model for name in _CPU_PRODUCTS))
    bare, weights = copy_of(model), {}
    for name, value in bare.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes >= _SHARED_BYTES:
            weights[name] = tensor.numpy()
            # A place-holder: there is no such file.
            value.const_value = ir.ExternalTensor(
                "weights",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
            )
    return OnnxSession(ir.to_proto(bare).SerializeToString(), weights=weights, simulated=True)


def write_graph(model: ir.Model, path: Path) -> None:
    """Writes a graph as one file, and checks it with ``onnx.checker`` and shape inference.

    Raises:
        ExportError: It is larger than 2 GB, or not valid ONNX: a fault of ours.
    """
    path.write_bytes(to_bytes(model))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (ValidationError, InferenceError) as exc:
        path.unlink()
        raise ExportError(f"{path.name} is not valid ONNX: {exc}") from exc


def add_constant(model: ir.Model, name: str, array: NDArray[Any]) -> ir.Value:
    """Adds a constant to a graph; returns the one of that name if it is there.

    Raises:
        ModelError: The graph has a constant of that name, of another value.
    """
    if name in model.graph.initializers:
        if not np.array_equal(constant(model, name), array):
            raise ModelError(f"the model has a constant {name!r} of its own; export it anew")
        return model.graph.initializers[name]
    value = ir.Value(
        name=name,
        const_value=ir.tensor(array, name=name),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
    )
    model.graph.register_initializer(value)
    return value


def constant(model: ir.Model, name: str) -> NDArray[Any]:
    """Returns a constant's value."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    array: NDArray[Any] = tensor.numpy()
    return array


def set_constant(model: ir.Model, name: str, array: NDArray[Any]) -> None:
    """Changes a constant's value, and its type with it."""
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(array, name=name)
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))


def remove_unused_constants(model: ir.Model) -> None:
    """Removes the constants that nothing reads any more."""
    constants = model.graph.initializers
    for name in [name for name, value in constants.items() if not value.uses()]:
        del constants[name]


def find_products(model: ir.Model) -> tuple[Product, ...]:
    """Finds the products in a graph, in its order.

    Raises:
        ModelError: It has no linear layer.
    """
    found: list[Product] = []
    for node in model.graph:
        product = _product(node)
        if product is not None:
            found.append(product)
    if not any(product.kind == "linear" for product in found):
        raise ModelError("the model has no linear layer, so there is nothing to quantise")
    if len({product.name for product in found}) != len(found):
        raise ModelError("two nodes of the model have the same name")
    behind = _behind_the_layers(model, found)
    return tuple(
        replace(product, head=product.node in behind or _is_small(model, product))
        if product.kind == "linear"
        else product
        for product in found
    )


def _behind_the_layers(model: ir.Model, products: Sequence[Product]) -> set[str]:
    """Names of the nodes behind the last transformer layer, whose end is its second norm."""
    attention = {product.node for product in products if product.kind == "attention"}
    norms, found = -len(model.graph), set[str]()  # none counts before the first attention
    for node in model.graph:
        if node.name in attention:
            norms, found = 0, set()
        elif node.op_type == "LayerNormalization":
            norms += 1
        elif norms >= _NORMS_OF_A_LAYER:
            found.add(str(node.name))
    return found


def _is_small(model: ir.Model, product: Product) -> bool:
    channels: tuple[int, ...] = constant(model, str(product.weight)).shape
    return min(channels) < _FEWEST_CHANNELS


def _product(node: ir.Node) -> Product | None:
    name = str(node.name).strip("/").replace("/", ".")
    if node.op_type not in {"Gather", "MatMul"}:
        return None
    first, second = node.inputs
    assert first is not None and second is not None
    if node.op_type == "Gather":
        if not _is_matrix(first) or _integer(node, "axis", 0) != 0:
            return None
        name = name.removesuffix(".Gather")
        return Product(name, "embedding", str(node.name), (), first.name)
    if _is_matrix(second) and not first.is_initializer():
        name = re.sub(r"\.(MatMul|Gemm)$", "", name)
        operand = Operand(str(first.name), -2)
        return Product(name, "linear", str(node.name), (operand,), second.name)
    if first.is_initializer() or second.is_initializer():
        return None
    # Queries by keys has the keys' tokens in columns; probabilities by values has rows of tokens.
    scores = _leads_to_softmax(node)
    name = re.sub(r"\.MatMul(_\d+)?$", "", name) + (".scores" if scores else ".context")
    operands = (
        Operand(str(first.name), -2, over_keys=not scores),
        Operand(str(second.name), -1 if scores else -2),
    )
    return Product(name, "attention", str(node.name), operands, None)


def bias_and_weight(sum_: ir.Node | None) -> tuple[str, str] | None:
    """Names of the bias and the weight of the linear layer that a node ends, if it ends one.

    ``None`` as well if something else reads one of the two.
    """
    if sum_ is None or sum_.op_type != "Add":
        return None
    biases = [v for v in sum_.inputs if v is not None and v.is_initializer()]
    products = [v.producer() for v in sum_.inputs if v is not None and v not in biases]
    if len(biases) != 1 or products[0] is None or products[0].op_type != "MatMul":
        return None
    weight = products[0].inputs[1]
    if weight is None or not weight.is_initializer():
        return None
    if len(weight.uses()) != 1 or len(biases[0].uses()) != 1:
        return None
    return str(biases[0].name), str(weight.name)


def vocabulary_size(model: ir.Model) -> int:
    """Returns how many token ids the model knows; the rows of the table that they look up.

    Raises:
        ModelError: No table is looked up by ``input_ids``.
    """
    for value in model.graph.inputs:
        for user, index in value.uses():
            if value.name == "input_ids" and user.op_type == "Gather" and index == 1:
                table = user.inputs[0]
                if table is not None and table.const_value is not None:
                    return int(table.const_value.numpy().shape[0])
    raise ModelError("the model has no table of word embeddings that input_ids look up")


def _leads_to_softmax(node: ir.Node) -> bool:
    """Whether a node's result reaches a softmax through scaling and masking alone."""
    seen = node
    while True:
        following = [user for user in seen.successors() if user.op_type != "Shape"]
        if len(following) != 1:
            return False
        (seen,) = following
        if seen.op_type == "Softmax":
            return True
        if seen.op_type not in {"Add", "Cast", "Div", "Mul", "Where"}:
            return False


def _is_matrix(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and len(value.const_value.shape) == 2
    )


def _is_plain_gemm(node: ir.Node) -> bool:
    factors = [
        node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes
    ]
    return _is_matrix(node.inputs[1]) and set(factors) <= {1.0} and not _integer(node, "transA", 0)


def _integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default
