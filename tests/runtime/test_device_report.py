"""``edgebert-rt bench``: the report that a device brings, on real bundles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from edgebert_runtime import Classifier
from edgebert_runtime.cli import main
from edgebert_runtime.device_report import (
    DeviceReport,
    own_texts,
    read_device_report,
    render_device_report,
)
from edgebert_runtime.errors import InputError
from edgebert_runtime.manifest import Task
from edgebert_runtime.rows import read_labelled, rows_sha256


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments), "--repeats", "1"])


def report_of(path: Path) -> DeviceReport:
    return read_device_report(path.read_bytes(), path.name)


@pytest.fixture
def data(tmp_path: Path, tiny_bundles, texts_for) -> Path:
    """Rows of which the bundle answers the first ten right, and the other two wrong."""
    texts = texts_for["single"][:12]
    with Classifier.load(tiny_bundles["single"], device="cpu") as classifier:
        answers = [found.label for found in classifier.predict(texts)]
        wrong = dict(zip(classifier.task.labels, reversed(classifier.task.labels), strict=True))
    rows: list[dict[str, Any]] = [
        {"text": text, "label": answer if number < 10 else wrong[answer]}
        for number, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_report_says_what_was_measured_on_what(tmp_path, tiny_bundles, data: Path) -> None:
    bundle = tiny_bundles["single"]
    done = bench(bundle, "--data", data, "--out", tmp_path / "orin.json")
    assert done.exit_code == 0, done.stderr
    report = report_of(tmp_path / "orin.json")
    (variant,) = report.variants
    with Classifier.load(bundle, device="cpu") as classifier:
        assert report.bundle_digest == classifier.digest
        assert report.task == classifier.task
        rows = read_labelled(data, classifier.task)
    assert (variant.name, variant.device) == ("fp32", "cpu")
    assert variant.size_bytes == (bundle / "models" / "fp32.onnx").stat().st_size
    assert variant.accuracy is not None
    assert (variant.accuracy.correct, variant.accuracy.rows) == (10, 12)
    assert report.rows_sha256 == rows_sha256(rows)
    assert variant.timing.texts == 12
    assert variant.timing.texts_sha256 == rows_sha256([(text, ()) for text, _ in rows])
    assert "accuracy: 0.8333 (10 of 12 rows)" in done.stdout


def test_without_data_the_grid_goes_up_to_the_longest_text(tmp_path, tiny_bundles) -> None:
    done = bench(tiny_bundles["pairs"], "--out", tmp_path / "device.json")
    assert done.exit_code == 0, done.stderr
    report = report_of(tmp_path / "device.json")
    timing = report.variants[0].timing
    with Classifier.load(tiny_bundles["pairs"], device="cpu") as classifier:
        rows = classifier.encoder.encode(own_texts(classifier.task, 64)[1])
        longest = max(len(row.ids) for row in rows)
    assert timing.cells[-1].max_tokens >= longest > timing.cells[-1].max_tokens / 2
    assert report.rows_sha256 is None
    assert re.search(r"^  p50 ms of a call +1 texts +8 texts +32 texts$", done.stdout, re.M)
    for tokens in (16, timing.cells[-1].max_tokens):
        (line,) = re.findall(rf"^  up to {tokens} tokens(.*)$", done.stdout, re.M)
        of_length = [cell for cell in timing.cells if cell.max_tokens == tokens]
        assert line.split() == [f"{cell.p50_ms:.2f}" for cell in of_length]
    assert report.variants[0].accuracy is None


@pytest.mark.parametrize("pairs", [False, True])
def test_own_texts_fill_a_model_whatever_its_length(pairs: bool) -> None:
    task = Task(kind="single_label", labels=("a", "b"), text_pair=pairs, thresholds=None)
    for max_length in (8, 100, 512):
        texts, grid = own_texts(task, max_length)
        assert len(grid) == max_length
        assert all(isinstance(text, tuple) == pairs for text in (*texts, *grid))
        longest = grid[-1][0] if pairs else grid[-1]
        assert isinstance(longest, str)
        assert len(longest.split()) == max_length


def test_all_variants_that_run_here_are_measured_and_the_others_named(
    tmp_path, rtx_bundle: Path, add_variant
) -> None:
    add_variant(rtx_bundle, "other")
    done = bench(rtx_bundle, "--all-variants", "--out", tmp_path / "out.json")
    assert done.exit_code == 0, done.stderr
    report = report_of(tmp_path / "out.json")
    assert [item.name for item in report.variants] == ["fp32", "other"]
    assert list(report.skipped) == ["fp32-gpu"]
    assert "fp32-gpu was not measured: " in done.stdout


def test_the_document_is_the_same_on_standard_output_and_in_a_file(tmp_path, tiny_bundles) -> None:
    done = bench(tiny_bundles["single"], "--json", "--out", tmp_path / "out.json")
    assert done.stdout.encode() == (tmp_path / "out.json").read_bytes()


@pytest.mark.parametrize("out", ["missing/out.json", "."])
def test_a_place_that_cannot_be_written_is_refused_before_measuring(
    tmp_path, tiny_bundles, out: str
) -> None:
    done = bench(tiny_bundles["single"], "--out", tmp_path / out)
    assert done.exit_code == 2
    assert "round" not in done.stderr
    assert "give a file in a directory that is there" in done.stderr


def test_a_fault_in_the_data_leaves_an_older_report_as_it_was(
    tmp_path, tiny_bundles, data: Path
) -> None:
    (tmp_path / "out.json").write_text("older")
    data.write_text(data.read_text() + '\n{"text": "a", "label": "maybe"}')
    done = bench(tiny_bundles["single"], "--data", data, "--out", tmp_path / "out.json")
    assert done.exit_code == 2
    assert "rows.jsonl, line 13: label 'maybe' is not one of the bundle's" in done.stderr
    assert (tmp_path / "out.json").read_text() == "older"


def test_several_bundles_are_timed_in_one_run_and_reported_on_apart(
    tmp_path, tiny_bundles, copy_bundle, add_variant, data: Path
) -> None:
    other = copy_bundle()
    add_variant(other, "other")
    outs = [tmp_path / "a.json", tmp_path / "b.json"]
    done = bench(
        tiny_bundles["single"], other, "--all-variants", "--data", data,
        "--out", outs[0], "--out", outs[1],
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("round ") == 1
    one, two = map(report_of, outs)
    assert [v.name for v in one.variants] == ["fp32"]
    assert [v.name for v in two.variants] == ["fp32", "other"]
    assert one.bundle_digest != two.bundle_digest
    assert {v.accuracy.correct for report in (one, two) for v in report.variants} == {10}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "a.json"], "give --out once for each bundle"),
        (["--out", "a.json", "--out", "a.json"], "give --out once for each bundle"),
        (["--json"], "--json prints one document"),
        ([], "is for another task than"),
    ],
)
def test_several_bundles_need_a_file_each_and_the_same_task(
    tiny_bundles, options: list[str], message: str
) -> None:
    done = bench(tiny_bundles["single"], tiny_bundles["multi"], *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_one_variant_or_all() -> None:
    done = bench("bundle", "--variant", "fp32", "--all-variants")
    assert done.exit_code == 2
    assert "--variant or --all-variants" in done.stderr


@pytest.mark.parametrize(
    "change",
    [{"device_report_version": 0}, {"variants": []}, {"task": None}, None],
)
def test_what_is_no_report_of_a_device_is_refused(tmp_path, tiny_bundles, change) -> None:
    bench(tiny_bundles["single"], "--out", tmp_path / "out.json")
    good = json.loads((tmp_path / "out.json").read_bytes())
    bad = b"{" if change is None else json.dumps({**good, **change}).encode()
    with pytest.raises(InputError, match=r"^a\.json is not a device's report"):
        read_device_report(bad, "a.json")


def test_a_report_that_contradicts_itself_is_refused(tmp_path, tiny_bundles, data: Path) -> None:
    """It may be a stranger's, and others divide by what it says."""
    bench(tiny_bundles["single"], "--data", data, "--out", tmp_path / "out.json")
    for part, key, value in (
        (None, "size_bytes", 0),
        ("timing", "latency_p50_ms", 0.0),
        ("accuracy", "rows", 0),
        ("accuracy", "correct", 13),
        ("accuracy", "right_rows", "AA=="),
    ):
        report = json.loads((tmp_path / "out.json").read_bytes())
        variant = report["variants"][0]
        (variant if part is None else variant[part])[key] = value
        with pytest.raises(InputError, match=r"^a\.json is not a device's report"):
            read_device_report(json.dumps(report).encode(), "a.json")


