"""``edgebert-rt`` as a person or a script meets it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from edgebert_runtime import Classifier
from edgebert_runtime.cli import main
from edgebert_runtime.facts import gather_facts

EDGEBERT_RT = Path(sys.executable).parent / "edgebert-rt"
WAIT_S = 60  # until a test gives up; nothing is timed


def call(*arguments: Any, stdin: str | bytes | None = None) -> Result:
    """Runs the command in this process; a traceback fails the test."""
    # With ``color`` the runner is like a terminal: click strips escape sequences elsewhere.
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(main, words, input=stdin, color=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Runs the installed command, as a shell would."""
    command = [str(EDGEBERT_RT), *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, timeout=WAIT_S, **options)


def assert_one_line_of_error(stderr: str, *named: str) -> None:
    assert stderr.startswith("error: ")
    assert len(stderr.splitlines()) == 1, stderr
    assert "Traceback" not in stderr
    assert all(character.isprintable() for character in stderr.rstrip("\n")), stderr
    for name in named:
        assert name in stderr


@pytest.fixture
def single(tiny_bundles: dict[str, Path]) -> Path:
    return tiny_bundles["single"]


@pytest.fixture
def damaged(copy_bundle: Callable[..., Path]) -> Path:
    """A bundle with one altered byte in its model."""
    bundle = copy_bundle()
    data = bytearray((bundle / "models/fp32.onnx").read_bytes())
    data[1000] ^= 1
    (bundle / "models/fp32.onnx").write_bytes(data)
    return bundle


# predict


def test_predict_prints_label_score_and_text_separated_by_tabs(
    single: Path, classifiers: dict[str, Classifier]
) -> None:
    texts = ["a great film", "never again", ""]
    result = call("predict", single, *texts)
    assert result.exit_code == 0
    assert result.stderr == ""
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    expected = classifiers["single"].predict(texts)
    assert [(label, text) for label, _, text in rows] == [
        (prediction.label, text) for prediction, text in zip(expected, texts, strict=True)
    ]
    for (_, score, _), prediction in zip(rows, expected, strict=True):
        assert float(score) == pytest.approx(prediction.score, abs=1e-4)


@pytest.mark.parametrize("dash", [[], ["-"]])
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_predict_reads_lines_from_standard_input(single: Path, dash: list[str], end: str) -> None:
    from_stdin = call("predict", single, *dash, stdin="Một ngày đẹp\n\nthe last 👍" + end)
    from_arguments = call("predict", single, "Một ngày đẹp", "", "the last 👍")
    assert from_stdin.exit_code == 0
    assert from_stdin.stdout == from_arguments.stdout
    assert len(from_stdin.stdout.splitlines()) == 3


def test_predict_answers_thousands_of_lines_in_order(single: Path) -> None:
    lines = [f"line {index}" for index in range(1500)]
    result = call("predict", single, stdin="\n".join(lines))
    assert [line.split("\t")[2] for line in result.stdout.splitlines()] == lines


def test_predict_without_input_prints_nothing(single: Path) -> None:
    result = call("predict", single, stdin="")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize("count", [0, 1, 3, 600])
def test_predict_json_is_one_document_whatever_the_number_of_lines(
    single: Path, classifiers: dict[str, Classifier], count: int
) -> None:
    texts = [f'the "{index}" \\ é\t👍' for index in range(count)]
    result = call("predict", single, "--json", stdin="".join(text + "\n" for text in texts))
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert [row["text"] for row in rows] == texts
    for row, prediction in zip(rows, classifiers["single"].predict(texts), strict=True):
        assert row["label"] == prediction.label
        assert row["labels"] == list(prediction.labels)
        assert row["score"] == pytest.approx(prediction.score, abs=1e-4)


def test_predict_takes_pairs_separated_by_a_tab(
    tiny_bundles: dict[str, Path], classifiers: dict[str, Classifier]
) -> None:
    pairs = [("a man sleeps", "nobody is awake"), ("one", "two"), ("", "")]
    lines = "".join(f"{first}\t{second}\n" for first, second in pairs)
    result = call("predict", tiny_bundles["pairs"], "--json", stdin=lines)
    expected = classifiers["pairs"].predict(pairs)
    assert [row["label"] for row in json.loads(result.stdout)] == [p.label for p in expected]


def test_predict_refuses_a_line_that_should_be_a_pair(tiny_bundles: dict[str, Path]) -> None:
    result = call("predict", tiny_bundles["pairs"], stdin="a\tb\nonly one text\n")
    assert result.exit_code == 2
    assert_one_line_of_error(result.stderr, "tab", "only one text")


