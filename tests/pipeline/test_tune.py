"""``edgebert tune``: what may win, what is written, and what goes wrong in one line.

How fast things are is made up here, so that a test can say who wins; models, answers, budgets and
bundles are real.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import signal
import statistics
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

import edgebert_pipeline.tune as module
from edgebert_export import cpu_kernels
from edgebert_export.errors import ExportError
from edgebert_pipeline import race
from edgebert_pipeline.build import BuildDirectory
from edgebert_pipeline.cli import main
from edgebert_pipeline.progress import Reporter
from edgebert_pipeline.race import Gain, Runner, Speed, call_tokens
from edgebert_runtime import Classifier
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.classifier import CpuSettings, encoder_for
from edgebert_runtime.manifest import Tuning
from edgebert_runtime.processor import processor_kind

ANY = ("--max-accuracy-drop", 1, "--max-flip-rate", 1)


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundles: dict[str, Path]) -> Path:
    return Path(shutil.copytree(tiny_bundles["single"], tmp_path / "place" / "bundle"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, sentences: list[dict[str, Any]]) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in sentences:
            if row["sentiment"] in ("negative", "positive"):
                writer.writerow([row["text"], row["sentiment"]])
    return path


@pytest.fixture(scope="module", autouse=True)
def _each_model_is_written_once() -> Iterator[None]:
    real, written = module.write_for, dict[tuple[cpu_kernels.CpuKernels, bytes], bytes]()

    def write_for(kernels: cpu_kernels.CpuKernels, model: Path) -> bytes:
        key = kernels, model.read_bytes()
        if key not in written:
            written[key] = real(kernels, model)
        return written[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_for", write_for)
        yield


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that makes up how many times as fast variants and settings are."""

    def make_up(
        by_name: Mapping[str, float] | None = None,
        *,
        settings: Sequence[float] = (),
        final: Sequence[float] = (2.0,) * 6,
    ) -> None:
        def time_rounds(
            classifiers: Mapping[str, Classifier], *args: Any
        ) -> list[dict[str, Speed]]:
            if set(classifiers) == {"new", "old"}:
                return [{"new": _speed(ratio), "old": _speed(1.0)} for ratio in final]
            factors = {name: (by_name or {}).get(name, 1.0) for name in classifiers}
            return [{name: _speed(factor) for name, factor in factors.items()}] * 3

        def times(calls: Sequence[object], rounds: int, progress: object) -> list[list[float]]:
            factors = [*settings, *[1.0] * len(calls)][: len(calls)]
            return [[1 / factor for factor in factors]] * 3

        monkeypatch.setattr(module, "time_rounds", time_rounds)
        monkeypatch.setattr(module, "times", times)
        monkeypatch.setattr(module, "call_tokens", lambda session, row: 24)

    make_up()
    return make_up


def _speed(factor: float) -> Speed:
    return Speed(latency_p50_ms=10 / factor, throughput_texts_per_s=100 * factor)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["tune", *map(str, arguments)])


