"""What every session promises, checked on the real one and on the fake that ships with us."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgebert_runtime import BundleError, DeviceError, InputError
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.cuda import Cuda
from edgebert_runtime.manifest import Profile
from edgebert_runtime.onnx_session import OnnxSession
from edgebert_runtime.session import Collated, Session
from edgebert_runtime.tensorrt_api import Flavour
from edgebert_runtime.tensorrt_build import build_engine
from edgebert_runtime.tensorrt_session import TensorRTSession
from edgebert_runtime.testing import FakeDriver, FakeSession, FakeTensorRT

LABELS = 2
VOCABULARY = 500  # fewer than the tiny model has
NAMES = ("input_ids", "attention_mask", "token_type_ids")

Batch = dict[str, np.ndarray]


def make_batch(rows: int, length: int, seed: int = 0) -> Batch:
    """Random tokens; rows of different lengths, padded with zeros to ``length``."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, length + 1, size=rows)
    lengths[0] = length
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    ids = random.integers(1, VOCABULARY, size=(rows, length)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def logits(session: Session, batch: Batch) -> np.ndarray:
    return session.run(batch)["logits"]


@pytest.fixture(scope="module")
def model_bytes(tiny_bundles: dict[str, Path]) -> bytes:
    bundle = Bundle.open(tiny_bundles["single"])
    return bundle.read(bundle.manifest.variants[0].model)


PROFILES = (
    Profile(max_batch=1, opt_batch=1, max_seq=32, opt_seq=16),
    Profile(max_batch=16, opt_batch=16, max_seq=32, opt_seq=16),
    Profile(max_batch=8, opt_batch=8, max_seq=64, opt_seq=64),
)


def on_tensorrt(model: bytes, flavour: Flavour, **options: Any) -> TensorRTSession:
    """A session over TensorRT, on a GPU that is not there."""
    driver = FakeDriver()
    trt = FakeTensorRT(driver, flavour)
    engine = build_engine(trt, flavour, model, PROFILES).engine
    return TensorRTSession(trt, flavour, engine, PROFILES, Cuda(driver), **options)


@pytest.fixture(params=["onnx", "fake", "tensorrt", "tensorrt, no graphs", "rtx"])
def make_session(request: pytest.FixtureRequest, model_bytes: bytes) -> Callable[[], Session]:
    """Makes a session; the contract is the same for each kind."""
    return {
        "onnx": lambda: OnnxSession(model_bytes, intra_op_threads=1),
        "fake": lambda: FakeSession(labels=LABELS),
        "tensorrt": lambda: on_tensorrt(model_bytes, "tensorrt"),
        "tensorrt, no graphs": lambda: on_tensorrt(model_bytes, "tensorrt", use_graphs=False),
        "rtx": lambda: on_tensorrt(model_bytes, "rtx"),
    }[request.param]


@pytest.fixture
def session(make_session: Callable[[], Session]) -> Iterator[Session]:
    made = make_session()
    yield made
    made.close()


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("length", [1, 2, 64])
def test_logits_are_float32_with_a_row_for_each_input_row(
    session: Session, rows: int, length: int
) -> None:
    found = logits(session, make_batch(rows, length))
    assert found.dtype == np.float32
    assert found.shape == (rows, LABELS)
    assert np.isfinite(found).all()


def test_the_same_batch_gives_the_same_answer_again(session: Session) -> None:
    batch = make_batch(5, 12)
    np.testing.assert_array_equal(logits(session, batch), logits(session, batch))


def test_different_rows_get_different_answers(session: Session) -> None:
    # Without this, a session that answers a constant would pass the rest.
    found = logits(session, make_batch(33, 16))
    assert len(np.unique(found.round(3), axis=0)) > 5


def test_a_row_does_not_depend_on_its_batch_mates(session: Session) -> None:
    batch = make_batch(33, 16)
    together = logits(session, batch)
    for row in range(33):
        alone = logits(session, {name: array[row : row + 1] for name, array in batch.items()})
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=25, suppress_health_check=[*HealthCheck])
@given(
    rows=st.integers(1, 8),
    length=st.integers(1, 24),
    padding=st.integers(1, 24),
    filler=st.integers(0, VOCABULARY - 1),
    seed=st.integers(0, 1000),
)
def test_a_row_does_not_depend_on_its_padding(
    session: Session, rows: int, length: int, padding: int, filler: int, seed: int
) -> None:
    batch = make_batch(rows, length, seed)
    wider = {name: np.pad(array, ((0, 0), (0, padding))) for name, array in batch.items()}
    wider["input_ids"][wider["attention_mask"] == 0] = filler
    np.testing.assert_allclose(logits(session, wider), logits(session, batch), rtol=1e-4, atol=1e-4)


