"""Recipes over the project's own sentences and a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
CALIBRATION = ROOT / "calibration_data"

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


@pytest.fixture
def edgebert(tmp_path: Path) -> Run:
    """Returns a function that runs the real command in a process of its own."""

    def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*args),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **env},
            timeout=300,
            check=False,
        )

    return run


def command(*args: object) -> list[str]:
    return [str(Path(sys.executable).parent / "edgebert"), *map(str, args)]


@pytest.fixture(scope="session")
def edgebert_command() -> Callable[..., list[str]]:
    """Returns a function that gives the command line of the real command."""
    return command


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
