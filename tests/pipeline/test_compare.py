"""``edgebert compare``: what it claims, what it refuses, and how it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from click.testing import CliRunner, Result

from edgebert_pipeline.cli import main
from edgebert_pipeline.compare import Compared, Limits, compare_sources
from edgebert_pipeline.compare_report import render_compared_markdown
from edgebert_pipeline.intervals import unpaired_difference
from edgebert_pipeline.junit import render_junit
from edgebert_pipeline.report import GateCheck
from edgebert_pipeline.sources import Source, read_source, read_sources
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.cli import main as runtime

MakeReport = Callable[..., bytes]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def right(count: int, rows: int = 40) -> list[bool]:
    """The first ``count`` of the rows."""
    return [number < count for number in range(rows)]


def others(count: int, rows: int = 40) -> list[bool]:
    """The last ``count`` of the rows."""
    return [number >= rows - count for number in range(rows)]


@pytest.fixture
def write(tmp_path: Path, made_report: MakeReport) -> Callable[..., Path]:
    """Returns a function that writes a made-up report under a name."""

    def write(name: str, **about: object) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_bytes(made_report(**about))
        return path

    return write


def found(result: Result) -> Compared:
    assert result.exit_code in (0, 3), result.output
    return msgspec.json.decode(result.stdout, type=Compared)


# what is claimed


def test_pairs_show_what_two_intervals_cannot(write) -> None:
    """The same 30 of 40 right but for one side's ten more: by pairs clear, by intervals not."""
    paths = write("a", right={"fp32": right(24)}), write("b", right={"fp32": right(34)})
    (paired,) = found(run(*paths, "--json")).differences
    assert paired.accuracy is not None
    assert paired.accuracy.p_value == pytest.approx(2 / 2**10)
    assert paired.accuracy.shown
    for path in paths:  # as an older report, which does not say which rows
        report = json.loads(path.read_bytes())
        report["evaluation"]["variants"][0]["right_rows"] = None
        path.write_text(json.dumps(report))
    (apart,) = found(run(*paths, "--json")).differences
    assert apart.accuracy is not None and apart.accuracy.p_value is None
    assert (apart.accuracy.low, apart.accuracy.high) == unpaired_difference(34, 40, 24, 40)
    assert apart.accuracy.difference == paired.accuracy.difference == 0.25


