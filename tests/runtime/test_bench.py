"""What the figures of a timing mean, on a clock that only the model and the tokenizer move."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from edgebert_runtime import Classifier
from edgebert_runtime.bench import Timing, measure
from edgebert_runtime.encoder import Encoded, Text, TextEncoder
from edgebert_runtime.manifest import Task
from edgebert_runtime.testing import FakeSession

TASK = Task(kind="single_label", labels=("no", "yes"), text_pair=False, thresholds=None)
TOKENISING_MS = 1.0


class Clock:
    """Stands still unless somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, ms: float) -> None:
        self.now += ms / 1000


class WorkingEncoder:
    """Tokenises as the real one does; each call takes a millisecond."""

    def __init__(self, encoder: TextEncoder, clock: Clock) -> None:
        self._encoder, self._clock = encoder, clock
        self.collate = encoder.collate

    def encode(self, texts: Sequence[Text], *, first_index: int = 0) -> list[Encoded]:
        self._clock.work(TOKENISING_MS)
        return self._encoder.encode(texts, first_index=first_index)

    def encode_one(self, text: Text) -> tuple[Any, bool]:
        self._clock.work(TOKENISING_MS)
        return self._encoder.encode_one(text)


class WorkingSession(FakeSession):
    """Takes a millisecond a token of its input, padding included, times ``slowness``'s next."""

    def __init__(self, clock: Clock, slowness: Iterator[float] | None = None) -> None:
        super().__init__(labels=2)
        self._clock, self._slowness = clock, slowness

    def run(self, inputs):
        found = super().run(inputs)
        self._clock.work(inputs["input_ids"].size * next(self._slowness or iter([1.0])))
        return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def classifier(clock: Clock, encoder: TextEncoder, session: FakeSession | None = None):
    working = WorkingEncoder(encoder, clock)
    return Classifier(session or WorkingSession(clock), working, TASK)  # type: ignore[arg-type]


@pytest.fixture
def text_of(encoders):
    """Returns a function that makes a text of so many tokens, special ones included."""

    def make(tokens: int) -> str:
        text = ". " * (tokens - 2)
        assert len(encoders["single"].encode([text])[0].ids) == tokens
        return text

    return make


def test_the_session_is_what_is_left_of_a_call_without_tokenising(clock, encoders, text_of) -> None:
    texts = [text_of(tokens) for tokens in range(3, 14)]
    timing = measure({"a": classifier(clock, encoders["single"])}, texts, repeats=3)["a"]
    assert (timing.texts, timing.repeats) == (11, 3)
    assert (timing.session_p50_ms, timing.session_p90_ms) == (pytest.approx(8), pytest.approx(12))
    assert timing.session_p99_ms == pytest.approx(12.9)
    assert timing.latency_p50_ms == pytest.approx(timing.session_p50_ms + TOKENISING_MS)
    assert timing.latency_p90_ms == pytest.approx(timing.session_p90_ms + TOKENISING_MS)
    assert timing.latency_p99_ms == pytest.approx(timing.session_p99_ms + TOKENISING_MS)


def test_a_steady_machine_is_not_called_noisy(clock, encoders, text_of) -> None:
    timing = measure({"a": classifier(clock, encoders["single"])}, [text_of(8)], repeats=3)["a"]
    assert timing.variation == pytest.approx(0)
    assert not timing.noisy
    assert timing.latency_p50_low_ms == pytest.approx(timing.latency_p50_high_ms)


def test_rounds_that_differ_are_told_and_called_noisy(clock, encoders, text_of) -> None:
    # The warm-up takes two calls of the model; then, in each round, one that starts the turn and
    # does not count, one that does, and one of all texts.
    slowness = iter([99, 99, *[99, 1.0, 1.0], *[99, 1.2, 1.0], *[99, 1.1, 1.0]])
    session = WorkingSession(clock, slowness)
    found = classifier(clock, encoders["single"], session)
    timing = measure({"a": found}, [text_of(10)], repeats=3, grid_texts=())["a"]
    assert timing.warmup_calls == 2
    assert timing.latency_p50_ms == pytest.approx(12)
    assert timing.latency_p50_low_ms == pytest.approx(11)
    assert timing.latency_p50_high_ms == pytest.approx(13)
    assert timing.variation == pytest.approx(1 / 12)
    assert timing.noisy
    assert timing.throughput_low_texts_per_s == pytest.approx(1000 / 11)
    assert timing.throughput_high_texts_per_s == pytest.approx(1000 / 11)


