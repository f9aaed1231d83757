"""What a student starts from, which layers it should take, and what its teacher costs a step.

Usage: python benchmarks/distillation.py RECIPE BUILD   (after edgebert export RECIPE --out BUILD)

Start: all of the teacher's layers, untrained; how far raw outputs are from the teacher's on
validation rows, which the head was not fitted on. Maps: a short training from each choice of
layers, the lowest ones among them, which the recipe's ``auto`` does not try. Step: distilling and
fine-tuning the same student on hard labels, turn by turn; medians, and their ratio.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from edgebert_export.checkpoint import open_checkpoint
from edgebert_export.distill import DistillationJob, DistillConfig
from edgebert_export.student import layer_maps
from edgebert_export.teach import answers, open_outputs
from edgebert_pipeline.data import load_dataset
from edgebert_pipeline.recipe import load_recipe

ROUNDS = 7
STEPS = 12


class Bench:
    """A recipe's teacher, rows and configuration, from a finished build."""

    def __init__(self, recipe_path: Path, build: Path) -> None:
        recipe = load_recipe(recipe_path)
        assert recipe.distill is not None, "the recipe distils nothing"
        self.config = recipe.distill
        self.data, _ = load_dataset(recipe.data, recipe_path.parent)
        self.max_length = recipe.export.max_length
        (finetuned,) = (build / ".stages").glob("finetune-*")
        (taught,) = (build / ".stages").glob("teach-*")
        self.teacher = open_checkpoint(finetuned / "checkpoint")
        self.outputs = open_outputs(taught / "outputs")

    def job(self, config: DistillConfig, work: Path) -> DistillationJob:
        """Returns a job with another configuration."""
        return DistillationJob(self.teacher, self.data, config, self.outputs, self.max_length, work)


def start(bench: Bench) -> None:
    """Prints how far the untrained student with all layers is from its teacher."""
    every = tuple(range(bench.teacher.architecture.layers))
    with tempfile.TemporaryDirectory() as work:
        job = bench.job(bench.config, Path(work))
        student = job.new_student(every)
        validation = job.validation
        logits = np.empty((len(validation), len(bench.data.task.labels)), np.float32)
        for indices, raw, _ in answers(student, job.encoder, [r.encoded for r in validation]):
            logits[indices] = raw
    said = bench.outputs.logits[-len(validation) :]
    off = np.abs(logits - said)
    same = (logits.argmax(1) == said.argmax(1)).mean()
    print(
        f"start: all {len(every)} layers, untrained, {len(validation)} validation rows: raw "
        f"outputs (of size {np.abs(said).mean():.2f} in the mean) are off by {off.mean():.4f} in "
        f"the mean and {off.max():.4f} at most; {same:.2%} of the answers are the teacher's\n"
    )


def maps(bench: Bench) -> None:
    """Prints the divergence from the teacher after a short training, by choice of layers."""
    layers = bench.config.layers_for(bench.teacher)
    choices = layer_maps(bench.teacher.architecture.layers, layers)
    choices["lowest"] = tuple(range(layers))
    with tempfile.TemporaryDirectory() as work:
        trials = bench.job(bench.config, Path(work)).try_out(choices, lambda done, total: None)
    print(f"| layers | from | divergence after {bench.config.trial_steps} steps |\n|---|---|---|")
    for name, divergence in trials.items():
        print(f"| {', '.join(map(str, choices[name]))} | {name} | {divergence:.4f} |")
    print()


def step(bench: Bench) -> None:
    """Prints what a step takes with the teacher's outputs and without, in one run."""
    layers = bench.config.layers_for(bench.teacher)
    layer_map = next(iter(layer_maps(bench.teacher.architecture.layers, layers).values()))
    configs = {
        "distilling": msgspec.structs.replace(bench.config, layers=None, layer_map=layer_map),
        "hard labels only": bench.config.hard_labels_only(layer_map),
    }
    # The same rows for both, so that a step has the same work but for the loss.
    bench.data = bench.data.without_unlabelled()
    times: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(ROUNDS):
        for name, config in configs.items():
            ends: list[float] = []
            note: Any = lambda done, total, ends=ends: ends.append(time.perf_counter())  # noqa: E731
            with tempfile.TemporaryDirectory() as work:
                bench.job(config, Path(work)).train(layer_map, Path(work), note, STEPS)
            times[name] += list(np.diff(ends)[1:])
    middle = {name: statistics.median(found) for name, found in times.items()}
    print(f"| a step of {bench.config.batch_size} rows | median ms |\n|---|---|")
    for name, seconds in middle.items():
        print(f"| {name} | {seconds * 1000:.0f} |")
    ratio = middle["distilling"] / middle["hard labels only"]
    print(
        f"\nratio {ratio:.3f}; {ROUNDS} rounds of {STEPS} steps, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


def main(recipe: Path, build: Path) -> None:
    """Prints all three."""
    bench = Bench(recipe, build)
    start(bench)
    maps(bench)
    step(bench)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