def test_rows_in_another_order_give_answers_in_that_order(session: Session) -> None:
    batch = make_batch(10, 16)
    order = np.random.default_rng(1).permutation(10)
    shuffled = {name: array[order] for name, array in batch.items()}
    np.testing.assert_allclose(
        logits(session, shuffled), logits(session, batch)[order], rtol=1e-4, atol=1e-4
    )


def test_what_is_given_is_not_changed(session: Session) -> None:
    batch = make_batch(3, 8)
    before = {name: array.copy() for name, array in batch.items()}
    logits(session, batch)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, before[name])


def _without(name: str) -> Callable[[Batch], Batch]:
    return lambda batch: {key: array for key, array in batch.items() if key != name}


def _with(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Batch], Batch]:
    return lambda batch: {**batch, name: change(batch["input_ids"])}


def _all(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Batch], Batch]:
    return lambda batch: {name: change(array) for name, array in batch.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda batch: {}, "takes", id="no inputs"),
        *(pytest.param(_without(name), name, id=f"without {name}") for name in NAMES),
        pytest.param(_with("position_ids", np.copy), "position_ids", id="an input too many"),
        pytest.param(_with("input_ids", lambda a: a.astype(np.int32)), "int32", id="int32"),
        pytest.param(_all(lambda a: a.astype(">i8")), ">i8", id="the other byte order"),
        pytest.param(
            _with("attention_mask", lambda a: a.astype(np.float32)), "float32", id="float mask"
        ),
        pytest.param(_with("attention_mask", lambda a: a > 0), "bool", id="boolean mask"),
        pytest.param(_all(lambda a: a[0]), "int64", id="one dimension"),
        pytest.param(_all(lambda a: a[None]), "int64", id="three dimensions"),
        pytest.param(_with("attention_mask", lambda a: a[:, :-1]), "shape", id="shorter mask"),
        pytest.param(_with("token_type_ids", lambda a: a[:-1]), "shape", id="fewer rows"),
        pytest.param(_all(lambda a: a[:0]), "empty", id="no rows"),
        pytest.param(_all(lambda a: a[:, :0]), "empty", id="no tokens"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_the_next_one_is_answered(
    session: Session, spoil: Callable[[Batch], Batch], message: str
) -> None:
    batch = make_batch(3, 8)
    with pytest.raises(InputError, match=message):
        session.run(spoil(batch))
    assert logits(session, batch).shape == (3, LABELS)


def test_a_closed_session_refuses_to_run(make_session: Callable[[], Session]) -> None:
    session = make_session()
    logits(session, make_batch(1, 4))
    session.close()
    with pytest.raises(DeviceError, match="closed"):
        session.run(make_batch(1, 4))


def test_closing_twice_does_nothing(make_session: Callable[[], Session]) -> None:
    session = make_session()
    session.close()
    session.close()


def test_threads_that_share_a_session_each_get_their_own_answers(session: Session) -> None:
    batches = [make_batch(1 + seed % 7, 5 + seed, seed) for seed in range(32)]
    expected = [logits(session, batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = pool.map(lambda batch: logits(session, batch), batches)
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_closing_while_others_run_ends_in_answers_or_device_errors(
    make_session: Callable[[], Session],
) -> None:
    session = make_session()
    batch = make_batch(4, 16)
    expected = logits(session, batch)

    def use(index: int) -> np.ndarray | None:
        if index == 20:
            session.close()
        try:
            return logits(session, batch)
        except DeviceError:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(use, range(40)))
    assert found[20] is None
    for answer in found:
        if answer is not None:
            np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-4)


# The fake, as what it is for


def test_the_fake_keeps_the_shapes_that_it_was_given() -> None:
    fake = FakeSession()
    fake.run(make_batch(3, 8))
    fake.run(make_batch(1, 5))
    assert fake.shapes == [(3, 8), (1, 5)]


def test_the_fake_answers_as_many_labels_and_takes_the_inputs_that_it_is_made_with() -> None:
    fake = FakeSession(labels=7, inputs=("input_ids", "attention_mask"))
    batch = _without("token_type_ids")(make_batch(3, 8))
    assert logits(fake, batch).shape == (3, 7)
    with pytest.raises(InputError):
        fake.run(make_batch(3, 8))


# ONNX Runtime


@pytest.mark.parametrize("data", [b"", b"no model", b"\x08\x07\x12\x00" * 50])
def test_bytes_that_are_no_model_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="cannot load the model"):
        OnnxSession(data)


