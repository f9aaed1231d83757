"""Training on a GPU: it learns in mixed precision, and an interruption changes nothing.

Needs the whole of edgebert, and a PyTorch that sees the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("edgebert_export", exc_type=ImportError)

from safetensors.numpy import load_file

from edgebert_export.checkpoint import Checkpoint, save_checkpoint
from edgebert_export.dataset import Dataset, Example
from edgebert_export.finetune import FinetuneConfig, finetune
from edgebert_export.training import TrainingLog
from edgebert_runtime.facts import GpuFacts
from edgebert_runtime.manifest import Task

ROOT = Path(__file__).parents[2]
TASK = Task(kind="single_label", labels=("negative", "positive"), text_pair=False)
CONFIG = FinetuneConfig(epochs=8, batch_size=8, learning_rate=1e-3, patience=99)

Run = Callable[..., tuple[Checkpoint, TrainingLog]]


class InterruptedRunError(Exception):
    """Raised out of a run, as Ctrl-C would be."""


@pytest.fixture(scope="module")
def rows() -> tuple[Example, ...]:
    lines = (ROOT / "calibration_data/sentences.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return tuple(
        Example(row["text"], (TASK.labels.index(row["sentiment"]),))
        for row in found
        if row["sentiment"] in TASK.labels
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, rows: tuple[Example, ...]) -> Checkpoint:
    """A tiny BERT with random weights."""
    from tokenizers import Tokenizer
    from tokenizers.implementations import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel

    words = sorted({word for row in rows for word in str(row.text).lower().split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer.from_str(BertWordPieceTokenizer(vocab, lowercase=True).to_str())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    return save_checkpoint(BertModel(config).eval(), tokenizer, tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def run(gpu: GpuFacts, encoder: Checkpoint, rows: tuple[Example, ...], tmp_path: Path) -> Run:
    """Fine-tunes the encoder on rows that it is scored on, too; ``name`` is the run's own."""
    if not torch.cuda.is_available():
        pytest.skip(f"PyTorch {torch.__version__} sees no GPU")
    data = Dataset(task=TASK, train=rows, validation=rows, test=(), calibration=())

    def start(
        name: str, on_progress: Callable[[int, int], None] | None = None
    ) -> tuple[Checkpoint, TrainingLog]:
        work, out = tmp_path / name / "work", tmp_path / name / "out"
        return finetune(
            encoder, data, CONFIG, max_length=32, work=work, out=out, on_progress=on_progress
        )

    return start


def weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return load_file(checkpoint.path / "model.safetensors")


def test_it_learns_on_the_gpu_and_keeps_weights_in_full_precision(run: Run) -> None:
    torch.cuda.reset_peak_memory_stats()
    checkpoint, log = run("whole")
    assert torch.cuda.max_memory_allocated() > 0
    assert max(log.validation_scores.values()) > 0.9
    for name, values in weights(checkpoint).items():
        assert values.dtype == np.float32, name
        assert np.isfinite(values).all(), name


def test_an_interrupted_run_ends_as_one_that_was_not(run: Run) -> None:
    whole, whole_log = run("whole")

    def interrupt(done: int, total: int) -> None:
        if done == total // 2 + 1:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        run("broken", interrupt)
    steps: list[int] = []
    resumed, log = run("broken", lambda done, _: steps.append(done))
    assert steps[0] > 1
    assert log.validation_scores == whole_log.validation_scores
    expected: dict[str, Any] = weights(whole)
    for name, values in weights(resumed).items():
        np.testing.assert_allclose(values, expected[name], atol=1e-6, err_msg=name)
