"""Smoothing's strength and the weights' rounding, and the kernels that TensorRT makes of it.

Usage: python benchmarks/int8_choices.py RECIPE BUILD [MODEL]   (after edgebert export)

Divergence from FP32 on up to 400 validation rows, for each calibrator and strength, all linear
layers in INT8; the same at the strength that is used, for both ways to round weights, and with
weights alone in INT8. Then, where tensorrt-rtx is installed, the kernels that it builds without a
GPU.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
from finished_build import FinishedModel
from numpy.typing import NDArray

from edgebert_export.attention import scale_queries
from edgebert_export.calibrate import CALIBRATORS, TensorStatistics, calibrate, threshold
from edgebert_export.emulate import emulate
from edgebert_export.fidelity import Judge
from edgebert_export.graph import Product, find_products, open_graph, write_graph
from edgebert_export.precision import to_half
from edgebert_export.qdq import activation_scale, insert_qdq
from edgebert_export.rounding import round_layers
from edgebert_export.smooth import STRENGTH, smooth
from edgebert_pipeline.markdown import table
from edgebert_runtime.encoder import Encoded, TextEncoder

STRENGTHS = (0.5, 0.65, 0.8, 0.85, 0.9, 1.0)
ROWS, TEXTS, PERCENTILE = 400, 256, 99.99


def linear_layers(graph: ir.Model) -> list[Product]:
    """The linear layers of a graph, without its head."""
    products = find_products(graph)
    return [product for product in products if product.kind == "linear" and not product.head]


def watch(
    graph: ir.Model, rows: list[Encoded], encoder: TextEncoder
) -> dict[str, TensorStatistics]:
    """Calibrates what the linear layers read."""
    operands = [operand for layer in linear_layers(graph) for operand in layer.operands]
    return calibrate(graph, operands, rows, encoder)


def quantised(
    graph: ir.Model,
    seen: dict[str, TensorStatistics],
    calibrator: str,
    steps: dict[str, NDArray[np.int8]] | None = None,
) -> ir.Model:
    """All linear layers in INT8, FP16 elsewhere; weights rounded to ``steps`` if given."""
    scales = {
        name: activation_scale(threshold(found.histogram, calibrator, PERCENTILE))  # type: ignore[arg-type]
        for name, found in seen.items()
    }
    return emulate(to_half(insert_qdq(graph, linear_layers(graph), scales, steps)))


def weights_alone(graph: ir.Model, steps: dict[str, NDArray[np.int8]]) -> ir.Model:
    """The weights of all linear layers in INT8, FP16 elsewhere."""
    layers = [dataclasses.replace(layer, operands=()) for layer in linear_layers(graph)]
    return emulate(to_half(insert_qdq(graph, layers, {}, steps)))


def kernels(graph: ir.Model, work: Path) -> str:
    """What the builder of TensorRT for RTX says of the engine that it makes."""
    try:
        import tensorrt_rtx as trt
    except ImportError:
        return "tensorrt-rtx is not installed"

    class Listener(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.text = ""

        def log(self, severity: object, message: str) -> None:
            self.text += message + "\n"

    write_graph(graph, work / "engine.onnx")
    listener = Listener()
    builder = trt.Builder(listener)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, listener)
    if not parser.parse_from_file(str(work / "engine.onnx")):
        return f"refused: {parser.get_error(0).desc()}"
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        profile.set_shape(network.get_input(index).name, (1, 8), (8, 64), (32, 128))
    config.add_optimization_profile(profile)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    builder.build_serialized_network(network, config)
    lines = [line for line in listener.text.splitlines() if line.startswith("Name: ")]
    built = [line for line in lines if "LayerType: " in line]
    attention = sum("mha" in line.split(",")[0] for line in built)
    return f"{len(built)} kernels, {attention} of them fused attention"


def main(recipe_path: Path, build: Path, which: str | None) -> None:
    """Prints a Markdown table, and one line for each engine."""
    logging.disable(logging.WARNING)
    model = FinishedModel.of(recipe_path, build, which)
    dataset, encoder = model.dataset, model.encoder
    rows = encoder.encode([example.text for example in dataset.calibration[:TEXTS]])
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        fp32 = model.export(work)
        judge = Judge(fp32.read_bytes(), dataset.task, encoder, dataset.validation).part(ROWS)
        graph = open_graph(fp32)
        graph = scale_queries(graph, find_products(graph))
        plain = watch(graph, rows, encoder)
        forms = {"none": (graph, plain)}
        for strength in STRENGTHS:
            smoothed = smooth(graph, linear_layers(graph), plain, strength=strength)
            forms[f"{strength}"] = (smoothed, watch(smoothed, rows, encoder))
        lines = []
        for strength_name, (form, seen) in forms.items():
            found = [judge.judge(quantised(form, seen, c)) for c in CALIBRATORS]
            lines.append((strength_name, *(f"{f.distance:.2g} ({f.flips})" for f in found)))
            print(" | ".join(lines[-1]), file=sys.stderr, flush=True)
        print(f"{model.name}: divergence (flips) on {judge.rows} validation rows\n")
        print(table(("strength", *CALIBRATORS), lines))
        form, seen = forms[f"{STRENGTH}"]
        lines = []
        for name, steps in {
            "nearest": {},
            "gptq": round_layers(form, linear_layers(form), rows, encoder),
        }.items():
            models = [quantised(form, seen, c, steps) for c in CALIBRATORS]
            found = [judge.judge(m) for m in (*models, weights_alone(form, steps))]
            lines.append((name, *(f"{f.distance:.2g} ({f.flips})" for f in found)))
        print("\n" + table((f"rounding, at {STRENGTH}", *CALIBRATORS, "weights alone"), lines))
        print(f"\nFP16: {kernels(to_half(graph), work)}")
        print(f"INT8: {kernels(quantised(*forms['none'], 'max'), work)}")
        print(f"INT8, smoothed: {kernels(quantised(*forms[f'{STRENGTH}'], 'max'), work)}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) == 4 else None)
