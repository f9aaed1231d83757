"""Measures a bundle on labelled rows, through the runtime that devices use."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgebert_export.dataset import Example
from edgebert_pipeline.build import library_versions
from edgebert_pipeline.intervals import wilson
from edgebert_runtime.bench import Timing, measure, spread_over_lengths
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.classifier import Classifier, encoder_for
from edgebert_runtime.manifest import Task, Variant
from edgebert_runtime.onnx_session import OnnxSession

__all__ = [
    "HARD_LABEL",
    "MODEL",
    "STUDENT",
    "TEACHER",
    "Comparison",
    "Evaluation",
    "VariantScores",
    "calibration_error",
    "evaluate",
    "machine",
    "reference_variant",
]

MODEL, STUDENT, TEACHER, HARD_LABEL = "model", "student", "teacher", "hard-label"
"""What a model is in the chain: the only one, or one of those that distilling brings."""

_CALIBRATION_BINS = 15


class LabelScores(msgspec.Struct, frozen=True, kw_only=True):
    """How well one label is told; ``rows`` is how many test rows it applies to."""

    label: str
    rows: int
    precision: float
    recall: float
    f1: float


class VariantScores(msgspec.Struct, frozen=True, kw_only=True):
    """What one variant of one model does.

    Attributes:
        model: ``model``, or ``student``, ``teacher`` or ``hard-label`` (the student that was
            trained without its teacher).
        name: The variant.
        precision: Of its weights.
        devices: What it is for. Its answers are always computed by ONNX Runtime on a CPU.
        size_bytes: Of its model file.
        correct: Test rows answered right; in ``multi_label``, with every label right.
        accuracy: ``correct`` over the rows.
        accuracy_low: Lower end of Wilson's 95 % interval.
        accuracy_high: Upper end of it.
        macro_f1: Mean of the labels' F1.
        labels: By label.
        calibration_error: Expected calibration error, from 0 to 1; see ``calibration_error``.
        flips: Rows that are answered unlike the model's reference variant does.
        flip_rate_low: Lower end of Wilson's 95 % interval of their share.
        flip_rate_high: Upper end of it.
        agreement: Share of rows that are answered as the teacher's reference variant does;
            ``None`` without a teacher.
        truncated: Rows that were cut to ``max_length``.
        timing: Latency and throughput; ``None`` if it is not for a CPU, where all is timed.
    """

    model: str
    name: str
    precision: str
    devices: tuple[str, ...]
    size_bytes: int
    correct: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    macro_f1: float
    labels: tuple[LabelScores, ...]
    calibration_error: float
    flips: int
    flip_rate_low: float
    flip_rate_high: float
    agreement: float | None
    truncated: int
    timing: Timing | None

    @property
    def full_name(self) -> str:
        """The variant's name, with the model's before it if there are several models."""
        return self.name if self.model == MODEL else f"{self.model} {self.name}"


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two variants on the same rows.

    Attributes:
        first: Full name of a variant.
        second: Full name of another.
        only_first_correct: Rows that the first alone answers right.
        only_second_correct: Rows that the second alone answers right.
        p_value: Of McNemar's exact test: how often rows that one alone answers right would be
            shared out so unevenly, or more so, if both were equally good.
    """

    first: str
    second: str
    only_first_correct: int
    only_second_correct: int
    p_value: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What all variants do on the same rows, in one run.

    Attributes:
        rows: Test rows.
        baseline_accuracy: Of always giving the commonest answer; what a model must beat.
        references: For each model, the variant that its flips are counted against.
        variants: The model in the bundle first, its variants in the bundle's order.
        comparisons: Paired tests of what a user may wonder about.
        intra_op_threads: Threads for one operator; ``None`` when ONNX Runtime decided.
        environment: The machine and the libraries.
    """

    rows: int
    baseline_accuracy: float
    references: dict[str, str]
    variants: tuple[VariantScores, ...]
    comparisons: tuple[Comparison, ...]
    intra_op_threads: int | None
    environment: dict[str, str]

    @property
    def shipped(self) -> tuple[VariantScores, ...]:
        """The variants of the model in the bundle."""
        return tuple(item for item in self.variants if item.model == self.variants[0].model)

    def reference(self, model: str) -> VariantScores:
        """Returns the variant of ``model`` that its others are held against."""
        return next(
            v for v in self.variants if (v.model, v.name) == (model, self.references[model])
        )

    def is_reference(self, variant: VariantScores) -> bool:
        """Whether a variant is what the others of its model are held against."""
        return self.references[variant.model] == variant.name

    @property
    def learned_nothing(self) -> bool:
        """Whether the shipped reference is not shown to be better than the commonest answer."""
        reference = self.reference(self.variants[0].model)
        return reference.accuracy_low <= self.baseline_accuracy


def reference_variant(variants: Sequence[Variant]) -> str:
    """Returns the FP32 variant's name, or the first one's when there is none."""
    fp32 = [item.name for item in variants if item.precision == "fp32"]
    return fp32[0] if fp32 else variants[0].name


def evaluate(
    bundles: Mapping[str, Path],
    examples: Sequence[Example],
    *,
    latency_texts: int,
    latency_repeats: int,
    intra_op_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Labels ``examples`` with every variant, and times those that are for a CPU.

    What is for a GPU is computed by ONNX Runtime on the CPU, too: the same graph that TensorRT
    gets, in the precision that the graph is typed in, but with another library's rounding.

    Args:
        bundles: Bundles on disk, by model; the one that is shipped first.
        examples: Labelled rows, at least one.
        latency_texts: Texts to time, spread over the lengths of ``examples``.
        latency_repeats: Rounds of timing.
        intra_op_threads: Threads for one operator.
        on_progress: Called with steps done and steps in all.

    Raises:
        BundleError: A bundle is damaged.
        DeviceError: It cannot be run.
    """
    opened = {model: Bundle.open(path) for model, path in bundles.items()}
    entries = [
        (model, variant) for model, bundle in opened.items() for variant in bundle.manifest.variants
    ]
    texts = [example.text for example in examples]
    steps = len(entries) + latency_repeats
    answers: dict[str, _Answers] = {}
    with ExitStack() as stack:
        classifiers: dict[str, Classifier] = {}
        for done, (model, variant) in enumerate(entries, start=1):
            name = f"{model} {variant.name}"
            classifier = _load(opened[model], variant, intra_op_threads)
            answers[name] = _Answers.of(classifier, classifier.scores(texts), examples)
            if "cpu" in variant.devices:
                classifiers[name] = stack.enter_context(classifier)
            else:  # it is not timed
                classifier.close()
            if on_progress is not None:
                on_progress(done, steps)
        timings = measure(
            classifiers,
            spread_over_lengths(texts, latency_texts),
            repeats=latency_repeats,
            on_progress=lambda done, _: (
                on_progress(len(entries) + done, steps) if on_progress else None
            ),
        )
    references = {
        model: reference_variant([variant for owner, variant in entries if owner == model])
        for model in bundles
    }
    variants = []
    for model, variant in entries:
        name = f"{model} {variant.name}"
        found = answers[name]
        teacher = answers[f"{TEACHER} {references[TEACHER]}"] if TEACHER in bundles else None
        sizes = {entry.path: entry.size_bytes for entry in opened[model].manifest.files}
        variants.append(
            VariantScores(
                model=model,
                name=variant.name,
                precision=variant.precision,
                devices=variant.devices,
                size_bytes=sizes[variant.model],
                **_accuracy(int(found.correct.sum()), len(examples)),
                **_by_label(opened[model].manifest.task, found),
                calibration_error=found.calibration_error,
                **_flips(found.differing(answers[f"{model} {references[model]}"]), len(examples)),
                agreement=1 - found.differing(teacher) / len(examples) if teacher else None,
                truncated=found.truncated,
                timing=timings.get(name),
            )
        )
    return Evaluation(
        rows=len(examples),
        baseline_accuracy=max(Counter(e.labels for e in examples).values()) / len(examples),
        references=references,
        variants=tuple(variants),
        comparisons=_compare(variants, references, answers),
        intra_op_threads=intra_op_threads,
        environment=_environment(),
    )


