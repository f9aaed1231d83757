"""``report.json``: its schema, and that older ones are read; the Markdown of each, to the letter.

``reports/version-N.json`` were written by the edgebert of that version, from a tiny model. Where
the Markdown is meant to change: ``edgebert report version-N.json > version-N.md``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from click.testing import CliRunner

from edgebert_pipeline.cli import main
from edgebert_pipeline.read_report import read_report
from edgebert_pipeline.report import REPORT_VERSION, Report
from edgebert_pipeline.report_html import render_html
from edgebert_pipeline.report_markdown import render_markdown
from edgebert_pipeline.report_schema import render_schema
from edgebert_runtime.errors import InputError

REPORTS = Path(__file__).parent / "reports"
VERSIONS = range(1, REPORT_VERSION + 1)
SCHEMA = Path(__file__).parent.parent.parent / "docs" / "report.schema.json"


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_read_and_its_markdown_is_the_golden_one(version: int) -> None:
    report = read_report(REPORTS / f"version-{version}.json")
    assert report.report_version == REPORT_VERSION
    golden = (REPORTS / f"version-{version}.md").read_text(encoding="utf-8")
    assert render_markdown(report) == golden


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_measured_is_what_the_older_report_says(version: int) -> None:
    path = REPORTS / f"version-{version}.json"
    written, report = json.loads(path.read_text()), read_report(path)
    found = [(v.name, v.correct, v.accuracy, v.flips) for v in report.evaluation.variants]
    assert found == [
        (v["name"], v["correct"], v["accuracy"], v["flips"])
        for v in written["evaluation"]["variants"]
    ]
    assert [check.passed for check in report.gate] == [c["passed"] for c in written["gate"]]
    assert report.measured_at == written["stages"]["evaluate"]["finished_at"]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_what_an_older_version_did_not_measure_is_not_made_up(version: int) -> None:
    report = read_report(REPORTS / f"version-{version}.json")
    evaluation = report.evaluation
    assert evaluation.rows_sha256 is None
    assert evaluation.flips is None
    assert report.commit is None
    for variant in evaluation.variants:
        assert variant.confusion is None
        assert variant.reliability == ()
        assert variant.timing is None or variant.timing.latency_p90_ms is None
    assert any("older edgebert" in item.reason for item in report.not_done)
    assert "older edgebert" in render_html(report)


@pytest.mark.parametrize("version", VERSIONS)
def test_any_report_as_json_is_valid_by_the_schema(version: int) -> None:
    schema = json.loads(render_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    done = CliRunner().invoke(main, ["report", str(REPORTS / f"version-{version}.json"), "--json"])
    assert done.exit_code == 0
    jsonschema.validate(json.loads(done.stdout), schema)
    if version == REPORT_VERSION:  # as it was written, too
        jsonschema.validate(json.loads((REPORTS / f"version-{version}.json").read_text()), schema)


def test_the_schema_refuses_what_is_no_report_and_says_what_everything_is() -> None:
    schema = json.loads(render_schema())
    report = json.loads((REPORTS / "version-4.json").read_text())
    for broken in (
        report | {"report_version": 3},
        report | {"gate": "passed"},
        {key: value for key, value in report.items() if key != "evaluation"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)
    for name, struct in schema["$defs"].items():
        assert struct["description"], name
    whole = schema["$defs"]["Report"]["properties"]
    assert all(item["description"] for item in whole.values())


def test_the_schema_in_the_documents_is_of_these_types() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == render_schema(), "run: make docs"


def test_a_report_survives_being_written_and_read() -> None:
    report = read_report(REPORTS / "version-4.json")
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw | {"report_version": 99}, "report_version 99; this edgebert reads up to"),
        (lambda raw: raw | {"report_version": 0}, "no report_version"),
        (lambda raw: raw | {"report_version": "4"}, "no report_version"),
        (lambda raw: raw | {"report_version": 2}, "is not a report of version 2"),
        (lambda raw: raw | {"evaluation": None}, "is not a report of version 4"),
        (lambda raw: [raw], "no report_version"),
    ],
)
def test_what_is_no_report_is_refused_with_one_line(
    tmp_path: Path, change: Any, message: str
) -> None:
    raw = json.loads((REPORTS / "version-4.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(change(raw)))
    with pytest.raises(InputError, match=message):
        read_report(tmp_path)


def evaluation(**change: Any) -> dict[str, Any]:
    return {"evaluation": change}


def first_variant(**change: Any) -> dict[str, Any]:
    return evaluation(variants={0: change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (evaluation(rows=0), "evaluation.rows"),
        (evaluation(variants=[]), "evaluation.variants"),
        (evaluation(references={}), "no reference"),
        (evaluation(references={"student": "none", "teacher": "fp32"}), "none of the variants"),
        (evaluation(comparisons={0: {"only_first_correct": 10**6}}), "more rows than there are"),
        (first_variant(size_bytes=0), "size_bytes"),
        (first_variant(correct=10**6), "more right answers"),
        (first_variant(flips=10**6), "more right answers or flips"),
        (first_variant(right_rows="AA=="), "the note of rows answered right is not of"),
        (first_variant(timing={"latency_p50_ms": 0}), "latency_p50_ms"),
        (first_variant(timing={"latency_p50_high_ms": -1}), "latency_p50_high_ms"),
        (first_variant(labels={0: {"right": 10**6}}), "more right answers of label"),
        (first_variant(reliability={0: {"answers": 0}}), "answers"),
        ({"models": {}}, "models"),
    ],
)
def test_what_contradicts_itself_is_refused_by_every_command(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """A report may be a stranger's, as that of a pull request is."""
    good = REPORTS / "version-4.json"
    path = tmp_path / "reports" / "report.json"
    path.parent.mkdir()
    path.write_text(json.dumps(changed(json.loads(good.read_text()), change)))
    with pytest.raises(InputError, match=f"report.json is not a report of version 4: .*{message}"):
        read_report(path)
    for arguments in (["report", path], ["compare", path, good], ["history", path.parent]):
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
    (path.parent / "good.json").write_bytes(good.read_bytes())
    done = CliRunner().invoke(main, ["history", str(path.parent)])
    assert done.exit_code == 0, done.stderr
    assert "Not read: " in done.stdout


def changed(raw: Any, change: Any) -> Any:
    """JSON with some of it replaced; a number is a place in a list, and all else is kept."""
    if not isinstance(change, dict) or not change:
        return change
    for key, value in change.items():
        raw[key] = changed(raw[key], value)
    return raw


def test_an_older_report_that_contradicts_itself_is_refused_too(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        for key, value in (("rows", 0), ("rows", 1), ("variants", []), ("references", {})):
            raw = json.loads((REPORTS / f"version-{version}.json").read_text())
            raw["evaluation"] |= {key: value, "reference": "none"}
            (tmp_path / "report.json").write_text(json.dumps(raw))
            if version == 1 and key == "references":
                continue  # it has none
            with pytest.raises(InputError, match=f"is not a report of version {version}: "):
                read_report(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"null"])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(InputError):
        read_report(tmp_path)


def test_report_writes_a_page_and_keeps_what_it_cannot_write_over(tmp_path: Path) -> None:
    source = str(REPORTS / "version-2.json")
    page = tmp_path / "page.html"
    done = CliRunner().invoke(main, ["report", source, "--html", str(page)])
    assert (done.exit_code, done.stdout) == (0, "")
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    for arguments in ([source, "--html", str(tmp_path / "none" / "page.html")], []):
        done = CliRunner().invoke(main, ["report", *arguments])
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1
