"""Distilling in the chain and alone: what is shipped and proved, crashes, several processes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from edgebert_export.checkpoint import Checkpoint, open_checkpoint
from edgebert_pipeline import STAGES
from edgebert_pipeline.report import Report
from edgebert_pipeline.run import export
from edgebert_runtime import Classifier
from edgebert_runtime.bundle import Bundle

ROOT = Path(__file__).parent.parent.parent
CALIBRATION = ROOT / "calibration_data"
DISTILL = "[distill]\nepochs = 2\nbatch_size = 16\ntrial_steps = 2\nlearning_rate = 1e-3\n"
VARIANTS = ("int8-cpu", "int8-gpu", "fp16-gpu", "fp32")


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unlabelled") / "unlabelled.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"An unlabelled text, {i}."}) for i in range(40)))
    return path


@pytest.fixture
def distilling(write_recipe: Any, unlabelled: Path) -> Callable[..., Path]:
    """Writes a recipe that distils, with unlabelled texts where the task is on single texts."""

    def write(task: str = "single", extra: str = "", distill: str = DISTILL) -> Path:
        path = write_recipe(task, distill + extra)
        if task != "pairs":
            text = path.read_text()
            more = f"[data.unlabelled]\npath = {json.dumps(str(unlabelled))}\n"
            path.write_text(text.replace("[data.train]", more + "[data.train]"))
        return path

    return write


@pytest.mark.parametrize("task", ["single", "multi", "pairs"])
def test_the_student_is_shipped_and_its_teacher_reported_beside_it(
    distilling: Callable[..., Path], tmp_path: Path, texts_for: dict[str, list[Any]], task: str
) -> None:
    out = tmp_path / "out"
    report = export(distilling(task), out, ablate=task == "single")
    assert report is not None
    others = ["hard-label"] * (task == "single")
    names = [f"{m} {v}" for m in ("student", "teacher", *others) for v in VARIANTS]
    assert [v.full_name for v in report.evaluation.variants] == names
    assert list(report.models) == ["student", "teacher", *others]
    student, teacher = report.models["student"], report.models["teacher"]
    assert (student.model_type, student.layers) == ("distilbert", 1)
    assert (teacher.model_type, teacher.layers) == ("bert", 2)
    assert student.parameters < teacher.parameters
    assert all(model.parity.max_difference <= 1e-4 for model in report.models.values())
    bundle = Bundle.open(out / "bundle")
    assert bundle.digest == report.bundle_digest
    assert [spec.name for spec in bundle.manifest.inputs] == ["input_ids", "attention_mask"]
    assert tuple(variant.name for variant in bundle.manifest.variants) == VARIANTS
    with Classifier.load(out / "bundle") as classifier:
        assert classifier.choice is not None
        assert classifier.choice.variant.name == "int8-cpu"
        assert len(classifier.predict(texts_for[task][:10])) == 10
    assert report.evaluation.reference("teacher").agreement == 1.0
    assert report.distillation is not None
    assert report.distillation.student.unlabelled == (40 if task != "pairs" else 0)
    assert report.data.rows.get("unlabelled") == (40 if task != "pairs" else None)
    pairs = [(c.first, c.second) for c in report.evaluation.comparisons]
    assert ("student int8-cpu", "teacher fp32") in pairs
    assert ("student fp32", "teacher fp32") in pairs
    assert (("student fp32", "hard-label fp32") in pairs) == (task == "single")
    read = msgspec.json.decode((out / "report.json").read_bytes(), type=Report)
    assert read == report
    text = (out / "report.md").read_text()
    assert "## Distillation" in text
    assert ("hard labels alone" in text) == (task == "single")
    assert re.search(r"keeps \d+\.\d\d% of its teacher's accuracy", text)


@pytest.fixture
def built(
    distilling: Callable[..., Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    edgebert: Any,
) -> tuple[Path, Path]:
    """A finished run with an ablation: recipe and build directory. Built once, then copied."""
    recipe, out = distilling(), tmp_path / "built"
    master = tmp_path_factory.getbasetemp() / "distilled-once"
    if not master.exists():
        done = edgebert("export", recipe, "--out", master, "--ablate")
        assert done.returncode == 0, done.stderr
    shutil.copytree(master, out)
    return recipe, out


def reused(stderr: str) -> list[str]:
    return re.findall(r"^(\w+): reused$", stderr, flags=re.MULTILINE)


def test_a_second_run_reuses_everything_and_only_what_changed_runs_again(
    built: tuple[Path, Path], edgebert: Any, edgebert_afresh: Any
) -> None:
    recipe, out = built
    done = edgebert_afresh("export", recipe, "--out", out, "--ablate")
    assert done.returncode == 0, done.stderr
    assert reused(done.stderr) == [
        *("finetune", "teach", "distill", "ablate"),
        *("onnx", "onnx", "onnx", "quantise", "quantise", "quantise"),
        *("bundle", "bundle", "bundle", "evaluate"),
    ]
    text = recipe.read_text()
    recipe.write_text(text.replace("trial_steps = 2", "trial_steps = 2\ntemperature = 5.0"))
    done = edgebert("export", recipe, "--out", out, "--until", "distill")
    assert done.returncode == 0, done.stderr
    assert reused(done.stderr) == ["finetune", "teach"]  # the teacher is not asked again
    assert "ablate" not in done.stderr


def outcome(out: Path) -> Any:
    report = json.loads((out / "report.json").read_text())
    variants = report["evaluation"]["variants"]
    checkpoints = [model["checkpoint_sha256"] for model in report["models"].values()]
    return report["bundle_digest"], checkpoints, [(v["name"], v["correct"]) for v in variants]


def test_a_run_killed_in_every_stage_of_distilling_ends_with_the_same_result(
    built: tuple[Path, Path], tmp_path: Path, edgebert: Any, start_edgebert: Any
) -> None:
    recipe, whole = built
    broken = tmp_path / "broken"
    for stage in ("teach", "distill", "ablate", "onnx"):
        process = start_edgebert(
            *("export", recipe, "--out", broken, "--ablate"), stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith(f"{stage}: "):
                time.sleep(0.1)
                process.kill()
        assert process.wait() == -signal.SIGKILL, said
    done = edgebert("export", recipe, "--out", broken, "--ablate")
    assert done.returncode == 0, done.stderr
    assert {"finetune", "teach", "distill", "ablate"} <= set(reused(done.stderr))
    assert outcome(broken) == outcome(whole)


def test_distilling_goes_on_where_it_was_killed(
    distilling: Callable[..., Path],
    built: tuple[Path, Path],
    tmp_path: Path,
    edgebert: Any,
    start_edgebert: Any,
) -> None:
    _, whole = built
    recipe, out = distilling(), tmp_path / "killed"
    for stage in ("finetune", "teach"):
        (source,) = (whole / ".stages").glob(f"{stage}-*")
        shutil.copytree(source, out / ".stages" / source.name)
    process = start_edgebert("export", recipe, "--out", out)
    deadline = time.monotonic() + 120
    saved: list[Path] = []
    while not saved and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        saved = list(
            (out / ".stages").glob("work-distill-*/student/checkpoint-*/edgebert-complete")
        )
    assert saved, "it ended before it saved anything"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = edgebert("export", recipe, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "going on from the last save of an interrupted run" in done.stderr
    students = [json.loads((o / "report.json").read_text())["models"] for o in (whole, out)]
    assert students[0]["student"] == students[1]["student"]


# Alone ------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Labelled rows in the columns that `edgebert distill` expects."""
    path = tmp_path / "rows.jsonl"
    lines = (CALIBRATION / "sentences.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    kept = [
        {"text": row["text"], "label": row["sentiment"]}
        for row in found
        if row["sentiment"] in ("negative", "positive")
    ]
    path.write_text("\n".join(map(json.dumps, kept)))
    return path


