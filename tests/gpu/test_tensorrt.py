"""What is true on a GPU only: ``make test-gpu BUNDLE=build/movie-sentiment/bundle``.

Needs the runtime and pytest alone; ``docs/gpu.md`` says in which environment.

Each flavour of TensorRT that is installed builds the bundle's engines and is held against ONNX
Runtime on the CPU. Prints times by shape, INT8 against FP16, graphs on and off, and memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edgebert_runtime.bundle import Bundle
from edgebert_runtime.cuda import Cuda
from edgebert_runtime.engine import EngineKey, unusable
from edgebert_runtime.engine_cache import EngineCache
from edgebert_runtime.engines import build_engines, measure_engines, open_engine
from edgebert_runtime.facts import DeviceFacts
from edgebert_runtime.onnx_session import OnnxSession
from edgebert_runtime.tensorrt_api import FLAVOURS, Flavour

MOST_FLIPS, MOST_DIFFERENCE = 0.01, 2e-2


@pytest.fixture(scope="module", params=FLAVOURS, autouse=True)
def flavour(request: pytest.FixtureRequest, facts: DeviceFacts) -> Flavour:
    """Comes before the bundle: what is missing of TensorRT is the reason that matters."""
    found: Flavour = request.param
    reason = unusable(found, facts)
    if reason is not None:
        pytest.skip(f"{found}: {reason}")
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def keys(
    flavour: Flavour, facts: DeviceFacts, bundle: Bundle, cache: EngineCache
) -> dict[str, EngineKey]:
    built = build_engines(bundle, flavour, facts, cache, say=print)
    assert not built.failures and {"int8-gpu", "fp16-gpu"} <= set(built.keys)
    return built.keys


def logits(session: Any, batches: list[dict[str, Any]]) -> np.ndarray:
    return np.concatenate([session.run(batch)["logits"] for batch in batches])


@pytest.fixture
def sessions(
    bundle: Bundle, keys: dict[str, EngineKey], cache: EngineCache
) -> Iterator[dict[str, Any]]:
    opened = {
        name: open_engine(bundle, key, cache, specialise_at_once=True) for name, key in keys.items()
    }
    yield opened
    for session in opened.values():
        session.close()


def test_int8_and_fp16_answer_as_onnx_runtime_does(
    bundle: Bundle, sessions: dict[str, Any], batches: list[dict[str, Any]]
) -> None:
    for name, session in sessions.items():
        model = bundle.read(bundle.manifest.variant(name).model)
        reference = OnnxSession(model, simulated=True)
        expected, found = logits(reference, batches), logits(session, batches)
        flips = float((found.argmax(axis=1) != expected.argmax(axis=1)).mean())
        difference = float(np.abs(found - expected).max())
        print(f"{name}: {flips:.2%} flips, outputs differ by up to {difference:.4f}")
        assert np.isfinite(found).all() and flips <= MOST_FLIPS
        if bundle.manifest.variant(name).precision == "fp16":
            assert difference <= MOST_DIFFERENCE


def test_graphs_change_no_answer(
    bundle: Bundle, keys: dict[str, EngineKey], cache: EngineCache, batches: list[dict[str, Any]]
) -> None:
    for name, key in keys.items():
        taken, answers = {}, {}
        for use_graphs in (True, False):
            session = open_engine(bundle, key, cache, use_graphs=use_graphs)
            for _ in range(3):  # the third time, graphs are there
                start = time.perf_counter()
                answers[use_graphs] = logits(session, batches[:40])
                taken[use_graphs] = time.perf_counter() - start
            session.close()
        print(f"{name}: {taken[True]:.3f} s with graphs, {taken[False]:.3f} s without")
        np.testing.assert_allclose(answers[True], answers[False], atol=1e-3)


def test_times_by_shape(
    bundle: Bundle, sessions: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    timings = measure_engines(sessions, bundle.manifest.profiles, 20000)
    with capsys.disabled():
        for timing in timings:
            shape = f"{timing.profile.opt_batch} x {timing.profile.opt_seq}"
            print(f"{timing.variant} {shape}: {timing.p50_ms:.3f} / {timing.p99_ms:.3f} ms")
    assert all(timing.p50_ms > 0 for timing in timings)


def test_closing_gives_the_memory_back(
    bundle: Bundle, keys: dict[str, EngineKey], cache: EngineCache, batches: list[dict[str, Any]]
) -> None:
    key = keys["int8-gpu"]
    with Cuda() as cuda:
        for turn in range(4):
            session = open_engine(bundle, key, cache)
            logits(session, batches[:10])
            inside = cuda.memory_bytes[0]
            session.close()
            free = cuda.memory_bytes[0]
            print(f"{(free - inside) / 2**20:.0f} MiB while open")
            if turn == 1:  # the first loads modules that stay
                settled = free
        assert abs(free - settled) < 16 * 2**20