@pytest.mark.parametrize(
    ("threshold", "labels"), [(0.0, {"food", "travel", "technology"}), (1.0, {"-"})]
)
def test_predict_prints_several_labels_by_commas_best_first_and_none_as_a_dash(
    copy_bundle: Callable[..., Path],
    edit_manifest: Callable[..., None],
    classifiers: dict[str, Classifier],
    threshold: float,
    labels: set[str],
) -> None:
    bundle = copy_bundle("multi")
    edit_manifest(bundle, lambda manifest: manifest["task"].update(thresholds=[threshold] * 3))
    result = call("predict", bundle, "a text about food")
    found, score, text = result.stdout.rstrip("\n").split("\t")
    assert text == "a text about food"
    assert set(found.split(",")) == labels
    scores = classifiers["multi"].scores([text])[0]
    assert float(score) == pytest.approx(float(scores.max()), abs=1e-4)
    if threshold == 0:
        order = [classifiers["multi"].task.labels.index(label) for label in found.split(",")]
        assert list(scores[order]) == sorted(scores, reverse=True)


def test_predict_says_on_stderr_how_many_texts_were_cut(single: Path) -> None:
    result = call("predict", single, "short", "long " * 200)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr == "1 of 2 texts were cut to fit\n"


def test_predict_keeps_control_characters_of_a_text_from_the_terminal(single: Path) -> None:
    text = "\x1b]0;title\x07 \x1b[31mred\x9b0m \x7f\x08\ttab\rback"
    for result in (call("predict", single, text), call("predict", single, stdin=text)):
        (line,) = result.stdout.rstrip("\n").split("\n")
        assert line.count("\t") == 2
        assert all(character.isprintable() for character in line.replace("\t", ""))
        assert "title" in line and "back" in line


def test_predict_keeps_control_characters_of_a_label_from_the_terminal(
    copy_bundle: Callable[..., Path], edit_manifest: Callable[..., None]
) -> None:
    # A bundle comes from elsewhere, like a text.
    bundle = copy_bundle()
    edit_manifest(
        bundle, lambda manifest: manifest["task"].update(labels=["\x1b[31ma\tb\n", "\x1b[2Jc"])
    )
    for command in (["predict", bundle, "text"], ["inspect", bundle]):
        result = call(*command)
        assert "\x1b" not in result.output
        if result.exit_code == 0 and command[0] == "predict":
            assert result.stdout.count("\n") == 1
            assert result.stdout.count("\t") == 2


def test_predict_names_the_line_that_is_not_utf8(single: Path) -> None:
    result = call("predict", single, stdin=b"good\nalso good\n\xff\xfe bad\n")
    assert result.exit_code == 2
    assert_one_line_of_error(result.stderr, "line 3", "UTF-8")


# predict, as a process in a pipe


def test_predict_into_head_ends_quietly(single: Path) -> None:
    lines = b"some line of text\n" * 20_000
    first = subprocess.Popen(
        [EDGEBERT_RT, "predict", single],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert first.stdin and first.stdout and first.stderr
    head = subprocess.Popen(["head", "-1"], stdin=first.stdout, stdout=subprocess.PIPE)
    first.stdout.close()
    try:
        first.stdin.write(lines)
        first.stdin.close()
    except BrokenPipeError:
        pass
    found, _ = head.communicate(timeout=WAIT_S)
    assert found.endswith(b"\tsome line of text\n")
    assert found.count(b"\n") == 1
    assert first.stderr.read() == b""
    assert first.wait(WAIT_S) == 0
    first.stderr.close()


class Conversation:
    """A running ``predict`` whose standard input stays open."""

    def __init__(self, bundle: Path) -> None:
        self.process = subprocess.Popen(
            [EDGEBERT_RT, "predict", bundle],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )

    def say(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)

    def answer(self) -> bytes:
        """The next line, or a failure when none comes."""
        assert self.process.stdout
        line = b""
        deadline = time.monotonic() + WAIT_S
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], WAIT_S)
            assert ready and time.monotonic() < deadline, f"no answer, only {line!r}"
            byte = self.process.stdout.read(1)
            assert byte, f"the output ended after {line!r}"
            line += byte
        return line

    def end(self) -> tuple[int, str]:
        """Waits for the end, with standard input still open; exit code and stderr."""
        assert self.process.stderr
        code = self.process.wait(WAIT_S)
        return code, self.process.stderr.read().decode()

    def drop(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream:
                stream.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)


@pytest.fixture
def conversation(single: Path) -> Iterator[Conversation]:
    started = Conversation(single)
    yield started
    started.drop()


def test_a_slow_pipe_is_answered_line_by_line(conversation: Conversation) -> None:
    for text in (b"the first", b"the second", b""):
        conversation.say(text + b"\n")
        assert conversation.answer().endswith(b"\t" + text + b"\n")
    conversation.say(b"no newline at the end")
    assert conversation.process.stdin
    conversation.process.stdin.close()
    assert conversation.answer().endswith(b"\tno newline at the end\n")
    assert conversation.end() == (0, "")