FAST = ("--epochs", 1, "--max-length", 32)


def test_distill_alone_writes_a_checkpoint_that_the_chain_takes(
    tiny_classifiers: dict[str, Checkpoint],
    rows: Path,
    unlabelled: Path,
    tmp_path: Path,
    edgebert: Any,
    write_recipe: Any,
) -> None:
    teacher, out = tiny_classifiers["single"].path, tmp_path / "student"
    arguments = ("distill", teacher, "--data", rows, "--layers", 1, "--out", out, *FAST)
    done = edgebert(*arguments, "--unlabelled", unlabelled, "--ablate")
    assert done.returncode == 0, done.stderr
    assert re.search(r"student fp32 .*\n.*teacher fp32 .*\n.*hard-label fp32", done.stdout)
    student = open_checkpoint(out)
    assert (student.model_type, student.architecture.layers) == ("distilbert", 1)
    assert student.labels == ("negative", "positive")
    report = msgspec.json.decode((out / "report.json").read_bytes(), type=Report)
    assert report.models["student"].checkpoint_sha256 == student.sha256
    assert edgebert("report", out).stdout == (out / "report.md").read_text()

    again = edgebert(*arguments, "--unlabelled", unlabelled, "--ablate")
    assert again.returncode == 0
    assert "distill: reused" in again.stderr
    assert open_checkpoint(out).sha256 == student.sha256

    recipe = write_recipe()
    text = re.sub(r'path = "[^"]*encoder[^"]*"', f'path = "{out}"', recipe.read_text())
    recipe.write_text(text)
    found = export(recipe, tmp_path / "exported")
    assert found is not None
    assert found.models["model"].model_type == "distilbert"


