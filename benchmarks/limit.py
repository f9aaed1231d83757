"""What a model's matrix products need, and how fast this machine multiplies matrices.

Usage: python benchmarks/limit.py SHAPES   (JSON: [[inner, columns, count], ...])

Prints operations per second in FP32 and INT8, for products of 4096 rows (32 texts of 128 tokens)
by constant matrices of these shapes. The quickest of the libraries that are installed counts:
PyTorch (oneDNN) and ONNX Runtime. ``speed.py`` runs it in every round, in a process of its own.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

ROWS = 32 * 128
REPEATS = 7

Products = Counter[tuple[bool, int, int, int]]
"""How often a model multiplies: whether by a constant, rows, inner size, columns."""


def count_products(model: Path, length: int) -> Products:
    """Lists the products of one text of ``length`` tokens, as ONNX Runtime's profile has them."""
    with tempfile.TemporaryDirectory() as directory:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = f"{directory}/profile"
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [spec.name for spec in session.get_inputs()]
        session.run(None, {name: np.ones((1, length), dtype=np.int64) for name in names})
        events = json.loads(Path(session.end_profiling()).read_text())
    found: Products = Counter()
    for event in events:
        node = event.get("args", {})
        if (
            node.get("op_name") in ("MatMul", "Gemm", "MatMulInteger")
            and "output_type_shape" in node
        ):
            first, *others = (shape for kind in node["input_type_shape"] for shape in kind.values())
            (result,) = node["output_type_shape"][0].values()
            constant = not others or len(others[0]) <= 2  # constants are packed, or matrices
            found[constant, math.prod(result[:-1]), first[-1], result[-1]] += 1
    return found


def operations(products: Products, *, constant: bool) -> int:
    """Counts multiplications and additions."""
    return sum(2 * math.prod(k[1:]) * n for k, n in products.items() if k[0] == constant)


def quickest_s(multiply: Callable[[], object]) -> float:
    """Times a product; the quickest of some calls after a first."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def with_torch(kind: str, inner: int, columns: int) -> float | None:
    """PyTorch's seconds; ``None`` where it cannot multiply integers."""
    import torch

    if kind == "fp32":
        left, right = torch.rand(ROWS, inner), torch.rand(inner, columns)
        return quickest_s(lambda: left @ right)
    whole = [torch.randint(-9, 9, s, dtype=torch.int8) for s in ((ROWS, inner), (inner, columns))]
    try:
        return quickest_s(lambda: torch._int_mm(*whole))
    except (AttributeError, RuntimeError):
        return None


def with_onnxruntime(kind: str, inner: int, columns: int) -> float:
    """ONNX Runtime's seconds; in INT8, unsigned activations by signed weights."""
    from onnx import helper, numpy_helper

    operator, left, right, out = {
        "fp32": ("MatMul", np.float32, np.float32, np.float32),
        "int8": ("MatMulInteger", np.uint8, np.int8, np.int32),
    }[kind]
    weight = numpy_helper.from_array(np.ones((inner, columns), dtype=right), "b")
    types = [helper.np_dtype_to_tensor_dtype(np.dtype(t)) for t in (left, out)]
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", types[0], (ROWS, inner))],
        [helper.make_tensor_value_info("c", types[1], (ROWS, columns))],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    array = np.ones((ROWS, inner), dtype=left)
    return quickest_s(lambda: session.run(None, {"a": array}))


def main(shapes: list[tuple[int, int, int]]) -> None:
    """Prints the rates as JSON."""
    rates = {}
    for kind in ("fp32", "int8"):
        seconds = 0.0
        for inner, columns, count in shapes:
            tried = (f(kind, inner, columns) for f in (with_torch, with_onnxruntime))
            seconds += count * min(found for found in tried if found is not None)
        needed = sum(2 * ROWS * inner * columns * count for inner, columns, count in shapes)
        rates[kind] = needed / seconds
    print(json.dumps(rates))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(json.loads(sys.argv[1]))