def test_an_error_in_a_pipe_that_stays_open_ends_with_one_line_and_exit_code_2(
    conversation: Conversation,
) -> None:
    conversation.say(b"good\n")
    conversation.answer()
    conversation.say(b"\xff\n")
    code, stderr = conversation.end()
    assert code == 2
    assert_one_line_of_error(stderr, "line 2", "UTF-8")


def test_a_reader_that_goes_away_while_the_pipe_stays_open_ends_it_quietly(
    conversation: Conversation,
) -> None:
    assert conversation.process.stdout
    conversation.say(b"one\n")
    conversation.answer()
    conversation.process.stdout.close()
    conversation.say(b"two\n")
    assert conversation.end() == (0, "")


def test_a_closed_standard_input_is_no_traceback(single: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"{EDGEBERT_RT}" predict "{single}" <&-'], capture_output=True, timeout=WAIT_S
    )
    assert done.returncode in (0, 2)
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_line_of_error(single: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [EDGEBERT_RT, "predict", single, "text"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=WAIT_S,
        )
    assert done.returncode == 1
    assert_one_line_of_error(done.stderr.decode(), "No space left")


def test_a_text_that_is_not_unicode_is_refused(single: Path) -> None:
    done = run("predict", single, os.fsdecode(b"caf\xe9"))
    assert done.returncode == 2
    assert_one_line_of_error(done.stderr.decode(), "Unicode")


# Bundles and options that are wrong


@pytest.mark.parametrize("command", ["predict", "bench", "inspect"])
def test_a_damaged_bundle_is_refused(damaged: Path, command: str) -> None:
    result = call(command, damaged, stdin="")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert_one_line_of_error(result.stderr, "models/fp32.onnx was altered")


@pytest.mark.parametrize("command", ["predict", "bench", "inspect", "doctor"])
def test_a_bundle_that_is_not_there_is_refused(tmp_path: Path, command: str) -> None:
    result = call(command, tmp_path / "nothing", stdin="")
    assert result.exit_code == 2
    assert_one_line_of_error(result.stderr, "there is no bundle there")


def test_a_refusal_by_the_real_command_is_one_line_and_no_traceback(damaged: Path) -> None:
    done = run("predict", damaged, "text")
    assert (done.returncode, done.stdout) == (2, b"")
    assert_one_line_of_error(done.stderr.decode(), "models/fp32.onnx was altered")


def test_a_model_that_onnx_runtime_refuses_is_one_line_and_no_traceback(
    copy_bundle: Callable[..., Path], replace_file: Callable[..., None]
) -> None:
    bundle = copy_bundle()
    replace_file(bundle, "models/fp32.onnx", b"no model")
    done = run("predict", bundle, "text")
    assert done.returncode == 2
    assert_one_line_of_error(done.stderr.decode(), "cannot load the model")


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", os.fsdecode(b"\xff")])
def test_the_name_of_a_file_that_is_too_much_is_shown_on_one_plain_line(
    copy_bundle: Callable[..., Path], name: str
) -> None:
    bundle = copy_bundle()
    (bundle / name).touch()
    result = call("inspect", bundle)
    assert result.exit_code == 2
    assert_one_line_of_error(result.stderr, "not listed")


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--threads", "0"], 2, "--threads"),
        (["--threads", "many"], 2, "--threads"),
        (["--device", "gpu"], 2, "--device"),
        (["--colour", "red"], 2, "--colour"),
        (["--variant", "int4"], 2, "int4"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "bench"])
def test_a_wrong_option_is_refused_by_name(
    single: Path, command: str, arguments: list[str], code: int, named: str
) -> None:
    result = call(command, single, *arguments, stdin="")
    assert result.exit_code == code
    assert result.stdout == ""
    assert named in result.stderr


def test_cuda_on_a_machine_without_it_is_exit_code_1(single: Path) -> None:
    result = call("predict", single, "--device", "cuda", "text")
    assert result.exit_code == 1
    assert_one_line_of_error(result.stderr, "CUDAExecutionProvider")


def test_an_unknown_command_and_a_missing_bundle_are_exit_code_2() -> None:
    assert call("serve").exit_code == 2
    assert call("predict").exit_code == 2


def test_the_version_is_that_of_the_package() -> None:
    from edgebert_runtime import __version__

    result = call("--version")
    assert result.exit_code == 0
    assert __version__ in result.stdout


