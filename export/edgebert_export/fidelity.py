"""Holds a model's answers on validation rows against those of the FP32 model it was made from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edgebert_export.dataset import Example
from edgebert_runtime.encoder import TextEncoder
from edgebert_runtime.manifest import Task

if TYPE_CHECKING:
    from edgebert_export.graph import Model

__all__ = ["Budget", "Fidelity", "Judge"]

_CONFIDENCE = 0.95
_Share = Annotated[float, Meta(ge=0, le=1)]


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What INT8, and FP16, may cost on validation rows against FP32; all limits hold."""

    max_accuracy_drop: Annotated[
        _Share, Meta(description="Most accuracy that may be lost; 0.005 is half a point.")
    ] = 0.005
    max_flip_rate: Annotated[
        _Share, Meta(description="Largest share of rows that may be answered otherwise.")
    ] = 0.03
    max_divergence: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Largest mean Kullback-Leibler divergence of the outputs, in nats."),
    ] = None


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """How a model's answers compare with FP32's.

    Attributes:
        rows: Validation rows.
        correct: Of them, how many the model answers right.
        lost: How many FP32 answers right more than the model; less than 0 if the model is better.
        flips: Rows that are answered otherwise.
        divergence: Mean Kullback-Leibler divergence of the model's outputs from FP32's, in nats;
            where several labels may apply, of each label on its own. ``None`` if an output is
            not a number.
    """

    rows: int
    correct: int
    lost: int
    flips: int
    divergence: float | None

    def fits(self, budget: Budget) -> bool:
        """Whether the model is within a budget."""
        return (
            self.divergence is not None
            and self.lost / self.rows <= budget.max_accuracy_drop
            and self.flips / self.rows <= budget.max_flip_rate
            and (budget.max_divergence is None or self.divergence <= budget.max_divergence)
        )

    def surely_fits(self, budget: Budget) -> bool:
        """Whether rows that nobody has looked at can be expected to keep to the budget's flips.

        Validation rows are a sample: at a model's true flip rate of 3 %, half of all samples show
        less. So this asks for so few flips that a model right at the limit would show as few in
        one of 20 samples at most (binomial distribution); no flips at all will do, of however few
        rows. Accuracy is not asked for as much: half a point cannot be shown by a thousand rows.
        """
        from scipy.stats import binom  # here: a recipe reads Budget, not SciPy

        limit = budget.max_flip_rate
        sure = (
            not self.flips
            or limit == 1
            or binom.cdf(self.flips, self.rows, limit) <= 1 - _CONFIDENCE
        )
        return self.fits(budget) and bool(sure)

    @property
    def distance(self) -> float:
        """The divergence, infinite if there is none: what candidates are ranked by."""
        return float("inf") if self.divergence is None else self.divergence


class Judge:
    """Judges models by validation rows.

    Args:
        reference: The FP32 model.
        task: What it answers; with its thresholds.
        encoder: Tokenises the rows.
        examples: Validation rows, at least one.
    """

    def __init__(
        self, reference: Model, task: Task, encoder: TextEncoder, examples: Sequence[Example]
    ) -> None:
        self.task = task
        self._encoder = encoder
        self._texts = [example.text for example in examples]
        self._truth = np.zeros((len(examples), len(task.labels)), dtype=bool)
        for row, example in enumerate(examples):
            self._truth[row, list(example.labels)] = True
        self._logits = self._run(reference)
        self._answers = self._answer(self._logits)

    def part(self, count: int) -> Judge:
        """Returns a judge of at most ``count`` of the rows, spread over all; nothing runs."""
        part = copy.copy(self)
        chosen = np.linspace(0, len(self._texts) - 1, min(count, len(self._texts))).astype(int)
        part._texts = [self._texts[index] for index in chosen]
        part._truth, part._logits = self._truth[chosen], self._logits[chosen]
        part._answers = self._answers[chosen]
        return part

    @property
    def rows(self) -> int:
        """How many rows it judges by."""
        return len(self._texts)

    def judge(self, model: Model) -> Fidelity:
        """Runs a model on the rows, as ONNX Runtime computes it on a CPU.

        For what is to run on a GPU, give what ``emulate`` makes of it.
        """
        logits = self._run(model)
        answers = self._answer(logits)
        correct, expected = (
            int((given == self._truth).all(axis=1).sum()) for given in (answers, self._answers)
        )
        divergence = self._divergence(logits)
        return Fidelity(
            rows=self.rows,
            correct=correct,
            lost=expected - correct,
            flips=int((answers != self._answers).any(axis=1).sum()),
            divergence=divergence if np.isfinite(divergence) else None,
        )

    def _run(self, model: Model) -> NDArray[np.float32]:
        # Here: a recipe reads Budget, not ONNX. Not by Classifier, which refuses to answer with
        # what is no number; here that is an answer like any other.
        from edgebert_export.calibrate import token_batches
        from edgebert_export.graph import open_session

        rows = self._encoder.encode(self._texts)
        logits = np.empty((len(rows), len(self.task.labels)), dtype=np.float32)
        session = open_session(model)
        for batch in token_batches(rows):
            inputs = self._encoder.collate([rows[index] for index in batch])
            logits[batch] = session.run(inputs)["logits"]
        session.close()
        return logits

    def _answer(self, logits: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Labels that apply, ``bool[rows, labels]``."""
        if self.task.kind == "multi_label":
            scores = np.exp(_log_probabilities(logits, self.task)[..., 1])
            above: NDArray[np.bool_] = scores >= self.task.thresholds
            return above
        answers = np.zeros(logits.shape, dtype=bool)
        answers[np.arange(len(logits)), logits.argmax(axis=1)] = True
        return answers

    def _divergence(self, logits: NDArray[np.float32]) -> float:
        with np.errstate(invalid="ignore"):  # an output that is not a number makes this one, too
            mine, reference = (_log_probabilities(z, self.task) for z in (logits, self._logits))
            return float((np.exp(reference) * (reference - mine)).sum(axis=-1).mean())


def _log_probabilities(logits: NDArray[np.float32], task: Task) -> NDArray[np.float64]:
    """Log-probabilities, ``float64[..., classes]``; a label that may apply is yes or no."""
    wide = logits.astype(np.float64)
    if task.kind == "multi_label":
        wide = np.stack([np.zeros_like(wide), wide], axis=-1)
    result: NDArray[np.float64] = wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
    return result
