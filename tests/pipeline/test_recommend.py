"""What a report concludes: which variant to take, what was not done, where a recipe is from."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgebert_pipeline.gate import apply_gate
from edgebert_pipeline.not_done import list_not_done
from edgebert_pipeline.read_report import read_report
from edgebert_pipeline.recipe import GateConfig
from edgebert_pipeline.recommend import recommend
from edgebert_pipeline.report import GateCheck, Report
from edgebert_pipeline.scores import Comparison, Evaluation
from edgebert_pipeline.sections.variants import pareto_front
from edgebert_pipeline.versioned import commit_of

REPORT = Path(__file__).parent / "reports" / "version-4.json"


@pytest.fixture(scope="module")
def report() -> Report:
    return read_report(REPORT)


def changed(
    evaluation: Evaluation, comparisons: Any = (), repeats: int = 5, **timings: Any
) -> Evaluation:
    """The evaluation with these median latencies, low and high of each shipped variant timed."""
    variants = []
    for variant in evaluation.variants:
        if variant.model == "student" and variant.timing is not None:
            p50, low, high = timings[variant.name.replace("-", "_")]
            timing = msgspec.structs.replace(
                variant.timing,
                repeats=repeats,
                latency_p50_ms=p50,
                latency_p50_low_ms=low,
                latency_p50_high_ms=high,
            )
            variant = msgspec.structs.replace(variant, timing=timing)
        variants.append(variant)
    return msgspec.structs.replace(
        evaluation, variants=tuple(variants), comparisons=tuple(comparisons)
    )


def refusal(variant: str) -> GateCheck:
    return GateCheck(
        variant=variant, limit="max_flip_rate", allowed=0.1, measured=0.2, passed=False
    )


def test_the_fastest_is_recommended_and_why_is_said_in_figures(report: Report) -> None:
    found = changed(report.evaluation, int8_cpu=(1.0, 0.9, 1.1), fp32=(2.5, 2.4, 2.6))
    best = recommend(found, ())
    assert best.variant == "student int8-cpu"
    assert "the fastest: 1.00 ms a text, 2.5 times as fast as fp32" in best.reason
    assert best.reason.endswith(".")
    assert "\n" not in best.reason


def test_of_variants_whose_rounds_overlap_the_smallest_is_recommended(report: Report) -> None:
    found = changed(report.evaluation, int8_cpu=(1.05, 1.0, 1.2), fp32=(1.0, 0.9, 1.1))
    best = recommend(found, ())
    assert best.variant == "student int8-cpu"
    assert "the smallest of those not shown to be slower: 1.05 ms" in best.reason
    apart = changed(report.evaluation, int8_cpu=(1.3, 1.2, 1.4), fp32=(1.0, 0.9, 1.1))
    assert recommend(apart, ()).variant == "student fp32"


def test_too_few_rounds_do_not_show_a_variant_to_be_slower(report: Report) -> None:
    for repeats, best in ((1, "student int8-cpu"), (3, "student int8-cpu"), (4, "student fp32")):
        found = changed(
            report.evaluation, repeats=repeats, int8_cpu=(1.3, 1.2, 1.4), fp32=(1.0, 0.9, 1.1)
        )
        assert recommend(found, ()).variant == best


def test_what_the_gate_refuses_is_not_recommended(report: Report) -> None:
    found = changed(report.evaluation, int8_cpu=(1.0, 0.9, 1.1), fp32=(2.5, 2.4, 2.6))
    assert recommend(found, [refusal("int8-cpu")]).variant == "student fp32"
    nothing = recommend(found, [refusal("int8-cpu"), refusal("fp32")])
    assert nothing.variant is None
    assert nothing.reason == (
        "Every variant that was timed breaks a limit of the gate, or is shown to be less accurate "
        "than fp32."
    )


def test_the_reference_is_recommended_only_within_limits_that_the_gate_spares_it(
    report: Report,
) -> None:
    found = changed(report.evaluation, int8_cpu=(2.5, 2.4, 2.6), fp32=(1.0, 0.9, 1.1))
    fp32 = found.reference("student")
    assert recommend(found, ()).variant == "student fp32"
    for allowed, best in ((fp32.size_bytes / 1e6 - 0.001, "int8-cpu"), (1e6, "fp32")):
        gate = apply_gate(found, GateConfig(max_size_mb=allowed))
        assert all(check.passed for check in gate)
        assert recommend(found, gate).variant == f"student {best}"


def test_what_is_shown_to_be_less_accurate_is_not_recommended(report: Report) -> None:
    def against_fp32(p_value: float) -> Comparison:
        return Comparison(
            first="student int8-cpu",
            second="student fp32",
            only_first_correct=2,
            only_second_correct=20,
            p_value=p_value,
        )

    times = {"int8_cpu": (1.0, 0.9, 1.1), "fp32": (2.5, 2.4, 2.6)}
    worse = changed(report.evaluation, [against_fp32(0.001)], **times)
    assert recommend(worse, ()).variant == "student fp32"
    unclear = changed(report.evaluation, [against_fp32(0.06)], **times)
    assert recommend(unclear, ()).variant == "student int8-cpu"


def test_nothing_beats_what_is_on_the_pareto_front(report: Report) -> None:
    timed = [v for v in report.evaluation.variants if v.timing is not None]
    front = pareto_front(report.evaluation)
    for variant in timed:
        beaten = any(
            other.timing.latency_p50_ms <= variant.timing.latency_p50_ms
            and other.accuracy >= variant.accuracy
            and (other.timing.latency_p50_ms, other.accuracy)
            != (variant.timing.latency_p50_ms, variant.accuracy)
            for other in timed
        )
        assert (variant in front) != beaten


def not_done(report: Report, **replaced: Any) -> dict[str, str]:
    facts: dict[str, Any] = {
        "fine_tuned": True,
        "distillation": report.distillation,
        "quantisation": report.quantisation,
        "engines": report.engines,
        "evaluation": report.evaluation,
        "gated": True,
    }
    return {item.what: item.reason for item in list_not_done(**facts | replaced)}


def test_what_was_not_done_is_listed_with_its_reason(report: Report) -> None:
    found = not_done(report)
    assert any("GPU" in what and "int8-gpu" in what for what in found)
    assert "Running the engines of int8-gpu, fp16-gpu" in found
    assert not {"A gate", "Fine-tuning", "Distilling", "INT8"} & set(found)
    bare = not_done(report, fine_tuned=False, gated=False, distillation=None)
    assert bare["Fine-tuning"] == "the checkpoint was taken as it is."
    assert "[distill]" in bare["Distilling"]
    assert bare["A gate"] == "the recipe sets no limit."
    skipped = msgspec.structs.replace(report.engines, built=(), skipped="no tensorrt-rtx here")
    assert not_done(report, engines=skipped)["Building engines ahead of time"] == (
        "no tensorrt-rtx here."
    )
    assert report.distillation is not None
    alone = msgspec.structs.replace(report.distillation, hard_label=None)
    assert "Training the student without its teacher" in not_done(report, distillation=alone)


def test_rows_and_texts_that_are_left_out_are_told(report: Report) -> None:
    flips = report.evaluation.flips
    assert flips is not None
    rows = tuple(msgspec.structs.replace(row, text=None) for row in flips.kept)
    fewer = msgspec.structs.replace(flips, count=5000, kept=rows)
    evaluation = msgspec.structs.replace(report.evaluation, flips=fewer)
    found = not_done(report, evaluation=evaluation)
    assert found["Texts of rows that flipped"] == "the recipe leaves them out (report.texts)."
    assert f"Listing {5000 - len(rows):,} more rows that flipped" in found


def git(directory: Path, *arguments: str) -> str:
    options = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *options, *arguments], cwd=directory, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_recipe_in_a_repository_has_a_commit_and_one_outside_has_none(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    assert commit_of(tmp_path / "none") is None
    git(tmp_path, "init", "--quiet")
    recipe = tmp_path / "recipes" / "recipe.toml"
    recipe.parent.mkdir()
    recipe.write_text("name = 'a'")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    git(tmp_path, "tag", "--annotate", "v1", "--message", "v1")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(recipe.parent) == head


def test_a_repository_runs_nothing_of_its_own(tmp_path: Path) -> None:
    """A recipe's repository may be a stranger's: its settings name commands that git would run."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "a").write_text("a")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexec cat\n")
    program.chmod(0o755)
    git(tmp_path, "config", "core.fsmonitor", str(program))
    git(tmp_path, "config", "filter.own.clean", str(program))
    (tmp_path / ".git" / "info" / "attributes").write_text("a filter=own\n")
    (tmp_path / "a").write_text("b")  # git would filter it to see what was changed
    assert commit_of(tmp_path) is not None
    assert not (tmp_path / "ran").exists()
