"""From a new process to the first label: the runtime beside a bare script on the same model.

Usage: python benchmarks/cold_start.py BUNDLE [--runs 15]

The bare script uses ``tokenizers`` and ``onnxruntime`` alone, checks no hash, and knows where the
files lie. Processes of all kinds take turns, after one of each that is not counted; the medians and
their ratio to the bare script's are printed, with the peak memory of each kind. The runtime hashes
what it parses at every start, and the rest of the bundle at the first start only.
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
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[2:4]} failed")
    return seconds, usage.ru_maxrss / 1000, printed.strip()


def main() -> None:
    """Runs both kinds in turn and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    manifest = Bundle.open(options.bundle).manifest
    model = next(variant for variant in manifest.variants if "cpu" in variant.devices).model
    files = [str(options.bundle / path) for path in (manifest.tokenizer, model)]
    runtime = [sys.executable, "-c", RUNTIME, str(options.bundle)]
    commands = {
        "edgebert_runtime": runtime,
        "edgebert_runtime, first start": runtime,
        "bare script": [sys.executable, "-c", BARE, *files, *manifest.task.labels],
    }
    found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as kept:
        for turn in range(options.runs + 1):
            for name, command in commands.items():
                with tempfile.TemporaryDirectory() as new:
                    result = run(command, new if "first" in name else kept)
                if turn:
                    found[name].append(result)
    labels = {label for results in found.values() for _, _, label in results}
    if len(labels) != 1:
        raise SystemExit(f"the two disagree: {labels}")
    medians = {n: statistics.median(result[0] for result in r) for n, r in found.items()}
    print("| what | median s | fastest | slowest | peak MB | ratio |\n|---|---|---|---|---|---|")
    for name, results in found.items():
        seconds = [result[0] for result in results]
        memory = statistics.median(result[1] for result in results)
        row = f"{medians[name]:.3f} | {min(seconds):.3f} | {max(seconds):.3f} | {memory:.0f}"
        print(f"| {name} | {row} | {medians[name] / medians['bare script']:.2f} |")
    print(f"\n{options.runs} processes each, in turn")


if __name__ == "__main__":
    main()
