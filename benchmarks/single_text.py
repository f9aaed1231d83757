"""What ``Classifier.predict`` takes for one text besides tokenising it and running the model.

Usage: python benchmarks/single_text.py BUNDLE [--texts 500] [--rounds 7]

One process, one tokenizer, one ONNX Runtime session, used in two ways: through the classifier, and
as a bare script would, which makes the model's inputs from what the tokenizer gives and leaves it
at raw outputs. The two take turns text by text, and at being first; what is printed is the
difference between the two on the same text: the median of all, and of the rounds the lowest and
the highest median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from check import sentences

from edgebert_runtime import Classifier

WARM_UP = 50


def bare(classifier: Classifier) -> Callable[[str], Any]:
    """The least that gives the model's outputs for a text, with the classifier's own parts."""
    session: Any = classifier.session._session  # type: ignore[attr-defined]
    tokenizer = classifier.encoder._tokenizer
    filled = {
        "input_ids": "ids",
        "attention_mask": "attention_mask",
        "token_type_ids": "type_ids",
    }
    names = {spec.name: filled[spec.name] for spec in session.get_inputs()}

    def run(text: str) -> Any:
        found = tokenizer.encode(text)
        inputs = {
            name: np.array([getattr(found, ids)], dtype=np.int64) for name, ids in names.items()
        }
        return session.run(["logits"], inputs)[0]

    return run


def timed(call: Callable[[str], Any], text: str) -> tuple[float, Any]:
    """Returns microseconds, and what the call gave."""
    start = time.perf_counter_ns()
    found = call(text)
    return (time.perf_counter_ns() - start) / 1000, found


def compare(classifier: Classifier, texts: list[str], rounds: int) -> list[list[tuple[float, ...]]]:
    """Returns, for each round and text, microseconds of the classifier and of the bare script."""
    ways = [lambda text: classifier.predict([text]), bare(classifier)]
    for text in texts[:WARM_UP]:
        for way in ways:
            way(text)
    found: list[list[tuple[float, ...]]] = []
    for round_ in range(rounds):
        found.append([])
        for index, text in enumerate(texts):
            first = (index + round_) % 2
            results = {way: timed(ways[way], text) for way in (first, 1 - first)}
            (ours, [prediction]), (theirs, logits) = results[0], results[1]
            if classifier.task.labels[int(logits.argmax())] != prediction.label:
                raise SystemExit(f"the two disagree on {text!r}")
            found[-1].append((ours, theirs))
    return found


def main() -> None:
    """Prints a table: a row for each variant that runs on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with Classifier.load(options.bundle, device="cpu") as first:
        if first.task.text_pair or first.task.kind != "single_label":
            raise SystemExit("this takes a bundle for single texts with one label each")
        texts = sentences(options.texts)
    print(
        "| variant | bare, µs | edgebert, µs | above it, µs (median; rounds) |\n|---|---|---|---|"
    )
    for variant in ("int8-cpu", "fp32"):
        with Classifier.load(options.bundle, device="cpu", variant=variant) as classifier:
            found = compare(classifier, texts, options.rounds)
        every = [pair for pairs in found for pair in pairs]
        ours, theirs = (statistics.median(values) for values in zip(*every, strict=True))
        above = [statistics.median(a - b for a, b in pairs) for pairs in found]
        middle = statistics.median(a - b for a, b in every)
        spread = f"{middle:.0f} ({min(above):.0f}-{max(above):.0f})"
        print(f"| {variant} | {theirs:.0f} | {ours:.0f} | {spread} |", flush=True)
    print(f"\n{options.rounds} rounds of {options.texts} texts")


if __name__ == "__main__":
    main()