def test_newcombes_interval_is_the_published_one() -> None:
    # Newcombe 1998, table II, method 10: 56 of 70 less 48 of 80, and 9 of 10 less 3 of 10.
    assert unpaired_difference(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert unpaired_difference(9, 10, 3, 10) == pytest.approx((0.1705, 0.8090), abs=5e-5)


def test_as_many_right_on_other_rows_is_no_difference(write) -> None:
    paths = write("a", right={"fp32": right(30)}), write("b", right={"fp32": others(30)})
    result = run(*paths)
    assert result.exit_code == 0
    assert re.search(
        r"\| b +\| fp32 +\| \+0\.00% \(.*\) +\| no difference shown at n = 40 \(p = 1\)",
        result.stdout,
    )


def test_rows_are_paired_whatever_their_order(tmp_path: Path, made_report, write) -> None:
    texts = tuple(f"text {number}" for number in range(40))
    # Labels go by place, so that an even step keeps each text's label.
    turned = texts[10:] + texts[:10]
    one = write("a", rows=texts, right={"fp32": right(30)})
    other = write("b", rows=turned, right={"fp32": right(40)[:30] + right(0, 10)})
    (item,) = found(run(one, other, "--json")).differences
    assert item.accuracy is not None  # rows 0-29 right, against rows 10-39
    assert item.accuracy.difference == 0
    assert item.accuracy.p_value == 1


def test_rounds_that_overlap_show_no_difference_in_speed(write) -> None:
    paths = [write(name, p50_ms={"fp32": ms}) for name, ms in (("a", 2), ("b", 2.02), ("c", 3))]
    ratios = {
        item.label: item.latency
        for item in found(run(*paths, "--json")).differences
        if item.variant == "fp32"
    }
    assert ratios["b"].ratio == pytest.approx(1.01) and not ratios["b"].shown
    assert ratios["c"].ratio == pytest.approx(1.5) and ratios["c"].shown
    assert ratios["c"].low == pytest.approx(3 * 0.99 / (2 * 1.01))
    text = run(*paths).stdout
    assert "no difference shown: rounds overlap" in text
    assert "slower in every round" in text


@pytest.mark.parametrize(("rounds", "shown"), [(1, False), (3, False), (4, True)])
def test_too_few_rounds_show_no_difference_in_speed(write, rounds: int, shown: bool) -> None:
    paths = write("a", p50_ms={"fp32": 2}), write("b", p50_ms={"fp32": 3})
    for path in paths:
        report = json.loads(path.read_bytes())
        for variant in report["evaluation"]["variants"]:
            variant["timing"]["repeats"] = rounds
        path.write_text(json.dumps(report))
    latency = {d.variant: d.latency for d in found(run(*paths, "--json")).differences}["fp32"]
    assert latency.shown is shown
    text = run(*paths).stdout
    assert ("slower in every round" in text) is shown
    assert ("no difference shown: too few rounds" in text) is not shown


def test_a_student_is_held_against_what_the_bundle_held_before(write) -> None:
    paths = write("before"), write("after", model="student")
    differences = found(run(*paths, "--json")).differences
    assert [(d.variant, d.baseline_variant) for d in differences] == [
        ("student int8-cpu", "int8-cpu"),
        ("student fp32", "fp32"),
    ]


def test_what_only_one_has_is_named(write) -> None:
    paths = write("a"), write("b", right={"fp32": right(38), "int8-new": right(38)})
    notes = found(run(*paths, "--json")).notes
    assert notes == ("b: int8-new is not in a.", "b lacks int8-cpu of a.")


def test_noisy_measurements_and_other_machines_are_told(write) -> None:
    one, other = write("a"), write("b")
    report = json.loads(other.read_bytes())
    report["evaluation"]["variants"][0]["timing"] |= {"noisy": True, "variation": 0.2}
    report["evaluation"]["environment"]["processor"] = "Other CPU"
    other.write_text(json.dumps(report))
    warnings = " ".join(found(run(one, other, "--json")).warnings)
    assert "Not known to be measured on the same machine" in warnings
    assert "b (int8-cpu, 20%)" in warnings


def test_a_noisy_machine_shows_no_difference_in_speed(write) -> None:
    one, other = write("a"), write("b", p50_ms={"fp32": 3.0, "int8-cpu": 3.0})
    report = json.loads(other.read_bytes())
    report["evaluation"]["variants"][0]["timing"] |= {"noisy": True, "variation": 0.2}
    other.write_text(json.dumps(report))
    shown = {d.variant: d.latency.shown for d in found(run(one, other, "--json")).differences}
    assert shown == {"int8-cpu": False, "fp32": True}
    assert "no difference shown: noisy" in run(one, other).stdout
    # A limit is on what was measured, all the same.
    assert run(one, other, "--max-latency-ratio", 2).exit_code == 3


# what is refused


def test_different_test_rows_are_refused_unless_allowed_and_then_told(write, tmp_path) -> None:
    rows = tuple(f"other {number}" for number in range(40))
    paths = write("a"), write("b", rows=rows)
    refused = run(*paths)
    assert refused.exit_code == 2
    assert "a and b were measured on different test rows" in refused.stderr
    assert refused.stdout == ""
    allowed = run(*paths, "--allow-different-data", "--html", tmp_path / "page.html")
    assert allowed.exit_code == 0
    sentence = "a and b were measured on different test rows: their accuracies do not compare."
    assert sentence in allowed.stdout
    assert sentence in (tmp_path / "page.html").read_text()
    differences = found(run(*paths, "--allow-different-data", "--json")).differences
    assert {item.accuracy.p_value for item in differences} == {None}  # nothing is paired


def test_no_difference_is_shown_on_other_rows(write) -> None:
    rows = tuple(f"other {number}" for number in range(40))
    paths = write("a", right={"fp32": right(40)}), write("b", rows=rows, right={"fp32": right(10)})
    result = run(*paths, "--allow-different-data", "--json")
    (item,) = found(result).differences
    assert item.accuracy is not None and item.accuracy.high < 0  # it would be on the same rows
    assert not item.accuracy.same_rows and not item.accuracy.shown
    text = run(*paths, "--allow-different-data").stdout
    assert re.search(r"\| b +\| fp32 .*\| measured on other rows +\|", text)
    assert "shown: worse" not in text


def test_every_pair_of_reports_on_different_rows_is_named(write) -> None:
    rows = tuple(f"other {number}" for number in range(40))
    refused = run(write("a"), write("b"), write("c", rows=rows))
    assert refused.exit_code == 2
    assert "a and c; b and c were measured on different test rows" in refused.stderr


def test_older_reports_of_the_same_data_are_the_same_rows(write) -> None:
    paths = write("a"), write("b")
    for path in paths:
        report = json.loads(path.read_bytes())
        report["evaluation"]["rows_sha256"] = None
        path.write_text(json.dumps(report))
    assert run(*paths).exit_code == 0
    report["data"]["sha256"] = "f" * 64
    paths[1].write_text(json.dumps(report))
    refused = run(*paths)
    assert refused.exit_code == 2
    assert "are not known to have been measured on the same test rows" in refused.stderr


def test_a_limit_on_latency_needs_the_same_texts(write) -> None:
    paths = write("a"), write("b")
    report = json.loads(paths[1].read_bytes())
    for variant in report["evaluation"]["variants"]:
        variant["timing"]["texts_sha256"] = "f" * 64
    paths[1].write_text(json.dumps(report))
    assert "timed on other texts" in run(*paths).stdout
    refused = run(*paths, "--max-latency-ratio", 2)
    assert refused.exit_code == 2
    assert "were not timed on the same texts" in refused.stderr
    assert run(*paths, "--max-latency-ratio", 2, "--allow-different-data").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline", "c"], "--baseline c is none of the reports: a, b"),
        (["--max-accuracy-drop", "2"], "--max-accuracy-drop"),
        (["--max-latency-ratio", "0"], "--max-latency-ratio"),
        (["--html", "none/page.html"], "give a file in a directory that is there"),
    ],
)
def test_wrong_use_is_one_line(write, options: list[str], message: str) -> None:
    result = run(write("a"), write("b"), *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"report_version": 99}', b'{"device_report_version": 9}', None]
)
def test_what_is_no_report_is_one_line(write, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "bad.json").write_bytes(content)
    result = run(write("a"), tmp_path / "bad.json")
    assert result.exit_code == 2
    assert "bad.json" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_limit_with_nothing_to_hold_it_against_is_refused(write) -> None:
    alone = run(write("a"), "--max-accuracy-drop", 0.1)
    assert alone.exit_code == 2
    assert "--max-accuracy-drop has nothing to be held against" in alone.stderr


