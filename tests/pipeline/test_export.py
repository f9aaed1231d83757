"""The whole chain on a tiny model: results, reuse, crashes, and two runs at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from warm import WarmProcess

from edgebert_pipeline import STAGES
from edgebert_pipeline.run import export
from edgebert_runtime import Classifier
from edgebert_runtime.bundle import Bundle

LEFT_OUT = ("teach", "distill", "ablate", "engine")  # by the recipes here
PLAIN = tuple(stage for stage in STAGES if stage not in LEFT_OUT)
"""The stages of a recipe that distils nothing."""


def read_report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


@pytest.fixture
def built(
    write_recipe, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, edgebert
) -> tuple[Path, Path, str]:
    """A finished run of the ``single`` recipe: recipe, build directory, and what it printed.

    Built once and copied for each test, which shows, too, that a build directory can be moved.
    """
    recipe, out = write_recipe(), tmp_path / "built"
    master = tmp_path_factory.getbasetemp() / "built-once"
    if not master.exists():
        done = edgebert("export", recipe, "--out", master)
        assert done.returncode == 0, done.stderr
        (master / "stdout").write_text(done.stdout)
    shutil.copytree(master, out)
    printed = (out / "stdout").read_text()
    (out / "stdout").unlink()
    return recipe, out, printed


def stage_directories(out: Path) -> set[str]:
    return {path.name for path in (out / ".stages").iterdir()}


@pytest.mark.parametrize("task", ["single", "multi", "pairs"])
def test_a_recipe_becomes_a_bundle_that_the_runtime_serves(
    write_recipe, tmp_path: Path, texts_for, task: str
) -> None:
    out = tmp_path / "out"
    report = export(write_recipe(task), out)
    assert report is not None
    variants = [v.full_name for v in report.evaluation.variants]
    assert variants == ["int8-cpu", "int8-gpu", "fp16-gpu", "fp32"]
    assert report.evaluation.reference("model").name == "fp32"
    assert report.evaluation.reference("model").flips == 0
    for variant in report.evaluation.variants:
        assert 0 <= variant.accuracy_low <= variant.accuracy <= variant.accuracy_high <= 1
        timing = variant.timing
        assert (timing is None) == ("cpu" not in variant.devices)
        if timing is not None:
            assert timing.latency_p99_ms >= timing.latency_p50_ms > 0
            assert timing.throughput_texts_per_s > 0
    assert report.models["model"].parity.max_difference <= 1e-4
    if task == "multi":  # its recipe says that they come from validation rows
        assert report.task.thresholds is not None
        assert len(report.task.thresholds) == 8
        assert set(report.task.thresholds) != {0.5}
    with Classifier.load(out / "bundle") as classifier:
        assert classifier.choice is not None
        assert classifier.choice.variant.name == "int8-cpu"
        predictions = classifier.predict(texts_for[task][:40])
    labels = set(report.task.labels)
    assert all(set(prediction.labels) <= labels for prediction in predictions)
    assert Bundle.open(out / "bundle").digest == report.bundle_digest
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    written = read_report(out)
    assert written["bundle_digest"] == report.bundle_digest
    assert stage_directories(out) == {
        name for name in stage_directories(out) if name.rpartition("-")[0] in STAGES
    }


def test_a_second_run_reuses_every_stage_and_changes_nothing(built, edgebert_afresh) -> None:
    recipe, out, printed = built
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name[0] != "."}
    second = edgebert_afresh("export", recipe, "--out", out)
    assert second.returncode == 0
    assert [f"{name}: reused" in second.stderr for name in PLAIN] == [True] * len(PLAIN)
    assert second.stdout == printed
    after = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name[0] != "."}
    assert after == before


def reused_stages(stderr: str) -> list[str]:
    return re.findall(r"^(\w+): reused$", stderr, flags=re.MULTILINE)


def test_a_changed_key_runs_only_what_depends_on_it(built, write_recipe, edgebert) -> None:
    _, out, _ = built
    changed = write_recipe(extra="[quantise]\nembeddings = false")
    done = edgebert("export", changed, "--out", out)
    assert done.returncode == 0
    assert reused_stages(done.stderr) == ["finetune", "onnx"]


def test_a_changed_limit_of_the_gate_measures_nothing_again(built, write_recipe, edgebert) -> None:
    _, out, _ = built
    done = edgebert("export", write_recipe(extra="[gate]\nmax_p99_ms = 1e6"), "--out", out)
    assert done.returncode == 0
    assert reused_stages(done.stderr) == list(PLAIN)
    assert [check["limit"] for check in read_report(out)["gate"]] == ["max_p99_ms"]


def test_force_runs_a_stage_again_and_until_stops_after_it(built, edgebert) -> None:
    recipe, out, _ = built
    done = edgebert("export", recipe, "--out", out, "--until", "quantise", "--force", "quantise")
    assert done.returncode == 0
    assert reused_stages(done.stderr) == ["finetune", "onnx"]
    assert "quantise: done" in done.stderr
    assert "bundle: " not in done.stderr
    assert done.stdout == ""


def test_a_classifier_with_the_right_labels_is_not_fine_tuned(
    write_recipe, tmp_path: Path, tiny_classifiers
) -> None:
    recipe = write_recipe()
    text = re.sub(
        r'path = "[^"]*encoder[^"]*"',
        f'path = "{tiny_classifiers["single"].path}"',
        recipe.read_text(),
    )
    recipe.write_text(text)
    report = export(recipe, tmp_path / "out")
    assert report is not None
    assert report.training is None
    assert "finetune" not in report.stages


def test_a_checkpoint_with_the_wrong_labels_is_refused(
    write_recipe, tmp_path: Path, tiny_classifiers, edgebert, fails_cleanly
) -> None:
    recipe = write_recipe()
    text = re.sub(
        r'path = "[^"]*encoder[^"]*"',
        f'path = "{tiny_classifiers["pairs"].path}"',
        recipe.read_text(),
    )
    recipe.write_text(text)
    error = fails_cleanly(edgebert("export", recipe, "--out", tmp_path / "out"))
    assert "3 labels (entails, contradicts, neutral)" in error
    assert "2 labels (negative, positive)" in error
    assert "finetune.mode" in error


def test_the_gate_refuses_with_3_and_what_it_refuses_is_not_called_bundle(
    built, write_recipe, edgebert
) -> None:
    recipe, out, _ = built
    good = Bundle.open(out / "bundle").digest
    strict = write_recipe(extra="[gate]\nmin_accuracy = 1.0\nmax_size_mb = 0.001")
    done = edgebert("export", strict, "--out", out, "--junit", strict.with_suffix(".xml"))
    assert done.returncode == 3, done.stderr
    breaches = [line for line in done.stderr.splitlines() if line.startswith("gate: ")]
    failures = ElementTree.parse(strict.with_suffix(".xml")).iter("failure")
    assert [failure.get("message") for failure in failures] == breaches
    assert any(re.search(r"min_accuracy allows 1, got 0\.\d+", line) for line in breaches)
    assert any(re.search(r"int8-cpu: max_size_mb allows 0\.001, got 0\.\d+", b) for b in breaches)
    assert not (out / "bundle").exists(), "what is refused now stayed as if it had passed"
    assert Bundle.open(out / "bundle.refused").digest == good
    assert "Gate refused" in (out / "report.md").read_text()

    lenient = strict.read_text()
    shutil.copytree(out / "bundle.refused", out / "bundle")  # of an earlier run that passed
    strict.write_text(lenient.replace("[quantise]", "[quantise]\nembeddings = false"))
    assert edgebert("export", strict, "--out", out).returncode == 3
    assert Bundle.open(out / "bundle").digest == good, "a refused build replaced another's bundle"
    assert Bundle.open(out / "bundle.refused").digest != good
    strict.write_text(lenient)

    recipe.write_text(recipe.read_text().replace("min_accuracy = 1.0\nmax_size_mb = 0.001", ""))
    assert edgebert("export", recipe, "--out", out).returncode == 0
    Bundle.open(out / "bundle").verify()
    assert not (out / "bundle.refused").exists()


def outcome(out: Path) -> tuple[str, list[tuple[str, int, int]]]:
    """What must be the same however often a run was interrupted."""
    report = read_report(out)
    variants = report["evaluation"]["variants"]
    return report["bundle_digest"], [(v["name"], v["correct"], v["flips"]) for v in variants]


def killed_when(process: WarmProcess, announced: str) -> str:
    """Kills ``process`` with SIGKILL once it says ``announced``; returns what it said."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith(announced):
            process.kill()
            break
    said += process.stderr.read()
    assert process.wait() == -signal.SIGKILL, said
    return said