def test_a_report_of_a_newer_version_asks_for_a_newer_edgebert() -> None:
    with pytest.raises(InputError, match=r"^a\.json has device_report_version 2; .* a newer one$"):
        read_device_report(b'{"device_report_version": 2, "name": 1}', "a.json")


@pytest.mark.parametrize("name", ["x" * 300, "made/by/nobody", "."])
def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path, name: str) -> None:
    done = bench("no bundle", "--out", tmp_path / name)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: --out {tmp_path / name}")
    assert done.stderr.count("\n") == 1


def test_looking_whether_a_file_can_be_written_leaves_it_as_it_was(tmp_path) -> None:
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        assert bench("no bundle", "--out", tmp_path / name).exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_a_noisy_measurement_says_so(tmp_path, tiny_bundles) -> None:
    bench(tiny_bundles["single"], "--out", tmp_path / "out.json")
    report = report_of(tmp_path / "out.json")
    variant = report.variants[0]
    timing = msgspec.structs.replace(variant.timing, variation=0.123, noisy=True)
    variant = msgspec.structs.replace(variant, timing=timing)
    noisy = msgspec.structs.replace(report, variants=(variant,))
    assert "noisy: the rounds vary by 12%" in render_device_report(noisy)
    assert "noisy" not in render_device_report(report)