def done(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def the_tuning(bundle: Path) -> Tuning:
    (found,) = Bundle.open(bundle).manifest.tunings
    return found


def state(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# What wins, and what is written


def test_the_fastest_becomes_a_variant_that_this_kind_of_processor_runs(
    bundle: Path, rows: Path, speeds
) -> None:
    before = Bundle.open(bundle).digest
    speeds({"int8-cpu-per-tensor": 1.5, "int8-cpu-blocks-32": 1.3}, final=(1.4, 1.5, 1.6) * 2)
    result = done(bundle, "--data", rows, *ANY, "--threads", 2)
    manifest = Bundle.open(bundle).manifest
    assert [v.name for v in manifest.variants] == ["fp32", "int8-cpu-per-tensor"]
    assert manifest.variants[1].devices == ("cpu",)
    found = the_tuning(bundle)
    assert (found.processor, found.cores) == (processor_kind(), 2)
    assert (found.variant, found.measured.before) == ("int8-cpu-per-tensor", "fp32")
    assert found.measured.bundle_sha256 == before
    assert found.measured.latency_ratio == pytest.approx(1.5)
    assert found.measured.throughput_ratio == pytest.approx(1.5)
    with Classifier.load(bundle) as classifier:
        assert classifier.choice is not None
        assert classifier.choice.variant.name == "int8-cpu-per-tensor"
    assert "int8-cpu-per-tensor, batches of at most 512 tokens" in result.stdout
    assert Bundle.open(bundle).digest in result.stderr


def test_what_is_written_of_its_answers_is_what_it_answers(
    bundle: Path, rows: Path, speeds
) -> None:
    speeds({"int8-cpu-per-tensor": 2.0})
    done(bundle, "--data", rows, *ANY)
    with rows.open(newline="", encoding="utf-8") as file:
        labelled = list(csv.DictReader(file))
    answers, correct = {}, {}
    for name in ("fp32", "int8-cpu-per-tensor"):
        with Classifier.load(bundle, device="cpu", variant=name) as classifier:
            found = [classifier.predict([row["text"]])[0].label for row in labelled]
        answers[name] = found
        correct[name] = sum(a == row["label"] for a, row in zip(found, labelled, strict=True))
    flips = sum(a != b for a, b in zip(*answers.values(), strict=True))
    measured = the_tuning(bundle).measured
    assert measured.rows == len(labelled)
    assert flips > 0 and measured.flips == pytest.approx(flips, abs=len(labelled) * 0.03)
    lost = correct["fp32"] - correct["int8-cpu-per-tensor"]
    assert measured.lost == pytest.approx(lost, abs=len(labelled) * 0.03)


def test_another_kind_of_processor_runs_what_it_ran_before(
    bundle: Path, rows: Path, speeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds({"int8-cpu-blocks-64": 1.5})
    done(bundle, "--data", rows, *ANY)
    monkeypatch.setattr("edgebert_runtime.classifier.processor_kind", lambda: "another kind")
    with Classifier.load(bundle) as classifier:
        assert classifier.choice is not None and classifier.choice.variant.name == "fp32"


def test_what_does_not_fit_the_budget_is_left_out_however_fast(
    bundle: Path, rows: Path, speeds
) -> None:
    speeds({"int8-cpu-per-tensor": 9.0, "int8-cpu-per-channel": 8.0})
    result = done(bundle, "--data", rows, "--max-accuracy-drop", 1, "--max-flip-rate", 0)
    assert [v.name for v in Bundle.open(bundle).manifest.variants] == ["fp32"]
    assert Bundle.open(bundle).manifest.tunings == ()
    assert "fp32 stays, as it was: nothing within the budget was faster" in result.stdout
    line = next(row for row in result.stdout.splitlines() if "int8-cpu-per-tensor " in row)
    assert "not within the budget" in line and line.count(" - ") == 3  # it was not timed


def test_accuracy_is_a_limit_of_its_own(bundle: Path, rows: Path, speeds) -> None:
    speeds({name.name: 2.0 for name in cpu_kernels.CANDIDATES})
    result = done(bundle, "--data", rows, "--max-flip-rate", 1, "--json", "--max-accuracy-drop", 0)
    for trial in json.loads(result.stdout)["trials"]:
        judged = trial["fidelity"]
        assert (trial["left_out"] is None) == (judged["lost"] <= 0)


def test_todays_variant_goes_when_it_is_not_within_the_budget_though_others_are_slower(
    bundle: Path, rows: Path, speeds
) -> None:
    speeds({"int8-cpu-per-tensor": 3.0})
    done(bundle, "--data", rows, *ANY)
    speeds({"fp32": 0.3}, final=(0.3,) * 6)
    result = done(bundle, "--data", rows, "--max-flip-rate", 0)
    assert the_tuning(bundle).variant in {"fp32", "fp32-cpu"}
    assert "per-tensor is not shown to be slower, but is not within the budget" in result.stdout


def test_where_nothing_is_within_the_budget_that_is_said(
    bundle: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, speeds
) -> None:
    monkeypatch.setattr(module.Fidelity, "fits", lambda fidelity, budget: False)
    result = done(bundle, "--data", rows, *ANY)
    assert "fp32 is not within the budget, but nothing that runs here is." in result.stdout
    speeds(settings=(1.0, 1.4), final=(1.1, 0.9) * 3)
    result = done(bundle, "--data", rows, *ANY)
    assert "which shows nothing. fp32 is not within the budget, but" in result.stdout
    assert Bundle.open(bundle).manifest.tunings == ()


def test_what_is_not_faster_by_more_than_noise_changes_nothing(
    bundle: Path, rows: Path, speeds
) -> None:
    speeds({"int8-cpu-per-tensor": 1.015})
    before = state(bundle)
    result = done(bundle, "--data", rows, *ANY)
    assert state(bundle) == before and "nothing was written" in result.stderr
    assert "fp32 stays, as it was: nothing within the budget was faster" in result.stdout
    assert "taken" not in result.stdout


def test_where_nothing_wins_out_becomes_a_copy(
    bundle: Path, rows: Path, tmp_path: Path, speeds
) -> None:
    done(bundle, "--data", rows, *ANY, "--out", tmp_path / "tuned")
    assert state(tmp_path / "tuned") == state(bundle)


def test_a_winner_that_loses_the_final_rounds_changes_nothing(
    bundle: Path, rows: Path, speeds
) -> None:
    speeds({"int8-cpu-per-tensor": 1.5}, final=(1.3, 1.3, 1.3, 1.3, 0.9, 0.9))
    result = done(bundle, "--data", rows, *ANY)
    manifest = Bundle.open(bundle).manifest
    assert manifest.tunings == () and [v.name for v in manifest.variants] == ["fp32"]
    assert "fp32 stays" in result.stdout and "which shows nothing" in result.stdout


def test_the_best_settings_are_kept(bundle: Path, rows: Path, speeds) -> None:
    speeds(settings=(1.0, 1.1, 1.4, 1.2))
    done(bundle, "--data", rows, *ANY, "--threads", 2)
    found = the_tuning(bundle)
    assert (found.variant, found.cores) == ("fp32", 2)
    assert (found.batch_tokens, found.call_tokens, found.by_core) == (256, 24, True)
    speeds(settings=(1.0,) * 9 + (1.4,))
    done(bundle, "--data", rows, *ANY, "--threads", 2)
    found = the_tuning(bundle)
    assert (found.batch_tokens, found.by_core) == (2048, False)


def test_for_latency_settings_of_many_texts_are_left_alone(
    bundle: Path, rows: Path, speeds
) -> None:
    speeds({"int8-cpu-per-tensor": 2.0}, settings=(1.0, 3.0))
    document = json.loads(done(bundle, "--data", rows, *ANY, "--goal", "latency", "--json").stdout)
    assert document["settings"] == [] and document["goal"] == "latency"
    found = the_tuning(bundle)
    assert CpuSettings.of(found) == CpuSettings() and found.variant == "int8-cpu-per-tensor"


def test_without_rows_nothing_new_competes_and_that_is_said(
    bundle: Path, rows: Path, speeds
) -> None:
    speeds({"int8-cpu-per-tensor": 2.0})
    done(bundle, "--data", rows, *ANY, "--threads", 7)  # for another number of cores
    names = [v.name for v in Bundle.open(bundle).manifest.variants]
    assert names == ["fp32", "int8-cpu-per-tensor"]
    speeds({name.name: 3.0 for name in cpu_kernels.CANDIDATES}, final=(1.0,) * 6)
    result = done(bundle, "--threads", 7)
    assert [v.name for v in Bundle.open(bundle).manifest.variants] == names
    assert "No labelled rows were given, so nothing new was tried" in result.stdout
    assert "int8-cpu-per-tensor" in result.stdout and "int8-cpu-blocks-32" not in result.stdout
    assert "nothing was faster by more than 2 %" in result.stdout
    speeds(settings=(1.0, 1.4))
    done(bundle, "--threads", 7)
    assert the_tuning(bundle).measured.rows == 0


def test_what_runs_today_is_what_an_earlier_tuning_says(bundle: Path, rows: Path, speeds) -> None:
    speeds({"int8-cpu-per-tensor": 2.0})
    done(bundle, "--data", rows, *ANY, "--threads", 2)
    first = Bundle.open(bundle).digest
    speeds({"int8-cpu-blocks-32": 2.0})
    document = json.loads(done(bundle, "--data", rows, *ANY, "--threads", 2, "--json").stdout)
    assert document["today"] == "int8-cpu-per-tensor"
    found = the_tuning(bundle)
    assert (found.variant, found.measured.before) == ("int8-cpu-blocks-32", "int8-cpu-per-tensor")
    assert found.measured.bundle_sha256 == first


def test_what_no_tuning_names_any_more_goes(bundle: Path, rows: Path, speeds) -> None:
    for kernels in ("per-tensor", "blocks-32"):
        speeds({f"int8-cpu-{kernels}": 2.0})
        done(bundle, "--data", rows, *ANY, "--threads", 2)
    opened = Bundle.open(bundle)
    assert [v.name for v in opened.manifest.variants] == ["fp32", "int8-cpu-blocks-32"]
    assert not (bundle / "models" / "int8-cpu-per-tensor.onnx").exists()


def test_a_file_or_a_name_of_the_bundles_own_is_not_taken(bundle: Path, rows: Path, speeds) -> None:
    (bundle / "models" / "int8-cpu-per-tensor.onnx").write_bytes(
        (bundle / "models" / "fp32.onnx").read_bytes()
    )
    variant = {"name": "int8-cpu-per-channel", "precision": "fp32", "devices": ["cuda"]}
    answers = json.loads((bundle / "known_answers.json").read_bytes())
    answers["expected"]["int8-cpu-per-channel"] = answers["expected"]["fp32"]
    known = json.dumps(answers).encode()
    (bundle / "known_answers.json").write_bytes(known)

    def change(manifest: Any) -> None:
        (listed,) = [e for e in manifest["files"] if e["path"] == "known_answers.json"]
        listed.update(size_bytes=len(known), sha256=hashlib.sha256(known).hexdigest())
        (entry,) = [e for e in manifest["files"] if e["path"] == "models/fp32.onnx"]
        path = "models/int8-cpu-per-tensor.onnx"
        manifest["files"].append({**entry, "path": path})
        manifest["variants"].append({**variant, "model": path})

    _edit(bundle, change)
    speeds({"int8-cpu-per-tensor": 3.0, "int8-cpu-per-channel": 3.0, "int8-cpu-blocks-32": 2.0})
    output = done(bundle, "--data", rows, *ANY).stdout
    assert output.count("the bundle has another int8-cpu-per-") == 2
    assert the_tuning(bundle).variant == "int8-cpu-blocks-32"
    names = [v.name for v in Bundle.open(bundle).manifest.variants]
    assert names == ["fp32", "int8-cpu-per-channel", "int8-cpu-blocks-32"]


def test_few_models_are_open_at_once(
    bundle: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, speeds
) -> None:
    opened: set[Runner] = set()
    most = 0

    class Counted(Runner):
        def __enter__(self) -> Runner:
            nonlocal most
            opened.add(self)
            most = max(most, len(opened))
            return super().__enter__()

        def __exit__(self, *exc: object) -> None:
            opened.remove(self)
            super().__exit__(*exc)

    monkeypatch.setattr(module, "Runner", Counted)
    document = json.loads(done(bundle, "--data", rows, *ANY, "--json").stdout)
    assert sum(trial["gain"] is not None for trial in document["trials"]) > 4
    assert most == 4 and not opened


def test_a_kernel_that_is_refused_here_is_said_and_left_out(
    bundle: Path, rows: Path, speeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.write_for

    def refuse(kernels: cpu_kernels.CpuKernels, model: Path) -> bytes:
        if kernels.name == "int8-cpu-blocks-32":
            raise ExportError("int8-cpu-blocks-32 cannot be made: no such kernel")
        return b"no model" if kernels.name == "int8-cpu-blocks-64" else real(kernels, model)

    monkeypatch.setattr(module, "write_for", refuse)
    speeds({"int8-cpu-blocks-32": 3.0, "int8-cpu-blocks-64": 3.0, "int8-cpu-blocks-128": 2.0})
    lines = done(bundle, "--data", rows, *ANY).stdout.splitlines()
    assert any("int8-cpu-blocks-32 " in line and "no such kernel" in line for line in lines)
    assert any("int8-cpu-blocks-64 " in line and "cannot load the model" in line for line in lines)
    assert the_tuning(bundle).variant == "int8-cpu-blocks-128"


@pytest.mark.parametrize("task", ["multi", "pairs"])
def test_other_tasks_are_tuned_alike(
    task: str, tmp_path: Path, tiny_bundles, sentences, pairs, speeds
) -> None:
    bundle = Path(shutil.copytree(tiny_bundles[task], tmp_path / "bundle"))
    path = tmp_path / "rows.jsonl"
    labels = Bundle.open(bundle).manifest.task.labels
    if task == "multi":
        rows = [{**row, "label": [t for t in row["topics"] if t in labels]} for row in sentences]
        columns: tuple[str, ...] = ()
    else:
        rows, columns = pairs, ("--text", "premise", "--text-pair", "hypothesis")
    path.write_text("\n".join(map(json.dumps, rows)))
    speeds({"int8-cpu-per-channel": 2.0})
    done(bundle, "--data", path, *ANY, *columns)
    assert the_tuning(bundle).variant == "int8-cpu-per-channel"
    speeds()
    done(bundle)  # its own texts fit the task


def test_it_runs_for_real(bundle: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROUNDS", 1)
    monkeypatch.setattr(module, "_FINAL_ROUNDS", 1)
    monkeypatch.setattr(module, "_MANY_TEXTS", 64)
    document = json.loads(done(bundle, "--data", rows, *ANY, "--threads", 2, "--json").stdout)
    assert len(document["trials"]) >= len(cpu_kernels.CANDIDATES)
    assert all(trial["throughput_texts_per_s"] > 0 for trial in document["trials"])
    assert {trial["by_core"] for trial in document["settings"]} == {True, False}
    opened = Bundle.open(bundle)
    opened.verify()
    assert document["tuning"] is document["digest"] is None  # one round shows nothing
    with Classifier.load(bundle) as classifier:
        classifier.predict(["it still answers"])


# Where it is written


def test_a_dry_run_writes_nothing(bundle: Path, rows: Path, speeds) -> None:
    before = state(bundle.parent)
    speeds({"int8-cpu-per-tensor": 2.0})
    result = done(bundle, "--data", rows, *ANY, "--dry-run")
    assert state(bundle.parent) == before
    assert "int8-cpu-per-tensor" in result.stdout and "nothing was written" in result.stderr


def test_out_leaves_the_old_bundle_as_it_was(
    bundle: Path, rows: Path, tmp_path: Path, speeds
) -> None:
    before = state(bundle.parent)
    speeds({"int8-cpu-per-tensor": 2.0})
    done(bundle, "--data", rows, *ANY, "--out", tmp_path / "tuned")
    assert state(bundle.parent) == before
    assert the_tuning(tmp_path / "tuned").variant == "int8-cpu-per-tensor"


def test_a_bundle_that_changed_meanwhile_is_not_written_over(
    bundle: Path, rows: Path, other_bundle: Path, monkeypatch: pytest.MonkeyPatch, speeds
) -> None:
    real = module._Run.tune

    def change(run: Any) -> Any:
        shutil.rmtree(bundle)
        shutil.copytree(other_bundle, bundle)
        return real(run)

    speeds({"int8-cpu-per-tensor": 2.0})
    monkeypatch.setattr(module._Run, "tune", change)
    result = call(bundle, "--data", rows, *ANY)
    assert result.exit_code == 1
    assert "was changed while it was being tuned; tune it again" in result.stderr
    assert Bundle.open(bundle).digest == Bundle.open(other_bundle).digest


def test_an_export_that_ends_while_the_tuned_bundle_is_written_is_not_written_over(
    bundle: Path, rows: Path, other_bundle: Path, monkeypatch: pytest.MonkeyPatch, speeds
) -> None:
    """Its build directory is held from the last look at the bundle on."""
    (bundle.parent / ".stages").mkdir()
    real, held, waited_for = module.write_tuned, threading.Event(), threading.Event()

    def export() -> None:
        with BuildDirectory(bundle.parent, Reporter()):
            held.set()
            assert waited_for.wait(20)
            shutil.rmtree(bundle)
            shutil.copytree(other_bundle, bundle)

    def write_while_an_export_runs(*arguments: Any) -> Bundle:
        written = real(*arguments)
        threading.Thread(target=export).start()
        assert held.wait(20)
        monkeypatch.setattr(Reporter, "line", lambda self, text: waited_for.set())
        return written

    speeds({"int8-cpu-per-tensor": 2.0})
    monkeypatch.setattr(module, "write_tuned", write_while_an_export_runs)
    result = call(bundle, "--data", rows, *ANY)
    assert "was changed while it was being tuned; tune it again" in result.stderr
    assert Bundle.open(bundle).digest == Bundle.open(other_bundle).digest


def test_a_killed_run_leaves_the_bundle_and_the_next_cleans_up(
    bundle: Path, rows: Path, start_edgebert, speeds
) -> None:
    before = state(bundle)
    process = start_edgebert("tune", bundle, "--data", rows, stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("speed:"):
            break
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert state(bundle) == before
    assert [p for p in bundle.parent.iterdir() if p.is_dir() and p != bundle]
    speeds({"int8-cpu-per-tensor": 2.0})
    done(bundle, "--data", rows, *ANY)
    assert sorted(p.name for p in bundle.parent.iterdir()) == [".bundle.tuning-lock", "bundle"]
    assert the_tuning(bundle)


# What a hasty user gets wrong


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return line


def test_a_tar_is_refused_with_what_to_do(bundle: Path, tmp_path: Path, rows: Path) -> None:
    path = tmp_path / "bundle.tar"
    with tarfile.open(path, "w") as file:
        file.add(bundle, "bundle")
    before = path.read_bytes()
    assert "unpack it (tar -xf), tune the directory" in refused(path, "--data", rows)
    assert path.read_bytes() == before


def test_a_bundle_without_fp32_is_refused_with_what_to_do(bundle: Path, rows: Path, speeds) -> None:
    _edit(bundle, lambda manifest: manifest["variants"][0].update(precision="int8"))
    before = state(bundle.parent)
    assert "no fp32 variant to make others from" in refused(bundle, "--data", rows)
    assert state(bundle.parent) == before
    done(bundle)  # its own variants can be compared


def test_a_bundle_for_a_gpu_alone_is_refused(bundle: Path) -> None:
    _edit(bundle, lambda manifest: manifest["variants"][0].update(devices=["cuda"]))
    assert "has no variant for a CPU" in refused(bundle)


def _edit(bundle: Path, change: Callable[[Any], object]) -> None:
    from hashlib import sha256

    manifest = json.loads((bundle / "manifest.json").read_bytes())
    change(manifest)
    data = json.dumps(manifest).encode()
    (bundle / "manifest.json").write_bytes(data)
    (bundle / "manifest.sha256").write_text(f"{sha256(data).hexdigest()}  manifest.json\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "ROWS", "--text", "review"], "has no column 'review'"),
        (["--data", "ROWS", "--text-pair", "label"], "leave --text-pair out"),
        (["--data", "gone.csv"], "there is no such data file"),
        (["--data", "ROWS", "--label-value", "bad"], "label_values"),
        (["--text", "review"], "name their file with --data"),
        (["--data", "ROWS", "--out", "BUNDLE"], "there is something already"),
        (["--data", "ROWS", "--out", "/proc/no-bundle"], "cannot be written"),
        (["--max-flip-rate", "3"], "3"),
        (["--goal", "size"], "size"),
        (["--threads", "0"], "0"),
    ],
)
def test_wrong_use_is_one_line_and_nothing_is_written(
    bundle: Path, rows: Path, arguments: list[str], said: str
) -> None:
    known = {"ROWS": str(rows), "BUNDLE": str(bundle)}
    before = state(bundle.parent)
    assert said in refused(bundle, *(known.get(argument, argument) for argument in arguments))
    assert state(bundle.parent) == before


@pytest.mark.parametrize(
    ("path", "said"), [("gone", "there is no bundle there"), ("place", "is missing")]
)
def test_what_is_no_bundle_is_said(bundle: Path, path: str, said: str) -> None:
    assert said in refused(bundle.parent.parent / path)


def test_a_damaged_bundle_is_refused_before_anything_is_measured(bundle: Path, rows: Path) -> None:
    model = bundle / "models" / "fp32.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    assert "was altered" in refused(bundle, "--data", rows)


# What counts as faster


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=30))
def test_a_gain_is_shown_only_if_most_rounds_say_so(ratios: list[float]) -> None:
    gain = Gain.of(ratios)
    assert gain.ratio == statistics.median(ratios)
    if gain.shown:
        assert gain.ratio > 1.02
        chance = binomtest(sum(ratio > 1 for ratio in ratios), len(ratios), alternative="greater")
        assert chance.pvalue <= 0.02


@pytest.mark.parametrize(
    ("ratios", "shown"),
    [
        ([1.1] * 6, True),
        ([1.1] * 5, False),  # five coins fall alike too often
        ([1.02] * 21, False),  # true, and not worth it
        ([1.1] * 16 + [0.5] * 5, True),  # five rounds of bad luck
        ([1.1] * 15 + [0.9] * 6, False),
        ([0.9] * 21, False),
    ],
)
def test_examples_of_what_is_shown(ratios: list[float], shown: bool) -> None:
    assert Gain.of(ratios).shown is shown


def test_noise_alone_is_hardly_ever_taken_for_a_gain() -> None:
    import numpy as np

    draws = np.exp(np.random.default_rng(0).normal(0, 0.15, (2000, 21)))
    assert sum(Gain.of(list(ratios)).shown for ratios in draws) <= 0.03 * len(draws)


def test_both_is_the_geometric_mean() -> None:
    one = Speed(latency_p50_ms=5, throughput_texts_per_s=300)
    other = Speed(latency_p50_ms=10, throughput_texts_per_s=150)
    slow_alone = Speed(latency_p50_ms=20, throughput_texts_per_s=300)
    assert one.ratio(other, "both") == pytest.approx(2.0)
    assert slow_alone.ratio(other, "both") == pytest.approx(1.0)
    assert slow_alone.ratio(other, "latency") == 0.5
    assert slow_alone.ratio(other, "throughput") == 2.0


class _Linear:
    """A session that takes so long for a call, and so long for a token of it."""

    def __init__(self, call_s: float, token_s: float, clock: list[float]) -> None:
        self._call_s, self._token_s, self._clock = call_s, token_s, clock

    def run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        rows, tokens = next(iter(inputs.values())).shape
        self._clock[0] += self._call_s + self._token_s * rows * tokens
        return {}

    def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize(("call_s", "expected"), [(0.16, 16), (0.0, 0), (500.0, 2048)])
def test_what_a_call_costs_in_tokens_is_read_off_two_lengths(
    call_s: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    row = {"input_ids": np.ones((1, 64), dtype=np.int64)}
    assert call_tokens(_Linear(call_s, 0.01, clock), row) == expected
    assert call_tokens(_Linear(call_s, 0.0, clock), row) is None


def test_every_other_round_goes_in_the_opposite_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(race, "_REST_S", 0)
    order: list[str] = []
    calls = [partial(order.append, name) for name in "abc"]
    found = race.times(calls, 2, lambda done, total: None)
    assert "".join(order) == "abccbaabc"
    assert [len(row) for row in found] == [3, 3] and all(s > 0 for row in found for s in row)

    class Named:
        def __init__(self, name: str) -> None:
            self._name = name

        def predict(self, texts: Sequence[str]) -> None:
            order.append(self._name)

    order.clear()
    both: Any = {name: Named(name) for name in "ab"}
    rounds = race.time_rounds(both, ["one"], ["of", "many"], 2, lambda done, total: None)
    assert "".join(order) == "aabbbbaaaabb"
    assert [set(row) for row in rounds] == [{"a", "b"}] * 2


def test_a_runner_answers_as_the_bundle_does_whatever_the_settings(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    texts = [f"text {'longer ' * (number % 7)}{number}" for number in range(50)]
    model, task = opened.read("models/fp32.onnx"), opened.manifest.task
    with Classifier.load(bundle, device="cpu") as classifier:
        expected = classifier.scores(texts)
    with Runner(model, encoder_for(opened), task, 2) as runner:
        for settings in (CpuSettings(), CpuSettings(64, 0, True), CpuSettings(64, 0, False)):
            with runner.classifier(settings) as one:
                assert one.scores(texts) == pytest.approx(expected, abs=1e-5)
