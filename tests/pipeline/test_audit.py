"""The audit as a user meets it: a stage that refuses an engine, and two commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgebert_export.audit import Audit
from edgebert_export.engine import EngineConfig
from edgebert_export.errors import ExportError
from edgebert_export.to_onnx import OnnxModel
from edgebert_export.write_bundle import VariantSource
from edgebert_pipeline.build import BuildDirectory
from edgebert_pipeline.engines import REFUSED, run_engines
from edgebert_pipeline.markdown import render_parts
from edgebert_pipeline.progress import Reporter
from edgebert_pipeline.sections.audit import audit_parts
from edgebert_runtime.manifest import Profile
from edgebert_runtime.tensorrt_api import is_installed

needs_rtx = pytest.mark.skipif(
    not is_installed("rtx"), reason="tensorrt-rtx has no wheel for this machine"
)
SHAPES = (Profile(max_batch=4, opt_batch=4, max_seq=64, opt_seq=16),)


@needs_rtx
def test_a_stage_refuses_an_engine_and_keeps_what_the_compiler_said(
    typed_models: dict[str, Path], tmp_path: Path
) -> None:
    def variants(int8: str) -> dict[str, VariantSource]:
        return {
            "int8-gpu": VariantSource(OnnxModel(typed_models[int8], "int8"), ("rtx",)),
            "fp16-gpu": VariantSource(OnnxModel(typed_models["fp16"], "fp16"), ("rtx",)),
        }

    kept = tmp_path / "out" / REFUSED
    for config in (EngineConfig(), EngineConfig(audit="report")):
        with (
            BuildDirectory(tmp_path / "out", Reporter()) as build,
            pytest.raises(ExportError, match="scaled after they are stored as FP16") as caught,
        ):
            run_engines(build, config, variants("channels"), SHAPES, say=print)
        said = str(caught.value)
        assert said.startswith("int8-gpu: ") and "\n" not in said and "fp16-gpu" not in said
        assert str(kept) in said and caught.value.exit_code == 1
        assert "LayerType: gemm" in (kept / "int8-gpu.kernels.log").read_text()
        assert not list(kept.glob("*.engine"))
    with BuildDirectory(tmp_path / "out", Reporter()) as build:
        engines = run_engines(build, EngineConfig(), variants("tensor"), SHAPES, say=print)
    assert [found.audit.verdict for found in engines.log.built if found.audit] == ["fine"] * 2
    assert len(engines.sources) == 2 and not kept.exists()


@needs_rtx
def test_the_command_says_what_is_fine(typed_models: dict[str, Path], edgebert: Any) -> None:
    done = edgebert("audit", typed_models["tensor"], typed_models["fp16"], "--tokens", "64")
    assert done.returncode == 0, done.stderr
    assert "| tensor | fine  | 19 of 19 " in done.stdout and "| fp16   | fine " in done.stdout
    assert "No GPU has run any of it" in " ".join(done.stdout.split())


@needs_rtx
def test_the_command_refuses_and_still_says_it_all(
    typed_models: dict[str, Path], edgebert: Any
) -> None:
    done = edgebert("audit", typed_models["channels"], "--json", "--tokens", "64")
    assert done.returncode == 3
    (found,) = json.loads(done.stdout)
    assert found["verdict"] == "refused" and len(found["audit"]["products"]) == 19
    assert {product["scale"] for product in found["audit"]["products"]} == {"after"}
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "channels is refused" in errors[0]


@needs_rtx
def test_what_is_not_understood_ends_with_another_code(
    typed_models: dict[str, Path], edgebert: Any, tmp_path: Path
) -> None:
    model = onnx.load(typed_models["fp16"])
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "nameless.onnx")
    done = edgebert("audit", tmp_path / "nameless.onnx", "--tokens", "64")
    assert done.returncode == 1
    assert "not understood" in done.stdout and "a product has no name" in done.stderr


def test_files_that_cannot_be_audited_are_one_line(
    typed_models: dict[str, Path], tmp_path: Path, edgebert: Any, fails_cleanly: Callable[..., str]
) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    fixed = onnx.load(typed_models["fp16"])
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(fixed, tmp_path / "fixed.onnx")
    apart = onnx.load(typed_models["fp16"])
    onnx.save(apart, tmp_path / "apart.onnx", save_as_external_data=True, size_threshold=0)
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name, said in (
        ("text", "is not an ONNX model"),
        ("fixed", "the input input_ids is 1 x "),
        ("apart", "keeps weights in other files"),
        ("none", "No such file"),
        ("empty", "has no inputs"),
    ):
        done = edgebert("audit", tmp_path / f"{name}.onnx")
        assert said in fails_cleanly(done)


def test_a_bundle_without_models_for_engines_is_one_line(
    tiny_bundles: dict[str, Path], edgebert: Any, fails_cleanly: Callable[..., str]
) -> None:
    done = edgebert("engine", tiny_bundles["single"], "--audit")
    assert "no variant that engines are built from" in fails_cleanly(done)
    done = edgebert("engine", tiny_bundles["single"], "--audit", "--variant", "fp32")
    assert "no engine is built from fp32" in fails_cleanly(done)
    done = edgebert("engine", tiny_bundles["single"], "--audit", "--flavour", "tensorrt")
    assert "leave --flavour out" in fails_cleanly(done)


def test_the_report_never_calls_fine_what_is_not_understood() -> None:
    told = render_parts(audit_parts({"int8-gpu": Audit(not_understood="the log is empty")}))
    assert "| int8-gpu | not understood |" in told and "fine" not in told
    assert "int8-gpu is not understood: the log is empty." in told
