"""Times ways to compute the same texts against each other, and says which is shown to be faster.

All take turns, round by round, and what counts is the ratio within a round: a machine whose speed
drifts slows all of them alike. Every other round goes in the opposite order, so that none always
comes after the same one. A difference counts if it holds in too many rounds for chance.

Each turn begins with a rest. ONNX Runtime's threads go on looking for work after the last call, in
releases that cannot be told otherwise for some 50 ms, and whoever comes next would share the cores
with those of the one before.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import msgspec

from edgebert_pipeline.progress import Progress
from edgebert_runtime.bench import in_turn
from edgebert_runtime.classifier import Classifier, CpuSettings
from edgebert_runtime.encoder import Text, TextEncoder
from edgebert_runtime.manifest import Task
from edgebert_runtime.onnx_session import OnnxSession
from edgebert_runtime.session import Inputs, Outputs, Session

__all__ = ["Gain", "Goal", "Runner", "Speed", "call_tokens", "time_rounds", "times"]

Goal = Literal["both", "latency", "throughput"]

_LEAST_RATIO, _BY_CHANCE = 1.02, 0.02
_CALLS = 30
_REST_S = 0.1
_MOST_CALL_TOKENS = 2048


class Gain(msgspec.Struct, frozen=True, kw_only=True):
    """How much faster something was than what it would replace.

    Attributes:
        ratio: Its speed over the other's in the same round; the median round.
        faster: Rounds in which it was faster.
        rounds: Of how many.
    """

    ratio: float
    faster: int
    rounds: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Gain:
        """Sums up the ratios of rounds."""
        faster = sum(ratio > 1 for ratio in ratios)
        return cls(ratio=statistics.median(ratios), faster=faster, rounds=len(ratios))

    @property
    def promising(self) -> bool:
        """Whether it is faster by more than two per cent, if the rounds can be believed."""
        return self.ratio > _LEAST_RATIO

    @property
    def shown(self) -> bool:
        """Whether the rounds can be believed, too: a sign test, one-sided.

        If neither were faster, it would be faster in so many rounds, or more, in at most 2 % of
        such races; that takes 6 rounds at least. Noise has any shape here, and this asks for none.
        """
        as_many = sum(math.comb(self.rounds, k) for k in range(self.faster, self.rounds + 1))
        return self.promising and as_many / 2**self.rounds <= _BY_CHANCE


class _Kept:
    """A session that stays open when a classifier that used it is closed."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(self, inputs: Inputs) -> Outputs:
        return self._session.run(inputs)

    def close(self) -> None:
        """Leaves it open for the next."""


class Runner:
    """One model, loaded once, for classifiers with settings that differ.

    Args:
        model: The ONNX file's bytes.
        encoder: Turns texts into its inputs.
        task: What its outputs mean.
        cores: Cores to use.

    Raises:
        BundleError: ONNX Runtime cannot load the model.
    """

    def __init__(self, model: bytes, encoder: TextEncoder, task: Task, cores: int) -> None:
        self._encoder = encoder
        self._task = task
        self._cores = cores
        self._on_all_cores = OnnxSession(model, intra_op_threads=cores)
        self._on_one_core = (
            self._on_all_cores if cores == 1 else OnnxSession(model, intra_op_threads=1)
        )

    def session(self, *, by_core: bool) -> OnnxSession:
        """Returns the session that computes many texts, one core or all cores at a time."""
        return self._on_one_core if by_core else self._on_all_cores

    @contextmanager
    def classifier(self, settings: CpuSettings) -> Iterator[Classifier]:
        """Yields what ``Classifier.load`` makes on a CPU with these settings."""
        by_core = settings.by_core and self._cores > 1
        one_core = _Kept(self._on_one_core)
        with Classifier(
            _Kept(self._on_all_cores),
            self._encoder,
            self._task,
            batch_tokens=settings.batch_tokens,
            call_tokens=settings.call_tokens,
            workers=self._cores if by_core else 1,
            start_worker_session=(lambda: one_core) if by_core else None,
        ) as classifier:
            yield classifier

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exc: object) -> None:
        self._on_all_cores.close()
        self._on_one_core.close()


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """What one turn of a classifier came to, tokenising and labelling included.

    Attributes:
        latency_p50_ms: Median over texts, one text a call.
        throughput_texts_per_s: Many texts in one call.
    """

    latency_p50_ms: float
    throughput_texts_per_s: float

    def ratios(self, other: Speed) -> tuple[float, float]:
        """How many times as fast this is as another: for one text, and for many."""
        return (
            other.latency_p50_ms / self.latency_p50_ms,
            self.throughput_texts_per_s / other.throughput_texts_per_s,
        )

    def ratio(self, other: Speed, goal: Goal) -> float:
        """How many times as fast this is, by a goal; for both, their geometric mean."""
        latency, throughput = self.ratios(other)
        if goal == "both":
            return math.sqrt(latency * throughput)
        return latency if goal == "latency" else throughput


