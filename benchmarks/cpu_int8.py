"""ONNX Runtime's choices for dynamic INT8 on a CPU, on a finished build's model and test rows.

Usage: python benchmarks/cpu_int8.py RECIPE BUILD   (after edgebert export RECIPE --out BUILD)

Every choice is made from the build's FP32 model, answers the recipe's test rows through the
runtime, and is timed in the same run, turn by turn.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic

from edgebert_pipeline.data import load_dataset
from edgebert_pipeline.recipe import load_recipe
from edgebert_runtime.bench import measure
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.classifier import Classifier, encoder_for
from edgebert_runtime.onnx_session import OnnxSession

CHOICES: dict[str, dict[str, Any]] = {
    "per channel, embeddings too (ours)": {"per_channel": True, "gather": True},
    "per channel, embeddings in FP32": {"per_channel": True},
    "per channel, embeddings too, range reduced to 7 bits": {
        "per_channel": True,
        "gather": True,
        "reduce_range": True,
    },
    "per tensor, embeddings too": {"gather": True},
    "per tensor, embeddings too, range reduced to 7 bits": {"gather": True, "reduce_range": True},
}


def quantised(
    fp32: bytes, per_channel: bool = False, reduce_range: bool = False, gather: bool = False
) -> bytes:
    """Returns the model, quantised by ONNX Runtime."""
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "fp32.onnx", Path(directory) / "int8.onnx"
        source.write_bytes(fp32)
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"] + (["Gather"] if gather else []),
            per_channel=per_channel,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
        )
        return target.read_bytes()


def main(recipe_path: Path, build: Path) -> None:
    """Prints a Markdown table."""
    logging.disable(logging.WARNING)
    dataset, _ = load_dataset(load_recipe(recipe_path).data, recipe_path.parent)
    texts = [example.text for example in dataset.test]
    bundle = Bundle.open(build / "bundle")
    fp32 = bundle.read("models/fp32.onnx")
    models = {"FP32": fp32} | {name: quantised(fp32, **how) for name, how in CHOICES.items()}
    task, encoder = bundle.manifest.task, encoder_for(bundle)
    classifiers = {n: Classifier(OnnxSession(m), encoder, task) for n, m in models.items()}
    answers = {name: classifier.predict(texts) for name, classifier in classifiers.items()}
    timings = measure(classifiers, texts[:200], repeats=5)
    print("| choice | MB | accuracy | predictions changed | p50 ms | texts/s |")
    print("|---|---|---|---|---|---|")
    for name, timing in timings.items():
        right = sum(
            answer.labels == tuple(task.labels[index] for index in example.labels)
            for answer, example in zip(answers[name], dataset.test, strict=True)
        )
        pairs = zip(answers[name], answers["FP32"], strict=True)
        flips = sum(one.labels != other.labels for one, other in pairs)
        print(
            f"| {name} | {len(models[name]) / 1e6:.1f} | {right / len(texts):.4f} | "
            f"{flips} ({flips / len(texts):.1%}) | {timing.latency_p50_ms:.2f} | "
            f"{timing.throughput_texts_per_s:.0f} |"
        )
    print(f"\n{len(texts)} test rows; ONNX Runtime {onnxruntime.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
