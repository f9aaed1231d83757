"""A device imports little: what makes models stays out of what runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HEAVY = (
    "accelerate",
    "datasets",
    "edgebert_export",
    "edgebert_pipeline",
    "onnx",
    "optimum",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "torch",
    "transformers",
)


def _imported_by(code: str, *arguments: str, cwd: Path) -> set[str]:
    report = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + report, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_predicting_imports_nothing_that_only_export_needs(
    tiny_bundles: dict[str, Path], tmp_path: Path
) -> None:
    imported = _imported_by(
        "import sys\n"
        "from edgebert_runtime import Classifier\n"
        "with Classifier.load(sys.argv[1]) as classifier:\n"
        "    assert classifier.predict(['a great film'])",
        str(tiny_bundles["single"]),
        cwd=tmp_path,
    )
    assert {"edgebert_runtime", "onnxruntime", "tokenizers"} <= imported
    assert not imported & set(HEAVY)


def test_predicting_imports_little_besides_onnx_runtime_and_the_tokenizer(
    tiny_bundles: dict[str, Path], tmp_path: Path
) -> None:
    # Each of these takes milliseconds of every start.
    bare = _imported_by("import onnxruntime, tokenizers", cwd=tmp_path)
    imported = _imported_by(
        "import sys\n"
        "from edgebert_runtime import Classifier\n"
        "assert Classifier.load(sys.argv[1], device='cpu').predict(['a great film'])",
        str(tiny_bundles["single"]),
        cwd=tmp_path,
    )
    slow = {"concurrent", "logging", "pathlib", "platformdirs", "tarfile"}
    assert not (imported - bare) & slow


def test_the_command_line_imports_nothing_that_only_export_needs(tmp_path: Path) -> None:
    imported = _imported_by(
        "from edgebert_runtime import cli, bench, testing\n"
        "cli.main(['doctor'], standalone_mode=False)",
        cwd=tmp_path,
    )
    assert "edgebert_runtime" in imported
    assert not imported & set(HEAVY)


def test_help_does_not_wait_for_onnx_runtime(tmp_path: Path) -> None:
    imported = _imported_by(
        "from edgebert_runtime import cli\ncli.main(['--help'], standalone_mode=False)",
        cwd=tmp_path,
    )
    assert "onnxruntime" not in imported