def time_rounds(
    classifiers: Mapping[str, Classifier],
    single: Sequence[Text],
    many: Sequence[Text],
    rounds: int,
    progress: Progress,
) -> list[dict[str, Speed]]:
    """Times classifiers in turns, after a round that does not count.

    Args:
        classifiers: By name.
        single: Texts to label one by one.
        many: Texts to label in one call.
        rounds: How many.
        progress: Called with rounds done and rounds in all.
    """
    found: list[dict[str, Speed]] = []
    for round_ in range(rounds + 1):
        row: dict[str, Speed] = {}
        for name, classifier in in_turn(classifiers.items(), round_):
            time.sleep(_REST_S)
            latency = statistics.median(
                _seconds(partial(classifier.predict, [text])) for text in single
            )
            time.sleep(_REST_S)
            whole = _seconds(partial(classifier.predict, many))
            row[name] = Speed(
                latency_p50_ms=1000 * latency, throughput_texts_per_s=len(many) / whole
            )
        found.append(row)
        progress(round_, rounds)
    return found[1:]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def times(
    calls: Sequence[Callable[[], object]], rounds: int, progress: Progress, *, rest: bool = True
) -> list[list[float]]:
    """Returns seconds of each call in each round, after a round that does not count.

    Args:
        calls: In turns; in every other round, the last first.
        rounds: How many.
        progress: Called with rounds done and rounds in all.
        rest: Whether a call is of another session than the one before.
    """
    found: list[list[float]] = []
    for round_ in range(rounds + 1):
        row = [0.0] * len(calls)
        for index, call in in_turn(enumerate(calls), round_):
            if rest:
                time.sleep(_REST_S)
            row[index] = _seconds(call)
        found.append(row)
        progress(round_, rounds)
    return found[1:]


def call_tokens(session: Session, row: Inputs) -> int | None:
    """Fits what a call takes besides its tokens, as so many tokens.

    Single rows of two lengths are timed in turns; the time of none is read off the line through
    the two.

    Args:
        session: The model.
        row: A long row, ``int64[1, seq]`` each.

    Returns:
        ``None`` if a longer row does not take longer.
    """
    longest = int(next(iter(row.values())).shape[1])
    lengths = (max(1, longest // 8), longest)
    cut = [{name: array[:, :length].copy() for name, array in row.items()} for length in lengths]
    calls = [partial(session.run, inputs) for inputs in cut]
    time.sleep(_REST_S)
    rounds = times(calls, _CALLS, lambda done, total: None, rest=False)
    short, long = (statistics.median(row[which] for row in rounds) for which in (0, 1))
    if lengths[0] == lengths[1] or long <= short:
        return None
    by_token = (long - short) / (lengths[1] - lengths[0])
    return max(0, min(round(short / by_token) - lengths[0], _MOST_CALL_TOKENS))