def test_distill_alone_takes_the_data_of_a_recipe(
    distilling: Callable[..., Path],
    tiny_classifiers: dict[str, Checkpoint],
    tmp_path: Path,
    edgebert: Any,
) -> None:
    out = tmp_path / "student"
    done = edgebert(
        *("distill", tiny_classifiers["single"].path, "--data", distilling(), "--out", out),
        *("--layer-map", "0"),
    )
    assert done.returncode == 0, done.stderr
    report = msgspec.json.decode((out / "report.json").read_bytes(), type=Report)
    assert report.distillation is not None
    log = report.distillation.student
    assert (log.layer_map, log.unlabelled, log.training.steps) == ((0,), 40, 2 * -(-348 // 16))


def test_a_directory_keeps_what_it_is_for(
    built: tuple[Path, Path],
    tiny_classifiers: dict[str, Checkpoint],
    rows: Path,
    tmp_path: Path,
    edgebert: Any,
    fails_cleanly: Any,
) -> None:
    """A student does not go where a bundle is, nor a bundle where a student is."""
    recipe, build = built
    teacher, student = tiny_classifiers["single"].path, tmp_path / "student"
    done = edgebert("distill", teacher, "--data", rows, "--out", build)
    assert "holds a build of edgebert export" in fails_cleanly(done)
    shutil.copytree(teacher, student)
    (student / ".stages").mkdir()
    done = edgebert("export", recipe, "--out", student)
    assert "holds a student of edgebert distill" in fails_cleanly(done)


def test_options_that_would_do_nothing_are_refused(
    write_recipe: Any,
    distilling: Callable[..., Path],
    tiny_classifiers: dict[str, Checkpoint],
    tmp_path: Path,
    edgebert: Any,
    fails_cleanly: Any,
) -> None:
    teacher, recipe = tiny_classifiers["single"].path, distilling()
    done = edgebert("distill", teacher, "--data", recipe, "--text", "t", "--out", tmp_path / "o")
    assert "says how its rows are read; leave out --format" in fails_cleanly(done)
    done = edgebert("export", recipe, "--until", "ablate")
    assert "the stage 'ablate' runs with --ablate only" in fails_cleanly(done)
    done = edgebert("export", write_recipe(), "--force", "teach")
    assert "no [distill] table: it has no stage 'teach'" in fails_cleanly(done)


def test_training_that_diverges_is_said_and_leaves_no_stage(
    distilling: Callable[..., Path], tmp_path: Path, edgebert: Any, fails_cleanly: Any
) -> None:
    recipe, out = distilling(), tmp_path / "out"
    head, _, tail = recipe.read_text().partition("[distill]")
    recipe.write_text(f"{head}[distill]{tail.replace('1e-3', '1e30', 1)}")
    done = edgebert("export", recipe, "--out", out)
    assert "diverged" in fails_cleanly(done)
    assert "lower learning_rate" in done.stderr
    assert not list((out / ".stages").glob("distill-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "3"], "a student of 3 layers cannot be made of a teacher of 2"),
        (["--layer-map", "5"], "layer_map names layer 5; the teacher"),
        (["--layer-map", "1,1"], "layer_map names layers 1, 1; name each once"),
        (["--layer-map", "1,0"], "from the lowest to the highest"),
        (["--layer-map", "0,x"], "--layer-map '0,x' is not a list of layers such as 1,3,5"),
        (["--layer-map", "0,1", "--layers", "1"], "layer_map names 2 layers and layers is 1"),
        (["--unlabelled", "EMPTY"], "empty.jsonl is empty"),
        (["--unlabelled", "ROWS"], "data.unlabelled: every text is also in"),
        (["--unlabelled", "none.csv"], "none.csv: there is no such data file"),
        (["--label", "stars"], "no column 'stars'"),
        (["--max-length", "500"], "max_length is 500"),
        (["--seed", "4294967296"], "seed: Expected 'int' <= 4294967295"),
        (["--learning-rate", "nan"], "learning_rate: Expected 'float' > 0"),
        (["--temperature", "inf"], "temperature is inf"),
        (["--epochs", "1000000"], "epochs: Expected 'int' <= 1000"),
        (["--out", "TEACHER"], "is in the teacher's way"),
        (["--out", "ROWS"], "is not empty and no build directory"),
    ],
)
def test_bad_input_is_named_before_anything_is_trained(
    tiny_classifiers: dict[str, Checkpoint],
    rows: Path,
    tmp_path: Path,
    edgebert: Any,
    fails_cleanly: Any,
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "empty.jsonl").touch()
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_classifiers["single"].path, teacher)
    (teacher / ".stages").mkdir()  # as if it had come out of this very command
    words = {"EMPTY": tmp_path / "empty.jsonl", "ROWS": rows, "TEACHER": teacher}
    options = [str(words.get(option, option)) for option in options]
    done = edgebert("distill", teacher, "--data", rows, "--out", tmp_path / "out", *FAST, *options)
    assert message in fails_cleanly(done)
    assert "distill: " not in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_teacher_must_fit(
    tiny_encoder: Path,
    tiny_classifiers: dict[str, Checkpoint],
    rows: Path,
    distilling: Callable[..., Path],
    tmp_path: Path,
    edgebert: Any,
    fails_cleanly: Any,
) -> None:
    out = tmp_path / "out"
    done = edgebert("distill", tiny_encoder, "--data", rows, "--out", out)
    assert "a teacher must be fine-tuned first" in fails_cleanly(done)
    done = edgebert("distill", tiny_classifiers["multi"].path, "--data", rows, "--out", out)
    assert "label 'positive' is not one of food" in fails_cleanly(done).replace(
        "negative", "positive"
    )
    done = edgebert("distill", tiny_classifiers["pairs"].path, "--data", distilling(), "--out", out)
    error = fails_cleanly(done)
    assert "3 labels (entails, contradicts, neutral)" in error
    assert "2 labels (negative, positive)" in error
    recipe = distilling(distill=DISTILL + "layers = 3\n")
    done = edgebert("export", recipe, "--out", out)
    assert "3 layers cannot be made of a teacher of 2" in fails_cleanly(done)
    assert "finetune: " not in done.stderr  # known before an hour of fine-tuning


def test_recipes_that_ask_for_distilling_without_the_table_are_refused(
    write_recipe: Any, unlabelled: Path, tmp_path: Path, edgebert: Any, fails_cleanly: Any
) -> None:
    recipe = write_recipe()
    assert "there is nothing to ablate" in fails_cleanly(edgebert("export", recipe, "--ablate"))
    recipe = write_recipe(extra="[gate]\nmin_accuracy_kept = 0.9")
    assert "add a [distill] table" in fails_cleanly(edgebert("export", recipe))
    more = f"[data.unlabelled]\npath = {json.dumps(str(unlabelled))}\n[data.train]"
    recipe.write_text(write_recipe().read_text().replace("[data.train]", more))
    assert "data.unlabelled is for distilling" in fails_cleanly(edgebert("export", recipe))


# Several processes ------------------------------------------------------------------------


def test_two_processes_killed_and_resumed_give_what_one_gives(
    tiny_encoder: Path,
    distilling: Callable[..., Path],
    tmp_path: Path,
    edgebert: Any,
    edgebert_command: Any,
    start_edgebert: Any,
) -> None:
    """Fine-tuning, the choice of layers, distilling and the ablation; without dropout."""
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, encoder)
    values = json.loads((encoder / "config.json").read_text())
    values |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (encoder / "config.json").write_text(json.dumps(values))
    training_alone = "dropout = 0.0\n[quantise]\ncpu = false\ngpu = false\n"
    recipe = distilling(distill=DISTILL + training_alone)
    recipe.write_text(recipe.read_text().replace(str(tiny_encoder), str(encoder)))
    one, two = tmp_path / "one", tmp_path / "two"
    alone = edgebert("export", recipe, "--out", one, "--ablate")
    assert alone.returncode == 0, alone.stderr

    def start(out: int, err: int) -> list[Any]:
        """Starts a process for each number in what launchers set in the environment."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        return [
            start_edgebert(
                *("export", recipe, "--out", two, "--ablate"),
                env={**environment, "RANK": rank, "LOCAL_RANK": rank},
                stdout=out,
                stderr=err,
            )
            for rank in ("0", "1")
        ]

    running = start(subprocess.DEVNULL, subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        saved: list[Path] = []
        while not saved and running[0].poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            saved = list((two / ".stages").glob("work-distill-*/student/*/edgebert-complete"))
        assert saved, "it ended before it saved anything"
    finally:
        for process in running:
            process.kill()
    assert [process.wait() for process in running] == [-signal.SIGKILL] * 2

    # The launcher's word for several processes on a machine, with GPUs or without.
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    options += " --dynamo_backend no --main_process_port 0"
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", *options.split()]
    launch += edgebert_command("export", recipe, "--out", two, "--ablate")
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on from the last save of an interrupted run" in done.stderr
    assert done.stdout.count("student fp32") == 1  # the leader reports, alone
    with (tmp_path / "said").open("w") as said:
        again = start(subprocess.DEVNULL, said.fileno())
        assert [process.wait(timeout=300) for process in again] == [0, 0]
    stages = {"finetune", "teach", "distill", "ablate", "evaluate"}
    assert stages <= set(reused((tmp_path / "said").read_text()))

    reports = [
        msgspec.json.decode((out / "report.json").read_bytes(), type=Report) for out in (one, two)
    ]
    for report, count in zip(reports, (1, 2), strict=True):
        assert report.training is not None
        assert report.distillation is not None
        assert report.distillation.hard_label is not None
        logs = (report.training, report.distillation.student.training)
        assert [log.processes for log in logs] == [count, count]
    first, second = (report.distillation for report in reports)
    assert first is not None
    assert second is not None
    assert first.student.layer_map == second.student.layer_map
    assert first.student.trials == pytest.approx(second.student.trials, rel=1e-3)
    for stage in ("finetune", "distill", "ablate"):
        weights = [
            load_file(next((out / ".stages").glob(f"{stage}-*")) / "checkpoint/model.safetensors")
            for out in (one, two)
        ]
        for name, expected in weights[0].items():
            if name.endswith(("k_lin.bias", "self.key.bias")):
                continue  # softmax makes its gradient zero: Adam steps by rounding alone
            np.testing.assert_allclose(
                weights[1][name], expected, atol=5e-4, err_msg=f"{stage} {name}"
            )


def test_a_batch_that_cannot_be_split_evenly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgebert_export.errors import TrainingError
    from edgebert_export.training import TrainingConfig, check_batch_size

    monkeypatch.setenv("WORLD_SIZE", "3")
    check_batch_size(TrainingConfig(batch_size=33))
    with pytest.raises(TrainingError, match="batch_size 32 cannot be split evenly among 3"):
        check_batch_size(TrainingConfig())


def test_the_stages_are_named_in_order() -> None:
    assert STAGES.index("finetune") < STAGES.index("teach") < STAGES.index("distill")
    assert STAGES.index("distill") < STAGES.index("ablate") < STAGES.index("onnx")
