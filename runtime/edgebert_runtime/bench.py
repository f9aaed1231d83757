"""Latency and throughput of loaded classifiers, measured through what an application calls.

The timing scope is one call of ``predict``, tokenising and labelling included; the part of it that
the session alone takes is measured in the same calls. Classifiers that are to be compared are
measured in one run, turn by turn, so that a machine whose speed drifts slows all of them alike;
every other round in the opposite order, so that none always comes after the same one. A turn is
some texts long: a device holds one model, whose weights stay in its processor's cache, and changing
the model at every text would measure their eviction. So a turn starts with a call that does not
count, either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, TypeVar

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edgebert_runtime.classifier import Classifier
from edgebert_runtime.encoder import Text, TextEncoder
from edgebert_runtime.rows import rows_sha256
from edgebert_runtime.session import Inputs, Outputs, Session

__all__ = [
    "BATCH_SIZES",
    "NOISY",
    "LatencyCell",
    "Timing",
    "in_turn",
    "measure",
    "spread_over_lengths",
]

_T = TypeVar("_T")

BATCH_SIZES = (1, 8, 32)
"""Texts in a call that latency is broken down by."""

NOISY = 0.05
"""Rounds that vary by more than this (standard deviation over mean) come from a noisy machine: a
difference of a few per cent between two such measurements says nothing."""

_Positive = Annotated[float, Meta(gt=0)]

_SHORTEST_CELL_TOKENS = 16
_TURN_TEXTS = 20
_WARMUP_TEXTS = 8
_CELL_TURNS = 5
_CELL_CALLS = 100
_CELL_SECONDS = 0.5


class LatencyCell(msgspec.Struct, frozen=True, kw_only=True):
    """Latency of calls of one kind: so many texts, each of about so many tokens.

    A cell takes half a second of each classifier, or 100 calls if they take less, but no less
    than five calls. Every call counts; none is averaged with another.

    Attributes:
        max_tokens: A power of two, from 16 on. Every text has so many tokens at most, and more
            than half as many (or, in cells of 16, any number).
        batch_size: Texts in one call of ``predict``, tokenising and labelling included.
        texts: Different texts that the calls took turns with.
        calls: Calls that were timed.
        p50_ms: Median of the calls, in milliseconds.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile; of fewer than 100 calls, next to the slowest.
    """

    max_tokens: int
    batch_size: int
    texts: int
    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one classifier answered. What has a default is missing in older reports.

    Attributes:
        texts: Different texts that were timed, each ``repeats`` times.
        repeats: Rounds; a text's latency is the median of its rounds.
        latency_p50_ms: Median over texts, one text a call of ``predict``: tokenising, the model
            and labelling.
        latency_p90_ms: 90th percentile over texts.
        latency_p99_ms: 99th percentile over texts.
        throughput_texts_per_s: All texts in one call; the median round.
        batch_size: Most texts in one call of the model while measuring throughput.
        warmup_calls: Calls of ``predict`` before the first that counts: one of all texts, the
            others of one. Besides, each turn of up to 20 texts starts with one that does
            not count.
        session_p50_ms: Of ``latency_p50_ms``'s calls, what the session took: from padded token
            ids, as NumPy arrays, to the model's raw outputs, as NumPy arrays. So copies to and
            from a GPU are in it; tokenising, padding and labelling are not.
        session_p90_ms: 90th percentile over texts.
        session_p99_ms: 99th percentile over texts.
        latency_p50_low_ms: Median over texts in the fastest round.
        latency_p50_high_ms: Median over texts in the slowest round.
        throughput_low_texts_per_s: The slowest round.
        throughput_high_texts_per_s: The fastest round.
        variation: Coefficient of variation of the rounds (their standard deviation over their
            mean): of their median latency or of their throughput, whichever varies more. ``None``
            when there was one round only.
        noisy: Whether ``variation`` is above 0.05.
        texts_sha256: Hash of the texts; latencies on other texts are those of other work.
        cells: Latency by length and by texts in a call; no cell for lengths that none of the
            texts has.
    """

    texts: int
    repeats: int
    latency_p50_ms: _Positive
    latency_p99_ms: _Positive
    throughput_texts_per_s: _Positive
    batch_size: int
    latency_p90_ms: float | None = None
    warmup_calls: int | None = None
    session_p50_ms: float | None = None
    session_p90_ms: float | None = None
    session_p99_ms: float | None = None
    latency_p50_low_ms: _Positive | None = None
    latency_p50_high_ms: _Positive | None = None
    throughput_low_texts_per_s: float | None = None
    throughput_high_texts_per_s: float | None = None
    variation: float | None = None
    noisy: bool = False
    texts_sha256: str | None = None
    cells: tuple[LatencyCell, ...] = ()


