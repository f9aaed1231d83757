"""FP32 written for other kernels of a CPU answers nearly as before, and is what it says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgebert_export.cpu_kernels import CANDIDATES, CpuKernels, write_for
from edgebert_export.errors import ExportError, ModelError
from edgebert_runtime.manifest import Variant
from edgebert_runtime.onnx_session import OnnxSession

KERNELS = pytest.mark.parametrize("kernels", CANDIDATES, ids=lambda kernels: kernels.name)


def logits(model: bytes) -> Any:
    session = OnnxSession(model, intra_op_threads=1)
    ids = np.random.default_rng(0).integers(5, 100, (16, 24))
    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    found = session.run({name: known[name] for name in session.input_names})["logits"]
    session.close()
    return found


@pytest.mark.parametrize("task", ["single", "multi", "pairs"])
@KERNELS
def test_answers_stay_close_to_fp32(kernels: CpuKernels, onnx_models, task: str) -> None:
    path = onnx_models[task].path
    before, after = logits(path.read_bytes()), logits(write_for(kernels, path))
    if kernels.precision == "fp32":
        np.testing.assert_allclose(after, before, atol=1e-4)
    else:
        assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.95


@KERNELS
def test_a_model_holds_the_kernels_that_it_is_written_for(kernels: CpuKernels, onnx_models) -> None:
    model = onnx.load_from_string(write_for(kernels, onnx_models["single"].path))
    count = Counter(node.op_type for node in model.graph.node)
    dynamic = (
        count["DynamicQuantizeMatMul"] + count["MatMulIntegerToFloat"] + count["MatMulInteger"]
    )
    layers = 2 * 6 + 2  # of each of two blocks, the pooler and the head
    expected = {"fp32": (0, 0), "blocks": (0, layers)}.get(kernels.products, (layers, 0))
    assert (dynamic, count["MatMulNBits"]) == expected
    blocks = [
        attribute.i
        for node in model.graph.node
        for attribute in node.attribute
        if node.op_type == "MatMulNBits" and attribute.name == "block_size"
    ]
    assert set(blocks) == ({kernels.block} if kernels.block else set())
    if kernels.precision == "int8":
        assert (count["SkipLayerNormalization"] > 0) == kernels.fused_norms
        tables = [t for t in model.graph.initializer if list(t.dims)[1:] == [32] and t.dims[0] > 64]
        assert tables and all(t.data_type == onnx.TensorProto.UINT8 for t in tables)


def test_scales_are_per_channel_or_per_tensor(onnx_models) -> None:
    found = {}
    for products in ("per-channel", "per-tensor"):
        data = write_for(CpuKernels(products), onnx_models["single"].path)  # type: ignore[arg-type]
        model = onnx.load_from_string(data)
        sizes = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
        found[products] = {
            sizes[node.input[2]]
            for node in model.graph.node
            if node.op_type == "DynamicQuantizeMatMul"
        }
    assert found["per-tensor"] == {1}
    assert found["per-channel"] == {2, 32, 64}  # the head has two labels


def test_the_same_model_gives_the_same_bytes(onnx_models) -> None:
    for kernels in CANDIDATES[2::4]:
        path = onnx_models["single"].path
        assert write_for(kernels, path) == write_for(kernels, path)


def test_names_are_distinct_and_fit_a_bundle() -> None:
    names = [kernels.name for kernels in CANDIDATES]
    assert len(set(names)) == len(names)
    for kernels in CANDIDATES:
        Variant(
            name=kernels.name,
            model=f"models/{kernels.name}.onnx",
            precision=kernels.precision,
            devices=("cpu",),
        )


def test_what_is_quantised_already_is_refused(onnx_models, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    path.write_bytes(write_for(CpuKernels("per-channel"), onnx_models["single"].path))
    with pytest.raises(ModelError, match="quantised already"):
        write_for(CpuKernels("per-tensor"), path)


def test_what_onnx_runtime_cannot_do_is_said(onnx_models) -> None:
    with pytest.raises(ExportError, match="int8-cpu-blocks-7 cannot be made"):
        write_for(CpuKernels("blocks", 7), onnx_models["single"].path)
