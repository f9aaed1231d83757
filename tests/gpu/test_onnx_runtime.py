"""ONNX Runtime on a GPU (``device="cuda"``), and what ``auto`` does where TensorRT cannot run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edgebert_runtime import Classifier
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.engine import unusable
from edgebert_runtime.errors import DeviceError
from edgebert_runtime.facts import DeviceFacts, GpuFacts
from edgebert_runtime.onnx_session import OnnxSession
from edgebert_runtime.tensorrt_api import FLAVOURS, Flavour

TEXTS = ["A wonderful film.", "A dull, endless mess.", "Not bad at all, if a little long."]
MOST_FLIPS, MOST_DIFFERENCE = 0.002, 2e-2  # products may be computed in TF32


@pytest.fixture(scope="module")
def sessions(facts: DeviceFacts, gpu: GpuFacts, bundle: Bundle) -> Iterator[dict[str, Any]]:
    if facts.onnxruntime_fault is not None:
        pytest.skip(facts.onnxruntime_fault)
    if "CUDAExecutionProvider" not in facts.providers:
        pytest.skip(f"{', '.join(facts.onnxruntime)} has no CUDAExecutionProvider")
    (variant, *_) = [item for item in bundle.manifest.variants if "cuda" in item.devices]
    model = bundle.read(variant.model)
    opened = {"cpu": OnnxSession(model), "cuda": OnnxSession(model, device="cuda")}
    yield opened
    for session in opened.values():
        session.close()


def test_cuda_answers_as_the_cpu_does(
    sessions: dict[str, Any], batches: list[dict[str, Any]]
) -> None:
    answers, taken = {}, {}
    for name, session in sessions.items():
        for _ in range(2):  # the first time, kernels are loaded
            start = time.perf_counter()
            found = [session.run(batch)["logits"] for batch in batches]
            taken[name] = time.perf_counter() - start
        answers[name] = np.concatenate(found)
    flips = float((answers["cuda"].argmax(axis=1) != answers["cpu"].argmax(axis=1)).mean())
    difference = float(np.abs(answers["cuda"] - answers["cpu"]).max())
    print(f"{flips:.2%} flips, outputs differ by up to {difference:.5f}, seconds: {taken}")
    assert np.isfinite(answers["cuda"]).all()
    assert flips <= MOST_FLIPS
    assert difference <= MOST_DIFFERENCE


def test_a_classifier_runs_on_cuda(sessions: dict[str, Any], bundle: Bundle) -> None:
    with (
        Classifier.load(bundle.path, device="cuda") as on_gpu,
        Classifier.load(bundle.path, device="cpu", variant="fp32") as on_cpu,
    ):
        np.testing.assert_allclose(on_gpu.scores(TEXTS), on_cpu.scores(TEXTS), atol=2e-2)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_tensorrt_that_cannot_run_here_is_refused_by_name_and_passed_over_by_auto(
    facts: DeviceFacts, gpu: GpuFacts, bundle: Bundle, flavour: Flavour
) -> None:
    reason = unusable(flavour, facts)
    if reason is None:
        pytest.skip(f"{flavour} runs here")
    with pytest.raises(DeviceError) as refused:
        Classifier.load(bundle.path, device=flavour)
    assert reason in str(refused.value)
    with Classifier.load(bundle.path) as classifier:
        assert classifier.choice.device != flavour
        assert len(classifier.predict(TEXTS)) == len(TEXTS)
