"""Batches, streams and many threads: every text gets its own answer, whoever shares its batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebert_runtime import Classifier
from edgebert_runtime.batching import Gatherer, by_length
from edgebert_runtime.encoder import Encoded
from edgebert_runtime.errors import DeviceError, InputError


def _row(length: int) -> Encoded:
    return Encoded(list(range(length)), [0] * length, False)


@given(
    st.lists(st.integers(1, 128), max_size=200), st.integers(1, 40), st.sampled_from([1, 64, 512])
)
def test_batches_hold_every_row_once_and_keep_to_both_limits(
    lengths: list[int], most_rows: int, most_tokens: int
) -> None:
    rows = [_row(length) for length in lengths]
    batches = by_length(rows, most_rows, most_tokens, 16)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths)
    for batch in batches:
        assert 1 <= len(batch) <= most_rows
        padded = len(batch) * max(lengths[index] for index in batch)
        assert len(batch) == 1 or padded <= most_tokens


def _all_cuts(count: int) -> Iterator[list[int]]:
    """Yields every way to cut so many rows into batches, as the batches' sizes."""
    if count == 0:
        yield []
    for size in range(1, count + 1):
        for rest in _all_cuts(count - size):
            yield [size, *rest]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.sampled_from([0, 16, 10**9]))
def test_no_other_way_to_cut_takes_less_time(lengths: list[int], call_tokens: int) -> None:
    most_rows, most_tokens = 4, 100

    def takes(sizes: list[int]) -> int | None:
        total, begin = 0, 0
        for size in sizes:
            longest = sorted(lengths)[begin + size - 1]
            if size > most_rows or (size > 1 and size * longest > most_tokens):
                return None
            total, begin = total + size * longest + call_tokens, begin + size
        return total

    batches = by_length([_row(n) for n in lengths], most_rows, most_tokens, call_tokens)
    possible = [cost for sizes in _all_cuts(len(lengths)) if (cost := takes(sizes)) is not None]
    assert takes([len(batch) for batch in batches]) == min(possible)


@pytest.fixture(scope="module")
def parallel(tiny_bundles: dict[str, Path]) -> Iterator[Classifier]:
    """A classifier on three cores, whose threads share batches."""
    path = tiny_bundles["single"]
    with Classifier.load(path, device="cpu", intra_op_threads=3, max_wait_ms=5) as classifier:
        yield classifier


@pytest.fixture(scope="module")
def plain(tiny_bundles: dict[str, Path]) -> Iterator[Classifier]:
    """The same on one core, each text on its own."""
    with Classifier.load(tiny_bundles["single"], device="cpu", intra_op_threads=1) as classifier:
        yield classifier


