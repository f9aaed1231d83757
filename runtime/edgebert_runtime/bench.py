"""Latency and throughput of loaded classifiers, measured through what an application calls.

The timing scope is one call of ``predict``, tokenising and labelling included. Classifiers that
are to be compared are measured in one run, turn by turn, so that a machine whose speed drifts
slows all of them alike. A turn is some texts long: a device holds one model, whose weights stay
in its processor's cache, and changing the model at every text would measure their eviction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from edgebert_runtime.classifier import Classifier
from edgebert_runtime.encoder import Text

__all__ = ["Timing", "measure"]

_TURN_TEXTS = 20


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one classifier answered.

    Attributes:
        texts: Different texts that were timed, each ``repeats`` times.
        repeats: Rounds; a text's latency is the median of its rounds.
        latency_p50_ms: Median over texts, one text a call.
        latency_p99_ms: 99th percentile over texts, one text a call.
        throughput_texts_per_s: All texts in one call; the median round.
        batch_size: Most texts in one call of the model while measuring throughput.
    """

    texts: int
    repeats: int
    latency_p50_ms: float
    latency_p99_ms: float
    throughput_texts_per_s: float
    batch_size: int


def measure(
    classifiers: Mapping[str, Classifier],
    texts: Sequence[Text],
    *,
    repeats: int = 3,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Times every classifier on ``texts``, after a warm-up of up to 8 of them.

    Args:
        classifiers: By name.
        texts: What to label; at least one.
        repeats: Rounds over all texts, at least one.
        on_progress: Called with rounds done and rounds in all.
    """
    single = {name: np.empty((repeats, len(texts))) for name in classifiers}
    whole: dict[str, list[float]] = {name: [] for name in classifiers}
    for classifier in classifiers.values():
        classifier.predict(texts[:8])
        for text in texts[:8]:
            classifier.predict([text])
    for round_ in range(repeats):
        for first in range(0, len(texts), _TURN_TEXTS):
            for name, classifier in classifiers.items():
                for index, text in enumerate(texts[first : first + _TURN_TEXTS], start=first):
                    start = time.perf_counter()
                    classifier.predict([text])
                    single[name][round_, index] = time.perf_counter() - start
        for name, classifier in classifiers.items():
            start = time.perf_counter()
            classifier.predict(texts)
            whole[name].append(time.perf_counter() - start)
        if on_progress is not None:
            on_progress(round_ + 1, repeats)
    return {
        name: _timing(classifier, single[name], whole[name])
        for name, classifier in classifiers.items()
    }


def _timing(classifier: Classifier, single: np.ndarray, whole: list[float]) -> Timing:
    repeats, texts = single.shape
    by_text = np.median(single, axis=0) * 1000
    return Timing(
        texts=texts,
        repeats=repeats,
        latency_p50_ms=float(np.percentile(by_text, 50)),
        latency_p99_ms=float(np.percentile(by_text, 99)),
        throughput_texts_per_s=texts / float(np.median(whole)),
        batch_size=classifier.batch_size,
    )