def test_one_round_says_nothing_of_variation(clock, encoders, text_of) -> None:
    timing = measure({"a": classifier(clock, encoders["single"])}, [text_of(8)], repeats=1)["a"]
    assert timing.variation is None
    assert not timing.noisy


def test_cells_tell_latency_by_length_and_texts_in_a_call(clock, encoders, text_of) -> None:
    texts = [text_of(tokens) for tokens in (5, 16, 17, 32, 33)]
    timing = measure({"a": classifier(clock, encoders["single"])}, texts, repeats=1)["a"]
    cells = {(cell.max_tokens, cell.batch_size): cell for cell in timing.cells}
    assert list(cells) == [(n, size) for n in (16, 32, 64) for size in (1, 8, 32)]
    one = cells[32, 1]
    assert one.texts == 2
    assert one.p50_ms == pytest.approx((17 + 32) / 2 + TOKENISING_MS, abs=8)
    assert one.p99_ms == pytest.approx(32 + TOKENISING_MS)
    many = cells[64, 8]  # the one text of this length, eight times
    assert (many.texts, many.calls) == (1, 5)
    assert many.p50_ms == many.p99_ms == pytest.approx(8 * 33 + TOKENISING_MS)
    assert all(5 <= cell.calls <= 100 for cell in timing.cells)


def test_a_slow_device_is_not_kept_for_long(clock, encoders, text_of) -> None:
    before = clock.now
    found = classifier(clock, encoders["single"], WorkingSession(clock, iter(lambda: 50.0, None)))
    timing = measure({"a": found}, [text_of(16)], repeats=1, grid_texts=[text_of(64)])["a"]
    assert {cell.calls for cell in timing.cells} == {5}
    ten_of_each_cell = 10 * 50 * 64 * (1 + 8 + 32) / 1000
    assert clock.now - before < ten_of_each_cell + 10


def test_classifiers_take_turns(clock, encoders, text_of) -> None:
    """Both see the machine while it is slow and while it is fast."""
    order: list[str] = []

    class Named(WorkingSession):
        def __init__(self, name: str) -> None:
            super().__init__(clock)
            self.name = name

        def run(self, inputs):
            order.append(self.name)
            return super().run(inputs)

    both = {name: classifier(clock, encoders["single"], Named(name)) for name in "ab"}
    measure(both, [text_of(8)] * 60, repeats=2, grid_texts=())
    changes = sum(one != other for one, other in itertools.pairwise(order))
    assert changes >= 2 * 2 * 60 / 20


def test_each_is_the_first_as_often_as_the_last(clock, encoders, text_of) -> None:
    """Whoever comes after a slow one would otherwise always pay for it."""
    calls: list[str] = []

    class Named(WorkingSession):
        def __init__(self, name: str) -> None:
            super().__init__(clock)
            self.name = name

        def run(self, inputs):
            calls.append(self.name)
            return super().run(inputs)

    three = {name: classifier(clock, encoders["single"], Named(name)) for name in "abc"}
    warmup = "aabbcc"
    measure(three, [text_of(8)], repeats=2, grid_texts=())
    assert "".join(calls) == warmup + "aabbccabc" + "ccbbaacba"
    calls.clear()
    measure(three, [text_of(8)], repeats=1, grid_texts=[text_of(8)])
    turns = "".join(name for name, _ in itertools.groupby(calls))
    assert turns == "abc" * 3 + "abcbabcbabc" * 3  # five turns of each of three cells


def test_what_older_reports_do_not_say_is_unknown() -> None:
    old = Timing(
        texts=1,
        repeats=1,
        latency_p50_ms=1.0,
        latency_p99_ms=1.0,
        throughput_texts_per_s=1.0,
        batch_size=1,
    )
    assert old.latency_p90_ms is old.session_p50_ms is old.variation is None
    assert old.cells == ()