@pytest.fixture(scope="module")
def expected(plain: Classifier, texts_for: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    """Raw outputs of each text, computed alone."""
    return {text: plain.logits([text])[0] for text in texts_for["single"]}


def test_many_texts_on_many_cores_are_answered_in_order(
    parallel: Classifier, expected: dict[str, np.ndarray]
) -> None:
    texts = [*expected] * 5
    found = parallel.logits(texts)
    np.testing.assert_allclose(found, [expected[text] for text in texts], atol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
def test_a_stream_gives_what_predict_gives_in_order(
    parallel: Classifier, expected: dict[str, np.ndarray], chunk_size: int
) -> None:
    texts = [*expected]
    found = list(parallel.stream(iter(texts), chunk_size=chunk_size))
    whole = parallel.predict(texts)
    assert [p.label for p in found] == [p.label for p in whole]
    np.testing.assert_allclose([p.score for p in found], [p.score for p in whole], atol=1e-4)


def test_an_empty_stream_ends(parallel: Classifier) -> None:
    assert list(parallel.stream([])) == []


def test_a_stream_reads_no_more_than_two_chunks_ahead(parallel: Classifier) -> None:
    read = 0

    def source() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield f"text number {read}"

    answers = parallel.stream(source(), chunk_size=10)
    for taken in range(1, 101):
        next(answers)
        assert read <= taken + 2 * 10
    answers.close()  # type: ignore[attr-defined]


def test_a_stream_that_is_left_early_leaves_the_classifier_usable(parallel: Classifier) -> None:
    answers = parallel.stream(["one", "two", "three"] * 100, chunk_size=10)
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert len(parallel.predict(["one"])) == 1


def test_a_fault_in_a_stream_names_the_text_by_its_place(parallel: Classifier) -> None:
    answers = parallel.stream(["good"] * 25 + [3], chunk_size=10)  # type: ignore[list-item]
    with pytest.raises(InputError, match="text 25"):
        list(answers)


@pytest.mark.parametrize(("texts", "size"), [("a text", 10), (["a text"], 0)])
def test_a_stream_of_one_string_or_in_chunks_of_nothing_is_refused(
    parallel: Classifier, texts: Any, size: int
) -> None:
    with pytest.raises(InputError):
        next(parallel.stream(texts, chunk_size=size))


@pytest.mark.parametrize("max_wait_ms", [-1.0, float("nan"), 1e9])
def test_a_wait_that_makes_no_sense_is_refused(
    tiny_bundles: dict[str, Path], max_wait_ms: float
) -> None:
    with pytest.raises(InputError, match="max_wait_ms"):
        Classifier.load(tiny_bundles["single"], device="cpu", max_wait_ms=max_wait_ms)


def test_thirty_two_threads_each_get_the_answers_to_their_own_texts(
    parallel: Classifier, expected: dict[str, np.ndarray]
) -> None:
    texts = [*expected]
    before = parallel.stats

    def ask(first: int) -> list[tuple[str, np.ndarray]]:
        mine = texts[first::32]
        return [(text, parallel.logits([text])[0]) for text in mine]

    with ThreadPoolExecutor(32) as threads:
        answers = [answer for found in threads.map(ask, range(32)) for answer in found]
    assert sorted(text for text, _ in answers) == sorted(texts)
    for text, logits in answers:
        np.testing.assert_allclose(logits, expected[text], atol=1e-4)
    after = parallel.stats
    assert after.texts - before.texts == len(texts)
    assert after.batches - before.batches < len(texts)  # some did share


def _gatherer(run: Any, encode: Any = None, **kwargs: Any) -> Gatherer:
    settings = {"most_rows": 8, "max_wait_ms": 0.0, "workers": 2} | kwargs
    cut = partial(by_length, most_rows=settings["most_rows"], most_tokens=512, call_tokens=16)
    return Gatherer(encode, run, cut, **settings)


def test_rows_that_waited_share_a_batch_with_those_nearest_in_length() -> None:
    entered, go = threading.Event(), threading.Event()
    seen: list[list[int]] = []

    def run(rows: list[Encoded]) -> Any:
        seen.append([len(row.ids) for row in rows])
        entered.set()
        assert go.wait(30)
        return np.zeros((len(rows), 2), dtype=np.float32)

    gatherer = _gatherer(run, workers=1, most_rows=3)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(gatherer.logits, [_row(5)])
        assert entered.wait(30)  # the worker is busy; these have to wait
        rest = [_row(length) for length in (20, 90, 22, 88, 21)]
        with ThreadPoolExecutor(1) as others:
            waiting = others.submit(gatherer.logits, rest)
            while gatherer._inside < 6:
                pass
            go.set()
            first.result(30)
            waiting.result(30)
    gatherer.close()
    assert seen[0] == [5]
    assert sorted(seen[1]) == [20, 21, 22]
    assert sorted(seen[2]) == [88, 90]


def test_a_fault_reaches_every_caller_of_its_batch_and_no_other() -> None:
    def run(rows: list[Encoded]) -> Any:
        if any(len(row.ids) == 13 for row in rows):
            raise DeviceError("thirteen")
        return np.array([[len(row.ids), 0] for row in rows], dtype=np.float32)

    gatherer = _gatherer(run, most_rows=1)
    assert gatherer.logits([_row(12)])[0][0] == 12
    with pytest.raises(DeviceError, match="thirteen"):
        gatherer.logits([_row(13)])
    assert gatherer.logits([_row(14)])[0][0] == 14
    gatherer.close()


def _lengths(rows: list[Encoded]) -> Any:
    return np.array([[len(row.ids), 0] for row in rows], dtype=np.float32)


def test_a_text_that_cannot_be_tokenised_after_all_fails_alone() -> None:
    entered, go = threading.Event(), threading.Event()

    def encode(text: Any) -> Encoded:
        entered.set()
        assert go.wait(30)
        if len(text) == 13:
            raise DeviceError("thirteen")
        return _row(len(text))

    gatherer = _gatherer(_lengths, encode=encode, workers=1)
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(gatherer.logits, ["a"])
        assert entered.wait(30)  # the worker is busy; these are taken together
        calls = {n: threads.submit(gatherer.logits, ["a" * n]) for n in (12, 13, 14, 15)}
        while gatherer._inside < 5:
            pass
        go.set()
        assert first.result(30)[0][0] == 1
        for length, call in calls.items():
            if length == 13:
                with pytest.raises(DeviceError, match="thirteen"):
                    call.result(30)
            else:
                assert call.result(30)[0][0] == length
    with pytest.raises(DeviceError, match="thirteen"):  # alone; the worker lives on
        gatherer.logits(["a" * 13])
    assert gatherer._inside == 0
    gatherer.close()


def test_each_text_is_tokenised_once_however_long_it_waits() -> None:
    encoded: list[int] = []

    def encode(text: Any) -> Encoded:
        encoded.append(len(text))
        return _row(len(text))

    gatherer = _gatherer(_lengths, encode=encode, most_rows=3)
    lengths = [5 + index * 37 % 80 for index in range(200)]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda n: gatherer.logits(["a" * n])[0][0], lengths))
    gatherer.close()
    assert found == lengths
    assert sorted(encoded) == sorted(lengths)


