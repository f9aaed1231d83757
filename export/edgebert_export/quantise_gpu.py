"""Makes the sources of TensorRT engines: FP32 OnnxModel in, FP16 and INT8 OnnxModels out.

The way to choose scales, and the layers that can bear INT8, are found by measurement on
validation rows, in arithmetic that stores FP16 where a GPU does. What misses the budget is not
written, nor a product whose sum could leave FP16; the log says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgebert_export.attention import find_attentions, merge_projections, scale_queries
from edgebert_export.calibrate import (
    CALIBRATORS,
    CalibrationTexts,
    TensorStatistics,
    calibrate,
    describe_texts,
    largest_magnitude,
    largest_magnitudes,
    threshold,
)
from edgebert_export.closed_loop import Fit, fit
from edgebert_export.emulate import emulate
from edgebert_export.errors import ExportError, ModelError
from edgebert_export.fidelity import Fidelity, Judge
from edgebert_export.graph import (
    Product,
    find_products,
    open_graph,
    release_memory,
    vocabulary_size,
    write_graph,
)
from edgebert_export.precision import to_half, with_input_type
from edgebert_export.qdq import LEVELS, activation_scale, insert_qdq
from edgebert_export.quantise import Calibrator, QuantiseConfig, Rounding, included
from edgebert_export.rounding import round_layers
from edgebert_export.smooth import smooth
from edgebert_export.to_onnx import OnnxModel
from edgebert_runtime.encoder import Encoded, Text, TextEncoder

__all__ = ["GpuLog", "ProductRange", "ScaleSummary", "Trial", "check_texts", "quantise_gpu"]

_LARGEST_IN_HALF = float(np.finfo(np.float16).max)
_MARGIN = 2.0
"""How far from FP16's end what was seen on calibration texts must stay, as a factor."""
_TRIAL_ROWS = 128
"""Validation rows that rank the candidates; the budget is then checked on all of them."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A way to choose the scales that was tried, and what the model was then worth."""

    calibrator: Calibrator
    smoothed: bool
    fidelity: Fidelity


class ScaleSummary(msgspec.Struct, frozen=True, kw_only=True):
    """An activation's scale.

    Attributes:
        activation: Its name in the graph.
        scale: One step of INT8.
        clipped: Share of the calibration texts' values that lie beyond the last step.
    """

    activation: str
    scale: float
    clipped: float


class ProductRange(msgspec.Struct, frozen=True, kw_only=True):
    """How near to FP16's end an INT8 product comes where its sum is stored.

    Attributes:
        layer: Name of the product.
        largest: Its sum's largest magnitude on the calibration texts, times the scale that is
            applied inside the product.
        share: Of the largest number that FP16 can hold; at most a half in what is shipped.
    """

    layer: str
    largest: float
    share: float


class GpuLog(msgspec.Struct, frozen=True, kw_only=True):
    """How ``fp16-gpu`` and ``int8-gpu`` were made, or why not.

    Attributes:
        texts: What the model was calibrated on.
        fp16: What FP16 is worth; ``None`` if the weights do not fit into it.
        trials: Ways to choose the scales, in the order they were tried; weights were rounded to
            the nearest step.
        chosen: Index of the trial with the smallest divergence, which was taken; ``None``
            without trials.
        rounding: How the weights of linear layers were rounded.
        fit: How INT8 came within its budget; ``None`` without trials.
        linear_layers: Linear layers that may be in INT8; queries, keys and values are one where
            they are one product.
        linear_int8: Of them, how many are.
        head_layers: Linear layers besides, which stay in FP16: those behind the last transformer
            layer, and those with fewer than 16 inputs or outputs.
        unfused: Why attentions that the recipe includes stay in FP16, by their names.
        ranges: Of the products in INT8.
        out_of_range: Of the products that stay in FP16 because their sum could leave it.
        scales: Of the activations that are quantised.
        refusal: Why there is no INT8 model, or no FP16 one either; ``None`` if there are both.
    """

    texts: CalibrationTexts
    fp16: Fidelity | None
    trials: tuple[Trial, ...] = ()
    chosen: int | None = None
    rounding: Rounding = "nearest"
    fit: Fit | None = None
    linear_layers: int
    linear_int8: int = 0
    head_layers: int = 0
    unfused: dict[str, str] = msgspec.field(default_factory=dict)
    ranges: tuple[ProductRange, ...] = ()
    out_of_range: tuple[ProductRange, ...] = ()
    scales: tuple[ScaleSummary, ...] = ()
    refusal: str | None = None


