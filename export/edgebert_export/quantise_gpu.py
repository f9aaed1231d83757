"""Makes the sources of TensorRT engines: FP32 OnnxModel in, FP16 and INT8 OnnxModels out.

The way to choose scales, and the layers that can bear INT8, are found by measurement on
validation rows. What misses the budget is not written; the log says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgebert_export.calibrate import (
    CALIBRATORS,
    CalibrationTexts,
    TensorStatistics,
    calibrate,
    describe_texts,
    largest_magnitude,
    threshold,
)
from edgebert_export.closed_loop import Fit, fit
from edgebert_export.errors import ExportError
from edgebert_export.fidelity import Fidelity, Judge
from edgebert_export.graph import (
    Product,
    find_products,
    open_graph,
    release_memory,
    vocabulary_size,
    write_graph,
)
from edgebert_export.precision import scale_queries, to_half, with_input_type
from edgebert_export.qdq import LEVELS, activation_scale, insert_qdq
from edgebert_export.quantise import Calibrator, QuantiseConfig, Rounding, included
from edgebert_export.rounding import round_layers
from edgebert_export.smooth import smooth
from edgebert_export.to_onnx import OnnxModel
from edgebert_runtime.encoder import Encoded, Text, TextEncoder

__all__ = ["GpuLog", "ScaleSummary", "Trial", "check_texts", "quantise_gpu"]

_LARGEST_IN_HALF = float(np.finfo(np.float16).max) / 2
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
        linear_layers: Linear layers of the model.
        linear_int8: Of them, how many are in INT8.
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
    scales: tuple[ScaleSummary, ...] = ()
    refusal: str | None = None


@dataclass(frozen=True)
class _Calibrated:
    """An FP32 graph, its layers that may be quantised, and what was seen of their activations."""

    graph: ir.Model
    layers: dict[str, Product]
    statistics: dict[str, TensorStatistics]

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
    layers = [product.name for product in included(products, config.include, config.exclude)]
    linear_layers = sum(product.kind == "linear" for product in products)
    texts, rows = check_texts(
        calibration, validation, encoder, config, vocabulary_size=vocabulary_size(graph)
    )
    graph = scale_queries(graph, products)

    def typed(plain: ir.Model) -> ir.Model:
        return with_input_type(to_half(plain), config.input_type)

    fidelity: Fidelity | None = None
    refusal = _out_of_range(graph, rows, encoder)
    if refusal is None:
        half = typed(graph)
        fidelity = judge.judge(half)
        refusal = None if fidelity.fits(config.budget) else "FP16 alone misses the budget"
    if refusal is not None:
        say(f"neither fp16-gpu nor int8-gpu: {refusal}")
        return GpuLog(texts=texts, fp16=fidelity, linear_layers=linear_layers, refusal=refusal)
    write_graph(half, fp16)
    del half

    calibrated = _calibrate_all(graph, layers, rows, encoder, config)
    names = CALIBRATORS if config.calibrator == "auto" else (config.calibrator,)
    candidates = [(calibrator, smoothed) for smoothed in calibrated for calibrator in names]
    scales = {
        (calibrator, smoothed): calibrated[smoothed].scales(calibrator, config)
        for calibrator, smoothed in candidates
    }
    steps: dict[str, NDArray[np.int8]] = {}

    def build(candidate: tuple[Calibrator, bool], names: Collection[str]) -> ir.Model:
        form = calibrated[candidate[1]]
        chosen = [product for name, product in form.layers.items() if name in names]
        return typed(insert_qdq(form.graph, chosen, scales[candidate], steps))

    part, trials = judge.part(_TRIAL_ROWS), []
    for done, candidate in enumerate(candidates, start=1):
        found = part.judge(build(candidate, layers))
        trials.append(Trial(calibrator=candidate[0], smoothed=candidate[1], fidelity=found))
        on_progress(done, len(candidates) + 1)
    best = min(range(len(trials)), key=lambda index: trials[index].fidelity.distance)
    winner = candidates[best]
    say(
        f"int8-gpu: of {len(candidates)} ways to choose scales, {winner[0]}"
        f"{' after smoothing' if winner[1] else ''} comes closest to FP32"
    )
    if config.rounding == "gptq":
        form = calibrated[winner[1]]
        steps |= round_layers(form.graph, list(form.layers.values()), rows, encoder)
    result = fit(
        layers,
        lambda names: build(winner, names),
        judge,
        config.budget,
        sensitivity=config.sensitivity,
        say=lambda line: say(f"int8-gpu: {line}"),
    )
    taken = [calibrated[winner[1]].layers[name] for name in result.quantised]
    if result.fits:
        write_graph(build(winner, result.quantised), int8)
    else:
        refusal = "none of the sets of layers that were tried in INT8 fits the budget"
        say(f"int8-gpu: {refusal}: FP16 it is")
    on_progress(len(candidates) + 1, len(candidates) + 1)
    return GpuLog(
        texts=texts,
        fp16=fidelity,
        trials=tuple(trials),
        chosen=best,
        rounding=config.rounding,
        fit=result,
        linear_layers=linear_layers,
        linear_int8=sum(product.kind == "linear" for product in taken),
        scales=_summaries(calibrated[winner[1]], scales[winner], taken),
        refusal=refusal,
    )


def _calibrate_all(
    graph: ir.Model,
    names: Collection[str],
    rows: Sequence[Encoded],
    encoder: TextEncoder,
    config: QuantiseConfig,
) -> dict[bool, _Calibrated]:
    """Calibrates the graph as it is, and smoothed, as far as ``config`` asks for them."""

    def calibrated(form: ir.Model) -> _Calibrated:
        layers = {product.name: product for product in find_products(form)}
        layers = {name: layers[name] for name in names}
        operands = [operand for product in layers.values() for operand in product.operands]
        return _Calibrated(form, layers, calibrate(form, operands, rows, encoder))

    plain = calibrated(graph)
    if config.smoothing == "never" or not any(p.kind == "linear" for p in plain.layers.values()):
        return {False: plain}
    smoothed = smooth(graph, list(plain.layers.values()), plain.statistics)
    if _out_of_range(smoothed, rows, encoder) is not None:
        return {False: plain}
    found = {True: calibrated(smoothed)}
    return found if config.smoothing == "always" else {False: plain, **found}


def _out_of_range(graph: ir.Model, rows: Sequence[Encoded], encoder: TextEncoder) -> str | None:
    """Says what would leave FP16's range, or come within a factor of two of it."""
    try:
        to_half(graph)
    except ExportError as exc:
        return str(exc)
    release_memory()
    name, largest = largest_magnitude(graph, rows, encoder)
    if largest <= _LARGEST_IN_HALF:
        return None
    return f"{name} reaches {largest:.3g} on the calibration texts, too much for FP16"


def _summaries(
    calibrated: _Calibrated, scales: dict[str, float], layers: Sequence[Product]
) -> tuple[ScaleSummary, ...]:
    names = dict.fromkeys(operand.value for layer in layers for operand in layer.operands)
    return tuple(
        ScaleSummary(
            activation=name,
            scale=scales[name],
            clipped=calibrated.statistics[name].histogram.share_above(
                scales[name] * (LEVELS + 0.5)
            ),
        )
        for name in names
    )
