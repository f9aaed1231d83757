"""The stage that quantises a model, for CPUs and for TensorRT, and what it tells the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder
from edgebert_export.closed_loop import Fit
from edgebert_export.dataset import Dataset
from edgebert_export.fidelity import Judge
from edgebert_export.quantise import QuantiseConfig
from edgebert_export.quantise_cpu import quantise_cpu
from edgebert_export.quantise_gpu import GpuLog, check_texts, quantise_gpu
from edgebert_export.to_onnx import OnnxModel
from edgebert_export.write_bundle import VariantSource
from edgebert_pipeline.build import LOADING, BuildDirectory, stage_key
from edgebert_pipeline.progress import Progress
from edgebert_runtime.manifest import Task

__all__ = ["Quantisation", "Quantised", "check_calibration", "run_quantisation"]

_QUANTISING = (
    *LOADING,
    "edgebert_pipeline.quantisation",
    "edgebert_pipeline.run",
    "edgebert_export.attention",
    "edgebert_export.calibrate",
    "edgebert_export.closed_loop",
    "edgebert_export.emulate",
    "edgebert_export.fidelity",
    "edgebert_export.graph",
    "edgebert_export.precision",
    "edgebert_export.qdq",
    "edgebert_export.quantise",
    "edgebert_export.quantise_cpu",
    "edgebert_export.quantise_gpu",
    "edgebert_export.rounding",
    "edgebert_export.smooth",
    "edgebert_export.thresholds",
    "edgebert_runtime.classifier",
    "edgebert_runtime.onnx_session",
)


class Quantisation(msgspec.Struct, frozen=True, kw_only=True):
    """How a model was quantised: for CPUs, for TensorRT; ``None`` where it was not asked for."""

    cpu: Fit | None
    gpu: GpuLog | None


@dataclass(frozen=True)
class Quantised:
    """What came of quantising a model: its variants, in order of preference."""

    variants: dict[str, VariantSource]
    log: Quantisation
    stage: Path


def check_calibration(
    config: QuantiseConfig, checkpoint: Checkpoint, dataset: Dataset, max_length: int
) -> tuple[str, ...]:
    """Looks at the calibration texts before hours of training, and returns what to warn of.

    Raises:
        DataError: They are of no use.
    """
    if not config.gpu:
        return ()
    texts, _ = check_texts(
        [example.text for example in dataset.calibration],
        [example.text for example in dataset.validation],
        checkpoint_encoder(checkpoint, max_length=max_length, text_pair=dataset.task.text_pair),
        config,
        vocabulary_size=checkpoint.architecture.vocab_size,
    )
    return texts.warnings


def run_quantisation(
    build: BuildDirectory,
    config: QuantiseConfig,
    checkpoint: Checkpoint,
    fp32: OnnxModel,
    dataset: Dataset,
    max_length: int,
    *,
    what: str,
    task: Callable[[], Task],
    thresholds: object,
    say: Callable[[str], None],
) -> Quantised:
    """Runs the stage that quantises a model.

    Args:
        build: Where the stage's output is kept.
        config: What to make, and how.
        checkpoint: What was exported: its tokenizer.
        fp32: The export.
        dataset: Rows to calibrate on and to choose by.
        max_length: Longest row in tokens.
        what: What is being done, for people.
        task: Tells what the model answers, with its thresholds.
        thresholds: What the recipe says of them.
        say: Called with what was found and decided.

    Raises:
        UsageError: The model or the calibration texts cannot be used.
    """
    key = stage_key(
        "quantise",
        _QUANTISING,
        fp32.sha256(),
        checkpoint.sha256,
        dataset.sha256("validation", "calibration"),
        config,
        max_length,
        thresholds,
    )

    def produce(out: Path, progress: Progress) -> Quantisation:
        encoder = checkpoint_encoder(
            checkpoint,
            max_length=max_length,
            text_pair=dataset.task.text_pair,
            input_names=fp32.input_names(),
        )
        judge = Judge(fp32.path.read_bytes(), task(), encoder, dataset.validation)
        cpu = gpu = None
        if config.cpu:
            cpu = quantise_cpu(fp32, judge, config, out / "int8-cpu.onnx", say=say)
        if config.gpu:
            gpu = quantise_gpu(
                fp32,
                [example.text for example in dataset.calibration],
                [example.text for example in dataset.validation],
                encoder,
                judge,
                config,
                fp16=out / "fp16-gpu.onnx",
                int8=out / "int8-gpu.onnx",
                on_progress=progress,
                say=say,
            )
        return Quantisation(cpu=cpu, gpu=gpu)

    stage = build.stage("quantise", key, what, produce)
    return Quantised(_variants(stage), build.result(stage, Quantisation), stage)


def _variants(stage: Path) -> dict[str, VariantSource]:
    """The models that the stage wrote; what missed its budget is not there."""
    found = {
        "int8-cpu": VariantSource(OnnxModel(stage / "int8-cpu.onnx", "int8"), ("cpu",)),
        "int8-gpu": VariantSource(OnnxModel(stage / "int8-gpu.onnx", "int8"), ("tensorrt", "rtx")),
        "fp16-gpu": VariantSource(OnnxModel(stage / "fp16-gpu.onnx", "fp16"), ("tensorrt", "rtx")),
    }
    return {name: source for name, source in found.items() if source.model.path.is_file()}