def test_two_workers_share_the_batches_of_one_call() -> None:
    both = threading.Barrier(2, timeout=30)

    def run(rows: list[Encoded]) -> Any:
        both.wait()  # neither goes on alone
        return _lengths(rows)

    gatherer = _gatherer(run)
    found = gatherer.logits([_row(5), _row(90)])
    gatherer.close()
    assert [row[0] for row in found] == [5, 90]


def test_what_is_left_of_a_lone_call_waits_for_nobody() -> None:
    gatherer = _gatherer(_lengths, max_wait_ms=60_000.0, most_rows=5)
    rows = [_row(length) for length in (5, 6, 7, 8, 9) for _ in range(4)]
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(gatherer.logits, rows).result(30)
    gatherer.close()
    assert [row[0] for row in found] == [len(row.ids) for row in rows]


def test_a_model_that_gives_too_few_rows_leaves_nobody_waiting() -> None:
    gatherer = _gatherer(lambda rows: np.zeros((len(rows) - 1, 2), dtype=np.float32), workers=1)
    for _ in range(2):  # its only worker lives on
        with pytest.raises(ValueError, match="1 rows, and 0 answers"):
            gatherer.logits([_row(3)])
    gatherer.close()


def test_who_comes_after_a_crowd_waits_for_it_once() -> None:
    def run(rows: list[Encoded]) -> Any:
        return np.zeros((len(rows), 2), dtype=np.float32)

    gatherer = _gatherer(run, max_wait_ms=20.0)
    gatherer._crowd = 100.0
    gatherer.logits([_row(3)])
    assert gatherer._expected() <= 1  # a row alone is all that is waited for from now on
    gatherer.close()


def test_more_texts_than_a_chunk_fit_into_a_large_batch(tiny_bundles: dict[str, Path]) -> None:
    with Classifier.load(tiny_bundles["single"], device="cpu", batch_size=4096) as classifier:
        assert len(classifier.predict(["a text"] * 1500)) == 1500
    with pytest.raises(InputError, match="batch_size is 4097; it must lie between 1 and 4096"):
        Classifier.load(tiny_bundles["single"], device="cpu", batch_size=4097)


def test_closing_while_others_ask_is_said_to_them(tiny_bundles: dict[str, Path]) -> None:
    classifier = Classifier.load(tiny_bundles["single"], device="cpu", intra_op_threads=2)
    faults: list[BaseException] = []
    asking = threading.Event()

    def ask() -> None:
        try:
            while True:
                classifier.predict(["a text of some length"] * 200)
                asking.set()
        except BaseException as exc:
            faults.append(exc)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert asking.wait(60)
    classifier.close()
    for thread in threads:
        thread.join(60)
    assert [type(fault) for fault in faults] == [DeviceError] * 3


def test_what_waits_when_it_is_closed_is_answered_and_what_comes_later_refused() -> None:
    def run(rows: list[Encoded]) -> Any:
        return np.zeros((len(rows), 2), dtype=np.float32)

    gatherer = _gatherer(run, workers=1, max_wait_ms=60_000.0)
    gatherer._crowd = 100.0  # as if others had to be waited for
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(gatherer.logits, [_row(3)])
        while not gatherer._waiting:
            pass
        gatherer.close()
        assert len(waiting.result(30)) == 1
    with pytest.raises(DeviceError, match="closed"):
        gatherer.logits([_row(3)])


def test_a_closed_classifier_refuses_lists_and_streams_too(tiny_bundles: dict[str, Path]) -> None:
    classifier = Classifier.load(tiny_bundles["single"], device="cpu", intra_op_threads=2)
    texts = ["a text"] * 100
    assert len(classifier.predict(texts)) == 100
    classifier.close()
    classifier.close()
    with pytest.raises(DeviceError):
        classifier.predict(texts)
    with pytest.raises(DeviceError):
        list(classifier.stream(texts))


def test_workers_share_the_loaded_model_if_the_bundle_is_gone(
    tiny_bundles: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundles["single"], copy)
    with Classifier.load(copy, device="cpu", intra_op_threads=2) as classifier:
        shutil.rmtree(copy)
        assert len(classifier.predict(["a text"] * 100)) == 100
    assert "share one session" in caplog.text