def test_dropping_a_variant_does_not_get_round_a_limit(write) -> None:
    base, less = write("base"), write("less", right={"fp32": right(40)})
    assert run(base, less).exit_code == 0
    refused = run(base, less, "--max-accuracy-drop", 0.1, "--max-latency-ratio", 9)
    assert refused.exit_code == 3
    assert "gate: less: int8-cpu: missing_figures allows 0, got 2" in refused.stderr
    assert "1 of 3 checks against base failed" in refused.stdout


def test_a_variant_that_is_no_longer_timed_does_not_get_round_a_limit(write) -> None:
    paths = write("base"), write("less")
    report = json.loads(paths[1].read_bytes())
    report["evaluation"]["variants"][0]["timing"] = None
    paths[1].write_text(json.dumps(report))
    assert run(*paths, "--max-accuracy-drop", 0.1).exit_code == 0
    refused = run(*paths, "--max-latency-ratio", 9)
    assert refused.exit_code == 3
    assert "gate: less: int8-cpu: missing_figures allows 0, got 1" in refused.stderr


def test_each_report_needs_something_that_a_limit_can_be_held_against(write) -> None:
    paths = write("a"), write("b"), write("c", right={"other": right(40), "fp32": right(40)})
    report = json.loads(paths[2].read_bytes())
    for variant in report["evaluation"]["variants"]:
        variant["timing"] = None
    paths[2].write_text(json.dumps(report))
    refused = run(*paths, "--max-latency-ratio", 9)
    assert refused.exit_code == 2
    assert "--max-latency-ratio has nothing in c to be held against" in refused.stderr


