"""What variants answered, and what follows from it: accuracy, calibration, flips, paired tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgebert_export.dataset import Example
from edgebert_pipeline.intervals import bootstrap, mcnemar, wilson
from edgebert_pipeline.scores import (
    TEACHER,
    Comparison,
    Evaluation,
    FlippedRow,
    Flips,
    GivenAnswer,
    LabelScores,
    ReliabilityBin,
    VariantScores,
    full_name,
)
from edgebert_runtime.classifier import Classifier
from edgebert_runtime.encoder import Text
from edgebert_runtime.manifest import Task

__all__ = [
    "Answers",
    "calibration_error",
    "compare",
    "find_flips",
    "reliability",
    "score",
    "with_texts",
]

_CALIBRATION_BINS = 15
_MOST_FLIPS = 1000
_MOST_CHARACTERS = 2000


@dataclass(frozen=True)
class Answers:
    """What one variant answered.

    Attributes:
        task: What was asked.
        given: ``bool[rows, labels]``, the labels that were given.
        truth: ``bool[rows, labels]``, those that apply.
        scores: ``float32[rows, labels]``, probabilities.
        truncated: Rows that were cut to ``max_length``.
    """

    task: Task
    given: NDArray[np.bool_]
    truth: NDArray[np.bool_]
    scores: NDArray[np.float32]
    truncated: int

    @classmethod
    def of(cls, classifier: Classifier, examples: Sequence[Example]) -> Answers:
        """Asks a classifier, which must not have been asked before: its statistics are read."""
        task = classifier.task
        logits = classifier.logits([example.text for example in examples])
        index = {label: column for column, label in enumerate(task.labels)}
        truth = np.zeros((len(examples), len(task.labels)), dtype=bool)
        given = np.zeros_like(truth)
        predictions = classifier.predictions_of(logits)
        for row, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
            truth[row, list(example.labels)] = True
            given[row, [index[label] for label in prediction.labels]] = True
        scores = classifier.scores_of(logits)
        return cls(task, given, truth, scores, classifier.stats.truncated)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """``bool[rows]``, with every label right."""
        right: NDArray[np.bool_] = (self.given == self.truth).all(axis=1)
        return right

    def differs(self, other: Answers) -> NDArray[np.bool_]:
        """``bool[rows]``, answered unlike another does."""
        unlike: NDArray[np.bool_] = (self.given != other.given).any(axis=1)
        return unlike

    def confidence(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """How sure each answer is, ``float32[n]``, and whether it is right, ``bool[n]``.

        In ``multi_label``, each label of a row is a question of its own.
        """
        if self.task.kind == "multi_label":
            sure = np.maximum(self.scores, 1 - self.scores).ravel()
            return sure, ((self.scores >= 0.5) == self.truth).ravel()
        return self.scores.max(axis=1), self.correct


def score(answers: Answers, reference: Answers, teacher: Answers | None) -> dict[str, Any]:
    """Returns the fields of ``VariantScores`` that follow from a variant's answers.

    Args:
        answers: The variant's.
        reference: Of the variant that its flips are counted against.
        teacher: Of the teacher's reference variant, if there is one.
    """
    rows = len(answers.truth)
    correct, flips = int(answers.correct.sum()), int(answers.differs(reference).sum())
    accuracy_low, accuracy_high = wilson(correct, rows)
    flip_rate_low, flip_rate_high = wilson(flips, rows)
    bins = reliability(*answers.confidence())
    return {
        "correct": correct,
        "accuracy": correct / rows,
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        **_by_label(answers),
        "confusion": _confusion(answers),
        "calibration_error": calibration_error(bins),
        "reliability": bins,
        "flips": flips,
        "flip_rate_low": flip_rate_low,
        "flip_rate_high": flip_rate_high,
        "agreement": None if teacher is None else 1 - int(answers.differs(teacher).sum()) / rows,
        "truncated": answers.truncated,
    }


def _by_label(answers: Answers) -> dict[str, Any]:
    right = answers.given & answers.truth
    counts = np.hstack([right, answers.given, answers.truth])  # three columns a label

    def f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of each label, and their mean: ``float64[n, labels + 1]``."""
        hits, given, rows = np.split(sums, 3, axis=1)
        both = given + rows
        each = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
        return np.hstack([each, each.mean(axis=1, keepdims=True)])

    (found,) = f1(counts.sum(axis=0, keepdims=True, dtype=np.float64))
    intervals = [
        (None, None) if np.isnan(low) else (float(low), float(high))
        for low, high in bootstrap(counts, f1)
    ]
    labels = []
    for index, label in enumerate(answers.task.labels):
        hits, given, rows = (
            int(part[:, index].sum()) for part in (right, answers.given, answers.truth)
        )
        labels.append(
            LabelScores(
                label=label,
                rows=rows,
                given=given,
                right=hits,
                precision=hits / given if given else 0.0,
                recall=hits / rows if rows else 0.0,
                f1=float(found[index]),
                f1_low=intervals[index][0],
                f1_high=intervals[index][1],
            )
        )
    return {
        "labels": tuple(labels),
        "macro_f1": float(found[-1]),
        "macro_f1_low": intervals[-1][0],
        "macro_f1_high": intervals[-1][1],
    }


