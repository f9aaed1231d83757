"""Texts in, labels out: what an application that holds a classifier can rely on."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebert_runtime import (
    BundleError,
    Classifier,
    DeviceError,
    EdgebertError,
    InputError,
    Prediction,
    Stats,
)
from edgebert_runtime.classifier import _MOST_UNCOUNTED
from edgebert_runtime.device import Choice, DeviceFacts
from edgebert_runtime.encoder import TextEncoder
from edgebert_runtime.manifest import Task
from edgebert_runtime.session import Inputs, Outputs
from edgebert_runtime.testing import FakeSession

NAMES = ("single", "multi", "pairs")
SINGLE = Task(kind="single_label", labels=("negative", "positive"), text_pair=False)

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=40),
    st.sampled_from(
        [
            "",
            " ",
            "\n\t\r",
            "\x00",
            "👩‍👩‍👧‍👦 🇻🇳 ❤️",
            "Món này ngon quá",
            "e\u0301\u200d\ufeff",
            "[CLS] [SEP] [MASK] [PAD]",
            "long " * 200,
            "x" * 500,
            "a great film",
        ]
    ),
)


class ConstantSession:
    """Answers every row with the logits that it was made with."""

    def __init__(self, logits: list[float]) -> None:
        self._logits = np.array(logits, dtype=np.float32)

    def run(self, inputs: Inputs) -> Outputs:
        return {"logits": np.tile(self._logits, (len(inputs["input_ids"]), 1))}

    def close(self) -> None:
        pass


@pytest.fixture
def over(encoders: dict[str, TextEncoder]) -> Callable[..., Classifier]:
    """Makes a classifier on single texts over a session that the test brings."""

    def make(session: Any, task: Task = SINGLE, **options: Any) -> Classifier:
        return Classifier(
            session, encoders["pairs" if task.text_pair else "single"], task, **options
        )

    return make


# Answers


@pytest.mark.parametrize("name", NAMES)
def test_predictions_scores_and_logits_agree(
    classifiers: dict[str, Classifier], texts_for: dict[str, list[Any]], name: str
) -> None:
    classifier, texts = classifiers[name], texts_for[name][:40]
    logits, scores = classifier.logits(texts), classifier.scores(texts)
    predictions = classifier.predict(texts)
    labels = classifier.task.labels
    assert logits.shape == scores.shape == (len(texts), len(labels))
    assert logits.dtype == scores.dtype == np.float32
    assert len(predictions) == len(texts)
    wide = logits.astype(np.float64)
    if classifier.task.kind == "multi_label":
        expected = 1 / (1 + np.exp(-wide))
    else:
        expected = np.exp(wide) / np.exp(wide).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    for prediction, row in zip(predictions, scores, strict=True):
        assert prediction.score == pytest.approx(float(row.max()), abs=1e-6)
        if classifier.task.kind == "single_label":
            assert prediction.label == labels[int(row.argmax())]
            assert prediction.labels == (prediction.label,)
        else:
            assert set(prediction.labels) == {
                label for label, score in zip(labels, row, strict=True) if score >= 0.5
            }
            assert prediction.label == (prediction.labels[0] if prediction.labels else None)
    assert len(np.unique(logits.round(3), axis=0)) > 10  # the model does look at its text


@pytest.mark.parametrize("name", ["single", "pairs"])
def test_the_scores_of_a_single_label_task_sum_to_one(
    classifiers: dict[str, Classifier], texts_for: dict[str, list[Any]], name: str
) -> None:
    scores = classifiers[name].scores(texts_for[name][:60])
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert (scores >= 0).all()


def test_the_scores_of_a_multi_label_task_each_lie_between_zero_and_one(
    classifiers: dict[str, Classifier], texts_for: dict[str, list[Any]]
) -> None:
    scores = classifiers["multi"].scores(texts_for["multi"][:60])
    assert ((scores > 0) & (scores < 1)).all()
    assert not np.allclose(scores.sum(axis=1), 1, atol=1e-2)


@pytest.mark.parametrize("name", ["single", "multi"])
@settings(deadline=None, max_examples=40, suppress_health_check=[*HealthCheck])
@given(texts=st.lists(TEXTS, max_size=12))
def test_a_list_gets_the_answers_of_its_texts_one_by_one_in_order(
    classifiers: dict[str, Classifier], name: str, texts: list[str]
) -> None:
    classifier = classifiers[name]
    together = classifier.scores(texts)
    assert together.shape == (len(texts), len(classifier.task.labels))
    for text, scores in zip(texts, together, strict=True):
        np.testing.assert_allclose(classifier.scores([text])[0], scores, atol=1e-4)


@settings(deadline=None, max_examples=40, suppress_health_check=[*HealthCheck])
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), max_size=12))
def test_a_list_of_pairs_gets_the_answers_of_its_pairs_one_by_one_in_order(
    classifiers: dict[str, Classifier], texts: list[tuple[str, str]]
) -> None:
    together = classifiers["pairs"].scores(texts)
    assert together.shape == (len(texts), 3)
    for pair, scores in zip(texts, together, strict=True):
        np.testing.assert_allclose(classifiers["pairs"].scores([pair])[0], scores, atol=1e-4)


@settings(deadline=None, max_examples=50, suppress_health_check=[*HealthCheck])
@given(texts=st.lists(TEXTS, max_size=40), batch_size=st.integers(1, 50))
def test_the_batch_size_changes_no_answer(
    over: Callable[..., Classifier], texts: list[str], batch_size: int
) -> None:
    one_by_one = over(FakeSession(), batch_size=1)
    batched = over(FakeSession(), batch_size=batch_size)
    np.testing.assert_array_equal(batched.logits(texts), one_by_one.logits(texts))


def test_the_two_texts_of_a_pair_are_told_apart(
    classifiers: dict[str, Classifier], texts_for: dict[str, list[Any]]
) -> None:
    there = texts_for["pairs"][:20]
    back = [(second, first) for first, second in there]
    found, turned = (classifiers["pairs"].scores(pairs) for pairs in (there, back))
    assert not np.allclose(found, turned, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_no_texts_get_no_answers(classifiers: dict[str, Classifier], name: str) -> None:
    classifier = classifiers[name]
    assert classifier.predict([]) == []
    labels = len(classifier.task.labels)
    assert classifier.scores([]).shape == classifier.logits([]).shape == (0, labels)


@pytest.mark.parametrize("name", NAMES)
def test_the_empty_string_is_a_text_like_any_other(
    classifiers: dict[str, Classifier], name: str
) -> None:
    text = ("", "") if name == "pairs" else ""
    (prediction,) = classifiers[name].predict([text])
    assert 0 < prediction.score <= 1


@pytest.mark.parametrize("make", [tuple, list, np.array])
def test_texts_may_come_in_any_sequence(
    classifiers: dict[str, Classifier], make: Callable[[list[str]], Any]
) -> None:
    texts = ["a great film", "never again", ""]
    assert classifiers["single"].predict(make(texts)) == classifiers["single"].predict(texts)


# What is not a text


@pytest.mark.parametrize("text", ["a great film", "", "x" * 10_000])
@pytest.mark.parametrize("name", NAMES)
def test_one_string_instead_of_a_list_is_refused(
    classifiers: dict[str, Classifier], name: str, text: str
) -> None:
    with pytest.raises(InputError, match="list of texts"):
        classifiers[name].predict(text)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("single", "fine", ("a", "pair")),
        ("single", "fine", ["a", "pair"]),
        ("single", "fine", ("alone",)),
        ("single", "fine", None),
        ("single", "fine", 3),
        ("single", "fine", b"bytes"),
        ("single", "fine", float("nan")),
        ("single", "fine", "lone \ud800 surrogate"),
        ("multi", "fine", ("a", "pair")),
        ("multi", "fine", None),
        ("pairs", ("a", "b"), "one text"),
        ("pairs", ("a", "b"), ("one text",)),
        ("pairs", ("a", "b"), ("one", "two", "three")),
        ("pairs", ("a", "b"), ()),
        ("pairs", ("a", "b"), ("one", None)),
        ("pairs", ("a", "b"), (b"one", "two")),
        ("pairs", ("a", "b"), ("one", "\udfff")),
        ("pairs", ("a", "b"), None),
    ],
)
def test_what_the_task_does_not_take_is_refused_by_its_index(
    classifiers: dict[str, Classifier], name: str, good: Any, bad: Any
) -> None:
    before = classifiers[name].stats
    for call in (classifiers[name].predict, classifiers[name].scores, classifiers[name].logits):
        with pytest.raises(InputError, match=r"\btext 2\b"):
            call([good, good, bad, good])
        with pytest.raises(InputError, match=r"\btext 0\b"):
            call([bad])
    assert classifiers[name].stats == before


@pytest.mark.parametrize("name", ["single", "pairs"])
@pytest.mark.parametrize("bad", [None, 5, ["one", "two"], "\ud800"])
def test_threads_that_share_batches_are_refused_for_their_own_texts_alone(
    tiny_bundles: dict[str, Path], texts_for: dict[str, list[Any]], name: str, bad: Any
) -> None:
    good = texts_for[name][:8]
    if name == "pairs" and bad == "\ud800":
        bad = ("one", bad)
    with (
        Classifier.load(tiny_bundles[name], device="cpu", max_wait_ms=50) as classifier,
        ThreadPoolExecutor(8) as threads,
    ):
        fine = [threads.submit(classifier.predict, [text]) for text in good]
        refused = [threads.submit(classifier.predict, [good[0], bad]) for _ in range(4)]
        for call in refused:
            with pytest.raises(InputError, match=r"\btext 1\b"):
                call.result(30)
        assert all(len(call.result(30)) == 1 for call in fine)


def test_the_index_counts_from_the_start_of_a_long_list(over: Callable[..., Classifier]) -> None:
    texts: list[Any] = ["a"] * 5000
    texts[4500] = None
    with pytest.raises(InputError, match=r"\btext 4500\b"):
        over(FakeSession()).predict(texts)


def test_a_refusal_shows_the_start_of_a_long_text_only(
    classifiers: dict[str, Classifier],
) -> None:
    with pytest.raises(InputError) as caught:
        classifiers["pairs"].predict(["word " * 100_000])  # type: ignore[list-item]
    assert len(str(caught.value)) < 300


def test_after_a_refusal_the_classifier_goes_on(classifiers: dict[str, Classifier]) -> None:
    with pytest.raises(InputError):
        classifiers["single"].predict([None])  # type: ignore[list-item]
    assert len(classifiers["single"].predict(["still there"])) == 1


# Length and batches


@pytest.mark.parametrize("name", ["single", "pairs"])
def test_one_text_gives_the_inputs_that_a_batch_of_it_does(
    encoders: dict[str, TextEncoder], texts_for: dict[str, list[Any]], name: str
) -> None:
    encoder = encoders[name]
    long: Any = "a " * 200 if name == "single" else ("a " * 200, "b " * 200)
    assert encoder.encode_one(long)[1]
    assert not encoder.encode_one("a" if name == "single" else ("a", "b"))[1]
    for text in [*texts_for[name][:50], long]:
        (row,) = encoder.encode([text])
        inputs, cut = encoder.encode_one(text)
        expected = encoder.collate([row])
        assert cut == row.truncated
        assert list(inputs) == list(expected)
        for input_name, array in inputs.items():
            assert array.dtype == np.int64
            np.testing.assert_array_equal(array, expected[input_name])


@pytest.mark.parametrize("name", ["single", "multi", "pairs"])
def test_labels_and_scores_can_be_had_of_raw_outputs(
    classifiers: dict[str, Classifier], texts_for: dict[str, list[Any]], name: str
) -> None:
    classifier, texts = classifiers[name], texts_for[name][:40]
    logits = classifier.logits(texts)
    assert classifier.predictions_of(logits) == classifier.predict(texts)
    np.testing.assert_array_equal(classifier.scores_of(logits), classifier.scores(texts))
    for prediction, scores in zip(
        classifier.predictions_of(logits), classifier.scores_of(logits), strict=True
    ):
        assert prediction.score == pytest.approx(scores.max(), abs=1e-6)
    assert classifier.scores_of(logits[:0]).shape == (0, len(classifier.task.labels))


def test_what_was_not_answered_is_not_counted(over: Callable[..., Classifier]) -> None:
    classifier = over(FakeSession(labels=3))  # of a model for another task
    with pytest.raises(BundleError, match="do not belong together"):
        classifier.predict(["a"])
    classifier.close()
    with pytest.raises(DeviceError, match="closed"):
        classifier.predict(["a"])
    assert classifier.stats == Stats(0, 0, 0)


def test_calls_are_counted_however_many(over: Callable[..., Classifier]) -> None:
    classifier = over(FakeSession())
    calls = 2 * _MOST_UNCOUNTED + 5
    for _ in range(calls):
        classifier.predict(["a"])
    assert len(classifier._answered) <= _MOST_UNCOUNTED
    assert classifier.stats == classifier.stats == Stats(texts=calls, truncated=0, batches=calls)


def test_what_is_cut_is_counted_and_answered(tiny_bundles: dict[str, Path]) -> None:
    with Classifier.load(tiny_bundles["single"]) as classifier:
        assert classifier.stats == Stats(0, 0, 0)
        long = "word " * 500
        found = classifier.scores(["short", long, "short", long + "and another end"])
        # The short ones share a call, the long ones another: that is less padding than one for all.
        assert classifier.stats == Stats(texts=4, truncated=2, batches=2)
        np.testing.assert_allclose(found[1], found[3], atol=1e-5)  # they differ behind the cut
        classifier.scores(["short"])
        assert classifier.stats == Stats(texts=5, truncated=2, batches=3)


def test_a_text_that_just_fits_is_not_cut(
    over: Callable[..., Classifier], encoders: dict[str, TextEncoder]
) -> None:
    (row,) = encoders["single"].encode(["a"])
    assert len(row.ids) == 3  # [CLS] a [SEP]
    session = FakeSession()
    classifier = over(session)
    classifier.predict(["a " * 62])  # max_length is 64
    assert classifier.stats.truncated == 0
    classifier.predict(["a " * 63])
    assert classifier.stats.truncated == 1
    assert session.shapes == [(1, 64), (1, 64)]


def test_a_pair_is_cut_at_its_longer_text(
    encoders: dict[str, TextEncoder], classifiers: dict[str, Classifier]
) -> None:
    (cut,) = encoders["pairs"].encode([("a " * 200, "b c d")])
    (short,) = encoders["pairs"].encode([("a", "b c d")])
    assert cut.truncated and not short.truncated
    assert len(cut.ids) == 64
    assert list(cut.type_ids).count(1) == list(short.type_ids).count(1)
    before = classifiers["pairs"].stats.truncated
    classifiers["pairs"].predict([("a " * 200, "b c d"), ("a", "b " * 200), ("a", "b")])
    assert classifiers["pairs"].stats.truncated == before + 2


def test_texts_of_like_length_share_a_batch(
    over: Callable[..., Classifier], encoders: dict[str, TextEncoder]
) -> None:
    texts = ["word " * (index * 7 % 60) for index in range(300)]
    lengths = [len(row.ids) for row in encoders["single"].encode(texts)]
    session = FakeSession()
    classifier = over(session, batch_size=16)
    classifier.predict(texts)
    assert sum(rows for rows, _ in session.shapes) == len(texts)
    assert max(rows for rows, _ in session.shapes) == 16
    assert len(session.shapes) == classifier.stats.batches == math.ceil(300 / 16)
    cells = sum(rows * length for rows, length in session.shapes)
    in_order = sum(
        len(lengths[start : start + 16]) * max(lengths[start : start + 16])
        for start in range(0, 300, 16)
    )
    padding, padding_in_order = cells - sum(lengths), in_order - sum(lengths)
    assert padding >= 0
    assert padding < padding_in_order / 5


def test_a_short_text_is_not_padded_to_the_longest_that_the_model_takes(
    over: Callable[..., Classifier],
) -> None:
    session = FakeSession()
    over(session).predict(["a"])
    assert session.shapes == [(1, 3)]


@pytest.mark.parametrize("count", [4095, 4096, 4097, 9000])
def test_thousands_of_texts_keep_their_order(over: Callable[..., Classifier], count: int) -> None:
    texts = ["a " * (index % 11) + chr(97 + index % 26) for index in range(count)]
    distinct = sorted(set(texts))
    classifier = over(FakeSession(), batch_size=64)
    alone = dict(zip(distinct, over(FakeSession(), batch_size=1).logits(distinct), strict=True))
    found = classifier.logits(texts)
    np.testing.assert_array_equal(found, np.stack([alone[text] for text in texts]))
    assert classifier.stats.texts == count


# What the outputs mean


@pytest.mark.parametrize(
    ("logits", "thresholds", "labels", "score"),
    [
        ([2.0, -2.0, 1.0], (0.5, 0.5, 0.5), ("a", "c"), 0.8808),
        ([1.0, -2.0, 2.0], (0.5, 0.5, 0.5), ("c", "a"), 0.8808),
        ([0.0, -1.0, -1.0], (0.5, 0.5, 0.5), ("a",), 0.5),  # exactly at the threshold
        ([-0.01, -1.0, -1.0], (0.5, 0.5, 0.5), (), 0.4975),
        ([2.0, 1.0, 0.0], (0.9, 0.7, 0.5), ("b", "c"), 0.7311),
        ([-2.0, -2.0, -2.0], (0.1, 0.2, 0.1), ("a", "c"), 0.1192),
        ([5.0, 5.0, 5.0], (1.0, 1.0, 1.0), (), 0.9933),
        ([-50.0, -50.0, -50.0], (0.0, 0.0, 0.0), ("a", "b", "c"), 0.0),
        ([0.0, 1.0, -3.0], (0.6, 0.8, 0.9), (), 0.7311),
    ],
)
def test_exactly_the_labels_from_their_threshold_on_apply_best_first(
    over: Callable[..., Classifier],
    logits: list[float],
    thresholds: tuple[float, ...],
    labels: tuple[str, ...],
    score: float,
) -> None:
    task = Task(kind="multi_label", labels=("a", "b", "c"), text_pair=False, thresholds=thresholds)
    (found,) = over(ConstantSession(logits), task).predict(["text"])
    assert found.labels == labels
    assert found.label == (labels[0] if labels else None)
    assert found.score == pytest.approx(score, abs=1e-4)


def test_a_single_label_task_gives_the_best_label_however_unsure(
    over: Callable[..., Classifier],
) -> None:
    (found,) = over(ConstantSession([0.1, 0.2])).predict(["text"])
    assert found.label == "positive"
    assert found.labels == ("positive",)
    assert found.score == pytest.approx(1 / (1 + math.exp(-0.1)), abs=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("logits", [[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4], [-1e4, -1e4], [3e38, 0]])
@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
def test_extreme_logits_give_probabilities_and_no_warning(
    over: Callable[..., Classifier], logits: list[float], kind: Any
) -> None:
    thresholds = (0.5, 0.5) if kind == "multi_label" else None
    task = Task(kind=kind, labels=("a", "b"), text_pair=False, thresholds=thresholds)
    classifier = over(ConstantSession(logits), task)
    scores = classifier.scores(["text"])
    assert np.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    if logits[0] != logits[1]:
        assert int(scores.argmax()) == int(np.argmax(logits))
    if kind == "single_label":
        assert scores.sum() == pytest.approx(1)
    else:
        np.testing.assert_allclose(
            scores[0], [1.0 if value > 0 else 0.5 if value == 0 else 0.0 for value in logits]
        )


@pytest.mark.parametrize("columns", [1, 3])
def test_a_model_that_answers_another_number_of_labels_is_refused(
    over: Callable[..., Classifier], columns: int
) -> None:
    # One column could be spread over two labels without numpy's complaint.
    with pytest.raises(EdgebertError):
        over(ConstantSession([1.0] * columns)).predict(["one", "two"])


def test_a_prediction_cannot_be_changed(classifiers: dict[str, Classifier]) -> None:
    (found,) = classifiers["single"].predict(["text"])
    assert isinstance(found, Prediction)
    with pytest.raises(AttributeError):
        found.label = "other"  # type: ignore[misc]


# Threads and closing


def test_threads_that_share_a_classifier_each_get_their_own_answers(
    tiny_bundles: dict[str, Path], texts_for: dict[str, list[Any]]
) -> None:
    texts = texts_for["single"]
    with Classifier.load(tiny_bundles["single"], intra_op_threads=1, batch_size=4) as classifier:
        parts = [texts[start : start + 1 + start % 9] for start in range(0, 160, 5)]
        parts.append(["long " * 200])
        expected = [classifier.scores(part) for part in parts]
        before = classifier.stats
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                for ours, theirs in zip(pool.map(classifier.scores, parts), expected, strict=True):
                    np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert classifier.stats == Stats(
            texts=4 * before.texts, truncated=4 * before.truncated, batches=4 * before.batches
        )


def test_the_context_manager_closes(tiny_bundles: dict[str, Path]) -> None:
    with Classifier.load(tiny_bundles["single"]) as classifier:
        assert classifier.predict(["open"])
    for call in (classifier.predict, classifier.scores, classifier.logits):
        with pytest.raises(DeviceError, match="closed"):
            call(["closed"])


def test_the_context_manager_closes_after_an_error_too(tiny_bundles: dict[str, Path]) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        Classifier.load(tiny_bundles["single"]) as classifier,
    ):
        raise ZeroDivisionError
    with pytest.raises(DeviceError, match="closed"):
        classifier.predict(["closed"])


@pytest.mark.parametrize("warm", [True, False])
def test_threads_that_outlive_the_main_one_get_their_answers(
    tiny_bundles: dict[str, Path], warm: bool
) -> None:
    # Once the main thread has ended, Python lets no pool take work, and none begin.
    script = f"""
