"""What ``make test-arm`` holds answers to, and what it installs; nothing is emulated here."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import run_on_arm
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
LABELS = [["negative"], ["positive"], ["positive"]]
HERE = [[2.0, -2.0], [-1.0, 1.0], [-0.5, 0.5]]


def fault(moved: float, precision: str, labels: list[list[str]] = LABELS) -> str | None:
    """What is said when the last text's first output is another by ``moved``."""
    there = [*HERE[:-1], [HERE[-1][0] + moved, HERE[-1][1]]]
    half, most = run_on_arm.differences(HERE, there)
    return run_on_arm.fault_of(half, most, LABELS, labels, precision)


@pytest.mark.parametrize(
    ("moved", "precision", "fits"),
    [
        (0.0, "fp32", True),
        (9e-6, "fp32", True),
        (2e-5, "fp32", False),
        (0.02, "int8", True),
        (-0.06, "int8", False),
        (math.nan, "fp32", False),
        (math.inf, "int8", False),
    ],
)
def test_one_text_may_differ_by_its_precision(moved: float, precision: str, fits: bool) -> None:
    assert (fault(moved, precision) is None) == fits


def test_int8_may_not_differ_in_every_text_by_what_one_may() -> None:
    there = [[value + 0.02 for value in row] for row in HERE]
    half, most = run_on_arm.differences(HERE, there)
    assert half == most == pytest.approx(0.02)
    said = run_on_arm.fault_of(half, most, LABELS, LABELS, "int8")
    assert said == "half of the texts differ by 2.0e-02 or more; the bound is 1e-02"


def test_another_label_is_a_fault_however_near_the_outputs_are() -> None:
    said = fault(0.0, "int8", [*LABELS[:-1], ["negative"]])
    assert said == "1 of 3 texts have other labels"


@pytest.mark.parametrize("board", run_on_arm.BOARDS, ids=lambda board: board.name)
def test_a_board_gets_one_pinned_version_of_all_but_what_it_asks_for(
    board: run_on_arm.Board,
) -> None:
    pins = [Requirement(line) for line in run_on_arm.pins_for(board.pins, board.requirements)]
    names = [pin.name for pin in pins]
    assert len(set(names)) == len(names)
    assert all(pin.marker is None for pin in pins)
    asked = {Requirement(line).name for line in board.requirements}
    wanted = {"pip", "numpy", "tokenizers", "onnxruntime", "cuda-bindings"}
    assert wanted & set(names) == wanted - asked


def test_jetpack_6_gets_the_newest_onnx_runtime_for_its_python() -> None:
    """Which is the last one there will be: no later release has a wheel for Python 3.10."""
    (orin, *newer) = run_on_arm.BOARDS
    assert "onnxruntime==1.23.2" in run_on_arm.pins_for(orin.pins, orin.requirements)
    for board in newer:
        assert "onnxruntime==1.23.2" not in run_on_arm.pins_for(board.pins, board.requirements)


def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "run_on_arm.py", "bundle"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "test-arm needs Debian's packages: "
        "sudo apt install debootstrap qemu-user-static debian-archive-keyring\n"
    )


@pytest.mark.parametrize("pairs", [False, True])
def test_texts_are_short_and_of_the_tasks_kind(pairs: bool) -> None:
    texts = run_on_arm.short_texts(pairs)
    assert 50 <= len(texts) <= 80
    for text in texts:
        parts = text if pairs else (text,)
        assert len(parts) == 1 + pairs and all(isinstance(part, str) for part in parts)
        assert sum(map(len, parts)) <= 120
