"""What both ways of quantising share: the configuration, and which layers it means."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from edgebert_export.errors import ModelError
from edgebert_export.fidelity import Budget

if TYPE_CHECKING:  # reading a recipe loads no ONNX
    from edgebert_export.graph import Product

__all__ = ["Calibrator", "LayerKind", "ProductKind", "QuantiseConfig", "Rounding", "included"]

Calibrator: TypeAlias = Literal["max", "percentile", "mse", "entropy"]
Rounding: TypeAlias = Literal["nearest", "gptq"]
ProductKind: TypeAlias = Literal["linear", "attention", "embedding"]
LayerKind: TypeAlias = Literal["linear", "head", "attention", "embedding"]


class QuantiseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which INT8 models to make, and how."""

    cpu: Annotated[
        bool,
        Meta(
            description="Make `int8-cpu`: weights in INT8 with a scale per channel, activations "
            "quantised while running (dynamic), for ONNX Runtime's CPU kernels."
        ),
    ] = True
    gpu: Annotated[
        bool,
        Meta(
            description="Make `int8-gpu` and `fp16-gpu`, the sources of TensorRT engines: "
            "explicit Q/DQ at the inputs of products, FP16 elsewhere."
        ),
    ] = True
    embeddings: Annotated[
        bool,
        Meta(
            description="`int8-cpu`: store the embedding tables in INT8, too; most of a small "
            "BERT's size."
        ),
    ] = True
    include: Annotated[
        tuple[LayerKind, ...],
        Meta(
            min_length=1,
            description="`int8-gpu`: what is quantised. `linear`: the linear layers of the "
            "transformer layers; `head`: those behind them, and any with fewer than 16 inputs or "
            "outputs, where INT8 saves nothing; `attention`: in each layer, both products of two "
            "activations and the linear layer behind them, together, where TensorRT fuses that "
            "(heads of 16, 32 or 64 channels); `embedding`: the tables, whose rows are then "
            "stored in INT8.",
        ),
    ] = ("linear",)
    exclude: Annotated[
        tuple[str, ...],
        Meta(
            description="Layers of the model in the bundle that stay in higher precision whatever "
            "the budget: names, as the report has them, in which `*` stands for anything."
        ),
    ] = ()
    calibrator: Annotated[
        Calibrator | Literal["auto"],
        Meta(
            description="`int8-gpu`: from which magnitude on an activation is clipped. `max`: "
            "nothing is; `percentile`: what lies above `percentile`; `mse`: by the smallest "
            "squared error; `entropy`: by the smallest divergence. `auto` tries all four and "
            "takes the one whose outputs on validation rows are closest to FP32's."
        ),
    ] = "auto"
    percentile: Annotated[
        float,
        Meta(gt=50, le=100, description="Percent of an activation's values that are not clipped."),
    ] = 99.99
    smoothing: Annotated[
        Literal["auto", "never", "always"],
        Meta(
            description="`int8-gpu`: move outliers of activations into the weights first "
            "(SmoothQuant), which is exact. `auto` tries both."
        ),
    ] = "auto"
    rounding: Annotated[
        Rounding,
        Meta(
            description="`int8-gpu`: how the weights of linear layers become whole steps. `gptq`: "
            "so that the layer's results on the calibration texts change least; `nearest`: each "
            "weight by itself."
        ),
    ] = "gptq"
    calibration_texts: Annotated[
        int, Meta(ge=1, description="`int8-gpu`: most texts to calibrate on.")
    ] = 256
    sensitivity: Annotated[
        Literal["when_needed", "always"],
        Meta(
            description="When to measure each layer's damage alone: to give layers back, or "
            "always, for the report."
        ),
    ] = "when_needed"
    input_type: Annotated[
        Literal["int32", "int64"],
        Meta(description="Of the inputs of `int8-gpu` and `fp16-gpu`."),
    ] = "int64"
    budget: Annotated[
        Budget,
        Meta(description="What INT8 may cost on validation rows; layers go back until it fits."),
    ] = Budget()

    def without_extras(self) -> QuantiseConfig:
        """The same for a model that is not shipped, whose layers have other names."""
        return msgspec.structs.replace(self, sensitivity="when_needed", exclude=())


def included(
    products: Sequence[Product], kinds: Sequence[LayerKind], exclude: Sequence[str]
) -> list[Product]:
    """Returns the products of some kinds that are not excluded by name.

    A product of several layers, ``...query+key+value``, is named by its own name and by each of
    theirs, and so it is in a pattern.

    Raises:
        ModelError: A pattern in ``exclude`` means nothing, or nothing is left.
    """
    for pattern in exclude:
        if not any(_is_named(product, [pattern]) for product in products):
            names = [product.name for product in products]
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
            raise ModelError(
                f"quantise.exclude: the model has no layer {pattern!r}; did you mean {close!r}?"
            )
    left = [
        product
        for product in products
        if ("head" if product.head else product.kind) in kinds and not _is_named(product, exclude)
    ]
    if not left:
        raise ModelError("quantise.include and quantise.exclude leave no layer to quantise")
    return left


def _is_named(product: Product, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches a product, or one of the layers that it is of."""
    meant = [name for pattern in patterns for name in _layers_of(pattern)]
    return any(fnmatchcase(name, wanted) for name in _layers_of(product.name) for wanted in meant)


def _layers_of(name: str) -> list[str]:
    scope, dot, last = name.rpartition(".")
    return [f"{scope}{dot}{part}" for part in last.split("+")]