import sys, threading
from edgebert_runtime import Classifier
classifier = Classifier.load(sys.argv[1], device="cpu", intra_op_threads=2)
if {warm}:
    classifier.predict(["word"] * 50)
def work(number):
    threading.main_thread().join()
    texts = ["word " * (index % 30) for index in range(50)]
    found = [len(classifier.predict(texts)), len(list(classifier.stream(iter(texts))))]
    print(f"thread {{number}}: {{found}}\\n", end="", flush=True)
for number in range(3):
    threading.Thread(target=work, args=(number,)).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_bundles["single"])],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"thread {n}: [50, 50]" for n in range(3)]


def test_closing_twice_does_nothing_and_the_stats_stay(tiny_bundles: dict[str, Path]) -> None:
    classifier = Classifier.load(tiny_bundles["single"])
    classifier.predict(["one", "two"])
    classifier.close()
    classifier.close()
    assert classifier.stats == Stats(texts=2, truncated=0, batches=1)


# Loading


@pytest.mark.parametrize("name", NAMES)
def test_auto_takes_the_cpu_here_and_says_why(tiny_bundles: dict[str, Path], name: str) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with Classifier.load(tiny_bundles[name]) as classifier:
        assert classifier.choice is not None
        assert classifier.choice.device == "cpu"
        assert classifier.choice.variant.name == "fp32"
        *_, reason = classifier.choice.passed_over
        assert reason.startswith("cuda: ") and "CUDAExecutionProvider" in reason