def measure(
    classifiers: Mapping[str, Classifier],
    texts: Sequence[Text],
    *,
    repeats: int = 3,
    grid_texts: Sequence[Text] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Times every classifier on ``texts``, after a warm-up on them.

    Args:
        classifiers: By name; they answer the same bundle, or bundles that tokenise alike.
        texts: What to label; at least one.
        repeats: Rounds over all texts, at least one.
        grid_texts: What to time the cells on; ``texts`` when ``None``, no cells when empty.
        on_progress: Called with rounds done and rounds in all.
    """
    watched = {name: _Watched(classifier) for name, classifier in classifiers.items()}
    single = {name: np.empty((2, repeats, len(texts))) for name in classifiers}
    whole: dict[str, list[float]] = {name: [] for name in classifiers}
    warmup = texts[:_WARMUP_TEXTS]
    for name, classifier in classifiers.items():
        classifier.predict(texts)  # starts the workers, too
        for text in warmup:
            watched[name].timed(text)
    for round_ in range(repeats):
        names = in_turn(classifiers, round_)
        for first in range(0, len(texts), _TURN_TEXTS):
            for name in names:
                watched[name].timed(texts[first - 1])
                for index, text in enumerate(texts[first : first + _TURN_TEXTS], start=first):
                    single[name][:, round_, index] = watched[name].timed(text)
        for name in names:
            whole[name].append(_seconds(partial(classifiers[name].predict, texts)))
        if on_progress is not None:
            on_progress(round_ + 1, repeats)
    sha256 = rows_sha256((text, ()) for text in texts)
    cells = _cells(classifiers, texts if grid_texts is None else grid_texts)
    return {
        name: msgspec.structs.replace(
            _timing(classifier, single[name], whole[name]),
            warmup_calls=1 + len(warmup),
            texts_sha256=sha256,
            cells=cells[name],
        )
        for name, classifier in classifiers.items()
    }


def in_turn(those: Iterable[_T], round_: int) -> list[_T]:
    """Returns who comes when in a round: in odd ones, the last come first."""
    return list(those)[:: -1 if round_ % 2 else 1]


def spread_over_lengths(texts: Sequence[Text], count: int) -> list[Text]:
    """Returns ``count`` of ``texts``, from the shortest to the longest; all if there are fewer."""
    ordered = sorted(texts, key=lambda text: len(text if isinstance(text, str) else "".join(text)))
    count = min(count, len(ordered))
    return [ordered[index] for index in np.linspace(0, len(ordered) - 1, count).astype(int)]


class _Stopwatch:
    """A session that adds up how long another one takes."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.seconds = 0.0

    def run(self, inputs: Inputs) -> Outputs:
        start = time.perf_counter()
        found = self._session.run(inputs)
        self.seconds += time.perf_counter() - start
        return found

    def close(self) -> None:
        """Leaves the other session open: it is not this one's."""


class _Watched:
    """A classifier of one text a call, as it is but for a watch on its session."""

    def __init__(self, classifier: Classifier) -> None:
        self._watch = _Stopwatch(classifier.session)
        self._predict = Classifier(self._watch, classifier.encoder, classifier.task).predict

    def timed(self, text: Text) -> tuple[float, float]:
        """Returns seconds of a call, and of the session in it."""
        before = self._watch.seconds
        whole = _seconds(partial(self._predict, [text]))
        return whole, self._watch.seconds - before


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cells(
    classifiers: Mapping[str, Classifier], texts: Sequence[Text]
) -> dict[str, tuple[LatencyCell, ...]]:
    """Measures every cell, with all classifiers before the next one."""
    found: dict[str, list[LatencyCell]] = {name: [] for name in classifiers}
    if classifiers and texts:
        buckets = _by_tokens(next(iter(classifiers.values())).encoder, texts)
        for max_tokens, bucket in buckets.items():
            for batch_size in BATCH_SIZES:
                calls = _cell_calls(classifiers, bucket, batch_size)
                for name, seconds in calls.items():
                    p50, p90, p99 = _percentiles_ms(np.array(seconds))
                    found[name].append(
                        LatencyCell(
                            max_tokens=max_tokens,
                            batch_size=batch_size,
                            texts=min(len(bucket), batch_size * len(seconds)),
                            calls=len(seconds),
                            p50_ms=p50,
                            p90_ms=p90,
                            p99_ms=p99,
                        )
                    )
    return {name: tuple(cells) for name, cells in found.items()}


def _by_tokens(encoder: TextEncoder, texts: Sequence[Text]) -> dict[int, list[Text]]:
    """Returns the texts by the power of two, 16 or more, that their tokens fit into, mixed."""
    texts = [texts[index] for index in np.random.default_rng(0).permutation(len(texts))]
    buckets: dict[int, list[Text]] = {}
    for text, row in zip(texts, encoder.encode(texts), strict=True):
        length = max(_SHORTEST_CELL_TOKENS, 1 << (len(row.ids) - 1).bit_length())
        buckets.setdefault(length, []).append(text)
    return dict(sorted(buckets.items()))


def _cell_calls(
    classifiers: Mapping[str, Classifier], texts: Sequence[Text], batch_size: int
) -> dict[str, list[float]]:
    """Returns seconds of each call of ``batch_size`` texts, in turns of the classifiers."""
    found: dict[str, list[float]] = {name: [] for name in classifiers}
    for turn in range(_CELL_TURNS):
        for name in in_turn(classifiers, turn):
            classifier, done = classifiers[name], found[name]
            classifier.predict(_batch(texts, batch_size, len(done)))
            spent = 0.0
            for _ in range(_CELL_CALLS // _CELL_TURNS):
                batch = _batch(texts, batch_size, len(done))
                done.append(_seconds(partial(classifier.predict, batch)))
                spent += done[-1]
                if spent >= _CELL_SECONDS / _CELL_TURNS:
                    break
    return found


def _batch(texts: Sequence[Text], size: int, number: int) -> list[Text]:
    """Returns the next ``size`` texts, from the front again when they are used up."""
    return [texts[index % len(texts)] for index in range(number * size, (number + 1) * size)]


def _percentiles_ms(seconds: NDArray[np.float64]) -> tuple[float, float, float]:
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)) * 1000)
    return p50, p90, p99


