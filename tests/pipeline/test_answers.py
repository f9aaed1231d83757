"""What follows from answers: intervals, the paired test, confusion, reliability, flipped rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from edgebert_export.dataset import Example
from edgebert_pipeline.answers import Answers, find_flips, score, with_texts
from edgebert_pipeline.evaluate import evaluate
from edgebert_pipeline.intervals import bootstrap, mcnemar, paired_difference, wilson
from edgebert_pipeline.scores import Flips, VariantScores
from edgebert_runtime.manifest import Task

TASK = Task(kind="single_label", labels=("a", "b", "c"), text_pair=False)
counts = st.integers(0, 400)


@given(only_first=counts, only_second=counts)
def test_the_paired_test_is_the_exact_binomial_one(only_first: int, only_second: int) -> None:
    rows = only_first + only_second
    expected = binomtest(only_first, rows).pvalue if rows else 1.0
    assert mcnemar(only_first, only_second) == pytest.approx(expected, rel=1e-9)


@given(rows=st.integers(1, 5000), share=st.floats(0, 1))
def test_the_interval_of_a_share_is_wilsons_and_holds_it(rows: int, share: float) -> None:
    count = round(rows * share)
    low, high = wilson(count, rows)
    expected = binomtest(count, rows).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= count / rows <= high <= 1


def test_the_interval_of_a_paired_difference_covers_what_it_should() -> None:
    """Of many samples from rows whose truth is known, 95 % of the intervals hold it."""
    draw, rows, shares = np.random.default_rng(5), 300, (0.06, 0.03, 0.91)
    samples = draw.multinomial(rows, shares, size=2000)
    inside = [
        low <= shares[0] - shares[1] <= high
        for low, high in (paired_difference(int(b), int(c), rows) for b, c, _ in samples)
    ]
    assert 0.93 < np.mean(inside) < 0.98
    assert paired_difference(3, 3, 147)[0] == -paired_difference(3, 3, 147)[1]
    assert paired_difference(0, 10, 10)[0] >= -1


def test_the_bootstrap_gives_the_same_every_time_and_covers_a_share() -> None:
    draw = np.random.default_rng(3)

    def share(sums: np.ndarray) -> np.ndarray:
        return sums / 200

    inside = []
    for _ in range(200):
        values = draw.random((200, 1)) < 0.3
        ((low, high),) = bootstrap(values, share)
        assert bootstrap(values, share).tolist() == [[low, high]]
        inside.append(low <= 0.3 <= high)
    assert 0.89 < np.mean(inside) < 0.99


def answers(truth: list[int], given: list[int], sure: float = 0.8) -> Answers:
    scores = np.full((len(truth), 3), (1 - sure) / 2, dtype=np.float32)
    scores[np.arange(len(truth)), given] = sure
    eye = np.eye(3, dtype=bool)
    return Answers(TASK, eye[given], eye[truth], scores, truncated=0)


def test_confusion_counts_what_was_taken_for_what_and_agrees_with_the_labels() -> None:
    truth = [0, 0, 0, 1, 1, 2, 2, 2, 2]
    found = score(answers(truth, [0, 1, 0, 1, 1, 0, 2, 2, 1]), answers(truth, truth), None)
    assert found["confusion"] == {
        "a": {"a": 2, "b": 1},
        "b": {"b": 2},
        "c": {"a": 1, "b": 1, "c": 2},
    }
    by_name = {label.label: label for label in found["labels"]}
    assert [(by_name[n].rows, by_name[n].given, by_name[n].right) for n in "abc"] == [
        (3, 3, 2),
        (2, 4, 2),
        (4, 2, 2),
    ]
    assert by_name["b"].precision == 0.5
    assert by_name["b"].recall == 1.0
    assert by_name["b"].f1 == pytest.approx(2 / 3)
    for label in found["labels"]:
        assert label.f1_low <= label.f1 <= label.f1_high
    assert found["macro_f1"] == pytest.approx(np.mean([label.f1 for label in found["labels"]]))
    assert found["macro_f1_low"] < found["macro_f1"] < found["macro_f1_high"]
    assert found["flips"] == 3


def test_an_interval_that_no_draw_widens_is_none() -> None:
    """Five rows that are all right do not show that all others would be."""
    truth = [0] * 5
    found = score(answers(truth, truth), answers(truth, truth), None)
    assert [(label.f1_low, label.f1_high) for label in found["labels"]] == [(None, None)] * 3
    assert (found["macro_f1"], found["macro_f1_low"]) == (pytest.approx(1 / 3), None)


def test_a_label_that_is_never_given_nor_true_scores_nothing() -> None:
    found = score(answers([0, 1], [0, 1]), answers([0, 1], [0, 1]), None)
    nothing = found["labels"][2]
    assert (nothing.rows, nothing.given, nothing.precision, nothing.recall) == (0, 0, 0.0, 0.0)
    assert nothing.f1 == 0.0


def test_reliability_says_how_often_answers_as_sure_as_that_are_right() -> None:
    truth = [0] * 10
    found = score(answers(truth, [0] * 7 + [1] * 3, sure=0.9), answers(truth, truth), None)
    (only,) = found["reliability"]
    assert only.low <= 0.9 < only.high
    assert (only.answers, only.correct) == (10, 7)
    assert only.confidence == pytest.approx(0.9)
    assert found["calibration_error"] == pytest.approx(0.2)


def variants(found: dict[str, Answers], reference: str) -> list[VariantScores]:
    return [
        VariantScores(
            model="student" if name.startswith("student") else "teacher",
            name=name.split()[1],
            precision="int8",
            devices=("cpu",),
            size_bytes=1,
            timing=None,
            **score(item, found[reference], None),
        )
        for name, item in found.items()
    ]


def flips_of(given: dict[str, list[int]], truth: list[int]) -> Flips:
    found = {name: answers(truth, item) for name, item in given.items()}
    references = {"student": "fp32", "teacher": "fp32"}
    return find_flips(variants(found, "student fp32"), references, found)


def test_flipped_rows_are_those_that_not_all_answer_alike_the_bundles_own_first() -> None:
    truth = [0, 1, 2, 0]
    given = {
        "student int8": [0, 1, 2, 1],
        "student fp32": [0, 1, 2, 0],
        "teacher fp32": [0, 2, 2, 0],
    }
    flips = flips_of(given, truth)
    assert flips.count == 2
    assert [row.row for row in flips.kept] == [3, 1]  # row 1 flips between models only
    first = flips.kept[0]
    assert first.truth == ("a",)
    assert [(answer.labels, set(answer.scores)) for answer in first.answers] == [
        (("a",), {"student fp32", "teacher fp32"}),
        (("b",), {"student int8"}),
    ]
    assert first.answers[0].scores["student fp32"] == pytest.approx(0.8)


def test_a_thousand_flipped_rows_are_kept_and_the_rest_is_counted() -> None:
    truth = [0] * 1500
    given = {"student int8": [1] * 1500, "student fp32": [0] * 1500}
    flips = flips_of(given, truth)
    assert (flips.count, len(flips.kept)) == (1500, 1000)


def test_evaluation_knows_its_rows_and_texts_are_added_by_their_place(
    tiny_bundles: dict[str, Path], other_bundle: Path, texts_for: Any
) -> None:
    texts = [*texts_for["single"][:60], "long " * 1000]
    examples = [Example(text, (index % 2,)) for index, text in enumerate(texts)]
    bundles = {"student": tiny_bundles["single"], "teacher": other_bundle}
    found = evaluate(bundles, examples, latency_texts=2, latency_repeats=1)
    shuffled = evaluate(bundles, examples[::-1], latency_texts=2, latency_repeats=1)
    assert found.rows_sha256 == shuffled.rows_sha256
    fewer = evaluate(bundles, examples[1:], latency_texts=2, latency_repeats=1)
    assert found.rows_sha256 != fewer.rows_sha256
    assert found.flips is not None
    assert found.flips.count
    assert all(row.text is None for row in found.flips.kept)
    with_them = with_texts(found, examples)
    assert with_them.flips is not None
    for row in with_them.flips.kept:
        assert isinstance(row.text, str)
        expected = texts[row.row]
        assert row.text == (expected if len(expected) <= 2000 else expected[:2000] + "…")
        assert row.truth == (("negative", "positive")[row.row % 2],)


def test_several_labels_have_no_confusion_but_counts(
    tiny_bundles: dict[str, Path], texts_for: Any
) -> None:
    examples = [Example(text, (0, 2)) for text in texts_for["multi"][:30]]
    found = evaluate({"model": tiny_bundles["multi"]}, examples, latency_texts=2, latency_repeats=1)
    (variant,) = found.variants
    assert variant.confusion is None
    assert [label.rows for label in variant.labels] == [30, 0, 30]
    assert sum(item.answers for item in variant.reliability) == 90
    assert math.isfinite(variant.macro_f1)
