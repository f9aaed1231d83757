"""Quantises an ONNX model for ONNX Runtime's CPU kernels: FP32 OnnxModel in, INT8 OnnxModel out."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx

from edgebert_export.closed_loop import Fit, fit
from edgebert_export.fidelity import Judge
from edgebert_export.graph import find_products, open_graph, write_graph
from edgebert_export.quantise import LayerKind, QuantiseConfig, included
from edgebert_export.to_onnx import OnnxModel
from edgebert_runtime.onnx_session import SLOWER_FUSED

__all__ = ["dynamic_int8", "quantise_cpu", "with_fusions"]


def quantise_cpu(
    model: OnnxModel,
    judge: Judge,
    config: QuantiseConfig,
    out: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Writes ``model`` with linear layers (and embeddings) in 8 bits for a CPU.

    Linear layers: signed, symmetric, one scale per output channel, which changes far fewer
    predictions than one per tensor (docs/decisions/0005). Embedding tables: unsigned, one scale
    per table, which is all that ONNX Runtime's quantiser makes of a ``Gather``. Products of two
    activations, inside attention, stay in FP32. Layers go back to FP32 until the budget fits.
    ONNX Runtime's fusions are in the file already, so that no start spends time on them.

    Args:
        model: In FP32.
        judge: Of ``model``, by validation rows.
        config: What to quantise, and the budget.
        out: The file to write; it is not written if nothing fits the budget.
        say: Called with what was found and decided.

    Raises:
        ModelError: ``model`` has no linear layer, or is quantised already.
    """
    kinds: list[LayerKind] = ["linear", "head"]
    if config.embeddings:
        kinds.append("embedding")
    graph = open_graph(model.path)
    products = included(find_products(graph), kinds, config.exclude)
    nodes = {product.name: product.node for product in products}
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "fp32.onnx"
        write_graph(graph, source)  # the graph in which these are the names

        def build(names: frozenset[str]) -> bytes:
            return with_fusions(
                dynamic_int8(source, [nodes[name] for name in nodes if name in names])
            )

        found = fit(
            list(nodes),
            build,
            judge,
            config.budget,
            sensitivity=config.sensitivity,
            say=lambda line: say(f"int8-cpu: {line}"),
        )
        if found.fits:
            out.write_bytes(build(frozenset(found.quantised)))
        else:
            say("int8-cpu: none of the sets of layers that were tried fits the budget")
    return found


def dynamic_int8(path: Path, nodes: Sequence[str], *, per_channel: bool = True) -> bytes:
    """Quantises the weights of ``nodes`` with ONNX Runtime; activations, while running.

    Args:
        path: The FP32 model.
        nodes: Names of products by a weight, and of look-ups in a table; at least one.
        per_channel: Whether a linear layer has a scale per output channel, or one.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    assert nodes  # of no nodes, ONNX Runtime makes all
    with tempfile.TemporaryDirectory() as directory, _quiet():
        out = Path(directory) / "int8.onnx"
        quantize_dynamic(
            path,
            out,
            op_types_to_quantize=["MatMul", "Gather"],
            nodes_to_quantize=list(nodes),
            per_channel=per_channel,
            reduce_range=False,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        return out.read_bytes()


def with_fusions(model: bytes, *, left_out: Sequence[str] = SLOWER_FUSED["cpu"]) -> bytes:
    """Returns a model with ONNX Runtime's fusions for CPUs of every kind, as a session has them.

    Args:
        model: An ONNX file's bytes.
        left_out: Fusions that are not made; by default, those that a session leaves out.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "fused.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(out)
        onnxruntime.InferenceSession(
            model,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(left_out),
        )
        fused = onnx.load(out)
    used = {node.domain for node in fused.graph.node}
    domains = [entry for entry in fused.opset_import if entry.domain in used]
    del fused.opset_import[:]
    fused.opset_import.extend(domains)
    data: bytes = fused.SerializeToString(deterministic=True)
    return data


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps ONNX Runtime from recommending its own pre-processing on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