def test_a_named_device_is_never_replaced(tiny_bundles: dict[str, Path]) -> None:
    # Without CUDA it is refused when choosing, with a CUDA build and no GPU when starting.
    with pytest.raises(DeviceError, match="CUDAExecutionProvider"):
        Classifier.load(tiny_bundles["single"], device="cuda")


@pytest.fixture
def broken_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that seems to offer CUDA, where a session on it cannot start."""
    facts = DeviceFacts(
        machine="x86_64",
        cpu_count=2,
        onnxruntime=("onnxruntime-gpu 1.0",),
        providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    )
    monkeypatch.setattr("edgebert_runtime.classifier.gather_facts", lambda device: facts)


@pytest.mark.usefixtures("broken_cuda")
def test_auto_falls_back_to_the_cpu_and_says_so_when_cuda_does_not_start(
    tiny_bundles: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with Classifier.load(tiny_bundles["single"]) as classifier:
        assert classifier.choice is not None
        assert classifier.choice.device == "cpu"
        assert classifier.choice.passed_over[-1].startswith("cuda: ")
        assert classifier.predict(["text"])
    (record,) = [record for record in caplog.records if record.name == "edgebert"]
    assert record.levelname == "WARNING"
    said = record.getMessage()
    assert said.startswith("falling back to cpu, variant fp32: cuda: ")


def test_a_device_that_does_not_start_leaves_the_next_best_one_its_turn(
    copy_bundle: Callable[..., Path],
    add_variant: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = copy_bundle()
    add_variant(bundle, "gpu", ("cuda", "tensorrt"))
    tried = []

    def choose_for(bundle: Any, *args: Any, failed: Any = None, **other: Any) -> Choice:
        failed = failed or {}
        tried.append(list(failed))
        pairs: list[tuple[Any, str]] = [("tensorrt", "gpu"), ("cuda", "gpu"), ("cpu", "fp32")]
        device, name = next(pair for pair in pairs if pair not in failed)
        return Choice(device, bundle.manifest.variant(name), tuple(failed.values()))

    def fail(*args: Any) -> None:
        raise DeviceError("the engine is out of memory")

    monkeypatch.setattr("edgebert_runtime.classifier.choose_for", choose_for)
    monkeypatch.setattr("edgebert_runtime.classifier._start_engine", fail)
    with Classifier.load(bundle) as classifier:
        assert classifier.choice is not None and classifier.choice.device == "cpu"
        first, second = classifier.choice.passed_over
    assert first == "the engine is out of memory" and "CUDAExecutionProvider" in second
    assert tried == [[], [("tensorrt", "gpu")], [("tensorrt", "gpu"), ("cuda", "gpu")]]


@pytest.mark.usefixtures("broken_cuda")
def test_falling_back_keeps_the_variant_that_was_asked_for(
    copy_bundle: Callable[..., Path], add_variant: Callable[..., None]
) -> None:
    bundle = copy_bundle()
    add_variant(bundle, "second", ("cpu", "cuda"))
    with Classifier.load(bundle, variant="second") as classifier:
        assert classifier.choice is not None
        assert (classifier.choice.device, classifier.choice.variant.name) == ("cpu", "second")


@pytest.mark.usefixtures("broken_cuda")
def test_a_variant_for_cuda_alone_is_not_replaced_when_cuda_does_not_start(
    copy_bundle: Callable[..., Path], add_variant: Callable[..., None]
) -> None:
    bundle = copy_bundle()
    add_variant(bundle, "second", ("cuda",))
    with pytest.raises(DeviceError):
        Classifier.load(bundle, variant="second")


@pytest.mark.usefixtures("broken_cuda")
def test_cuda_that_was_asked_for_and_does_not_start_is_an_error(
    tiny_bundles: dict[str, Path],
) -> None:
    with pytest.raises(DeviceError, match="CUDAExecutionProvider"):
        Classifier.load(tiny_bundles["single"], device="cuda")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "gpu"}, InputError, "device 'gpu' is not one of auto, cpu, cuda"),
        ({"variant": "int4"}, BundleError, "no variant 'int4'; it has: fp32"),
        ({"intra_op_threads": 0}, InputError, "intra_op_threads is 0"),
        ({"intra_op_threads": -1}, InputError, "intra_op_threads is -1"),
        ({"batch_size": 0}, InputError, "batch_size is 0"),
        ({"batch_size": -1}, InputError, "batch_size is -1"),
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(
    tiny_bundles: dict[str, Path], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Classifier.load(tiny_bundles["single"], **options)


def test_a_variant_is_loaded_by_name(
    copy_bundle: Callable[..., Path], add_variant: Callable[..., None]
) -> None:
    bundle = copy_bundle()
    add_variant(bundle, "second")
    for options, name in (({}, "fp32"), ({"variant": "second"}, "second")):
        with Classifier.load(bundle, **options) as classifier:
            assert classifier.choice is not None
            assert classifier.choice.variant.name == name
            assert classifier.predict(["text"])


def test_the_number_of_threads_changes_no_answer(
    tiny_bundles: dict[str, Path], texts_for: dict[str, list[Any]]
) -> None:
    texts = texts_for["single"][:20]
    with (
        Classifier.load(tiny_bundles["single"], intra_op_threads=1) as one,
        Classifier.load(tiny_bundles["single"], intra_op_threads=2) as two,
    ):
        np.testing.assert_allclose(one.scores(texts), two.scores(texts), atol=1e-4)


def test_a_padding_token_other_than_zero_changes_no_answer(
    copy_bundle: Callable[..., Path],
    edit_manifest: Callable[..., None],
    classifiers: dict[str, Classifier],
) -> None:
    bundle = copy_bundle()
    edit_manifest(bundle, lambda manifest: manifest.update(pad_token_id=7))
    texts = ["a", "a much longer text than the other one", ""]
    with Classifier.load(bundle) as classifier:
        np.testing.assert_allclose(
            classifier.scores(texts), classifiers["single"].scores(texts), atol=1e-4
        )


def test_a_tokenizer_that_says_how_to_pad_and_cut_does_not_override_the_manifest(
    copy_bundle: Callable[..., Path],
    replace_file: Callable[..., None],
    classifiers: dict[str, Classifier],
) -> None:
    from tokenizers import Tokenizer

    bundle = copy_bundle()
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokenizer.enable_padding(length=128, direction="left")
    tokenizer.enable_truncation(5)
    replace_file(bundle, "tokenizer.json", tokenizer.to_str().encode())
    texts = ["a text that has a few more tokens than five", "a"]
    with Classifier.load(bundle) as classifier:
        np.testing.assert_allclose(
            classifier.scores(texts), classifiers["single"].scores(texts), atol=1e-4
        )
        assert classifier.stats.truncated == 0


def test_two_long_texts_as_a_pair_take_no_more_memory_than_short_ones(tiny_bundles) -> None:
    script = f"""
import resource
from edgebert_runtime import Classifier
with Classifier.load({str(tiny_bundles["pairs"])!r}, device="cpu") as classifier:
    classifier.predict([("a", "b")])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    classifier.predict([("word " * 20_000, "other " * 20_000)])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, classifier.stats.truncated)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    grown_kb, truncated = map(int, done.stdout.split())
    assert grown_kb < 100_000
    assert truncated == 1


def test_cutting_a_long_side_first_changes_nothing(encoders, texts_for) -> None:
    encoder = encoders["pairs"]
    texts = texts_for["single"]
    long = [" ".join(texts[start : start + 40]) for start in range(0, 400, 40)]
    pairs = [*zip(long, texts, strict=False), *zip(texts, long, strict=False)]
    pairs += zip(long, reversed(long), strict=True)
    cut = encoder.encode(pairs)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encoder, "_bounded", lambda text: text)
        assert cut == encoder.encode(pairs)
    assert all(row.truncated for row in cut)
