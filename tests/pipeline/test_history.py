"""``edgebert history``: many reports, by the time in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from edgebert_pipeline.cli import main
from edgebert_pipeline.history import History


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["history", *map(str, arguments)])


@pytest.fixture
def write(tmp_path: Path, made_report):
    """Returns a function that writes a made-up report of a day."""

    def write(place: str, day: int, **about: Any) -> Path:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        about.setdefault("bundle_digest", f"{day:064x}")
        path.write_bytes(made_report(measured_at=f"2026-01-{day:02}T10:00:00+00:00", **about))
        return path

    return write


def test_reports_come_in_the_order_of_measuring(write, tmp_path: Path) -> None:
    write("z/report.json", 1)
    write("a/b/report.json", 3)
    write("orin.json", 2)
    result = run(tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "made-up: 3 reports over time" in result.stdout
    rows = re.findall(r"^\| 2026-01-(\d\d)T10:00 \| (\S+) +\| `c+` +\| fp32", result.stdout, re.M)
    assert rows == [("01", "z"), ("02", "orin"), ("03", "a/b")]
    assert "## The latest, a/b, against orin" in result.stdout


def test_what_is_no_report_is_passed_by_and_what_is_damaged_is_named(write, tmp_path) -> None:
    write("good.json", 1)
    write(".stages/report.json", 2)
    (tmp_path / "package.json").write_text('{"name": "something else"}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    (tmp_path / "damaged.json").write_text('{"report_version": 4, "name": ')
    result = run(tmp_path, "--json")
    found = msgspec.json.decode(result.stdout, type=History)
    assert [source.label for source in found.sources] == ["good"]
    (reason,) = found.skipped
    assert "damaged.json is not a report" in reason
    assert "Not read: " in run(tmp_path).stdout


def test_a_report_in_two_places_counts_once(write, tmp_path: Path) -> None:
    write("a/report.json", 1)
    write("b/report.json", 1)
    assert "1 report over time" in run(tmp_path).stdout


def test_two_measurements_of_one_bundle_in_one_second_are_two(write, tmp_path: Path) -> None:
    write("one.json", 1, p50_ms={"fp32": 2.0})
    write("other.json", 1, p50_ms={"fp32": 2.1})
    assert "2 reports over time" in run(tmp_path).stdout


def test_no_two_reports_are_called_the_same(write, tmp_path: Path) -> None:
    long = "long/" + "x" * 200
    for day, place in enumerate(("a.json", "a/report.json", f"{long}1.json", f"{long}2.json"), 1):
        write(place, day)
    sources = msgspec.json.decode(run(tmp_path, "--json").stdout, type=History).sources
    labels = [source.label for source in sources]
    assert labels[:2] == ["a.json", "a/report.json"]
    assert labels[2].startswith("long/xxx")
    assert labels[3].startswith("4: long/xxx")


def test_machines_are_not_said_to_differ_when_that_is_not_known(write, tmp_path: Path) -> None:
    write("1.json", 1)
    report = json.loads(write("2.json", 2).read_bytes())
    report["evaluation"]["environment"]["processor"] = "Board, Some CPU (x86_64)"
    (tmp_path / "2.json").write_text(json.dumps(report))
    text = run(tmp_path).stdout
    assert text.count("Not known to be measured on the same machine: ") == 2
    assert "different machines" not in text


def test_a_change_of_test_rows_is_told_where_it_is(write, tmp_path: Path) -> None:
    write("1.json", 1)
    write("2.json", 2)
    assert "test rows of the report before" not in run(tmp_path).stdout
    write("3.json", 3, rows=tuple(f"other {number}" for number in range(40)))
    write("4.json", 4, rows=tuple(f"other {number}" for number in range(40)))
    text = run(tmp_path).stdout
    assert (
        "Not known to be measured on the test rows of the report before: 3 (2026-01-03). "
        "Accuracies on either side do not compare." in text
    )


def test_the_latest_on_other_rows_is_shown_neither_better_nor_worse(write, tmp_path) -> None:
    write("1.json", 1, right={"fp32": [True] * 40})
    rows = tuple(f"other {number}" for number in range(40))
    write("2.json", 2, right={"fp32": [True] * 10 + [False] * 30}, rows=rows)
    latest = run(tmp_path).stdout.partition("## The latest")[2]
    assert "1 and 2 were measured on different test rows" in latest
    assert "measured on other rows" in latest
    assert "shown: worse" not in latest


def test_points_are_joined_only_while_rows_and_machine_stay(write, tmp_path: Path) -> None:
    write("1.json", 1)
    write("2.json", 2, rows=tuple(f"other {number}" for number in range(40)))
    path = write("3.json", 3, rows=tuple(f"other {number}" for number in range(40)))
    report = json.loads(path.read_bytes())
    report["evaluation"]["environment"]["processor"] = "Other CPU"
    path.write_text(json.dumps(report))
    page = tmp_path / "page.html"
    assert run(tmp_path, "--html", page).exit_code == 0
    specs = [
        json.loads(spec)
        for spec in re.findall(r'<script type="application/json">(.*?)</script>', page.read_text())
    ]
    assert [spec["layer"][-1]["encoding"]["y"]["field"] for spec in specs] == [
        "accuracy",
        "p50",
        "size",
    ]
    (line,) = [layer for layer in specs[0]["layer"] if layer["mark"]["type"] == "line"]
    joined = [value[line["encoding"]["detail"]["field"]] for value in specs[0]["data"]["values"]]
    assert joined == ["40 (1)"] * 2 + ["40 (2)"] * 4
    (line,) = [layer for layer in specs[1]["layer"] if layer["mark"]["type"] == "line"]
    joined = [value[line["encoding"]["detail"]["field"]] for value in specs[1]["data"]["values"]]
    assert joined == ["Some CPU (x86_64) x 2"] * 4 + ["Other CPU x 2"] * 2


@pytest.mark.parametrize(
    ("place", "message"), [("none", "there is no such directory"), (".", "holds no report")]
)
def test_nothing_to_show_is_one_line(tmp_path: Path, place: str, message: str) -> None:
    result = run(tmp_path / place)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
