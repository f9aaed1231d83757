"""Holds what a compiler made of a model against what the model asks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from edgebert_export.audit.constants import holds_scalar, lone_words
from edgebert_export.audit.log import Kernel, NotUnderstoodError, read_kernels
from edgebert_export.audit.model import Asked, Attention, Int8Product, read_asked
from edgebert_export.audit.result import Audit, ProductAudit, ProfileAudit, Ran, Scale

__all__ = ["audit"]

_DEFAULT_SCALE = "_alpha_myl"
"""In the name of a product's factor that the compiler left at 1: its sums are stored as they are,
and scaled by the next kernel."""


def audit(model: Path, messages: Sequence[str], engine: bytes, profiles: int) -> Audit:
    """Audits an engine.

    Args:
        model: The ONNX model that it was built from.
        messages: Of the verbose log of its build, with detailed profiling, line breaks kept.
        engine: Its bytes.
        profiles: How many it was built for.

    Raises:
        ModelError: The model is not ONNX.
    """
    try:
        asked = read_asked(model)
        found = read_kernels(messages, profiles)
        words = lone_words(engine)
        runs = [_products(asked, kernels, words) for kernels in found]
        return Audit(
            attentions=len(asked.attentions),
            products=tuple(_worst(each) for each in zip(*runs, strict=True)),
            profiles=tuple(_profile(asked, kernels) for kernels in found),
        )
    except NotUnderstoodError as exc:
        return Audit(not_understood=str(exc))


def _products(
    asked: Asked, kernels: Sequence[Kernel], words: Collection[bytes]
) -> list[ProductAudit]:
    """Returns what a profile makes of each INT8 product."""
    by_node = {product.node: product for product in asked.products}
    fused = [(found, kernel) for found in asked.attentions for kernel in _fused(found, kernels)]
    return [_product(product, by_node, kernels, fused, words) for product in asked.products]


def _product(
    product: Int8Product,
    by_node: dict[str, Int8Product],
    kernels: Sequence[Kernel],
    fused: Sequence[tuple[Attention, Kernel]],
    words: Collection[bytes],
) -> ProductAudit:
    part_of = [kernel for kernel in kernels if product.node in kernel.nodes]
    for attention, kernel in fused:
        if product.node in {attention.scores, attention.context}:
            # Sums of a fused attention are scaled before they leave the kernel.
            is_int8 = sum(t.dtype == "Int8" for t in kernel.inputs) == len(("q", "k", "v"))
            ran: Ran = "int8" if is_int8 else "other"
            return _told(product, kernel, "attention", ran, "inside")
    running = [kernel for kernel in part_of if _multiplies_int8(kernel)]
    if len(running) > 1:
        raise NotUnderstoodError(f"{len(running)} kernels run the product {product.node}")
    if running:
        (kernel,) = running
        together = [by_node[node] for node in kernel.nodes if node in by_node]
        _check_shape(kernel, together)
        return _told(product, kernel, kernel.kind, "int8", _scale(kernel, together, words))
    touching = part_of + [k for k in kernels if product.weight in k.nodes and k not in part_of]
    if not touching:
        raise NotUnderstoodError(f"no kernel runs the product {product.node}")
    for kernel in touching:
        if any(t.dtype == "Int8" and len(t.shape) > 1 for t in kernel.constants):
            return _told(product, kernel, kernel.kind, "dequantised", "undecided")
    return _told(product, touching[0], touching[0].kind, "other", "undecided")


def _told(product: Int8Product, kernel: Kernel, kind: str, ran: Ran, scale: Scale) -> ProductAudit:
    return ProductAudit(node=product.node, kernel=kernel.name, kind=kind, ran=ran, scale=scale)


def _multiplies_int8(kernel: Kernel) -> bool:
    """Whether a kernel is a product of INT8 by INT8.

    Only the library's own products are: a fused kernel may read two INT8 operands and make FP16 of
    both before it multiplies them.
    """
    read = sum(t.dtype == "Int8" for t in kernel.inputs)
    held = sum(t.dtype == "Int8" and len(t.shape) > 1 for t in kernel.constants)
    return kernel.kind == "gemm" and read > 0 and read + held > 1


def _check_shape(kernel: Kernel, products: Sequence[Int8Product]) -> None:
    """Refuses a kernel whose weight is not that of the products that it is said to run."""
    shapes = [product.shape for product in products if product.shape is not None]
    if not shapes:
        return
    rows = {shape[0] for shape in shapes}
    wanted = {(size, sum(shape[1] for shape in shapes)) for size in rows}
    held = {t.shape[-2:] for t in kernel.constants if t.dtype == "Int8" and len(t.shape) > 1}
    if len(shapes) != len(products) or held != wanted:
        raise NotUnderstoodError(f"{kernel.name} has another weight than its products")


def _scale(kernel: Kernel, products: Sequence[Int8Product], words: Collection[bytes]) -> Scale:
    """Says where a kernel's sums are scaled.

    What is not FP16 holds every sum, or was scaled to become INT8. FP16 is proved to be written
    scaled by two things at once: the kernel has a factor that is not the default of 1, and the
    scales' product is among the engine's constants.
    """
    if {t.dtype for t in kernel.outputs} <= {"Float", "Int32", "Int8"}:
        return "inside"
    factors = [t.name for t in kernel.constants if t.dtype == "Float" and t.shape == (1,)]
    if any(_DEFAULT_SCALE in name for name in factors):
        return "after"
    scales = {product.scale for product in products}
    (scale, *others) = scales
    if not factors or others or scale is None:
        return "undecided"
    return "inside" if holds_scalar(words, scale) else "undecided"


def _fused(attention: Attention, kernels: Sequence[Kernel]) -> list[Kernel]:
    """Returns the one kernel that computes a whole attention; nothing if several do."""
    nodes = {attention.scores, attention.softmax, attention.context}
    running = [kernel for kernel in kernels if attention.softmax in kernel.nodes]
    if not running:
        raise NotUnderstoodError(f"no kernel runs the softmax {attention.softmax}")
    return running if len(running) == 1 and nodes <= running[0].nodes else []


def _profile(asked: Asked, lines: Sequence[Kernel]) -> ProfileAudit:
    kernels = [line for line in lines if not line.is_wait]
    at = [
        max(index for index, kernel in enumerate(kernels) if found.softmax in kernel.nodes)
        for found in asked.attentions
    ]
    read = {tensor.name for kernel in kernels for tensor in kernel.inputs}
    return ProfileAudit(
        kernels=len(kernels),
        kernels_per_layer=(max(at) - min(at)) / (len(at) - 1) if len(at) > 1 else None,
        waits=len(lines) - len(kernels),
        fp32_tensors=sum(
            tensor.dtype == "Float" and tensor.name in read
            for kernel in kernels
            for tensor in kernel.outputs
        ),
        fused=sum(bool(_fused(found, kernels)) for found in asked.attentions),
    )


def _worst(found: Sequence[ProductAudit]) -> ProductAudit:
    """Returns what became of a product in the profile where it fared worst."""
    ran = ("int8", "other", "dequantised")
    scales = ("inside", "undecided", "after")
    return max(found, key=lambda each: (ran.index(each.ran), scales.index(each.scale)))
