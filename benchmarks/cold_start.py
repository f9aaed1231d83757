"""From a new process to the first label: the runtime beside a bare script on the same model.

Usage: python benchmarks/cold_start.py BUNDLE [--runs 21]

The bare script uses ``tokenizers`` and ``onnxruntime`` alone, checks no hash, and knows where the
files lie. Processes of the two kinds take turns, after one of each that is not counted; medians
and their ratio to the bare script's are printed, with the peak memory of each kind. The runtime
hashes what it parses at every start, and the rest of the bundle at the first start only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgebert_runtime.bundle import Bundle

RUNTIME = """
import sys
from edgebert_runtime import Classifier
print(Classifier.load(sys.argv[1], device="cpu").predict(["a great film"])[0].label)
"""

BARE = """
import sys
import numpy as np
import onnxruntime
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
encoding = tokenizer.encode("a great film")
values = {
    "input_ids": encoding.ids,
    "attention_mask": encoding.attention_mask,
    "token_type_ids": encoding.type_ids,
}
inputs = {i.name: np.array([values[i.name]], dtype=np.int64) for i in session.get_inputs()}
print(sys.argv[3:][session.run(["logits"], inputs)[0].argmax()])
"""


def run(command: list[str], cache: str) -> tuple[float, float, str]:
    """Runs a process; returns its wall time in s, its peak memory in MB, and what it printed."""
    start = time.perf_counter()
    environment = {**os.environ, "EDGEBERT_CACHE_DIR": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are compiled
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[2:4]} failed")
    return seconds, usage.ru_maxrss / 1000, printed.strip()


def compare(name: str, command: list[str], bare: list[str], runs: int, *, first: bool) -> None:
    """Runs the two in turn, and prints a row for each and the ratio of their medians."""
    found: dict[str, list[tuple[float, float, str]]] = {name: [], "bare script": []}
    with tempfile.TemporaryDirectory() as kept:
        for turn in range(runs + 1):
            with tempfile.TemporaryDirectory() as new:
                results = run(command, new if first else kept), run(bare, kept)
            if turn:  # the first of each is a warm-up
                for results_of, result in zip(found.values(), results, strict=True):
                    results_of.append(result)
    if len({label for results_of in found.values() for _, _, label in results_of}) != 1:
        raise SystemExit("the two disagree on the label")
    medians = {n: statistics.median(seconds for seconds, _, _ in r) for n, r in found.items()}
    for kind, results_of in found.items():
        seconds = [result[0] for result in results_of]
        memory = statistics.median(result[1] for result in results_of)
        row = f"{medians[kind]:.3f} | {min(seconds):.3f} | {max(seconds):.3f} | {memory:.0f}"
        print(f"| {kind} | {row} | {medians[kind] / medians['bare script']:.2f} |")


def main() -> None:
    """Prints a table: a usual start, and the first start of a bundle, each beside the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=21)
    options = parser.parse_args()
    manifest = Bundle.open(options.bundle).manifest
    model = next(variant for variant in manifest.variants if "cpu" in variant.devices).model
    files = [str(options.bundle / path) for path in (manifest.tokenizer, model)]
    runtime = [sys.executable, "-c", RUNTIME, str(options.bundle)]
    bare = [sys.executable, "-c", BARE, *files, *manifest.task.labels]
    print("| what | median s | fastest | slowest | peak MB | ratio |\n|---|---|---|---|---|---|")
    compare("edgebert_runtime", runtime, bare, options.runs, first=False)
    compare("edgebert_runtime, first start", runtime, bare, options.runs, first=True)
    print(f"\n{options.runs} processes each, in turn")


if __name__ == "__main__":
    main()
