"""Recipes over the project's own sentences and a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import loaded
import msgspec
import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait
from warm import FEW_CALLS, WarmCommand, WarmProcess

from edgebert_export.dataset import Example
from edgebert_export.fidelity import Budget
from edgebert_export.to_onnx import Parity
from edgebert_pipeline.answers import Answers, compare, find_flips, score
from edgebert_pipeline.data import DataSummary
from edgebert_pipeline.engines import EngineLog
from edgebert_pipeline.recommend import recommend
from edgebert_pipeline.report import REPORT_VERSION, ModelSummary, Report
from edgebert_pipeline.scores import Evaluation, VariantScores, full_name
from edgebert_runtime import bench
from edgebert_runtime.bench import LatencyCell, Timing
from edgebert_runtime.manifest import Provenance, Task
from edgebert_runtime.rows import pack_right, row_order, rows_sha256

ROOT = Path(__file__).parent.parent.parent
CALIBRATION = ROOT / "calibration_data"


@pytest.fixture(scope="session", autouse=True)
def _loaded_once() -> None:
    loaded.load()


@pytest.fixture(autouse=True)
def _time_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_CELL_CALLS", FEW_CALLS)


_DATA = {
    "single": f"""
labels = ["negative", "positive"]
label = "sentiment"
test_share = 0.3
[data.train]
path = {json.dumps(str(CALIBRATION / "sentences.jsonl"))}
""",
    "multi": f"""
task = "multi_label"
labels = ["food", "travel", "technology", "film", "sport", "work", "health", "home"]
label = "topics"
[data.train]
path = {json.dumps(str(CALIBRATION / "sentences.jsonl"))}
[bundle]
thresholds = "validation"
""",
    "pairs": f"""
labels = ["entails", "contradicts", "neutral"]
text = "premise"
text_pair = "hypothesis"
test_share = 0.25
validation_share = 0.2
[data.train]
path = {json.dumps(str(CALIBRATION / "pairs.jsonl"))}
""",
}

WriteRecipe = Callable[..., Path]


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_encoder: Path) -> WriteRecipe:
    """Returns a function that writes a recipe for ``single``, ``multi`` or ``pairs``."""

    def write(task: str = "single", extra: str = "", **replace: str) -> Path:
        text = f"""
