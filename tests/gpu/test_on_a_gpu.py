"""What is true on a GPU only: ``make test-gpu BUNDLE=build/movie-sentiment/bundle``.

Needs the runtime and pytest alone; ``docs/gpu.md`` says in which environment.

Each flavour of TensorRT that is installed builds the bundle's engines and is held against ONNX
Runtime on the CPU. Prints times by shape, INT8 against FP16, graphs on and off, and memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebert_runtime.bundle import Bundle
from edgebert_runtime.cuda import Cuda
from edgebert_runtime.engine import EngineKey, unusable
from edgebert_runtime.engine_cache import EngineCache
from edgebert_runtime.engines import build_engines, measure_engines, open_engine
from edgebert_runtime.facts import gather_facts
from edgebert_runtime.onnx_session import OnnxSession
from edgebert_runtime.tensorrt_api import FLAVOURS, Flavour

BUNDLE = os.environ.get("EDGEBERT_GPU_BUNDLE", "build/movie-sentiment/bundle")
ROWS, MOST_FLIPS, MOST_DIFFERENCE = 1000, 0.01, 2e-2
FACTS = gather_facts(look_for_gpu=True)


@pytest.fixture(scope="module", params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    found: Flavour = request.param
    reason = unusable(found, FACTS)
    if reason is not None:
        pytest.skip(f"{found}: {reason}")
    return found


@pytest.fixture(scope="module")
def bundle(flavour: Flavour) -> Bundle:
    if not Path(BUNDLE).exists():
        pytest.skip(f"there is no bundle at {BUNDLE}: make export, or name one with BUNDLE=…")
    return Bundle.open(BUNDLE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def keys(flavour: Flavour, bundle: Bundle, cache: EngineCache) -> dict[str, EngineKey]:
    found = build_engines(bundle, flavour, FACTS, cache, say=print)
    assert {"int8-gpu", "fp16-gpu"} <= set(found)
    return found


@pytest.fixture(scope="module")
def batches(bundle: Bundle) -> list[dict[str, Any]]:
    """Rows of all lengths, in batches of one to thirty-two."""
    random, longest = np.random.default_rng(11), bundle.manifest.max_length
    found, rows = [], 0
    while rows < ROWS:
        shape = (int(random.choice([1, 2, 8, 32])), int(random.integers(3, longest + 1)))
        lengths = random.integers(3, shape[1] + 1, size=shape[0])
        mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
        ids = random.integers(1000, 20000, size=shape) * mask
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        found.append({spec.name: batch[spec.name] for spec in bundle.manifest.inputs})
        rows += shape[0]
    return found


def logits(session: Any, batches: list[dict[str, Any]]) -> np.ndarray:
    return np.concatenate([session.run(batch)["logits"] for batch in batches])


@pytest.fixture
def sessions(
    bundle: Bundle, keys: dict[str, EngineKey], cache: EngineCache
) -> Iterator[dict[str, Any]]:
    opened = {name: open_engine(bundle, key, cache) for name, key in keys.items()}
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