def test_a_device_may_lack_what_a_build_has_but_not_what_another_device_had(
    write, tmp_path: Path
) -> None:
    def device(name: str, *variants: str) -> Source:
        source = read_source(write(name, right={v: right(36) for v in variants}), name)
        return msgspec.structs.replace(source, kind="device")

    build = read_source(write("build"), "build")
    both, one = device("both", "int8-cpu", "fp32"), device("one", "fp32", "other")
    limits = Limits(max_accuracy_drop=0.1)
    assert compare_sources([build, one], limits=limits).passed
    found = compare_sources([both, one], limits=limits)
    assert [check.variant for check in found.checks if not check.passed] == ["one: int8-cpu"]
    assert "one lacks int8-cpu of both." in found.notes


# limits


def test_a_limit_holds_up_to_and_including_itself(write, tmp_path: Path) -> None:
    base = write("base", right={"int8-cpu": right(36), "fp32": right(40)})
    less = write("less", right={"int8-cpu": right(33), "fp32": right(40)})
    junit, html = tmp_path / "junit.xml", tmp_path / "page.html"
    kept = run(base, less, "--max-accuracy-drop", 3 / 40, "--junit", junit)
    assert kept.exit_code == 0, kept.stderr
    assert ElementTree.parse(junit).getroot().get("failures") == "0"
    refused = run(base, less, "--max-accuracy-drop", 0.07, "--junit", junit, "--html", html)
    assert refused.exit_code == 3
    assert "gate: less: int8-cpu: max_accuracy_drop allows 0.07, got 0.075" in refused.stderr
    assert "**Refused**: 1 of 2 checks against base failed." in refused.stdout
    assert "1 of 2 checks" in html.read_text()
    assert ElementTree.parse(junit).getroot().get("failures") == "1"


def test_a_drop_of_just_the_limit_is_not_above_it_by_rounding(write) -> None:
    """0.9 - 0.895 is more than 0.005 in floating point; and without pairs, it is all there is."""
    paths = []
    for name, correct in (("a", 900), ("b", 895)):
        rows = tuple(map(str, range(1000)))
        paths.append(write(name, rows=rows, right={"fp32": right(correct, 1000)}))
        report = json.loads(paths[-1].read_bytes())
        report["evaluation"]["variants"][0]["right_rows"] = None
        paths[-1].write_text(json.dumps(report))
    assert run(*paths, "--max-accuracy-drop", 0.005).exit_code == 0
    assert run(*paths, "--max-accuracy-drop", 0.00499).exit_code == 3


def test_latency_is_held_against_the_baseline_that_is_named(write) -> None:
    slow, fast = write("slow", p50_ms={"fp32": 3.0}), write("fast", p50_ms={"fp32": 2.0})
    assert run(slow, fast, "--max-latency-ratio", 1.2).exit_code == 0
    for baseline in ("fast", fast):
        refused = run(slow, fast, "--max-latency-ratio", 1.2, "--baseline", baseline)
        assert refused.exit_code == 3
        assert "slow: fp32: max_latency_ratio allows 1.2, got 1.5" in refused.stderr


def test_only_what_is_in_bundles_is_held_to_limits(write, made_report, tmp_path) -> None:
    """A teacher that got worse is told, and fails nothing."""
    paths = []
    for name, correct in (("a", 40), ("b", 20)):
        path = write(name, model="student")
        report = json.loads(path.read_bytes())
        teacher = json.loads(made_report({"fp32": right(correct)}, model="teacher"))
        report["evaluation"]["variants"] += teacher["evaluation"]["variants"]
        report["evaluation"]["references"]["teacher"] = "fp32"
        path.write_text(json.dumps(report))
        paths.append(path)
    result = run(*paths, "--max-accuracy-drop", 0.01, "--json")
    assert result.exit_code == 0, result.stderr
    dropped = [d for d in found(result).differences if d.accuracy and d.accuracy.shown]
    assert [d.variant for d in dropped] == ["teacher fp32"]
    assert not any("teacher" in check.variant for check in found(result).checks)


# devices