def _load(bundle: Bundle, variant: Variant, intra_op_threads: int | None) -> Classifier:
    if "cpu" in variant.devices:
        return Classifier.load(
            bundle.path, device="cpu", variant=variant.name, intra_op_threads=intra_op_threads
        )
    session = OnnxSession(
        bundle.read(variant.model), intra_op_threads=intra_op_threads, simulated=True
    )
    return Classifier(session, encoder_for(bundle), bundle.manifest.task)


@dataclass(frozen=True)
class _Answers:
    """What one variant answered: ``bool[rows, labels]``, and ``bool[rows]`` which were right."""

    given: NDArray[np.bool_]
    truth: NDArray[np.bool_]
    calibration_error: float
    truncated: int

    @classmethod
    def of(
        cls, classifier: Classifier, scores: NDArray[np.float32], examples: Sequence[Example]
    ) -> _Answers:
        task = classifier.task
        index = {label: column for column, label in enumerate(task.labels)}
        truth = np.zeros((len(examples), len(task.labels)), dtype=bool)
        given = np.zeros_like(truth)
        predictions = classifier.predictions(scores)
        for row, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
            truth[row, list(example.labels)] = True
            given[row, [index[label] for label in prediction.labels]] = True
        sure, right = scores.max(axis=1), np.asarray((given & truth).any(axis=1))
        if task.kind == "multi_label":  # each label is a question of its own
            sure, right = np.maximum(scores, 1 - scores).ravel(), (scores >= 0.5) == truth
        error = calibration_error(sure, right.ravel())
        return cls(given, truth, error, classifier.stats.truncated)

    @property
    def correct(self) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = (self.given == self.truth).all(axis=1)
        return right

    def differing(self, other: _Answers) -> int:
        return int((self.given != other.given).any(axis=1).sum())