def test_a_run_killed_in_every_stage_ends_with_the_same_result(
    built, tmp_path: Path, edgebert_afresh, start_edgebert
) -> None:
    recipe, whole, _ = built
    broken = tmp_path / "broken"
    for index, stage in enumerate(PLAIN):
        process = start_edgebert("export", recipe, "--out", broken, stderr=subprocess.PIPE)
        said = killed_when(process, f"{stage}: ")
        for finished_stage in PLAIN[: max(index - 1, 0)]:
            assert f"{finished_stage}: reused" in said
        for name in stage_directories(broken):
            assert name.startswith(("tmp-", "work-")) or name.rpartition("-")[0] in PLAIN[:index]
        assert not (broken / "bundle").exists()
    done = edgebert_afresh("export", recipe, "--out", broken)
    assert done.returncode == 0, done.stderr
    assert outcome(broken) == outcome(whole)
    assert not [name for name in stage_directories(broken) if name.startswith(("tmp-", "work-"))]


def test_fine_tuning_goes_on_where_it_was_killed(
    write_recipe, tmp_path: Path, edgebert, start_edgebert
) -> None:
    recipe = write_recipe(**{"epochs = 2": "epochs = 4"})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    until = ("--until", "finetune")
    assert edgebert("export", recipe, "--out", whole, *until).returncode == 0
    process = start_edgebert("export", recipe, "--out", broken, *until)
    deadline = time.monotonic() + 120
    while not list(broken.glob(".stages/work-*/checkpoint-*/edgebert-complete")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not list(broken.glob(".stages/finetune-*"))
    assert edgebert("export", recipe, "--out", broken, *until).returncode == 0
    weights = [
        hashlib.sha256(
            next(out.glob(".stages/finetune-*/checkpoint/model.safetensors")).read_bytes()
        )
        for out in (whole, broken)
    ]
    assert weights[0].digest() == weights[1].digest()


@pytest.fixture
def running(write_recipe, tmp_path: Path, start_edgebert) -> Iterator[tuple[Path, Path, int]]:
    """A run that holds its build directory: recipe, directory and process id."""
    recipe = write_recipe(**{"epochs = 2": "epochs = 6"})
    out = tmp_path / "shared"
    process = start_edgebert(
        *("export", recipe, "--out", out, "--until", "finetune"), stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("finetune: "):
            break
    yield recipe, out, process.pid
    process.kill()
    process.wait()


def test_a_second_run_at_once_stops_and_names_the_first(running, edgebert, fails_cleanly) -> None:
    recipe, out, pid = running
    error = fails_cleanly(edgebert("export", recipe, "--out", out), code=1)
    assert f"in use by process {pid} on " in error


def test_a_second_run_that_waits_goes_on_when_the_first_is_gone(running, start_edgebert) -> None:
    recipe, out, pid = running
    second = start_edgebert(
        *("export", recipe, "--out", out, "--until", "finetune", "--wait"), stderr=subprocess.PIPE
    )
    assert second.stderr is not None
    for line in second.stderr:
        if line.startswith("waiting for "):
            assert f"process {pid}" in line
            os.kill(pid, signal.SIGKILL)
            break
    rest = second.stderr.read()
    assert second.wait() == 0, rest
    assert list(out.glob(".stages/finetune-*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)],
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which("mount")
        else None
    )
    if mounted is None or mounted.returncode:
        pytest.skip("cannot mount a small file system here (needs root on Linux)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_a_message_and_a_directory_to_go_on_with(
    write_recipe, small_disk: Path, edgebert, fails_cleanly, tmp_path: Path
) -> None:
    recipe, out = write_recipe(), small_disk / "out"
    filler = small_disk / "filler"
    blocks = {"nothing": 0, "little": 200_000, "a checkpoint": 1_600_000}
    for free in blocks.values():
        filler.write_bytes(b"")
        left = shutil.disk_usage(small_disk).free
        filler.write_bytes(b"x" * max(left - free - 8192, 0))
        done = edgebert("export", recipe, "--out", out, TMPDIR=str(tmp_path))
        assert "is full; free some space and run the same command again" in (
            fails_cleanly(done, code=1)
        )
    filler.unlink()
    subprocess.run(
        ["mount", "-o", "remount,size=40m", str(small_disk)], check=True, capture_output=True
    )
    done = edgebert("export", recipe, "--out", out)
    assert done.returncode == 0, done.stderr
    Bundle.open(out / "bundle").verify()


def test_a_directory_that_holds_something_else_is_left_alone(
    write_recipe, tmp_path: Path, edgebert, fails_cleanly
) -> None:
    out = tmp_path / "mine"
    (out / "bundle").mkdir(parents=True)
    (out / "bundle" / "thesis.txt").write_text("three years of work")
    done = edgebert("export", write_recipe(), "--out", out)
    assert "is not empty and no build directory" in fails_cleanly(done)
    assert [p.name for p in out.rglob("*")] == ["bundle", "thesis.txt"]


def test_progress_is_plain_lines_when_stderr_is_no_terminal(built, edgebert) -> None:
    recipe, out, printed = built
    done = edgebert("export", recipe, "--out", out, "--force", "quantise")
    assert "\x1b" not in done.stderr
    assert re.search(r"^quantise: done in [\d.]+ s$", done.stderr, flags=re.MULTILINE)
    assert re.search(
        r"^  train: \d+ rows \(negative \d+, positive \d+\)$", done.stderr, re.MULTILINE
    )
    assert printed.splitlines()[0].startswith("| variant ")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_is_a_bar_on_a_terminal(built, start_edgebert) -> None:
    import pty

    recipe, out, _ = built

    main, terminal = pty.openpty()
    process = start_edgebert(
        *("export", recipe, "--out", out, "--until", "onnx", "--force", "onnx"),
        stderr=terminal,
        env={"TERM": "xterm-256color"},
    )
    os.close(terminal)
    said = b""
    while True:
        try:
            said += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    assert "━".encode() in said
