"""The session over TensorRT, on a GPU that is not there: same answers, nothing left over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgebert_runtime import BundleError, DeviceError, InputError
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.cuda import Cuda
from edgebert_runtime.manifest import Profile
from edgebert_runtime.onnx_session import OnnxSession
from edgebert_runtime.profiles import padded_length, padded_rows, parts
from edgebert_runtime.tensorrt_api import Flavour
from edgebert_runtime.tensorrt_build import build_engine
from edgebert_runtime.tensorrt_session import TensorRTSession
from edgebert_runtime.testing import FakeDriver, FakeTensorRT, Misuse, fake_tensorrt

PROFILES = (
    Profile(max_batch=1, opt_batch=1, max_seq=32, opt_seq=16),
    Profile(max_batch=8, opt_batch=8, max_seq=32, opt_seq=16),
    Profile(max_batch=4, opt_batch=4, max_seq=60, opt_seq=60),
)
BATCHES_OF_32 = (
    Profile(max_batch=1, opt_batch=1, max_seq=32, opt_seq=16),
    Profile(max_batch=32, opt_batch=32, max_seq=32, opt_seq=16),
)
Batch = dict[str, Any]


class Machine:
    """A machine with a GPU that is not there, and an engine for it."""

    def __init__(
        self,
        model: bytes,
        flavour: Flavour = "tensorrt",
        *,
        profiles: tuple[Profile, ...] = PROFILES,
        **gpu: Any,
    ) -> None:
        self.driver = FakeDriver(**gpu)
        self.trt = FakeTensorRT(self.driver, flavour)
        self.flavour: Flavour = flavour
        self.lines: list[str] = []
        self.engine = build_engine(self.trt, flavour, model, profiles).engine

    def open(self, **options: Any) -> TensorRTSession:
        return TensorRTSession(
            self.trt,
            self.flavour,
            options.pop("engine", self.engine),
            options.pop("profiles", PROFILES),
            Cuda(self.driver),
            log=self.lines.append,
            **options,
        )

    def left_over(self) -> dict[str, int]:
        gc.collect()
        found = {name: count for name, count in self.driver.live.items() if count}
        return {**found, **({"objects": self.trt.live} if self.trt.live else {})}


@pytest.fixture(scope="module")
def model(tiny_bundles: dict[str, Path]) -> bytes:
    bundle = Bundle.open(tiny_bundles["single"])
    return bundle.read(bundle.manifest.variant("fp32").model)


@pytest.fixture(scope="module")
def reference(model: bytes) -> Iterator[OnnxSession]:
    session = OnnxSession(model, intra_op_threads=1)
    yield session
    session.close()


@pytest.fixture
def machine(model: bytes) -> Machine:
    return Machine(model)


def batch_of(rows: int, tokens: int, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, tokens + 1, size=rows)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    ids = random.integers(1, 500, size=(rows, tokens)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def check(session: TensorRTSession, reference: OnnxSession, batch: Batch) -> None:
    found, expected = session.run(batch)["logits"], reference.run(batch)["logits"]
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("flavour", "use_graphs"), [("tensorrt", True), ("tensorrt", False), ("rtx", True)]
)
def test_thousands_of_batches_are_answered_as_on_a_cpu(
    model: bytes, reference: OnnxSession, flavour: Flavour, use_graphs: bool
) -> None:
    machine, random = Machine(model, flavour), np.random.default_rng(5)
    known = {}
    session = machine.open(use_graphs=use_graphs)
    for turn in range(2_000):
        # Few shapes come often, as they do when texts are sorted by length; many come seldom.
        rows = int(random.choice([1, 2, 8, 11, int(random.integers(1, 20))]))
        tokens = int(random.choice([5, 16, 32, int(random.integers(1, 61))]))
        seed = turn % 3
        key = (rows, tokens, seed)
        if key not in known:
            batch = batch_of(rows, tokens, seed)
            known[key] = (batch, reference.run(batch)["logits"])
        batch, expected = known[key]
        np.testing.assert_allclose(session.run(batch)["logits"], expected, atol=2e-5)
    with_graphs = machine.driver.calls["cuGraphLaunch"]
    assert (with_graphs > 1_000) == (use_graphs and flavour == "tensorrt")
    session.close()
    assert machine.left_over() == {}


def test_nothing_is_allocated_once_the_shapes_have_come_twice(
    machine: Machine, reference: OnnxSession
) -> None:
    session = machine.open()
    shapes = [(1, 8), (8, 20), (3, 60), (11, 30)]
    for _ in range(3):
        for rows, tokens in shapes:
            session.run(batch_of(rows, tokens))
    allocating = ("cuMemAlloc", "cuMemHostAlloc", "cuGraphInstantiate", "cuStreamCreate")
    before = [machine.driver.calls[name] for name in allocating]
    objects = machine.trt.live
    for _ in range(20):
        for rows, tokens in shapes:
            check(session, reference, batch_of(rows, tokens))
    assert [machine.driver.calls[name] for name in allocating] == before
    assert machine.trt.live == objects
    session.close()


def test_a_shape_is_recorded_the_second_time_and_launched_from_the_third(
    machine: Machine, reference: OnnxSession
) -> None:
    session = machine.open()
    calls = machine.driver.calls
    for expected in [(0, 0), (1, 0), (1, 1), (1, 2)]:
        check(session, reference, batch_of(4, 20, seed=sum(expected)))
        assert (calls["cuGraphInstantiate"], calls["cuGraphLaunch"]) == expected
    check(session, reference, batch_of(4, 21))  # padded to 24 tokens, as 20 is
    assert calls["cuGraphLaunch"] == 3
    check(session, reference, batch_of(4, 25))
    assert calls["cuGraphLaunch"] == 3
    session.close()


def test_batches_of_every_size_share_a_few_graphs(model: bytes, reference: OnnxSession) -> None:
    machine = Machine(model, profiles=BATCHES_OF_32)
    session = machine.open(profiles=BATCHES_OF_32)
    graphs = machine.driver.live
    for tokens in (16, 24):
        before = graphs["executable graphs"]
        for rows in [*range(1, 33)] * 2:
            check(session, reference, batch_of(rows, tokens, seed=rows))
        assert graphs["executable graphs"] - before == 6  # of 1, 2, 4, 8, 16 and 32 rows
    session.close()
    assert machine.left_over() == {}


def test_rows_of_padding_repeat_the_first_and_nothing_of_an_earlier_batch(
    machine: Machine,
) -> None:
    session = machine.open()
    session.run(batch_of(8, 32, seed=1))
    batch = batch_of(5, 27, seed=2)
    slot = session._slots[1]
    slot.fill(batch, (8, 32))
    for tensor in (tensor for tensor in session._tensors if tensor.is_input):
        held = slot.view(tensor, (8, 32))
        np.testing.assert_array_equal(held[:5, :27], batch[tensor.name])
        np.testing.assert_array_equal(held[5:], held[[0, 0, 0]])
        assert not held[:, 27:].any()
    assert slot.view(next(t for t in session._tensors if t.name == "attention_mask"), (8, 32))[
        :, 0
    ].all()  # no row without a token to look at
    session.close()


def test_a_stream_that_cannot_be_recorded_goes_on_without_graphs(
    machine: Machine, reference: OnnxSession
) -> None:
    session = machine.open()
    machine.driver.fail("cuStreamBeginCapture", status=900)
    for _ in range(4):
        check(session, reference, batch_of(2, 9))
    assert machine.driver.calls["cuGraphLaunch"] == 0
    assert any("going on without CUDA graphs" in line for line in machine.lines)
    session.close()
    assert machine.left_over() == {}


def test_graphs_that_were_not_used_for_longest_are_freed(
    machine: Machine, reference: OnnxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgebert_runtime.tensorrt_session._MOST_GRAPHS", 3)
    session = machine.open()
    for tokens in (8, 16, 24, 32, 40, 48):
        for _ in range(3):
            check(session, reference, batch_of(2, tokens))
        assert machine.driver.live["executable graphs"] <= 3
    session.close()
    assert machine.left_over() == {}


def test_threads_share_a_session(machine: Machine, reference: OnnxSession) -> None:
    session = machine.open()
    batches = [batch_of(rows, tokens) for rows in (1, 3, 9) for tokens in (7, 32, 50)] * 10
    expected = [reference.run(batch)["logits"] for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: session.run(batch)["logits"], batches))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    session.close()
    assert machine.left_over() == {}


def test_answers_stay_when_the_next_batch_comes(machine: Machine) -> None:
    session = machine.open()
    first = session.run(batch_of(2, 8, seed=1))["logits"]
    kept = first.copy()
    session.run(batch_of(2, 8, seed=2))
    np.testing.assert_array_equal(first, kept)
    session.close()


def test_rows_that_no_profile_holds_are_refused(machine: Machine) -> None:
    session = machine.open()
    with pytest.raises(InputError, match="a row has 61 tokens, the engine takes at most 60"):
        session.run(batch_of(1, 61))
    assert session.run(batch_of(1, 60))["logits"].shape == (1, 2)
    session.close()


@pytest.mark.parametrize(
    "function",
    ["cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuStreamSynchronize", "cuCtxPushCurrent"],
)
def test_a_start_that_fails_leaves_nothing(machine: Machine, function: str) -> None:
    before = machine.driver.calls[function]
    machine.open().close()
    calls = machine.driver.calls[function] - before - 2 * (function == "cuCtxPushCurrent")  # close
    assert calls > 0
    for after in range(calls):
        machine.driver.fail(function, after=after)
        with pytest.raises(DeviceError, match="CUDA error 2") as caught:
            machine.open()
        assert machine.left_over() == {}, "held by the exception" if caught else ""


def raising(self: Any, *args: Any) -> bool:
    raise RuntimeError("Error in set optimization profile async.")


def test_what_tensorrt_raises_at_the_start_is_an_error_that_leaves_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_tensorrt._Context, "set_optimization_profile_async", raising)
    with pytest.raises(
        DeviceError, match="TensorRT cannot prepare a batch: Error in set"
    ) as caught:
        machine.open()
    assert machine.left_over() == {}, caught


def test_what_tensorrt_raises_while_recording_costs_graphs_and_no_batch(
    machine: Machine, reference: OnnxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = machine.open()
    monkeypatch.setattr(fake_tensorrt._Context, "set_optimization_profile_async", raising)
    for _ in range(4):
        check(session, reference, batch_of(2, 9))
    assert any("going on without CUDA graphs" in line for line in machine.lines)
    session.close()
    assert machine.left_over() == {}


def test_what_tensorrt_raises_on_a_batch_is_an_error(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = machine.open()
    monkeypatch.setattr(fake_tensorrt._Context, "set_input_shape", raising)
    with pytest.raises(DeviceError, match="TensorRT cannot compute a batch: Error"):
        session.run(batch_of(1, 8))
    session.close()
    assert machine.left_over() == {}


def test_a_graph_that_cannot_be_freed_keeps_nothing_else(machine: Machine) -> None:
    session = machine.open()
    for _ in range(3):
        session.run(batch_of(2, 8))
        session.run(batch_of(2, 16))
    machine.driver.fail("cuGraphExecDestroy")
    with pytest.raises(DeviceError, match="cuGraphExecDestroy failed"):
        session.close()
    assert machine.left_over() == {}


@pytest.mark.parametrize("after", [0, 1])
def test_a_gpu_that_was_lost_gets_its_context_back(machine: Machine, after: int) -> None:
    session = machine.open()
    machine.driver.fail("cuCtxPushCurrent", after=after)
    with pytest.raises(DeviceError, match="cuCtxPushCurrent failed"):
        session.close()
    assert machine.driver.live["contexts"] == 0
    session.close()


def test_a_full_gpu_is_an_error_that_leaves_nothing(model: bytes) -> None:
    machine = Machine(model, memory_bytes=20_000)
    with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
        machine.open()
    assert machine.left_over() == {}


@pytest.mark.parametrize("function", ["cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuGraphLaunch"])
def test_a_batch_that_fails_is_an_error_and_the_session_closes_clean(
    machine: Machine, function: str
) -> None:
    session = machine.open()
    for _ in range(3):
        session.run(batch_of(2, 8))
    machine.driver.fail(function)
    with pytest.raises(DeviceError, match="CUDA error 2"):
        session.run(batch_of(2, 8))
        session.run(batch_of(2, 16))
    session.close()
    session.close()
    assert machine.left_over() == {}
    with pytest.raises(DeviceError, match="closed"):
        session.run(batch_of(2, 8))


def test_an_engine_of_another_release_is_refused_with_what_tensorrt_says(machine: Machine) -> None:
    other = FakeTensorRT(machine.driver, "tensorrt", version="10.13.0")
    with pytest.raises(DeviceError, match="Version tag does not match"):
        TensorRTSession(other, "tensorrt", machine.engine, PROFILES, Cuda(machine.driver))
    assert machine.left_over() == {}


def test_an_engine_with_other_profiles_is_refused(machine: Machine) -> None:
    with pytest.raises(BundleError, match="has 3 profiles, the bundle lists 1"):
        machine.open(profiles=PROFILES[:1])
    assert machine.left_over() == {}


def test_rtx_keeps_the_kernels_that_it_compiled(model: bytes, tmp_path: Path) -> None:
    machine, path = Machine(model, "rtx"), tmp_path / "runtime.cache"
    for _ in range(2):
        session = machine.open(runtime_cache=path)
        session.run(batch_of(2, 8))
        session.close()
        assert path.read_bytes() == b"kernels of the fake"
    path.write_bytes(b"damaged")  # the library refuses it, and compiles anew
    session = machine.open(runtime_cache=path)
    session.run(batch_of(2, 8))
    session.close()
    assert path.read_bytes() == b"kernels of the fake"
    assert [file.name for file in tmp_path.iterdir()] == ["runtime.cache"]


def test_a_runtime_cache_that_cannot_be_had_is_done_without(
    model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(model, "rtx")
    (tmp_path / "file").touch()
    session = machine.open(runtime_cache=tmp_path / "file" / "runtime.cache")
    session.close()
    session = machine.open(runtime_cache=tmp_path / "runtime.cache")
    monkeypatch.setattr(fake_tensorrt._RuntimeCache, "serialize", lambda self: None)
    session.close()
    assert not (tmp_path / "runtime.cache").exists() and machine.left_over() == {}


# The fake itself: what would be wrong on a GPU must not pass.


def test_memory_that_was_freed_cannot_be_used(machine: Machine, model: bytes) -> None:
    session = machine.open()
    address = session._slots[0].device["input_ids"]
    with Cuda(machine.driver).current():
        machine.driver.cuMemFree(address)
    with pytest.raises(Misuse, match="freed"):
        session.run(batch_of(1, 8))


def test_a_profile_cannot_be_switched_twice_at_once(machine: Machine) -> None:
    session = machine.open()
    context, stream = session._contexts[0], int(session._stream)
    assert context.set_optimization_profile_async(1, stream)
    with pytest.raises(Misuse, match="second switch"):
        context.set_optimization_profile_async(2, stream)
    with pytest.raises(Misuse, match="before the switch"):
        context.set_input_shape("input_ids", (1, 8))


def test_a_missing_address_or_shape_is_refused(machine: Machine) -> None:
    session = machine.open()
    context = session._make_contexts()
    context.set_optimization_profile_async(0, int(session._stream))
    with session._cuda.current():
        session._stream.wait()
    context.set_device_memory(*session._activations)
    assert not context.execute_async_v3(int(session._stream))
    assert not context.set_input_shape("input_ids", (2, 8))  # of a profile for one row
    assert "no shape or no address" in machine.lines[-2]


def test_results_are_not_there_before_somebody_waited(machine: Machine) -> None:
    session = machine.open()
    slot, context = session._slots[0], session._contexts[0]
    slot.fill(batch_of(1, 8), (1, 8))
    with session._cuda.current():
        session._enqueue(context, slot, (1, 8), new_shape=True)
        logits = slot.view(next(t for t in session._tensors if t.name == "logits"), (1, 8))
        before = logits.copy()
        session._stream.wait()
    assert not np.array_equal(before, logits)


def test_a_graph_is_not_launched_under_a_context_that_was_changed(machine: Machine) -> None:
    session = machine.open()
    for _ in range(3):
        session.run(batch_of(2, 8))
    (graph,) = [graph for graph in session._seen.values() if graph is not None]
    graph.context.set_input_shape("input_ids", (3, 8))
    with pytest.raises(Misuse, match="under its graph"):
        session.run(batch_of(2, 8))


def test_the_first_run_after_a_change_of_shape_cannot_be_recorded(machine: Machine) -> None:
    session = machine.open()
    context, slot = session._contexts[1], session._slots[1]
    with session._cuda.current(), pytest.raises(DeviceError, match="could not run the engine"):
        session._stream.capture(lambda: session._enqueue(context, slot, (2, 8), new_shape=True))
    assert machine.driver.live["graphs"] == 0


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [
        (1, 10, [(0, 1, 0)]),
        (2, 32, [(0, 2, 1)]),
        (8, 32, [(0, 8, 1)]),
        (9, 32, [(0, 8, 1), (8, 9, 0)]),
        (1, 33, [(0, 1, 2)]),
        (9, 60, [(0, 4, 2), (4, 8, 2), (8, 9, 2)]),
    ],
)
def test_the_smallest_profile_that_fits_is_taken(
    rows: int, tokens: int, expected: list[tuple[int, int, int]]
) -> None:
    assert list(parts(PROFILES, rows, tokens)) == expected


@pytest.mark.parametrize(("tokens", "expected"), [(1, 8), (8, 8), (9, 16), (57, 60), (60, 60)])
def test_rows_are_padded_to_a_multiple_of_eight_within_the_profile(
    tokens: int, expected: int
) -> None:
    assert padded_length(tokens, PROFILES[2]) == expected


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 12), (12, 12)])
def test_rows_are_padded_to_a_power_of_two_within_the_profile(rows: int, expected: int) -> None:
    profile = Profile(max_batch=12, opt_batch=12, max_seq=8, opt_seq=8)
    assert padded_rows(rows, profile) == expected


# What builds engines: nothing that a callback or the library raises is lost.


def test_what_a_callback_raises_ends_the_build(machine: Machine, model: bytes) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no space left on device")

    for callback in ("log", "verbose", "on_progress"):
        with pytest.raises(OSError, match="no space left"):
            build_engine(machine.trt, "tensorrt", model, PROFILES, **{callback: fail})


def test_kernels_are_told_with_their_line_breaks_to_who_asks_alone(
    machine: Machine, model: bytes
) -> None:
    lines: list[str] = []
    messages: list[str] = []
    build_engine(machine.trt, "tensorrt", model, PROFILES, log=lines.append)
    assert not any("Layers" in line for line in lines)
    build_engine(
        machine.trt, "tensorrt", model, PROFILES, log=lines.append, verbose=messages.append
    )
    assert messages == ["Layers:\nName: a kernel"]
    assert not any("Layers" in line for line in lines)


def test_an_engine_has_one_stream(machine: Machine, model: bytes) -> None:
    engine = build_engine(machine.trt, "tensorrt", model, PROFILES).engine
    assert b'"streams": 1' in engine


def test_an_interrupt_ends_the_build_at_its_next_step(
    machine: Machine, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def interrupt(jobs: Any) -> None:
        raise KeyboardInterrupt  # as the main thread does on ^C, wherever it waits

    monkeypatch.setattr("concurrent.futures.wait", interrupt)
    reported = fake_tensorrt._Builder._report

    def report(self: Any, monitor: Any) -> bool:
        steps.append(reported(self, monitor))
        return bool(steps[-1])

    monkeypatch.setattr(fake_tensorrt._Builder, "_report", report)
    with pytest.raises(KeyboardInterrupt):
        build_engine(machine.trt, "tensorrt", model, PROFILES)
    assert steps == [False] and machine.trt.builds == 1  # the machine's own


def test_shapes_that_tensorrt_refuses_are_an_error(machine: Machine, model: bytes) -> None:
    shapes = (msgspec.structs.replace(PROFILES[0]),)
    msgspec.structs.force_setattr(shapes[0], "opt_seq", 99)
    with pytest.raises(DeviceError, match="cannot build the engine: Shapes of input_ids"):
        build_engine(machine.trt, "tensorrt", model, shapes)


def test_timings_that_tensorrt_cannot_read_are_measured_anew(
    machine: Machine, model: bytes
) -> None:
    for timings in (b"damaged", b"another GPU measured", None):
        built = build_engine(machine.trt, "tensorrt", model, PROFILES, timing_cache=timings)
        assert built.timing_cache == b"Fake GPU measured"


def test_without_a_gpu_the_builder_says_why(model: bytes) -> None:
    with pytest.raises(DeviceError, match="cannot build the engine: CUDA initialization failure"):
        build_engine(FakeTensorRT(FakeDriver(gpus=0)), "tensorrt", model, PROFILES)