def calibration_error(confidence: NDArray[np.floating], correct: NDArray[np.bool_]) -> float:
    """Expected calibration error: how far confidence is from being right as often as it says.

    Fifteen bins of equal width, the mean of their gaps weighted by their answers (Guo et al.
    2017, section 2).

    Args:
        confidence: ``float[n]``, from 0 to 1.
        correct: ``bool[n]``.
    """
    bins = np.minimum((confidence * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=confidence - correct, minlength=_CALIBRATION_BINS)
    return float(np.abs(gap).sum() / len(confidence))


def _compare(
    variants: Sequence[VariantScores],
    references: Mapping[str, str],
    answers: Mapping[str, _Answers],
) -> tuple[Comparison, ...]:
    """Pairs each variant with its model's reference, and the shipped ones with other models'."""
    from scipy.stats import binomtest

    shipped = variants[0].model
    pairs: list[tuple[VariantScores, VariantScores]] = []
    for variant in variants:
        for other in variants:
            int8_and_fp16 = (variant.name, other.name) == ("int8-gpu", "fp16-gpu")
            if int8_and_fp16 and variant.model == other.model:
                pairs.append((variant, other))
            if references[other.model] != other.name or variant is other:
                continue
            same = variant.model == other.model
            # The student without its teacher is compared with the student alone, FP32 with FP32.
            fair = other.model == TEACHER or references[variant.model] == variant.name
            if same or (variant.model == shipped and fair):
                pairs.append((variant, other))
    found = []
    for first, second in pairs:
        one, two = (answers[f"{v.model} {v.name}"].correct for v in (first, second))
        only_first, only_second = int((one & ~two).sum()), int((two & ~one).sum())
        differing = only_first + only_second
        found.append(
            Comparison(
                first=first.full_name,
                second=second.full_name,
                only_first_correct=only_first,
                only_second_correct=only_second,
                p_value=float(binomtest(only_first, differing).pvalue) if differing else 1.0,
            )
        )
    return tuple(found)


def _accuracy(correct: int, rows: int) -> dict[str, Any]:
    low, high = wilson(correct, rows)
    return {
        "correct": correct,
        "accuracy": correct / rows,
        "accuracy_low": low,
        "accuracy_high": high,
    }


def _flips(flips: int, rows: int) -> dict[str, Any]:
    low, high = wilson(flips, rows)
    return {"flips": flips, "flip_rate_low": low, "flip_rate_high": high}


def _by_label(task: Task, answers: _Answers) -> dict[str, Any]:
    from sklearn.metrics import precision_recall_fscore_support

    by_label = precision_recall_fscore_support(
        answers.truth, answers.given, average=None, zero_division=0
    )
    labels = tuple(
        LabelScores(label=label, rows=int(rows), precision=float(p), recall=float(r), f1=float(f))
        for label, p, r, f, rows in zip(task.labels, *by_label, strict=True)
    )
    return {"labels": labels, "macro_f1": float(np.mean(by_label[2]))}


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