@dataclass(frozen=True)
class _Form:
    """An FP32 graph, its layers that may be quantised, and what was seen of their activations.

    Attributes:
        graph: With queries, keys and values in one product.
        layers: By name, the products that are quantised together or not at all: one, or an
            attention's three.
        statistics: By the activation's name.
    """

    graph: ir.Model
    layers: dict[str, tuple[Product, ...]]
    statistics: dict[str, TensorStatistics]

    def products(self, names: Collection[str]) -> list[Product]:
        """The products of some layers, in the graph's order."""
        return [p for name, products in self.layers.items() if name in names for p in products]

    def scales(self, calibrator: Calibrator, config: QuantiseConfig) -> dict[str, float]:
        return {
            name: activation_scale(threshold(seen.histogram, calibrator, config.percentile))
            for name, seen in self.statistics.items()
        }


def check_texts(
    calibration: Sequence[Text],
    validation: Sequence[Text],
    encoder: TextEncoder,
    config: QuantiseConfig,
    *,
    vocabulary_size: int,
) -> tuple[CalibrationTexts, list[Encoded]]:
    """Tokenises as many calibration texts as ``config`` says, and tells what they are like.

    Raises:
        DataError: They are of no use; see ``describe_texts``.
    """
    rows = encoder.encode(calibration[: config.calibration_texts])
    found = describe_texts(
        rows,
        encoder.encode(validation),
        vocabulary_size=vocabulary_size,
        special=encoder.special_ids,
    )
    return found, rows


