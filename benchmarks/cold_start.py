"""From a new process to the first label: the runtime beside a bare script on the same model.

Usage: python benchmarks/cold_start.py BUNDLE [--runs 15]

The bare script uses ``tokenizers`` and ``onnxruntime`` alone, checks no hash, and knows where the
files lie. Processes of the two kinds take turns, after one of each that is not counted; the
medians and their ratio are printed, with the peak memory of each kind.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
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


def run(command: list[str]) -> tuple[float, float, str]:
    """Runs a process; returns its wall time in s, its peak memory in MB, and what it printed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
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
    commands = {
        "edgebert_runtime": [sys.executable, "-c", RUNTIME, str(options.bundle)],
        "bare script": [sys.executable, "-c", BARE, *files, *manifest.task.labels],
    }
    found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in commands}
    for turn in range(options.runs + 1):
        for name, command in commands.items():
            result = run(command)
            if turn:
                found[name].append(result)
    labels = {label for results in found.values() for _, _, label in results}
    if len(labels) != 1:
        raise SystemExit(f"the two disagree: {labels}")
    medians = {}
    print("| what | median s | fastest | slowest | peak MB |\n|---|---|---|---|---|")
    for name, results in found.items():
        seconds = [result[0] for result in results]
        medians[name] = statistics.median(seconds)
        memory = statistics.median(result[1] for result in results)
        row = f"{medians[name]:.3f} | {min(seconds):.3f} | {max(seconds):.3f} | {memory:.0f}"
        print(f"| {name} | {row} |")
    ratio = medians["edgebert_runtime"] / medians["bare script"]
    print(f"\nratio of medians: {ratio:.2f} ({options.runs} runs each, in turn)")


if __name__ == "__main__":
    main()