def _confusion(answers: Answers) -> dict[str, dict[str, int]] | None:
    if answers.task.kind == "multi_label":
        return None
    names = answers.task.labels
    found: dict[str, dict[str, int]] = {}
    pairs = np.stack([answers.truth.argmax(axis=1), answers.given.argmax(axis=1)], axis=1)
    for (truth, given), count in zip(*np.unique(pairs, axis=0, return_counts=True), strict=True):
        found.setdefault(names[truth], {})[names[given]] = int(count)
    return found


def reliability(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_]
) -> tuple[ReliabilityBin, ...]:
    """How often answers are right by how sure they are, in 15 bins of equal width.

    Args:
        confidence: ``float[n]``, from 0 to 1.
        correct: ``bool[n]``.
    """
    index = np.minimum((confidence * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    return tuple(
        ReliabilityBin(
            low=number / _CALIBRATION_BINS,
            high=(number + 1) / _CALIBRATION_BINS,
            answers=int(inside.sum()),
            confidence=float(confidence[inside].mean(dtype=np.float64)),
            correct=int(correct[inside].sum()),
        )
        for number in range(_CALIBRATION_BINS)
        if (inside := index == number).any()
    )


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Expected calibration error: how far confidence is from being right as often as it says.

    The mean of the bins' gaps, weighted by their answers (Guo et al. 2017, section 2).
    """
    gaps = [abs(item.confidence * item.answers - item.correct) for item in bins]
    return sum(gaps) / sum(item.answers for item in bins)


def compare(
    variants: Sequence[VariantScores],
    references: Mapping[str, str],
    answers: Mapping[str, Answers],
) -> tuple[Comparison, ...]:
    """Pairs each variant with its model's reference, and the shipped ones with other models'.

    Args:
        variants: The shipped model's first.
        references: As in ``Evaluation``.
        answers: By full name.
    """
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
        one, two = (answers[v.full_name].correct for v in (first, second))
        only_first, only_second = int((one & ~two).sum()), int((two & ~one).sum())
        found.append(
            Comparison(
                first=first.full_name,
                second=second.full_name,
                only_first_correct=only_first,
                only_second_correct=only_second,
                p_value=mcnemar(only_first, only_second),
            )
        )
    return tuple(found)


def find_flips(
    variants: Sequence[VariantScores],
    references: Mapping[str, str],
    answers: Mapping[str, Answers],
) -> Flips:
    """Finds the rows that not all variants answer alike. Arguments as for ``compare``."""
    first = answers[variants[0].full_name]
    differing = np.zeros(len(first.truth), dtype=bool)
    shipped = differing.copy()
    for variant in variants:
        found = answers[variant.full_name]
        differing |= found.differs(first)
        if variant.model == variants[0].model:
            reference = full_name(variant.model, references[variant.model])
            shipped |= found.differs(answers[reference])
    chosen = np.flatnonzero(differing)
    # Stable: in the rows' order, but those that matter to the bundle first.
    kept = chosen[np.argsort(~shipped[chosen], kind="stable")][:_MOST_FLIPS]
    return Flips(count=len(chosen), kept=tuple(_flipped_row(int(row), answers) for row in kept))


def _flipped_row(row: int, answers: Mapping[str, Answers]) -> FlippedRow:
    names = next(iter(answers.values())).task.labels
    by_answer: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for variant, found in answers.items():
        labels = tuple(names[index] for index in np.flatnonzero(found.given[row]))
        by_answer[labels][variant] = round(float(found.scores[row].max()), 4)
    truth = next(iter(answers.values())).truth[row]
    return FlippedRow(
        row=row,
        truth=tuple(names[index] for index in np.flatnonzero(truth)),
        answers=tuple(
            GivenAnswer(labels=labels, scores=scores)
            for labels, scores in sorted(by_answer.items(), key=lambda item: -len(item[1]))
        ),
    )


def with_texts(evaluation: Evaluation, examples: Sequence[Example]) -> Evaluation:
    """Adds the texts of flipped rows, cut after 2,000 characters."""
    if evaluation.flips is None:
        return evaluation
    kept = tuple(
        msgspec.structs.replace(item, text=_cut(examples[item.row].text))
        for item in evaluation.flips.kept
    )
    flips = msgspec.structs.replace(evaluation.flips, kept=kept)
    return msgspec.structs.replace(evaluation, flips=flips)


def _cut(text: Text) -> Text:
    if not isinstance(text, str):
        return _cut_one(text[0]), _cut_one(text[1])
    return _cut_one(text)


def _cut_one(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "…"
