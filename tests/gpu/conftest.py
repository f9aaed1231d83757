"""What the tests on a GPU share: the machine's facts, a bundle, and batches for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebert_runtime.bundle import Bundle
from edgebert_runtime.facts import DeviceFacts, GpuFacts, gather_facts

BUNDLE = os.environ.get("EDGEBERT_GPU_BUNDLE", "build/movie-sentiment/bundle")
ROWS = 1000


@pytest.fixture(scope="session")
def facts() -> DeviceFacts:
    return gather_facts(look_for_gpu=True)


@pytest.fixture(scope="session")
def gpu(facts: DeviceFacts) -> GpuFacts:
    if facts.gpu is None:
        pytest.skip(str(facts.gpu_fault))
    return facts.gpu


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    if not Path(BUNDLE).exists():
        pytest.skip(f"there is no bundle at {BUNDLE}: make export, or name one with BUNDLE=…")
    return Bundle.open(BUNDLE)


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