def quantise_gpu(
    model: OnnxModel,
    calibration: Sequence[Text],
    validation: Sequence[Text],
    encoder: TextEncoder,
    judge: Judge,
    config: QuantiseConfig,
    *,
    fp16: Path,
    int8: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> GpuLog:
    """Writes ``model`` for TensorRT: typed FP16, and with explicit Q/DQ around its products.

    FP16's range is checked on the calibration texts. Every way to choose scales that ``config``
    allows is tried on validation rows; the one with the smallest divergence from FP32 is taken,
    the weights are rounded, and layers go back to FP16 until the budget fits.

    Args:
        model: In FP32.
        calibration: Texts to calibrate on; ``config.calibration_texts`` of them are taken.
        validation: The texts that ``judge`` judges by, for the calibration texts to be held
            against.
        encoder: Tokenises them.
        judge: Of ``model``, by validation rows.
        config: What to quantise, how, and the budget.
        fp16: The file for the FP16 model; it is not written if that misses the budget.
        int8: The file for the INT8 model; it is not written if no set of layers fits.
        on_progress: Called with steps done and steps in all.
        say: Called with what was found and decided.

    Raises:
        ModelError: ``model`` has no linear layer, is quantised already, or is damaged.
        DataError: The calibration texts are of no use; see ``describe_texts``.
    """
    graph = open_graph(model.path)
    products = find_products(graph)
    included(products, config.include, config.exclude)  # before anything is computed
    texts, rows = check_texts(
        calibration, validation, encoder, config, vocabulary_size=vocabulary_size(graph)
    )
    graph = scale_queries(graph, products)
    merged = merge_projections(graph)
    layers, unfused = _layers(merged, config)
    for name, reason in unfused.items():
        say(f"int8-gpu: {name} stays in FP16: {reason}")
    linear_layers, head_layers = _counts(find_products(merged), config)

    def typed(plain: ir.Model) -> ir.Model:
        return with_input_type(to_half(plain), config.input_type)

    fidelity: Fidelity | None = None
    refusal = _out_of_range(graph, rows, encoder)
    if refusal is None:
        half = typed(graph)
        fidelity = judge.judge(emulate(half))
        refusal = None if fidelity.fits(config.budget) else "FP16 alone misses the budget"
    if refusal is not None:
        say(f"neither fp16-gpu nor int8-gpu: {refusal}")
        return GpuLog(
            texts=texts,
            fp16=fidelity,
            linear_layers=linear_layers,
            head_layers=head_layers,
            unfused=unfused,
            refusal=refusal,
        )
    write_graph(half, fp16)
    del half

    forms = _forms(graph, rows, encoder, config)
    names = CALIBRATORS if config.calibrator == "auto" else (config.calibrator,)
    candidates = [(calibrator, smoothed) for smoothed in forms for calibrator in names]
    scales = {
        (calibrator, smoothed): forms[smoothed].scales(calibrator, config)
        for calibrator, smoothed in candidates
    }
    steps: dict[str, NDArray[np.int8]] = {}

    def quantised(candidate: tuple[Calibrator, bool], names: Collection[str]) -> ir.Model:
        form = forms[candidate[1]]
        return insert_qdq(form.graph, form.products(names), scales[candidate], steps)

    def ranges(candidate: tuple[Calibrator, bool], names: Collection[str]) -> list[ProductRange]:
        products = forms[candidate[1]].products(names)
        return _ranges(quantised(candidate, names), products, rows, encoder)

    # Before anything is judged, with scales that clip least: one sum that overflows would make
    # every candidate worthless.
    beyond = {
        found.layer: found
        for smoothed in forms
        for found in ranges((names[0], smoothed), layers)
        if found.share > 1 / _MARGIN
    }
    for product in beyond.values():
        say(f"int8-gpu: {product.layer} stays in FP16: its sum reaches {product.largest:.3g}")
    safe = [n for n, products in layers.items() if not beyond.keys() & {p.name for p in products}]
    if not safe:
        refusal = "every product's sum could leave FP16"
        say(f"int8-gpu: {refusal}: FP16 it is")
        return GpuLog(
            texts=texts,
            fp16=fidelity,
            linear_layers=linear_layers,
            head_layers=head_layers,
            unfused=unfused,
            out_of_range=tuple(beyond.values()),
            refusal=refusal,
        )
    part, trials = judge.part(_TRIAL_ROWS), []
    for done, candidate in enumerate(candidates, start=1):
        found = part.judge(emulate(typed(quantised(candidate, safe))))
        trials.append(Trial(calibrator=candidate[0], smoothed=candidate[1], fidelity=found))
        on_progress(done, len(candidates) + 1)
    best = min(range(len(trials)), key=lambda index: trials[index].fidelity.distance)
    winner = candidates[best]
    form = forms[winner[1]]
    say(
        f"int8-gpu: of {len(candidates)} ways to choose scales, {winner[0]}"
        f"{' after smoothing' if winner[1] else ''} comes closest to FP32"
    )
    if config.rounding == "gptq":
        steps |= round_layers(form.graph, form.products(safe), rows, encoder)

    result = fit(
        safe,
        lambda names: emulate(typed(quantised(winner, names))),
        judge,
        config.budget,
        sensitivity=config.sensitivity,
        say=lambda line: say(f"int8-gpu: {line}"),
    )
    taken = form.products(result.quantised)
    proved = ranges(winner, result.quantised) if taken else []
    if not result.fits:
        refusal = "none of the sets of layers that were tried in INT8 fits the budget"
    elif any(found.share > 1 / _MARGIN for found in proved):
        refusal = "a product's sum could leave FP16 with the scales that were chosen"
    else:
        write_graph(typed(quantised(winner, result.quantised)), int8)
    if refusal is not None:
        say(f"int8-gpu: {refusal}: FP16 it is")
        taken, proved = [], []
    on_progress(len(candidates) + 1, len(candidates) + 1)
    return GpuLog(
        texts=texts,
        fp16=fidelity,
        trials=tuple(trials),
        chosen=best,
        rounding=config.rounding,
        fit=result,
        linear_layers=linear_layers,
        head_layers=head_layers,
        linear_int8=sum(product.kind == "linear" for product in taken),
        unfused=unfused,
        ranges=tuple(proved),
        out_of_range=tuple(beyond.values()),
        scales=_summaries(form, scales[winner], taken),
        refusal=refusal,
    )


def _layers(
    graph: ir.Model, config: QuantiseConfig
) -> tuple[dict[str, tuple[Product, ...]], dict[str, str]]:
    """Returns what can be quantised, by name, and why attentions that are included cannot be.

    Raises:
        ModelError: Nothing can be.
    """
    products = find_products(graph)
    chosen = included(products, config.include, config.exclude)
    layers: dict[str, tuple[Product, ...]] = {
        product.name: (product,) for product in chosen if product.kind != "attention"
    }
    unfused: dict[str, str] = {}
    if "attention" in config.include:
        allowed = included(products, [*config.include, "linear"], config.exclude)
        for attention in find_attentions(graph, products):
            if not set(attention.products) <= set(allowed):
                unfused[attention.name] = "a part of it is excluded (quantise.exclude)"
            elif attention.unfused_in_int8 is not None:
                unfused[attention.name] = attention.unfused_in_int8
            else:
                for product in attention.products:
                    layers.pop(product.name, None)
                layers[attention.name] = attention.products
    if not layers:
        raise ModelError(
            f"quantise.include: nothing is left to quantise: {next(iter(unfused.values()))}"
        )
    order = {product.name: index for index, product in enumerate(products)}
    return dict(sorted(layers.items(), key=lambda item: order[item[1][0].name])), unfused


def _counts(products: Sequence[Product], config: QuantiseConfig) -> tuple[int, int]:
    """Counts the linear layers that may be in INT8, and those that stay in FP16 anyway."""
    linear = [product for product in products if product.kind == "linear"]
    heads = 0 if "head" in config.include else sum(product.head for product in linear)
    return len(linear) - heads, heads


def _forms(
    graph: ir.Model, rows: Sequence[Encoded], encoder: TextEncoder, config: QuantiseConfig
) -> dict[bool, _Form]:
    """Calibrates the graph as it is, and smoothed, as far as ``config`` asks for them."""

    def calibrated(apart: ir.Model) -> _Form:
        merged = merge_projections(apart)
        layers, _ = _layers(merged, config)
        operands = [o for products in layers.values() for p in products for o in p.operands]
        return _Form(merged, layers, calibrate(merged, operands, rows, encoder))

    plain = calibrated(graph)
    apart = included(find_products(graph), [*config.include, "linear"], config.exclude)
    linear = [p for p in apart if p.kind == "linear" and p.operands[0].value in plain.statistics]
    if config.smoothing == "never" or not linear:
        return {False: plain}
    smoothed = smooth(graph, linear, plain.statistics)
    if _out_of_range(smoothed, rows, encoder) is not None:
        return {False: plain}
    found = {True: calibrated(smoothed)}
    return found if config.smoothing == "always" else {False: plain, **found}


def _out_of_range(graph: ir.Model, rows: Sequence[Encoded], encoder: TextEncoder) -> str | None:
    """Says what would leave FP16's range, or come too near to its end."""
    try:
        to_half(graph)
    except ExportError as exc:
        return str(exc)
    release_memory()
    name, largest = largest_magnitude(graph, rows, encoder)
    if largest <= _LARGEST_IN_HALF / _MARGIN:
        return None
    return f"{name} reaches {largest:.3g} on the calibration texts, too much for FP16"


def _ranges(
    quantised: ir.Model,
    products: Sequence[Product],
    rows: Sequence[Encoded],
    encoder: TextEncoder,
) -> list[ProductRange]:
    """Measures what INT8 products store as FP16, before their outputs are scaled."""
    results = {str(node.name): str(node.outputs[0].name) for node in quantised.graph}
    stored = {p.name: results[p.node] for p in products if p.kind != "embedding"}
    largest = largest_magnitudes(quantised, list(stored.values()), rows, encoder)
    return [
        ProductRange(layer=name, largest=largest[value], share=largest[value] / _LARGEST_IN_HALF)
        for name, value in stored.items()
    ]


def _summaries(
    form: _Form, scales: dict[str, float], layers: Sequence[Product]
) -> tuple[ScaleSummary, ...]:
    names = dict.fromkeys(operand.value for layer in layers for operand in layer.operands)
    return tuple(
        ScaleSummary(
            activation=name,
            scale=scales[name],
            clipped=form.statistics[name].histogram.share_above(scales[name] * (LEVELS + 0.5)),
        )
        for name in names
    )
