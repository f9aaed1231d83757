"""Engines built ahead of time, with the real TensorRT-RTX: no GPU is needed for that."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgebert_export.engine as module
from edgebert_export.engine import build_rtx_engine, engine_profiles, rtx_or_reason
from edgebert_export.errors import ExportError, ModelError
from edgebert_export.to_onnx import OnnxModel
from edgebert_runtime.manifest import Profile
from edgebert_runtime.tensorrt_api import is_installed

needs_rtx = pytest.mark.skipif(
    not is_installed("rtx"), reason="tensorrt-rtx has no wheel for this machine"
)
SHAPES = (
    Profile(max_batch=1, opt_batch=1, max_seq=32, opt_seq=16),
    Profile(max_batch=8, opt_batch=8, max_seq=32, opt_seq=16),
)


@pytest.mark.parametrize(
    ("lengths", "max_length", "sizes", "expected"),
    [
        # most texts are short: their own profiles, and one for the rest
        (
            [10] * 90 + [20] * 8 + [100] * 2,
            128,
            (1, 32),
            [(1, 64, 16), (32, 64, 16), (32, 128, 128)],
        ),
        # the usual text is as long as any
        ([120] * 100, 128, (32, 1), [(1, 128, 120), (32, 128, 120)]),
        # longer than what the model takes: they are cut
        ([700] * 10, 60, (4,), [(4, 60, 60)]),
        ([3], 512, (8, 8), [(8, 64, 8), (8, 512, 512)]),
    ],
)
def test_shapes_follow_the_lengths_of_the_texts(
    lengths: list[int], max_length: int, sizes: tuple[int, ...], expected: list[tuple[int, ...]]
) -> None:
    found = engine_profiles(lengths, max_length, sizes)
    assert [(p.max_batch, p.max_seq, p.opt_seq) for p in found] == expected
    assert all(p.opt_batch == p.max_batch for p in found)
    assert max(p.max_seq for p in found) == max_length


@needs_rtx
def test_an_engine_is_built_without_a_gpu(
    onnx_models: dict[str, OnnxModel], tmp_path: Path
) -> None:
    here = rtx_or_reason()
    assert isinstance(here, tuple)
    steps: list[tuple[int, int]] = []
    out, log = tmp_path / "a.engine", tmp_path / "log"
    found = build_rtx_engine(
        "fp32",
        onnx_models["single"].path,
        SHAPES,
        out,
        version=here[0],
        platform=here[1],
        log=log,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert found.size_bytes == out.stat().st_size > 1000
    assert found.seconds > 0 and found.peak_bytes > 50e6
    assert steps and all(0 <= done <= total for done, total in steps)
    assert "Engine generation completed" in log.read_text()


@needs_rtx
def test_a_model_that_rtx_does_not_take_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(ModelError, match="int8-gpu: TensorRT does not take the model") as caught:
        _build(broken, tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "a.engine").exists()


@needs_rtx
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="No such file"):
        _build(tmp_path / "none.onnx", tmp_path)


@needs_rtx
def test_a_build_that_is_ended_is_an_error_that_names_the_log(
    onnx_models: dict[str, OnnxModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(ExportError, match=r"was ended \(status 1\).*log"):
        _build(onnx_models["single"].path, tmp_path)


def _build(model: Path, tmp_path: Path) -> None:
    build_rtx_engine(
        "int8-gpu",
        model,
        SHAPES,
        tmp_path / "a.engine",
        version="1",
        platform="linux-x86_64",
        log=tmp_path / "log",
    )
