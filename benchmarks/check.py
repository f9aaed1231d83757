"""Whether the runtime is still as fast, beside a bare script on the same models.

Usage: python benchmarks/check.py BUILD [--quick]   (after edgebert export)

The bare script has ``tokenizers`` and ``onnxruntime`` alone, and forms batches by length, too; the
two run the same ONNX file in turn, so that neither the machine's speed nor the model's matters.
Exits with 1 if the median of the rounds' ratios is under a floor of ``floors.toml``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
from contestant import Contestant

from edgebert_runtime.bundle import Bundle

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FLOORS = Path(__file__).with_name("floors.toml")
ROUNDS, TEXTS, SINGLE = 11, 512, 60
WORDS = "a film that is no great work of art but has more wit and heart than most of its kind"


def sentences(count: int, most_words: int = 40) -> list[str]:
    """Makes texts of 2 to 40 words; speed does not depend on what they say."""
    random, words = np.random.default_rng(0), WORDS.split()
    lengths = random.integers(2, most_words + 1, count)
    return [" ".join(random.choice(words, length)) for length in lengths]


def compare(bundle: Path, variant: str, rounds: int, texts: list[str]) -> dict[str, list[float]]:
    """Returns how many times as fast as the bare script edgebert is, in every round."""
    manifest = Bundle.open(bundle).manifest
    (model,) = (str(bundle / v.model) for v in manifest.variants if v.name == variant)
    bare = Contestant(
        "bare",
        model=model,
        tokenizer=str(bundle / manifest.tokenizer),
        labels=manifest.task.labels,
        max_length=manifest.max_length,
    )
    found: dict[str, list[float]] = {"throughput": [], "single": []}
    with Contestant("edgebert", bundle=str(bundle), variant=variant) as ours, bare:
        for round_ in range(rounds + 1):
            pair = (ours, bare) if round_ % 2 else (bare, ours)
            whole = {c: c.ask(texts) for c in pair}
            single = {c: c.ask(texts[:SINGLE], one_by_one=True) for c in pair}
            labels = zip(whole[ours]["labels"], whole[bare]["labels"], strict=True)
            wrong = sum(mine != other for mine, other in labels)
            if wrong > len(texts) // 50:  # dynamic INT8 depends a little on who shares a batch
                raise SystemExit(f"{variant}: edgebert and the bare script disagree on labels")
            if round_:  # the first round is a warm-up
                found["throughput"].append(whole[bare]["seconds"][0] / whole[ours]["seconds"][0])
                medians = {c: statistics.median(answer["seconds"]) for c, answer in single.items()}
                found["single"].append(medians[bare] / medians[ours])
    return found


def main() -> None:
    """Prints a line for each ratio, and says which are too low."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer texts and rounds")
    options = parser.parse_args()
    rounds, count = (5, 128) if options.quick else (ROUNDS, TEXTS)
    failed = 0
    for variant, floors in tomllib.loads(FLOORS.read_text(encoding="utf-8")).items():
        found = compare(options.build.resolve() / "bundle", variant, rounds, sentences(count))
        for what, floor in floors.items():
            ratio = statistics.median(found[what])
            low, high = min(found[what]), max(found[what])
            failed += ratio < floor
            verdict = "TOO LOW" if ratio < floor else "ok"
            print(
                f"{verdict}: {variant}, {what}: {ratio:.3f} times the bare script's speed "
                f"({low:.3f}-{high:.3f} in {rounds} rounds); floor {floor}"
            )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
