"""What was not done, with its reason: a report must not leave it to the reader to notice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from edgebert_pipeline.engines import EngineLog
from edgebert_pipeline.quantisation import Quantisation
from edgebert_pipeline.report import Distillation, NotDone
from edgebert_pipeline.scores import Evaluation

__all__ = ["list_not_done"]


def list_not_done(
    *,
    fine_tuned: bool,
    distillation: Distillation | None,
    quantisation: Mapping[str, Quantisation],
    engines: EngineLog,
    evaluation: Evaluation,
    gated: bool,
) -> tuple[NotDone, ...]:
    """Lists what a reader may expect and will not find.

    Args:
        fine_tuned: Whether the checkpoint was fine-tuned.
        distillation: How distilling went.
        quantisation: How each model was quantised.
        engines: What became of engines.
        evaluation: What was measured.
        gated: Whether the recipe sets a limit.
    """
    found = [
        *_on_a_gpu(evaluation, engines),
        *_quantised(quantisation, evaluation),
        *_distilled(distillation),
    ]
    if not fine_tuned:
        found.append(("Fine-tuning", "the checkpoint was taken as it is"))
    if not gated:
        found.append(("A gate", "the recipe sets no limit"))
    found += _kept(evaluation)
    return tuple(NotDone(what=what, reason=f"{reason}.") for what, reason in found)


_Found = Iterator[tuple[str, str]]


def _on_a_gpu(evaluation: Evaluation, engines: EngineLog) -> _Found:
    untimed = [v.full_name for v in evaluation.variants if v.timing is None]
    if untimed:
        yield (
            f"A run on a GPU: {', '.join(untimed)}",
            "an export measures on a CPU; their answers were computed there by ONNX Runtime, from "
            "the graphs that TensorRT gets, and they were not timed",
        )
    if engines.skipped is not None:
        yield "Building engines ahead of time", engines.skipped
    elif engines.built:
        names = ", ".join(item.variant for item in engines.built)
        yield f"Running the engines of {names}", "an export builds them without a GPU"
    if untimed:
        yield (
            "Engines of TensorRT itself",
            "they are built on the device that runs them (edgebert-rt engine)",
        )


def _quantised(quantisation: Mapping[str, Quantisation], evaluation: Evaluation) -> _Found:
    if not quantisation and all(v.precision == "fp32" for v in evaluation.variants):
        yield "INT8", "the recipe asks for none (quantise.cpu, quantise.gpu)"
    for model, log in quantisation.items():
        of = "" if model == "model" else f"{model} "
        if log.cpu is None:
            yield f"{of}int8-cpu", "the recipe asks for none (quantise.cpu)"
        elif not log.cpu.fits:
            yield f"{of}int8-cpu", "no set of layers that was tried fits the budget"
        if log.gpu is None:
            yield f"{of}int8-gpu and fp16-gpu", "the recipe asks for none (quantise.gpu)"
            continue
        if log.gpu.refusal is not None:
            missing = "int8-gpu" if log.gpu.fp16 is not None else "int8-gpu and fp16-gpu"
            yield f"{of}{missing}", log.gpu.refusal
        shipped = model == next(iter(quantisation))
        if shipped and log.gpu.fit is not None and not log.gpu.fit.sensitivity:
            yield (
                "Measuring each layer's sensitivity",
                "all layers fit the budget at once (quantise.sensitivity)",
            )


def _distilled(distillation: Distillation | None) -> _Found:
    if distillation is None:
        yield "Distilling", "the recipe has no [distill] table"
        return
    if distillation.hard_label is None:
        yield "Training the student without its teacher", "it was not asked for (--ablate)"
    log = distillation.student
    if log.hidden is not None and log.hidden < log.texts:
        yield (
            f"Learning from the teacher's hidden states of {log.texts - log.hidden} texts",
            "there was no room for them (distill.hidden_limit_mb)",
        )


def _kept(evaluation: Evaluation) -> _Found:
    flips = evaluation.flips
    if flips is None:
        yield (
            "Which rows flipped, confusion, and calibration",
            "the report was written by an older edgebert",
        )
        return
    left_out = flips.count - len(flips.kept)
    if left_out:
        yield f"Listing {left_out:,} more rows that flipped", f"{len(flips.kept):,} are kept"
    if flips.kept and flips.kept[0].text is None:
        yield "Texts of rows that flipped", "the recipe leaves them out (report.texts)"
