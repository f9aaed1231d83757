"""The gate's arithmetic, the report's statistics, and how both read."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edgebert_export.dataset import Example
from edgebert_pipeline.answers import calibration_error, reliability
from edgebert_pipeline.cli import main
from edgebert_pipeline.evaluate import evaluate
from edgebert_pipeline.gate import apply_gate, describe_breach
from edgebert_pipeline.markdown import render_parts
from edgebert_pipeline.recipe import GateConfig
from edgebert_pipeline.report_markdown import render_table
from edgebert_pipeline.scores import Comparison, Evaluation, VariantScores
from edgebert_pipeline.sections.differences import comparisons_table
from edgebert_runtime import Classifier
from edgebert_runtime.bench import Timing


def variant(name: str, correct: int, flips: int, **more: Any) -> VariantScores:
    timing = Timing(
        texts=10,
        repeats=1,
        latency_p50_ms=1.0,
        latency_p99_ms=more.pop("p99", 2.0),
        throughput_texts_per_s=100.0,
        batch_size=32,
    )
    values = {
        "precision": "int8",
        "devices": ("cpu",),
        "flip_rate_low": 0.0,
        "flip_rate_high": 1.0,
        "size_bytes": 20_000_000,
        "accuracy": correct / 1000,
        "accuracy_low": 0.0,
        "accuracy_high": 1.0,
        "macro_f1": 0.9,
        "labels": (),
        "calibration_error": 0.1,
        "agreement": None,
        "model": "model",
        "truncated": 0,
        "timing": timing,
        **more,
    }
    return VariantScores(name=name, correct=correct, flips=flips, **values)


def evaluation(*variants: VariantScores) -> Evaluation:
    return Evaluation(
        rows=1000,
        baseline_accuracy=0.5,
        references={item.model: "fp32" for item in variants},
        variants=variants,
        comparisons=(),
        intra_op_threads=None,
        environment={},
    )


REFERENCE = variant("fp32", 900, 0, size_bytes=90_000_000, p99=9.0)


@pytest.mark.parametrize(
    ("limits", "candidate", "passed"),
    [
        ({"max_accuracy_drop": 0.005}, variant("int8", 895, 30), True),
        ({"max_accuracy_drop": 0.005}, variant("int8", 894, 30), False),
        ({"max_accuracy_drop": 0.0}, variant("int8", 901, 30), True),
        ({"max_flip_rate": 0.03}, variant("int8", 895, 30), True),
        ({"max_flip_rate": 0.03}, variant("int8", 895, 31), False),
        ({"max_p99_ms": 2.0}, variant("int8", 895, 30, p99=2.0), True),
        ({"max_p99_ms": 2.0}, variant("int8", 895, 30, p99=2.01), False),
        ({"max_size_mb": 20.0}, variant("int8", 895, 30), True),
        ({"max_size_mb": 19.9}, variant("int8", 895, 30), False),
    ],
)
def test_a_limit_holds_up_to_and_including_itself(
    limits: dict[str, float], candidate: VariantScores, passed: bool
) -> None:
    checks = apply_gate(evaluation(candidate, REFERENCE), GateConfig(**limits))
    assert [(check.variant, check.passed) for check in checks] == [("int8", passed)]


def test_the_reference_is_held_to_accuracy_alone() -> None:
    limits = GateConfig(min_accuracy=0.95, max_p99_ms=5.0, max_size_mb=50.0, max_flip_rate=0.0)
    checks = apply_gate(evaluation(variant("int8", 960, 0), REFERENCE), limits)
    assert [c.limit for c in checks if c.variant == "fp32"] == ["min_accuracy"]
    assert [c.passed for c in checks if c.variant == "fp32"] == [False]
    alone = apply_gate(evaluation(REFERENCE), limits)
    assert {c.limit for c in alone if not c.passed} == {"min_accuracy", "max_p99_ms", "max_size_mb"}


def test_what_is_for_a_gpu_is_not_held_to_limits_on_what_a_cpu_loads() -> None:
    gpu = variant("fp16-gpu", 900, 0, size_bytes=500_000_000, timing=None, devices=("tensorrt",))
    limits = GateConfig(max_p99_ms=5.0, max_size_mb=50.0, max_flip_rate=0.0)
    found = apply_gate(evaluation(gpu, REFERENCE), limits)
    checks = {(check.variant, check.limit): check.passed for check in found}
    assert checks == {
        ("fp16-gpu", "max_flip_rate"): True,
        ("fp32", "max_flip_rate"): True,  # what a CPU loads is FP32 now, so FP32 is judged
        ("fp32", "max_size_mb"): False,
        ("fp32", "max_p99_ms"): False,
    }


def test_no_limit_means_no_check() -> None:
    assert apply_gate(evaluation(REFERENCE), GateConfig()) == ()


def test_a_student_is_held_to_its_teacher_and_the_teacher_to_nothing() -> None:
    """What the bundle holds is judged: INT8 and FP32 of the student."""
    found = evaluation(
        variant("int8-cpu", 894, 30, model="student", size_bytes=99_000_000),
        variant("fp32", 896, 0, model="student"),
        variant("int8-cpu", 100, 900, model="teacher", size_bytes=99_000_000),
        variant("fp32", 900, 0, model="teacher"),
    )
    limits = GateConfig(min_accuracy_kept=0.995, max_accuracy_drop=0.005, max_size_mb=50)
    checks = {(c.variant, c.limit): c for c in apply_gate(found, limits)}
    assert {key: check.passed for key, check in checks.items()} == {
        ("int8-cpu", "min_accuracy_kept"): False,
        ("int8-cpu", "max_accuracy_drop"): True,
        ("int8-cpu", "max_size_mb"): False,
        ("fp32", "min_accuracy_kept"): True,
    }
    assert checks["int8-cpu", "min_accuracy_kept"].measured == pytest.approx(894 / 900)
    assert checks["int8-cpu", "max_accuracy_drop"].measured == pytest.approx(2 / 1000)


def test_a_breach_is_told_with_both_numbers() -> None:
    (check,) = apply_gate(
        evaluation(variant("int8", 900, 31), REFERENCE), GateConfig(max_flip_rate=0.03)
    )
    assert describe_breach(check) == "gate: int8: max_flip_rate allows 0.03, got 0.031"


def test_evaluation_counts_what_the_runtime_answers(tiny_bundles, texts_for) -> None:
    for task, path in tiny_bundles.items():
        texts = texts_for[task][:90]
        with Classifier.load(path, device="cpu") as classifier:
            labels = classifier.task.labels
            answers = [
                tuple(sorted(labels.index(label) for label in prediction.labels))
                for prediction in classifier.predict(texts)
            ]
        right = [Example(text, answer) for text, answer in zip(texts, answers, strict=True)]
        found = evaluate({"model": path}, right, latency_texts=5, latency_repeats=1).variants[0]
        assert (found.correct, found.accuracy, found.flips) == (90, 1.0, 0)
        assert sum(label.rows for label in found.labels) == sum(map(len, answers))
        wrong = [Example(e.text, (0,) if e.labels != (0,) else (1,)) for e in right[:60]]
        found = evaluate(
            {"model": path}, wrong + right[60:], latency_texts=5, latency_repeats=1
        ).variants[0]
        assert found.correct == 30


def test_the_interval_is_wilsons(tiny_bundles, texts_for) -> None:
    texts = texts_for["single"][:100]
    examples = [Example(text, (index % 2,)) for index, text in enumerate(texts)]
    found = evaluate(
        {"model": tiny_bundles["single"]}, examples, latency_texts=5, latency_repeats=1
    )
    (scores,) = found.variants
    # Wilson 1927: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96 at 95 %.
    n, p, z = 100, scores.accuracy, 1.959964
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert scores.accuracy_low == pytest.approx((centre - spread) / (1 + z * z / n), abs=1e-6)
    assert scores.accuracy_high == pytest.approx((centre + spread) / (1 + z * z / n), abs=1e-6)


def test_variants_are_compared_on_the_same_rows_by_mcnemars_exact_test(
    tiny_bundles, other_bundle, texts_for
) -> None:
    texts = texts_for["single"][:90]
    with Classifier.load(tiny_bundles["single"], device="cpu") as classifier:
        answers = [int(p.label == classifier.task.labels[1]) for p in classifier.predict(texts)]
    # Another classifier, which answers some rows otherwise.
    with Classifier.load(other_bundle, device="cpu") as classifier:
        others = [int(p.label == classifier.task.labels[1]) for p in classifier.predict(texts)]
    rows = [Example(text, (index % 2,)) for index, text in enumerate(texts)]
    only_first = sum(a == i % 2 != b for i, (a, b) in enumerate(zip(answers, others, strict=True)))
    only_second = sum(b == i % 2 != a for i, (a, b) in enumerate(zip(answers, others, strict=True)))
    assert only_first + only_second > 5
    bundles = {"student": tiny_bundles["single"], "teacher": other_bundle}
    found = evaluate(bundles, rows, latency_texts=2, latency_repeats=1)
    (comparison,) = found.comparisons
    assert (comparison.first, comparison.second) == ("student fp32", "teacher fp32")
    assert (comparison.only_first_correct, comparison.only_second_correct) == (
        only_first,
        only_second,
    )
    # Two-sided: twice the smaller tail of a fair coin, never more than 1.
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert comparison.p_value == pytest.approx(min(1.0, 2 * tail))
    agreeing = sum(a == b for a, b in zip(answers, others, strict=True))
    assert found.reference("student").agreement == pytest.approx(agreeing / 90)
    assert found.reference("teacher").agreement == 1.0


def test_calibration_error_is_the_mean_gap_of_confidence_and_being_right() -> None:
    sure = np.array([0.99] * 10 + [0.6] * 10, dtype=np.float32)
    right = np.array([True] * 9 + [False] + [True] * 5 + [False] * 5)
    # In one bin 0.99 sure and 90 % right, in the other 0.6 and 50 %; half of the answers in each.
    assert calibration_error(reliability(sure, right)) == pytest.approx((0.09 + 0.1) / 2, abs=1e-6)
    assert calibration_error(reliability(np.ones(4, np.float32), np.ones(4, bool))) == 0.0
    # 0.34 and 0.39 share a bin, where too sure and not sure enough cancel out.
    both = np.array([0.34, 0.39], dtype=np.float32)
    assert calibration_error(reliability(both, np.array([True, False]))) == pytest.approx(
        0.27 / 2, abs=1e-6
    )


def test_words_do_not_overclaim() -> None:
    small = Comparison(
        first="a", second="b", only_first_correct=12, only_second_correct=8, p_value=0.5034
    )
    large = Comparison(
        first="c", second="d", only_first_correct=9, only_second_correct=40, p_value=1e-5
    )
    found = msgspec.structs.replace(evaluation(REFERENCE), comparisons=(small, large))
    table = render_parts([comparisons_table(found)]).splitlines()
    assert re.search(r"\| 12 +\| 8 +\| 0.5 +\| no difference shown at n = 1,000 +\|$", table[2])
    assert "-3.10%" in table[3]
    assert "shown: second is better" in table[3]


def test_a_model_that_is_no_better_than_the_commonest_answer_is_called_that(
    tiny_bundles, texts_for
) -> None:
    texts = texts_for["single"][:60]
    same = [Example(text, (0,)) for text in texts[:45]] + [Example(t, (1,)) for t in texts[45:]]
    found = evaluate({"model": tiny_bundles["single"]}, same, latency_texts=2, latency_repeats=1)
    assert found.baseline_accuracy == 0.75
    assert found.learned_nothing == (found.variants[0].accuracy_low <= 0.75)
    good = evaluation(variant("int8", 895, 0), variant("fp32", 900, 0, accuracy_low=0.88))
    assert not good.learned_nothing
    bad = evaluation(variant("int8", 895, 0), variant("fp32", 510, 0, accuracy_low=0.48))
    assert bad.learned_nothing


def test_truncated_rows_are_counted(tiny_bundles) -> None:
    examples = [Example("word " * 200, (0,)), Example("short", (1,))]
    found = evaluate(
        {"model": tiny_bundles["single"]}, examples, latency_texts=2, latency_repeats=1
    )
    assert found.variants[0].truncated == 1


def test_the_table_reads_well_on_a_terminal() -> None:
    table = render_table(evaluation(variant("int8-cpu", 895, 31), REFERENCE))
    assert len({len(line) for line in table.splitlines()}) == 1
    assert "31 (3.10%, 0.00%-100.00%)" in table
    assert "reference" in table


@pytest.fixture
def labelled(tmp_path: Path, texts_for) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"text": text, "label": ["no", "yes"][index % 2]}
        for index, text in enumerate(texts_for["single"][:30])
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_evaluate_measures_a_bundle_on_a_file(tiny_bundles, labelled: Path) -> None:
    options = ["--label-value", "no", "--label-value", "yes", "--latency-texts", "3", "--json"]
    arguments = ["evaluate", str(tiny_bundles["single"]), str(labelled), *options]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert msgspec.json.decode(done.stdout, type=Evaluation).rows == 30


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("single", [], "label 'no' is not one of negative, positive"),
        ("single", ["--label-value", "no"], "one value for each of labels"),
        ("single", ["--text", "words"], "has no column 'words'"),
        ("single", ["--text-pair", "text"], "leave --text-pair out"),
        ("pairs", [], "name the second column: --text-pair"),
    ],
)
def test_evaluate_names_what_does_not_fit(
    tiny_bundles, labelled: Path, task: str, options: list[str], message: str
) -> None:
    done = CliRunner().invoke(main, ["evaluate", str(tiny_bundles[task]), str(labelled), *options])
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_report_refuses_what_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"report_version": 99}')
    for path in (tmp_path, tmp_path / "none"):
        done = CliRunner().invoke(main, ["report", str(path)])
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ")
