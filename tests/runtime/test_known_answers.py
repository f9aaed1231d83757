"""Known answers: what a machine that computes wrongly cannot get past."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebert_runtime import Classifier
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.encoder import TextEncoder
from edgebert_runtime.errors import BundleError, DeviceError, InputError
from edgebert_runtime.known_answers import KnownAnswers, deviation, read_known_answers, verify
from edgebert_runtime.onnx_session import OnnxSession
from edgebert_runtime.testing import FakeSession
from edgebert_runtime.verify import verify_here

NAMES = ("single", "multi", "pairs")


class Faulty:
    """A session whose outputs something was done to."""

    def __init__(self, bundle: Bundle, fault: Callable[[Any], Any]) -> None:
        self._session = OnnxSession(bundle.read("models/fp32.onnx"))
        self._fault = fault

    def run(self, inputs: Any) -> dict[str, Any]:
        return {"logits": self._fault(self._session.run(inputs)["logits"])}

    def close(self) -> None:
        self._session.close()


def _with(index: Any, value: float) -> Callable[[Any], Any]:
    def fault(logits: Any) -> Any:
        wrong = logits.copy()
        wrong[index] = value
        return wrong

    return fault


@pytest.mark.parametrize("name", NAMES)
def test_a_session_that_computes_what_it_should_passes(
    tiny_bundles: dict[str, Path], name: str
) -> None:
    bundle = Bundle.open(tiny_bundles[name])
    found = verify(Faulty(bundle, lambda logits: logits), bundle, "fp32", "cpu")
    assert found.passed and found.largest == 0.0
    assert found.from_reference == found.expected_from_reference == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(np.zeros_like, id="zeros"),
        pytest.param(lambda logits: logits / 2, id="half"),
        pytest.param(lambda logits: -logits, id="negated"),
        pytest.param(lambda logits: np.roll(logits, 1, axis=1), id="columns"),
        pytest.param(lambda logits: np.roll(logits, 1, axis=0), id="rows"),
    ],
)
def test_plain_faults_are_found(
    tiny_bundles: dict[str, Path], name: str, fault: Callable[[Any], Any]
) -> None:
    bundle = Bundle.open(tiny_bundles[name])
    with pytest.raises(DeviceError, match=r"fp32 computes wrongly on cuda: .* off by .* verify"):
        verify(Faulty(bundle, fault), bundle, "fp32", "cuda")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_output_that_is_not_finite_is_enough(
    tiny_bundles: dict[str, Path], value: float
) -> None:
    bundle = Bundle.open(tiny_bundles["single"])
    with pytest.raises(DeviceError, match=r"fp32 computes wrongly on cpu: .* not finite"):
        verify(Faulty(bundle, _with((-1, -1), value)), bundle, "fp32", "cpu")


def test_the_known_inputs_are_single_rows_of_several_lengths_and_a_padded_batch(
    tiny_bundles: dict[str, Path], encoders: dict[str, TextEncoder]
) -> None:
    for name in NAMES:
        bundle = Bundle.open(tiny_bundles[name])
        batches = read_known_answers(bundle).batches
        lengths = [[len(row.input_ids) for row in batch] for batch in batches]
        assert len({length for each in lengths for length in each}) > 1
        assert sorted(map(len, batches))[:2] == [1, 1] and len(set(lengths[-1])) > 1
        first = encoders[name].encode([("", "") if name == "pairs" else ""])[0].ids
        assert all(row.input_ids[0] == first[0] for batch in batches for row in batch)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [1, 2, 70])
def test_an_answer_that_is_not_finite_is_an_error_and_never_a_score(
    encoders: dict[str, TextEncoder], tiny_bundles: dict[str, Path], value: float, count: int
) -> None:
    task = Bundle.open(tiny_bundles["single"]).manifest.task
    logits = np.ones(len(task.labels), dtype=np.float32)
    logits[-1] = value

    class Session(FakeSession):
        def run(self, inputs: Any) -> dict[str, Any]:
            return {"logits": np.tile(logits, (len(inputs["input_ids"]), 1))}

    for wait in (None, 1.0):
        with Classifier(Session(), encoders["single"], task, max_wait_ms=wait) as clf:
            texts = ["a great film"] * count
            for ask in (clf.predict, clf.scores, clf.logits, lambda t: list(clf.stream(t))):
                with pytest.raises(DeviceError, match="not a finite number"):
                    ask(texts)


def _negate(variant: str) -> Callable[[dict[str, Any]], None]:
    def change(answers: dict[str, Any]) -> None:
        found = answers["expected"][variant]
        found["logits"] = [[[-x for x in row] for row in batch] for batch in found["logits"]]

    return change


@pytest.fixture
def two(copy_bundle: Callable[..., Path], add_variant: Callable[..., None]) -> Path:
    path = copy_bundle()
    add_variant(path, "other")
    return path


def test_auto_passes_over_a_variant_that_computes_wrongly_and_says_so(
    two: Path,
    edit_answers: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(tmp_path / "cache"))
    edit_answers(two, _negate("fp32"))
    with Classifier.load(two) as clf:
        assert clf.choice is not None and clf.choice.variant.name == "other"
        assert any("cpu: fp32 computes wrongly" in line for line in clf.choice.passed_over)
        assert clf.predict(["a great film"])[0].score <= 1
    assert "falling back to cpu, variant other: cpu: fp32 computes wrongly" in caplog.text
    for asked in ({"variant": "fp32"}, {"device": "cpu"}):
        with pytest.raises(DeviceError, match="fp32 computes wrongly on cpu"):
            Classifier.load(two, **asked)
    edit_answers(two, _negate("other"))
    with pytest.raises(DeviceError, match=r"no way to run .*fp32 computes wrongly.*other computes"):
        Classifier.load(two)


def test_a_machine_is_asked_once_for_each_bundle_and_library(
    two: Path,
    edit_answers: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(tmp_path / "cache"))
    asked: list[str] = []
    real = verify

    def watched(*args: Any) -> Any:
        asked.append(args[2])
        return real(*args)

    monkeypatch.setattr("edgebert_runtime.known_answers.verify", watched)
    for _ in range(2):
        Classifier.load(two).close()
    assert asked == ["fp32"]
    Classifier.load(two, variant="other").close()
    assert asked == ["fp32", "other"]
    monkeypatch.setattr("edgebert_runtime.classifier.processor_kind", lambda: "another processor")
    Classifier.load(two).close()
    assert asked == ["fp32", "other", "fp32"]
    edit_answers(two, lambda answers: answers["expected"]["fp32"].update(tolerance=0.5))
    Classifier.load(two).close()
    assert len(asked) == 4


def test_what_cannot_be_kept_is_asked_again(
    two: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(tmp_path / "file"))
    with Classifier.load(two) as clf:
        assert len(clf.predict(["a great film"])) == 1


def _drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(answers: dict[str, Any]) -> None:
        for key in keys[:-1]:
            answers = answers[key]
        del answers[keys[-1]]  # type: ignore[arg-type]

    return change


def _set(value: Any, *keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(answers: dict[str, Any]) -> None:
        for key in keys[:-1]:
            answers = answers[key]
        answers[keys[-1]] = value  # type: ignore[index]

    return change


FP32 = ("expected", "fp32")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(_drop(*FP32), "of each variant: fp32", id="no variant"),
        pytest.param(_set({}, "expected", "more"), "missing required field", id="not whole"),
        pytest.param(_set("gone", "reference"), "of each variant", id="reference"),
        pytest.param(_set([], "batches"), "1 to 64 batches", id="no batches"),
        pytest.param(_set([[]], "batches"), "1 to 64 rows", id="no rows"),
        pytest.param(_set([], "batches", 0, 0, "input_ids"), "1 to 64 tokens", id="no tokens"),
        pytest.param(_set([1] * 65, "batches", 0, 0, "input_ids"), "1 to 64 tokens", id="long"),
        pytest.param(_set(-1, "batches", 0, 0, "input_ids", 0), "no token id", id="negative id"),
        pytest.param(_set(2**40, "batches", 0, 0, "input_ids", 0), "no token id", id="large id"),
        pytest.param(_set([0], "batches", 0, 0, "token_type_ids"), "as many", id="types"),
        pytest.param(_set(7, "batches", 0, 0, "token_type_ids", 0), "0 or 1", id="type 7"),
        pytest.param(_set(0, *FP32, "tolerance"), "above 0", id="tolerance 0"),
        pytest.param(_set([], *FP32, "logits"), "of each row", id="no logits"),
        pytest.param(_set([1.0], *FP32, "logits", 0, 0), "finite numbers a row", id="width"),
        pytest.param(_set("x", *FP32, "logits"), "Expected `array`", id="type"),
        pytest.param(_set(1, "more"), "unknown field `more`", id="unknown key"),
        pytest.param(_set([[{"input_ids": [1]}]] * 65, "batches"), "64 batches", id="many"),
        pytest.param(
            _set([[{"input_ids": [1] * 64, "token_type_ids": [0] * 64}] * 64] * 9, "batches"),
            "at most 32768 tokens",
            id="work",
        ),
    ],
)
def test_known_answers_that_make_no_sense_are_refused_in_one_line(
    copy_bundle: Callable[..., Path],
    edit_answers: Callable[..., None],
    runtime_command: Callable[..., subprocess.CompletedProcess[str]],
    change: Callable[[dict[str, Any]], None],
    said: str,
) -> None:
    path = copy_bundle()
    edit_answers(path, change)
    with pytest.raises(BundleError, match=r"known_answers\.json: ") as refused:
        read_known_answers(Bundle.open(path))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b"[" * 100_000, b'{"batches": 1e999}', b'{"reference":"a","reference":"b"}'],
)
def test_a_file_that_is_no_known_answers_is_refused(
    copy_bundle: Callable[..., Path], replace_file: Callable[..., None], data: bytes
) -> None:
    path = copy_bundle()
    replace_file(path, "known_answers.json", data)
    with pytest.raises(BundleError, match=r"known_answers\.json: "):
        read_known_answers(Bundle.open(path))


def test_a_file_larger_than_any_bundle_needs_is_not_parsed(
    copy_bundle: Callable[..., Path], replace_file: Callable[..., None]
) -> None:
    path = copy_bundle()
    replace_file(path, "known_answers.json", b" " * (8 * 2**20 + 1))
    with pytest.raises(BundleError, match="more than any bundle needs"):
        read_known_answers(Bundle.open(path))


def test_a_token_that_the_model_does_not_know_is_the_sessions_fault_and_no_traceback(
    two: Path, edit_answers: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(tmp_path / "cache"))
    edit_answers(two, _set(2**31 - 1, "batches", 0, 0, "input_ids", 1))
    with pytest.raises(DeviceError):
        Classifier.load(two, device="cpu")


def test_everything_that_runs_here_is_verified(two: Path) -> None:
    found = verify_here(Bundle.open(two))
    assert [(item.variant, item.device) for item in found.verified] == [
        ("fp32", "cpu"),
        ("other", "cpu"),
    ]
    assert all(item.passed and item.largest is not None for item in found.verified)
    assert list(found.not_run) == ["fp32 on cuda"]
    only = verify_here(Bundle.open(two), variant="other", device="cpu")
    assert [item.variant for item in only.verified] == ["other"] and not only.not_run


def test_asking_for_what_is_not_there_is_refused(two: Path) -> None:
    bundle = Bundle.open(two)
    with pytest.raises(InputError, match="device 'gpu' is not one of"):
        verify_here(bundle, device="gpu")
    with pytest.raises(InputError, match="other has nothing for cuda; for it is: fp32"):
        verify_here(bundle, device="cuda", variant="other")
    with pytest.raises(BundleError, match="no variant 'int4'"):
        verify_here(bundle, variant="int4")
    with pytest.raises(DeviceError, match="cuda"):
        verify_here(bundle, device="cuda")


def test_the_command_prints_each_variants_difference_and_fails_if_one_is_wrong(
    two: Path,
    edit_answers: Callable[..., None],
    runtime_command: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    cache = {"EDGEBERT_CACHE_DIR": str(tmp_path / "cache")}
    done = runtime_command("verify", two, **cache)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "fp32 on cpu",
        "other on cpu",
    ]
    assert "not run: fp32 on cuda" in done.stderr
    doctor = runtime_command("doctor", two, **cache)
    assert "known answers: given here" in doctor.stdout
    edit_answers(two, _negate("other"))
    done = runtime_command("verify", two, "--json", **cache)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert {item["variant"]: item["passed"] for item in document["verified"]} == {
        "fp32": True,
        "other": False,
    }
    assert "Traceback" not in done.stderr


def test_outputs_of_another_shape_are_a_device_error(tiny_bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(tiny_bundles["single"])
    answers: KnownAnswers = read_known_answers(bundle)
    with pytest.raises(DeviceError, match="outputs of shape"):
        deviation(Faulty(bundle, lambda logits: logits[:, :1]), answers, bundle.manifest, "fp32")


def test_a_bundle_that_is_damaged_where_nothing_here_looks_is_not_called_right(two: Path) -> None:
    path = two / "models" / "other.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"models/other\.onnx was altered"):
        verify_here(Bundle.open(two), variant="fp32")
