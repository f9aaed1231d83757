"""What an evaluation finds: the types, with nothing that computes them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from edgebert_runtime.bench import Timing
from edgebert_runtime.encoder import Text
from edgebert_runtime.rows import unpack_right

__all__ = [
    "HARD_LABEL",
    "MODEL",
    "STUDENT",
    "TEACHER",
    "Comparison",
    "Evaluation",
    "FlippedRow",
    "Flips",
    "GivenAnswer",
    "LabelScores",
    "ReliabilityBin",
    "VariantScores",
    "full_name",
]

_Count = Annotated[int, Meta(ge=0)]
_AtLeastOne = Annotated[int, Meta(ge=1)]

MODEL, STUDENT, TEACHER, HARD_LABEL = "model", "student", "teacher", "hard-label"
"""What a model is in the chain: the only one, or one of those that distilling brings."""


def full_name(model: str, variant: str) -> str:
    """A variant's name, with its model's before it if there are several models."""
    return variant if model == MODEL else f"{model} {variant}"


class LabelScores(msgspec.Struct, frozen=True, kw_only=True):
    """How well one label is told.

    Attributes:
        label: The label.
        rows: Test rows that it applies to.
        given: Rows that were answered with it; ``None`` in reports before version 4.
        right: Rows that were rightly answered with it; ``None`` in reports before version 4.
        precision: ``right`` over ``given``; 0 if it was never given.
        recall: ``right`` over ``rows``; 0 if it never applies.
        f1: Harmonic mean of the two.
        f1_low: Lower end of its 95 % interval (bootstrap); ``None`` before version 4, and where
            draws do not differ enough for one, as on a few rows that are all right.
        f1_high: Upper end of it.
    """

    label: str
    rows: _Count
    given: _Count | None = None
    right: _Count | None = None
    precision: float
    recall: float
    f1: float
    f1_low: float | None = None
    f1_high: float | None = None

    def __post_init__(self) -> None:
        if (self.right or 0) > min(self.rows, self.rows if self.given is None else self.given):
            raise ValueError(f"more right answers of label {self.label!r:.80} than answers or rows")


class ReliabilityBin(msgspec.Struct, frozen=True, kw_only=True):
    """Answers that were about equally sure.

    Attributes:
        low: Least confidence of the bin.
        high: Most confidence of it.
        answers: Answers in it; bins without any are left out.
        confidence: Their mean confidence.
        correct: How many of them are right.
    """

    low: float
    high: float
    answers: _AtLeastOne
    confidence: float
    correct: _Count

    def __post_init__(self) -> None:
        if self.correct > self.answers:
            raise ValueError("more right answers in a bin of confidence than answers")


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
        macro_f1_low: Lower end of its 95 % interval (bootstrap); ``None`` as ``f1_low`` is.
        macro_f1_high: Upper end of it.
        labels: By label.
        confusion: For each true label, how many rows were answered with each label; pairs that
            never occur are left out. ``None`` in ``multi_label`` and before version 4.
        calibration_error: Expected calibration error, from 0 to 1; see ``calibration_error``.
            ``None`` in version 1.
        reliability: How often answers are right by how sure they are; empty before version 4.
        flips: Rows that are answered unlike the model's reference variant does.
        flip_rate_low: Lower end of Wilson's 95 % interval of their share.
        flip_rate_high: Upper end of it.
        agreement: Share of rows that are answered as the teacher's reference variant does;
            ``None`` without a teacher.
        truncated: Rows that were cut to ``max_length``.
        timing: Latency and throughput; ``None`` if it is not for a CPU, where all is timed.
        right_rows: Which rows are answered right, as ``edgebert_runtime.rows.pack_right`` notes
            it; ``None`` before version 4.
    """

    model: str
    name: str
    precision: str
    devices: tuple[str, ...]
    size_bytes: _AtLeastOne
    correct: _Count
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    macro_f1: float
    macro_f1_low: float | None = None
    macro_f1_high: float | None = None
    labels: Annotated[tuple[LabelScores, ...], Meta(min_length=1)]
    confusion: dict[str, dict[str, int]] | None = None
    calibration_error: float | None
    reliability: tuple[ReliabilityBin, ...] = ()
    flips: _Count
    flip_rate_low: float
    flip_rate_high: float
    agreement: float | None
    truncated: int
    timing: Timing | None
    right_rows: str | None = None

    @property
    def full_name(self) -> str:
        """The variant's name, with the model's before it if there are several models."""
        return full_name(self.model, self.name)


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
    only_first_correct: _Count
    only_second_correct: _Count
    p_value: float

    @property
    def shown(self) -> bool:
        """Whether the two are shown to differ: p < 0.05."""
        return self.p_value < 0.05


class GivenAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer to a row, and which variants gave it.

    Attributes:
        labels: The answer; empty where no label of a ``multi_label`` task applies.
        scores: Probability of the best label, by the variant's full name.
    """

    labels: tuple[str, ...]
    scores: dict[str, float]


class FlippedRow(msgspec.Struct, frozen=True, kw_only=True):
    """A test row that not all variants answer alike.

    Attributes:
        row: Its place among the test rows, from 0.
        text: The text or the pair of texts, cut after 2,000 characters; ``None`` if the recipe
            leaves texts out.
        truth: Its labels.
        answers: What was answered, the most frequent answer first.
    """

    row: int
    text: Text | None = None
    truth: tuple[str, ...]
    answers: tuple[GivenAnswer, ...]


class Flips(msgspec.Struct, frozen=True, kw_only=True):
    """The test rows that not all variants answer alike.

    Attributes:
        count: How many there are.
        kept: Up to 1,000 of them; those that variants in the bundle answer unlike their
            reference come first.
    """

    count: int
    kept: tuple[FlippedRow, ...]


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What all variants do on the same rows, in one run.

    Attributes:
        rows: Test rows.
        rows_sha256: Hash of the rows and their labels, whatever their order
            (``edgebert_runtime.rows``); ``None`` before version 4.
        baseline_accuracy: Of always giving the commonest answer; what a model must beat.
        references: For each model, the variant that its flips are counted against.
        variants: The model in the bundle first, its variants in the bundle's order.
        comparisons: Paired tests of what a user may wonder about.
        flips: Rows that not all variants answer alike; ``None`` before version 4.
        intra_op_threads: Threads for one operator; ``None`` when ONNX Runtime decided.
        environment: The machine and the libraries.
    """

    rows: _AtLeastOne
    rows_sha256: str | None = None
    baseline_accuracy: float
    references: dict[str, str]
    variants: Annotated[tuple[VariantScores, ...], Meta(min_length=1)]
    comparisons: tuple[Comparison, ...]
    flips: Flips | None = None
    intra_op_threads: int | None
    environment: dict[str, str]

    def __post_init__(self) -> None:
        """Refuses what contradicts itself: a report may be a stranger's."""
        names = {(v.model, v.name) for v in self.variants}
        if not names.issuperset(self.references.items()):
            raise ValueError("a reference that is none of the variants")
        for v in self.variants:
            if v.model not in self.references:
                raise ValueError(f"no reference for the variants of {v.model!r:.80}")
            if max(v.correct, v.flips) > self.rows:
                raise ValueError(f"more right answers or flips of {v.name!r:.80} than rows")
            if v.right_rows is not None:
                unpack_right(v.right_rows, self.rows)
        for item in self.comparisons:
            if item.only_first_correct + item.only_second_correct > self.rows:
                raise ValueError("a comparison of more rows than there are")

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
