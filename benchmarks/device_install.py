"""What a device downloads, and how long its imports take: `edgebert-runtime[tensorrt]`, installed.

Usage: python benchmarks/device_install.py [--extra tensorrt] [--runs 21]

Downloads the runtime with an extra as pip would, adds up the files, installs them into a new
environment and times, in new processes, the import of all that a TensorRT session needs; without
one, an interpreter that imports nothing. Works with a driver and without.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNTIME = Path(__file__).parents[1] / "runtime"
STATEMENTS = {
    "nothing": "pass",
    "numpy, tokenizers": "import numpy, tokenizers",
    "the runtime": "import edgebert_runtime",
    "the runtime and its TensorRT session": (
        "import edgebert_runtime.classifier, edgebert_runtime.engines, "
        "edgebert_runtime.tensorrt_session, cuda.bindings.driver"
    ),
}


def seconds_of(python: Path, statement: str) -> float:
    """Returns the wall time of a process that runs a statement."""
    start = time.perf_counter()
    subprocess.run([python, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extra", default="tensorrt")
    parser.add_argument("--runs", type=int, default=21)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        wheels, environment = Path(directory) / "wheels", Path(directory) / "environment"
        pip = [sys.executable, "-m", "pip", "--quiet"]
        wanted = f"{RUNTIME}[{options.extra}]"
        subprocess.run([*pip, "wheel", "--wheel-dir", wheels, wanted], check=True)
        sizes = sorted((file.stat().st_size, file.name) for file in wheels.iterdir())[::-1]
        print("| file | MB |\n|---|---|")
        for size, name in sizes:
            print(f"| {name} | {size / 1e6:.1f} |")
        print(f"| all | {sum(size for size, _ in sizes) / 1e6:.1f} |\n")

        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        python = environment / "bin" / "python"
        local = ["--no-index", "--find-links", wheels]
        package = f"edgebert-runtime[{options.extra}]"
        subprocess.run([*pip, "--python", python, "install", *local, package], check=True)
        found: dict[str, list[float]] = {name: [] for name in STATEMENTS}
        for turn in range(options.runs + 1):
            for name, statement in STATEMENTS.items():
                seconds = seconds_of(python, statement)
                if turn:  # the first writes the compiled files
                    found[name].append(seconds)
    nothing = statistics.median(found["nothing"])
    print("| imported | median s, whole process | without the interpreter's start |\n|---|---|---|")
    for name, taken in found.items():
        median = statistics.median(taken)
        print(f"| {name} | {median:.3f} | {median - nothing:.3f} |")
    print(f"\n{options.runs} processes each, in turn")


if __name__ == "__main__":
    main()