def test_a_device_is_held_against_the_build_on_the_same_rows(
    tmp_path: Path, tiny_bundles, texts_for
) -> None:
    labels = Bundle.open(tiny_bundles["single"]).manifest.task.labels
    data = tmp_path / "rows.jsonl"
    rows = [
        {"text": text, "label": labels[number % 2]}
        for number, text in enumerate(texts_for["single"][:20])
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    paths = []
    for name in ("x86", "orin"):
        path = tmp_path / f"{name}.json"
        arguments = [str(tiny_bundles["single"]), "--data", str(data), "--repeats", "2"]
        done = CliRunner().invoke(runtime, ["bench", *arguments, "--out", str(path)])
        assert done.exit_code == 0, done.stderr
        paths.append(path)
    result = run(*paths, "--max-accuracy-drop", 0, "--max-latency-ratio", 1000, "--json")
    assert result.exit_code == 0, result.stderr
    (item,) = found(result).differences
    assert item.accuracy is not None and item.accuracy.p_value == 1
    assert item.latency is not None and item.latency.same_texts
    assert "memory MB" in run(*paths).stdout


def test_a_device_without_data_compares_with_any_rows(tmp_path: Path, tiny_bundles, write) -> None:
    path = tmp_path / "device.json"
    arguments = [str(tiny_bundles["single"]), "--repeats", "1", "--out", str(path)]
    assert CliRunner().invoke(runtime, ["bench", *arguments]).exit_code == 0
    result = run(write("build"), path)
    assert result.exit_code == 0, result.stderr
    assert re.search(
        r"\| device +\| fp32 +\| not measured +\| +\| .*timed on other texts", result.stdout
    )


# names


def test_reports_are_called_after_their_files_or_as_the_user_says(
    tmp_path: Path, made_report
) -> None:
    paths = [tmp_path / part for part in ("main/report.json", "pr/report.json", "x/pr.json")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(made_report())
    labels = [
        s.label for s in read_sources([str(paths[0].parent), str(paths[1]), f"new={paths[2]}"])
    ]
    assert labels == ["main", "pr", "new"]
    alike = [s.label for s in read_sources([str(paths[1]), str(paths[2])])]
    assert alike == [str(paths[1]), str(paths[2])]
    endless = run("x" * 10_000)
    assert endless.exit_code == 2
    assert "cannot be read: File name too long" in endless.stderr
    twice = run(paths[0], paths[0])
    assert twice.exit_code == 2
    assert "is there twice" in twice.stderr


HOSTILE = "<script>alert(1)</script>|`*\u202e" + "x" * 200


def test_hostile_names_stay_text(tmp_path: Path, made_report) -> None:
    (tmp_path / "a.json").write_bytes(made_report(name=HOSTILE))
    source = read_source(tmp_path / "a.json", HOSTILE)
    other = msgspec.structs.replace(source, label="b")
    page = tmp_path / "page.html"
    result = run(f"{HOSTILE}={tmp_path / 'a.json'}", tmp_path / "a.json", "--html", page)
    assert result.exit_code == 0, result.stderr
    markdown = render_compared_markdown(compare_sources([source, other]))
    for text in (markdown, page.read_text()):
        assert "<script>alert" not in text
        assert "\u202e" not in text
    header, *rows = [line for line in markdown.splitlines() if line.startswith("|")][:4]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {header.count("|")}


# JUnit


def check(variant: str, measured: float, passed: bool) -> GateCheck:
    return GateCheck(
        variant=variant, limit="max_flip_rate", allowed=0.03, measured=measured, passed=passed
    )


def test_junit_says_what_each_check_allows_and_what_was_measured() -> None:
    document = render_junit(
        "movie-sentiment", [check("fp32", 0, True), check("int8", 0.031, False)]
    )
    root = ElementTree.fromstring(document)
    suite = root[0]
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == (
        "movie-sentiment", "2", "1",
    )  # fmt: skip
    passed, failed = suite
    assert passed.find("failure") is None
    assert failed.get("classname") == "movie-sentiment.int8"
    failure = failed.find("failure")
    assert failure is not None
    assert failure.get("message") == "gate: int8: max_flip_rate allows 0.03, got 0.031"


def test_junit_is_xml_whatever_names_hold() -> None:
    hostile = "<a>&\"'\x00\x1b\ud800\uffff👍"
    root = ElementTree.fromstring(render_junit(hostile, [check(hostile, 1, False)]))
    assert root[0].get("name") == "<a>&\"'\ufffd\ufffd\ufffd\ufffd👍"