def _timing(classifier: Classifier, single: NDArray[np.float64], whole: Sequence[float]) -> Timing:
    """Sums up ``float64[2, repeats, texts]`` (calls, and sessions in them) and whole rounds."""
    _, repeats, texts = single.shape
    calls, sessions = (_percentiles_ms(np.median(times, axis=0)) for times in single)
    by_round = np.median(single[0], axis=1) * 1000
    rates = texts / np.asarray(whole)
    variation = None
    if repeats > 1:
        variation = max(float(np.std(r, ddof=1) / np.mean(r)) for r in (by_round, rates))
    return Timing(
        texts=texts,
        repeats=repeats,
        latency_p50_ms=calls[0],
        latency_p90_ms=calls[1],
        latency_p99_ms=calls[2],
        throughput_texts_per_s=float(np.median(rates)),
        batch_size=classifier.batch_size,
        session_p50_ms=sessions[0],
        session_p90_ms=sessions[1],
        session_p99_ms=sessions[2],
        latency_p50_low_ms=float(by_round.min()),
        latency_p50_high_ms=float(by_round.max()),
        throughput_low_texts_per_s=float(rates.min()),
        throughput_high_texts_per_s=float(rates.max()),
        variation=variation,
        noisy=variation is not None and variation > NOISY,
    )