@pytest.mark.parametrize("command", [[], ["predict"], ["bench"], ["inspect"], ["doctor"]])
def test_every_command_has_help(command: list[str]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage:")


# inspect


def test_inspect_says_what_is_in_a_bundle(tiny_bundles: dict[str, Path]) -> None:
    from edgebert_runtime.bundle import Bundle

    result = call("inspect", tiny_bundles["pairs"])
    assert result.exit_code == 0
    for expected in (
        "tiny-pairs: single label, pairs; up to 64 tokens",
        "entails, contradicts, neutral",
        " MB, fp32",
        "on cpu, cuda",
        Bundle.open(tiny_bundles["pairs"]).digest,
    ):
        assert expected in result.stdout


def test_inspect_json_is_the_manifest(single: Path) -> None:
    result = call("inspect", single, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((single / "manifest.json").read_bytes())


# doctor


def test_doctor_says_what_this_machine_offers() -> None:
    result = call("doctor")
    assert result.exit_code == 0
    assert "processors" in result.stdout
    assert "CPUExecutionProvider" in result.stdout
    assert "would run" not in result.stdout


def test_doctor_says_what_would_run_and_why(single: Path) -> None:
    result = call("doctor", single)
    assert result.exit_code == 0
    assert "would run: fp32 on cpu" in result.stdout
    assert "passed over: cuda: " in result.stdout


def test_doctor_tells_the_facts_where_nothing_would_run(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = msgspec.structs.replace(
        gather_facts("cpu"), providers=(), onnxruntime_fault="ONNX Runtime is not installed"
    )
    monkeypatch.setattr("edgebert_runtime.cli.gather_facts", lambda **look: facts)
    result = call("doctor", single)
    assert result.exit_code == 1
    assert "processors" in result.stdout
    assert "would run: nothing: ONNX Runtime is not installed" in result.stdout
    document = json.loads(call("doctor", single, "--json").stdout)
    assert document["choice"] is None and document["facts"]["cpu_count"] == facts.cpu_count
    assert document["fault"] == "ONNX Runtime is not installed"


def test_doctor_json_is_one_document(single: Path) -> None:
    alone, with_bundle = (
        json.loads(call("doctor", *bundle, "--json").stdout) for bundle in ([], [single])
    )
    assert alone["choice"] is None
    assert alone["facts"] == with_bundle["facts"]
    assert "CPUExecutionProvider" in alone["facts"]["providers"]
    assert with_bundle["choice"]["device"] == "cpu"
    assert with_bundle["choice"]["variant"]["name"] == "fp32"


# bench


@pytest.mark.parametrize("name", ["single", "pairs"])
def test_bench_times_its_own_texts(tiny_bundles: dict[str, Path], name: str) -> None:
    result = call("bench", tiny_bundles[name], "--repeats", 1)
    assert result.exit_code == 0
    assert result.stdout.startswith("fp32 on cpu: p50 ")
    assert "texts/s" in result.stdout
    assert "64 texts, 1 rounds" in result.stdout


def test_bench_json_times_the_texts_of_a_file(single: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("one\ntwo\nba 👍\n", encoding="utf-8")
    result = call("bench", single, "--texts", tmp_path / "texts", "--repeats", 2, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    (variant,) = report["variants"]
    assert (variant["name"], variant["device"]) == ("fp32", "cpu")
    timing = variant["timing"]
    assert (timing["texts"], timing["repeats"]) == (3, 2)
    assert 0 < timing["session_p50_ms"] < timing["latency_p50_ms"] <= timing["latency_p99_ms"]
    assert timing["throughput_texts_per_s"] > 0
    assert timing["batch_size"] >= 1
    assert report["facts"]["jetson"] is None


def test_bench_takes_pairs_from_a_file(tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("one\ttwo\n")
    arguments = ("bench", tiny_bundles["pairs"], "--texts", tmp_path / "texts", "--repeats", 1)
    assert call(*arguments).exit_code == 0
    (tmp_path / "texts").write_text("only one\n")
    result = call(*arguments)
    assert result.exit_code == 2
    assert_one_line_of_error(result.stderr, "only one")


@pytest.mark.parametrize("content", [None, b""])
def test_bench_refuses_a_file_that_is_missing_or_empty(
    single: Path, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "texts").write_bytes(content)
    result = call("bench", single, "--texts", tmp_path / "texts")
    assert result.exit_code == 2
    assert_one_line_of_error(result.stderr, str(tmp_path / "texts"))


def test_bench_names_the_file_and_the_line_that_is_not_utf8(single: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes(b"good\n\xff\n")
    result = call("bench", single, "--texts", tmp_path / "texts")
    assert result.exit_code == 2
    assert_one_line_of_error(result.stderr, "line 2", "UTF-8", str(tmp_path / "texts"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc on this system")
def test_bench_ends_when_its_file_cannot_be_read_to_the_end(single: Path) -> None:
    # Opens like any file, and fails at the first read, as a file on a broken disk does.
    command = [EDGEBERT_RT, "bench", single, "--texts", "/proc/self/mem"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10)
    except subprocess.TimeoutExpired:
        pytest.fail("it waits for ever for the end of a file that failed")
    assert done.returncode == 2
    assert_one_line_of_error(done.stderr.decode(), "/proc/self/mem")