def test_who_waits_for_the_model_to_be_parsed_is_called_once(model_bytes: bytes) -> None:
    calls: list[str] = []
    session = OnnxSession(model_bytes, on_parsed=lambda: calls.append("parsed"))
    assert calls == ["parsed"]
    assert session.run(make_batch(2, 4))["logits"].shape[0] == 2
    with pytest.raises(BundleError):
        OnnxSession(b"no model", on_parsed=lambda: calls.append("not parsed"))
    assert calls == ["parsed"]
    # Parsed, but not prepared: there is no kernel for it.
    shape = [TensorProto.BFLOAT16, [1]]
    node = helper.make_node("Erf", ["x"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", *shape)],
        [helper.make_tensor_value_info("y", *shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(BundleError, match="implementation"):
        OnnxSession(model.SerializeToString(), on_parsed=lambda: calls.append("parsed too"))
    assert calls == ["parsed", "parsed too"]


def test_idle_threads_do_not_look_for_work_for_long(model_bytes: bytes) -> None:
    options = OnnxSession(model_bytes)._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "1000"


@pytest.mark.parametrize(
    "spoil", [_without("attention_mask"), _with("position_ids", np.copy), lambda batch: {}]
)
def test_inputs_of_another_models_encoder_are_refused(
    model_bytes: bytes, spoil: Callable[[Batch], Batch]
) -> None:
    session = OnnxSession(model_bytes)
    with pytest.raises(InputError, match="the model takes"):
        session.run(Collated(spoil(make_batch(2, 4))))


def test_a_model_that_was_cut_off_is_refused(model_bytes: bytes) -> None:
    with pytest.raises(BundleError, match="cannot load the model"):
        OnnxSession(model_bytes[: len(model_bytes) // 2])


def test_cuda_without_a_cuda_build_is_refused_and_says_what_to_install(model_bytes: bytes) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(DeviceError, match=r"CUDAExecutionProvider.*edgebert-runtime\[gpu\]"):
        OnnxSession(model_bytes, device="cuda")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_what_onnx_runtime_prints_of_missing_cuda_libraries_stays_off_stdout(
    model_bytes: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stdout are the answers, and a program may read them."""
    import onnxruntime

    class WithCuda:
        def __getattr__(self, name: str) -> Any:
            return getattr(onnxruntime, name)

        def get_available_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", *onnxruntime.get_available_providers()]

        def preload_dlls(self) -> None:
            sys.stdout.write("Failed to load libcublasLt.so.13\n")

    monkeypatch.setattr("edgebert_runtime.onnx_session.import_onnxruntime", WithCuda)
    with pytest.raises(DeviceError, match=r"CUDAExecutionProvider.*onnxruntime-gpu\[cuda,cudnn\]"):
        OnnxSession(model_bytes, device="cuda")
    said = capsys.readouterr()
    assert "libcublasLt" in said.err
    assert not said.out


def test_tokens_that_the_model_does_not_have_are_an_error_and_not_an_answer(
    model_bytes: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    session = OnnxSession(model_bytes)
    batch = make_batch(2, 4)
    with pytest.raises(DeviceError, match="failed on a batch"):
        session.run(_with("input_ids", lambda ids: ids + 10**6)(batch))
    assert logits(session, batch).shape == (2, LABELS)


# ONNX Runtime's wheels. These need an interpreter whose packages differ from ours.


def _run(code: str, *, path: Path | None = None) -> str:
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_REPORT = """
from edgebert_runtime import Classifier, MissingExtraError
from edgebert_runtime.onnx_session import OnnxSession
from edgebert_runtime.device import gather_facts
for call in (lambda: OnnxSession(b""), lambda: Classifier.load({bundle!r})):
    try:
        call()
    except MissingExtraError as error:
        print(error)
print(gather_facts().onnxruntime_fault)
"""


def test_both_wheels_at_once_are_refused_with_the_command_that_mends_it(
    tmp_path: Path, tiny_bundles: dict[str, Path]
) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        info = tmp_path / f"{name.replace('-', '_')}-1.99.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.99.0\n")
    messages = _run(_REPORT.format(bundle=str(tiny_bundles["single"])), path=tmp_path).splitlines()
    assert len(messages) == 3
    for message in messages:
        assert "onnxruntime and onnxruntime-gpu are both installed" in message
        assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install" in message


def test_without_onnx_runtime_the_message_says_how_to_install_it(
    tiny_bundles: dict[str, Path],
) -> None:
    blocker = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
    messages: Any = _run(blocker + _REPORT.format(bundle=str(tiny_bundles["single"])))
    messages = messages.splitlines()
    assert len(messages) == 3
    for message in messages:
        assert "pip install 'edgebert-runtime[cpu]'" in message
