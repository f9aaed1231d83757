"""Engines built ahead of time, through a recipe: in the bundle, or left out aloud."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgebert_pipeline.engines as module
from edgebert_export.engine import EngineConfig
from edgebert_export.to_onnx import OnnxModel
from edgebert_export.write_bundle import VariantSource
from edgebert_pipeline.engines import EngineLog, run_engines
from edgebert_pipeline.markdown import render_parts
from edgebert_pipeline.report import Report
from edgebert_pipeline.report_html import render_html
from edgebert_pipeline.report_markdown import render_markdown
from edgebert_pipeline.run import export
from edgebert_pipeline.sections.made import engine_parts
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.engine import bundled_keys
from edgebert_runtime.manifest import Profile
from edgebert_runtime.tensorrt_api import is_installed

needs_rtx = pytest.mark.skipif(
    not is_installed("rtx"), reason="tensorrt-rtx has no wheel for this machine"
)
SHAPES = (Profile(max_batch=4, opt_batch=4, max_seq=64, opt_seq=16),)
# Heads of 8 numbers are too small for TensorRT to fuse attention, which is no reason not to ship.
ALWAYS = '[engine]\nrtx = "always"\naudit = "report"'


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Report]]:
    """Returns a function that builds a recipe with engines, once for all tests here."""
    out = tmp_path_factory.mktemp("engines") / "out"
    found: list[Report] = []

    def build(write_recipe: Callable[..., Path]) -> tuple[Path, Report]:
        if not found:
            report = export(write_recipe("single", ALWAYS), out)
            assert report is not None
            found.append(report)
        return out, found[0]

    return build


@needs_rtx
def test_the_bundle_brings_engines_of_both_variants(built, write_recipe) -> None:
    out, report = built(write_recipe)
    bundle = Bundle.open(out / "bundle")
    bundle.verify()
    assert [engine.variant for engine in bundle.manifest.engines] == ["int8-gpu", "fp16-gpu"]
    hashes = {key.model_sha256 for key in bundled_keys(bundle.manifest)}
    models = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    assert hashes == {models["models/int8-gpu.onnx"], models["models/fp16-gpu.onnx"]}
    sizes = {entry.path: entry.size_bytes for entry in bundle.manifest.files}
    for found in report.engines.built:
        assert sizes[f"engines/{found.variant}-rtx.engine"] == found.size_bytes
        assert found.peak_bytes > found.model_bytes and found.seconds > 0
        assert found.audit is not None and found.audit.wrong_numbers() == ()
    assert report.engines.profiles == bundle.manifest.profiles
    assert report.engines.skipped is None and "engine" in report.stages


@needs_rtx
def test_the_report_tells_what_was_built_and_that_it_was_not_run(built, write_recipe) -> None:
    _, report = built(write_recipe)
    page = render_markdown(report)
    section = page.partition("## Engines")[2].partition("\n## ")[0]
    assert "without a GPU; not run on one" in " ".join(section.split())
    assert "| int8-gpu |" in section and "| fp16-gpu |" in section
    assert "attentions fused" in section and "No GPU has run any of it" in section
    assert "fp16-gpu: 1 of 2 attentions are fused" in section
    html = render_html(report)
    assert "attentions fused" in html and "No GPU has run any of it" in html


@needs_rtx
def test_a_second_run_builds_no_engine_again(built, write_recipe, edgebert) -> None:
    out, _ = built(write_recipe)
    before = (out / "bundle" / "manifest.json").read_bytes()
    done = edgebert("export", write_recipe("single", ALWAYS), "--out", out)
    assert done.returncode == 0, done.stderr
    assert "engine: reused" in done.stderr
    assert (out / "bundle" / "manifest.json").read_bytes() == before


def sources(tmp_path: Path, *devices: str) -> dict[str, VariantSource]:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"model")
    return {"int8-gpu": VariantSource(OnnxModel(path, "int8"), devices)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rtx", "here", "devices", "said"),
    [
        ("never", ("1.7", "linux-x86_64"), ("tensorrt", "rtx"), "the recipe says so"),
        ("auto", "tensorrt_rtx is not installed", ("tensorrt", "rtx"), "is not installed"),
        ("auto", ("1.7", "linux-x86_64"), ("cpu",), "no variant is for TensorRT"),
    ],
)
def test_engines_that_are_left_out_are_left_out_with_a_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rtx: Any,
    here: Any,
    devices: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setattr(module, "rtx_or_reason", lambda: here)
    lines: list[str] = []
    nothing: Any = None
    found = run_engines(
        nothing, EngineConfig(rtx=rtx), sources(tmp_path, *devices), SHAPES, say=lines.append
    )
    assert found.sources == () and found.stage is None
    assert found.log.skipped is not None and said in found.log.skipped
    assert said in lines[0]
    told = render_parts(engine_parts(found.log))
    assert said in told and "1 to 64" in told


def test_a_recipe_that_insists_is_refused_before_all_the_rest(
    write_recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "rtx_or_reason", lambda: "tensorrt_rtx is not installed")
    recipe = write_recipe("single", ALWAYS)
    with pytest.raises(Exception, match=r'engine.rtx = "always": tensorrt_rtx is not installed'):
        export(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / ".stages").exists()


def test_an_odd_choice_is_one_line(write_recipe, edgebert, fails_cleanly, tmp_path: Path) -> None:
    recipe = write_recipe("single", "[engine]\nbatch_sizes = []")
    done = edgebert("export", recipe, "--out", tmp_path / "out")
    assert "batch_sizes" in fails_cleanly(done)


def test_the_log_of_engines_is_in_the_report_as_json() -> None:
    log = EngineLog(profiles=SHAPES, skipped="no")
    import msgspec

    assert json.loads(msgspec.json.encode(log))["skipped"] == "no"


@needs_rtx
def test_a_run_killed_while_it_builds_engines_goes_on(
    built, write_recipe, edgebert, start_edgebert
) -> None:
    out, report = built(write_recipe)
    recipe = write_recipe("single", ALWAYS)
    process = start_edgebert(
        *("export", recipe, "--out", out, "--force", "engine"), stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("engine: "):
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    Bundle.open(out / "bundle").verify()  # the one that was there
    done = edgebert("export", recipe, "--out", out)
    assert done.returncode == 0, done.stderr
    bundle = Bundle.open(out / "bundle")
    bundle.verify()
    assert [engine.variant for engine in bundle.manifest.engines] == ["int8-gpu", "fp16-gpu"]
    assert report.passed
