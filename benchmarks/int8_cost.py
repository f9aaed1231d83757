"""What quantising for TensorRT costs: time and memory of a bert-base, memory of calibrating.

Usage: python benchmarks/int8_cost.py RECIPE

A BERT of bert-base's size with random weights is exported and quantised on 128 of the recipe's
calibration texts, judged by 128 validation rows and by up to 1,000, with everything else as by
default but the budget, which random weights would miss. A BERT of the size of all-MiniLM-L6 is
calibrated on 256 and on 4,096 texts. Each in a process of its own, whose peak memory the system
reports.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from edgebert_export.calibrate import calibrate
from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_tokenizer,
    open_checkpoint,
    save_checkpoint,
)
from edgebert_export.fidelity import Budget, Judge
from edgebert_export.graph import find_products, open_graph
from edgebert_export.quantise import QuantiseConfig
from edgebert_export.quantise_gpu import quantise_gpu
from edgebert_export.to_onnx import ExportConfig, OnnxModel, to_onnx
from edgebert_pipeline.data import load_dataset
from edgebert_pipeline.fetch import fetch_checkpoint
from edgebert_pipeline.recipe import load_recipe
from edgebert_runtime.encoder import TextEncoder

TEXTS = 128
SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


def random_bert(recipe_path: Path, work: Path, shape: dict[str, int]) -> None:
    """Exports a BERT with random weights and the recipe's tokenizer to ``work``."""
    recipe = load_recipe(recipe_path)
    source = open_checkpoint(fetch_checkpoint(recipe.model, recipe_path.parent))
    labels = recipe.data.labels
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=source.architecture.vocab_size,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        **shape,
    )
    model = BertForSequenceClassification(config).eval()
    checkpoint = save_checkpoint(model, load_tokenizer(source), work / "checkpoint")
    to_onnx(checkpoint, recipe.data.as_task(None), ExportConfig(), work / "fp32.onnx")


def encoder_of(checkpoint: Checkpoint, model: OnnxModel) -> TextEncoder:
    """Makes the inputs of an exported model, of single texts."""
    return checkpoint_encoder(
        checkpoint, max_length=128, text_pair=False, input_names=model.input_names()
    )


def quantise(recipe_path: Path, work: Path, count: int) -> str:
    """Quantises the model in ``work``, judged by up to ``count`` validation rows."""
    dataset, _ = load_dataset(load_recipe(recipe_path).data, recipe_path.parent)
    checkpoint: Checkpoint = open_checkpoint(work / "checkpoint")
    model = OnnxModel(work / "fp32.onnx", "fp32")
    encoder = encoder_of(checkpoint, model)
    start = time.monotonic()
    validation = dataset.validation[:count]
    judge = Judge(open_graph(model.path), dataset.task, encoder, validation)
    log = quantise_gpu(
        model,
        [example.text for example in dataset.calibration],
        [example.text for example in validation],
        encoder,
        judge,
        QuantiseConfig(
            calibration_texts=TEXTS, budget=Budget(max_accuracy_drop=1.0, max_flip_rate=1.0)
        ),
        fp16=work / "fp16.onnx",
        int8=work / "int8.onnx",
    )
    sizes = [f"{(work / name).stat().st_size / 1e6:.0f}" for name in ("fp32.onnx", "int8.onnx")]
    return (
        f"{log.linear_int8} of {log.linear_layers} linear layers, {log.texts.texts} calibration "
        f"texts, {judge.rows} validation rows, {len(log.trials)} candidates: "
        f"{time.monotonic() - start:.0f} s; {sizes[0]} MB -> {sizes[1]} MB"
    )


def calibrate_on(recipe_path: Path, work: Path, count: int) -> str:
    """Calibrates the model in ``work`` on ``count`` texts."""
    dataset, _ = load_dataset(load_recipe(recipe_path).data, recipe_path.parent)
    model = OnnxModel(work / "fp32.onnx", "fp32")
    encoder = encoder_of(open_checkpoint(work / "checkpoint"), model)
    rows = encoder.encode([example.text for example in dataset.calibration[:count]])
    graph = open_graph(model.path)
    linear = [product for product in find_products(graph) if product.kind == "linear"]
    operands = [operand for product in linear for operand in product.operands]
    start = time.monotonic()
    found = calibrate(graph, operands, rows, encoder)
    return f"{len(rows)} texts, {len(found)} activations: {time.monotonic() - start:.0f} s"


def alone(what: str, job: Callable[..., str | None], *args: object) -> None:
    """Runs a job in a new process and prints what it says, and its peak memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        said, peak = pool.apply(_with_peak, (job, *args))
    if said is not None:
        print(f"{what}: {said}; peak {peak / 1e6:.0f} MB", flush=True)


def _with_peak(job: Callable[..., str | None], *args: object) -> tuple[str | None, float]:
    said = job(*args)
    return said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main(recipe: Path) -> None:
    """Prints one line for each measurement."""
    with tempfile.TemporaryDirectory() as directory:
        base, small = Path(directory) / "base", Path(directory) / "small"
        base.mkdir()
        small.mkdir()
        alone("", random_bert, recipe, small, SMALL)
        for count in (256, 4096):
            alone("calibrating, 6 layers of 384", calibrate_on, recipe, small, count)
        alone("", random_bert, recipe, base, BASE)
        for count in (TEXTS, 1000):
            alone("quantising, 12 layers of 768", quantise, recipe, base, count)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
