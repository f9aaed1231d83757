"""How long a turn should be when two bundles are timed side by side.

Usage: python benchmarks/turns.py RECIPE SMALL LARGE   (two bundles; the recipe's test rows)

With turns of one text, every call finds the other model's weights in the processor's cache and
the other session's threads still spinning; a device, which holds one model, does not.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from edgebert_pipeline.data import load_dataset
from edgebert_pipeline.recipe import load_recipe
from edgebert_runtime.classifier import Classifier

ROUNDS = 7
TEXTS = 200


def main(recipe_path: Path, small: Path, large: Path) -> None:
    """Prints a Markdown table."""
    dataset, _ = load_dataset(load_recipe(recipe_path).data, recipe_path.parent)
    texts = [example.text for example in dataset.test[:TEXTS]]
    pair = [Classifier.load(path, device="cpu") for path in (small, large)]
    print("| texts in a turn | small, p50 ms | large, p50 ms | ratio |\n|---|---|---|---|")
    for turn in (1, 5, 20, 100):
        times = np.zeros((2, ROUNDS, len(texts)))
        for round_ in range(ROUNDS):
            for first in range(0, len(texts), turn):
                for which, classifier in enumerate(pair):
                    for index in range(first, min(first + turn, len(texts))):
                        start = time.perf_counter()
                        classifier.predict([texts[index]])
                        times[which, round_, index] = time.perf_counter() - start
        one, two = np.median(np.median(times, axis=1), axis=1) * 1000
        print(f"| {turn} | {one:.2f} | {two:.2f} | {one / two:.3f} |")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