name = "tiny-{task}"
[model]
path = {json.dumps(str(tiny_encoder))}
[data]
{_DATA[task]}
[finetune]
epochs = 2
learning_rate = 1e-3
batch_size = 16
[export]
max_length = 64
parity_texts = 40
[evaluate]
latency_texts = 10
latency_repeats = 1
[quantise.budget]
max_accuracy_drop = 1.0  # a tiny model is unsure of everything
max_flip_rate = 1.0
{extra}
"""
        # Some seconds each, of no use to most tests:
        if "[engine]" not in extra:
            text += '[engine]\nrtx = "never"\n'
        if "[quantise]" not in extra:
            text += '[quantise]\ncalibrator = "mse"\nsmoothing = "never"\n'
        for old, new in replace.items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"{task}.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def warm_command() -> Iterator[WarmCommand]:
    """The command, loaded once."""
    warm = WarmCommand()
    yield warm
    warm.close()


@pytest.fixture
def edgebert(tmp_path: Path, warm_command: WarmCommand) -> Run:
    """Returns a function that runs the command in a process of its own."""

    def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
        with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
            process = warm_command.start(
                *args, cwd=tmp_path, env=env, stdout=out.fileno(), stderr=err.fileno()
            )
            code = process.wait(timeout=300)
            out.seek(0), err.seek(0)
            return subprocess.CompletedProcess(args, code, out.read(), err.read())

    return run


@pytest.fixture
def start_edgebert(tmp_path: Path, warm_command: WarmCommand) -> Callable[..., WarmProcess]:
    """Returns a function that starts the command in a process of its own, to be killed, say.

    Keyword arguments are ``env``, ``stdout`` and ``stderr``, as ``WarmCommand.start`` has them.
    """
    return partial(warm_command.start, cwd=tmp_path)


def command(*args: object) -> list[str]:
    return [str(Path(sys.executable).parent / "edgebert"), *map(str, args)]


@pytest.fixture(scope="session")
def edgebert_command() -> Callable[..., list[str]]:
    """Returns a function that gives the command line of the real command."""
    return command


@pytest.fixture
def edgebert_afresh(tmp_path: Path) -> Run:
    """Returns a function that runs the real command in an interpreter that has loaded nothing."""

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*args), capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
        )

    return run


@pytest.fixture
def fails_cleanly() -> Callable[[Any], str]:
    """Returns a check that a process ended as bad input must: exit 2, one line, no traceback."""

    def check(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.stderr
        assert done.stdout == ""
        return errors[0]

    return check


@pytest.fixture(scope="session")
def made_report() -> Callable[..., bytes]:
    """Returns a function that makes a ``report.json`` of made-up figures.

    Its test rows are ``rows``; ``right`` says, for each variant, which of them it answers right.
    """

    def make(
        right: dict[str, list[bool]] | None = None,
        *,
        rows: tuple[str, ...] = tuple(f"text {number}" for number in range(40)),
        p50_ms: dict[str, float] | None = None,
        model: str = "model",
        **change: Any,
    ) -> bytes:
        right = right or {"int8-cpu": [True] * 36 + [False] * 4, "fp32": [True] * 38 + [False] * 2}
        task = Task(kind="single_label", labels=("no", "yes"), text_pair=False)
        examples = [Example(text, (number % 2,)) for number, text in enumerate(rows)]
        truth = np.array([[number % 2 == 0, number % 2 == 1] for number in range(len(rows))])
        answers = {}
        for name, which in right.items():
            given = np.where(np.array(which)[:, None], truth, ~truth)
            scores = np.where(given, 0.9, 0.1).astype(np.float32)
            answers[full_name(model, name)] = Answers(task, given, truth, scores, 0)
        labelled = [(e.text, (task.labels[e.labels[0]],)) for e in examples]
        references = {model: "fp32"}
        variants = [
            VariantScores(
                model=model,
                name=name,
                precision=name.partition("-")[0],
                devices=("cpu",),
                size_bytes=90_000_000 if name == "fp32" else 23_000_000,
                **score(answers[full_name(model, name)], answers[full_name(model, "fp32")], None),
                timing=made_timing((p50_ms or {}).get(name, 2.0 if name == "fp32" else 1.0)),
                right_rows=pack_right(row_order(labelled), answers[full_name(model, name)].correct),
            )
            for name in right
        ]
        evaluation = Evaluation(
            rows=len(rows),
            rows_sha256=rows_sha256(labelled),
            baseline_accuracy=0.5,
            references=references,
            variants=tuple(variants),
            comparisons=compare(variants, references, answers),
            flips=find_flips(variants, references, answers),
            intra_op_threads=None,
            environment={"processor": "Some CPU (x86_64)", "processors": "2"},
        )
        report = Report(
            report_version=REPORT_VERSION,
            name="made-up",
            measured_at="2026-01-01T00:00:00+00:00",
            commit="c" * 40,
            bundle_digest="0" * 64,
            task=task,
            data=DataSummary(
                rows={"test": len(rows)},
                labels={},
                out_of_ranges=0,
                duplicates=0,
                contradictions=0,
                moved_out=0,
                sha256="d" * 64,
            ),
            training=None,
            distillation=None,
            models={
                model: ModelSummary(
                    model_type=None,
                    layers=None,
                    parameters=None,
                    checkpoint_sha256=None,
                    parity=Parity(
                        texts=1, shortest_tokens=3, longest_tokens=3, max_difference=0, limit=1
                    ),
                )
            },
            quantisation={},
            engines=EngineLog(profiles=()),
            budget=Budget(),
            evaluation=evaluation,
            gate=(),
            recommended=recommend(evaluation, ()),
            not_done=(),
            stages={},
            provenance=Provenance(
                edgebert="0.1.0",
                recipe_sha256="0" * 64,
                model_sha256="0" * 64,
                data_sha256="d" * 64,
                seed=None,
                versions={},
            ),
        )
        return msgspec.json.encode(msgspec.structs.replace(report, **change))

    return make


def made_timing(p50_ms: float, **change: Any) -> Timing:
    """Timing whose rounds spread by two per cent, of texts that are always the same ones."""
    timing = Timing(
        texts=10,
        repeats=5,
        latency_p50_ms=p50_ms,
        latency_p90_ms=2 * p50_ms,
        latency_p99_ms=3 * p50_ms,
        throughput_texts_per_s=1000 / p50_ms,
        batch_size=32,
        session_p50_ms=0.9 * p50_ms,
        latency_p50_low_ms=0.99 * p50_ms,
        latency_p50_high_ms=1.01 * p50_ms,
        variation=0.01,
        texts_sha256="e" * 64,
        cells=tuple(
            LatencyCell(
                max_tokens=tokens,
                batch_size=size,
                texts=5,
                calls=20,
                p50_ms=p50_ms * size,
                p90_ms=2 * p50_ms * size,
                p99_ms=3 * p50_ms * size,
            )
            for tokens in (16, 32)
            for size in (1, 8)
        ),
    )
    return msgspec.structs.replace(timing, **change)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium that notes what it says and what it fetches."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        missing = "chromium and chromedriver are not here (apt-get install chromium-driver)"
        if os.environ.get("EDGEBERT_NEEDS_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1280,1000",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Callable[..., Any]:
    """Returns a function that opens HTML from disk, waits for its charts, and gives the browser."""

    def open_(html: str, *, width: int = 1280, dark: bool = False) -> Any:
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [scheme]})
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(path.as_uri())
        WebDriverWait(browser, 60).until(
            lambda found: found.execute_script(
                "return [...document.querySelectorAll('.plot')].every(p => p.querySelector('svg'))"
            )
        )
        return browser

    return open_
