"""Measures a bundle on labelled rows, through the runtime that devices use."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from edgebert_export.dataset import Example
from edgebert_pipeline.build import library_versions
from edgebert_runtime.bench import Timing, measure
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.classifier import Classifier, Prediction
from edgebert_runtime.encoder import Text
from edgebert_runtime.manifest import Task, Variant

__all__ = ["Evaluation", "LabelScores", "VariantScores", "evaluate", "machine", "reference_variant"]


class LabelScores(msgspec.Struct, frozen=True, kw_only=True):
    """How well one label is told; ``rows`` is how many test rows it applies to."""

    label: str
    rows: int
    precision: float
    recall: float
    f1: float


class VariantScores(msgspec.Struct, frozen=True, kw_only=True):
    """What one variant does.

    Attributes:
        name: The variant.
        precision: Of its weights.
        device: Where it was measured.
        size_bytes: Of its model file.
        correct: Test rows answered right; in ``multi_label``, with every label right.
        accuracy: ``correct`` over the rows.
        accuracy_low: Lower end of Wilson's 95 % interval.
        accuracy_high: Upper end of it.
        macro_f1: Mean of the labels' F1.
        labels: By label.
        flips: Rows that are answered unlike the reference variant does.
        truncated: Rows that were cut to ``max_length``.
        timing: Latency and throughput.
    """

    name: str
    precision: str
    device: str
    size_bytes: int
    correct: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    macro_f1: float
    labels: tuple[LabelScores, ...]
    flips: int
    truncated: int
    timing: Timing


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What all variants do on the same rows, in one run.

    Attributes:
        rows: Test rows.
        baseline_accuracy: Of always giving the commonest answer; what a model must beat.
        reference: Name of the variant that flips are counted against.
        variants: In the bundle's order.
        intra_op_threads: Threads for one operator; ``None`` when ONNX Runtime decided.
        environment: The machine and the libraries.
    """

    rows: int
    baseline_accuracy: float
    reference: str
    variants: tuple[VariantScores, ...]
    intra_op_threads: int | None
    environment: dict[str, str]

    @property
    def learned_nothing(self) -> bool:
        """Whether the reference is not shown to be better than the commonest answer."""
        reference = next(item for item in self.variants if item.name == self.reference)
        return reference.accuracy_low <= self.baseline_accuracy


def reference_variant(variants: Sequence[Variant]) -> str:
    """Returns the FP32 variant's name, or the first one's when there is none."""
    fp32 = [item.name for item in variants if item.precision == "fp32"]
    return fp32[0] if fp32 else variants[0].name


def evaluate(
    path: Path,
    examples: Sequence[Example],
    *,
    latency_texts: int,
    latency_repeats: int,
    intra_op_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Labels ``examples`` with every variant that runs on a CPU, and times each.

    Args:
        path: The bundle on disk.
        examples: Labelled rows, at least one.
        latency_texts: Texts to time, spread over the lengths of ``examples``.
        latency_repeats: Rounds of timing.
        intra_op_threads: Threads for one operator.
        on_progress: Called with steps done and steps in all.

    Raises:
        BundleError: The bundle is damaged.
        DeviceError: It cannot be run.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    names = [item.name for item in manifest.variants if "cpu" in item.devices]
    steps = len(names) + latency_repeats
    texts = [example.text for example in examples]
    predictions: dict[str, list[Prediction]] = {}
    truncated: dict[str, int] = {}
    with ExitStack() as stack:
        classifiers = {
            name: stack.enter_context(
                Classifier.load(path, device="cpu", variant=name, intra_op_threads=intra_op_threads)
            )
            for name in names
        }
        for done, (name, classifier) in enumerate(classifiers.items(), start=1):
            predictions[name] = classifier.predict(texts)
            truncated[name] = classifier.stats.truncated
            if on_progress is not None:
                on_progress(done, steps)
        timings = measure(
            classifiers,
            _spread_over_lengths(texts, latency_texts),
            repeats=latency_repeats,
            on_progress=lambda done, _: (
                on_progress(len(names) + done, steps) if on_progress else None
            ),
        )
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    measured = [item for item in manifest.variants if item.name in names]
    reference = reference_variant(measured)
    variants = tuple(
        _score(
            manifest.task,
            examples,
            predictions[item.name],
            name=item.name,
            precision=item.precision,
            size_bytes=sizes[item.model],
            flips=_flips(predictions[item.name], predictions[reference]),
            truncated=truncated[item.name],
            timing=timings[item.name],
        )
        for item in measured
    )
    return Evaluation(
        rows=len(examples),
        baseline_accuracy=max(Counter(e.labels for e in examples).values()) / len(examples),
        reference=reference,
        variants=variants,
        intra_op_threads=intra_op_threads,
        environment=_environment(),
    )


def _spread_over_lengths(texts: Sequence[Text], count: int) -> list[Text]:
    ordered = sorted(texts, key=lambda text: len(text if isinstance(text, str) else "".join(text)))
    count = min(count, len(ordered))
    return [ordered[index] for index in np.linspace(0, len(ordered) - 1, count).astype(int)]


def _flips(predictions: Sequence[Prediction], reference: Sequence[Prediction]) -> int:
    pairs = zip(predictions, reference, strict=True)
    return sum(set(one.labels) != set(other.labels) for one, other in pairs)


def _score(
    task: Task,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    *,
    name: str,
    precision: str,
    size_bytes: int,
    flips: int,
    truncated: int,
    timing: Timing,
) -> VariantScores:
    from scipy.stats import binomtest
    from sklearn.metrics import precision_recall_fscore_support

    truth = np.zeros((len(examples), len(task.labels)), dtype=bool)
    found = np.zeros_like(truth)
    index = {label: column for column, label in enumerate(task.labels)}
    for row, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        truth[row, list(example.labels)] = True
        found[row, [index[label] for label in prediction.labels]] = True
    correct = int((truth == found).all(axis=1).sum())
    interval = binomtest(correct, len(examples)).proportion_ci(method="wilson")
    by_label = precision_recall_fscore_support(truth, found, average=None, zero_division=0)
    return VariantScores(
        name=name,
        precision=precision,
        device="cpu",
        size_bytes=size_bytes,
        correct=correct,
        accuracy=correct / len(examples),
        accuracy_low=float(interval.low),
        accuracy_high=float(interval.high),
        macro_f1=float(np.mean(by_label[2])),
        labels=tuple(
            LabelScores(
                label=label, rows=int(rows), precision=float(p), recall=float(r), f1=float(f)
            )
            for label, p, r, f, rows in zip(task.labels, *by_label, strict=True)
        ),
        flips=flips,
        truncated=truncated,
        timing=timing,
    )


def _environment() -> dict[str, str]:
    return {
        **machine(),
        "system": f"{platform.system()} {platform.release()}",
        **library_versions(),
    }


def machine() -> dict[str, str]:
    """What makes a figure of speed comparable: processor, their number, Python."""
    return {
        "processor": f"{_processor()} ({platform.machine()})",
        "processors": str(os.cpu_count()),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
