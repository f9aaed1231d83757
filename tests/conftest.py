"""What all tests share: tiny real models made on the spot, and the project's own sentences."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from edgebert_export.checkpoint import Checkpoint, save_checkpoint
from edgebert_export.to_onnx import ExportConfig, to_onnx
from edgebert_export.write_bundle import VariantSource, write_bundle
from edgebert_runtime.manifest import Provenance, Task

# Nothing here is about how fast the machine is.
settings.register_profile("edgebert", parent=settings.default, deadline=None)
settings.load_profile("edgebert")

ROOT = Path(__file__).parent.parent
CALIBRATION = ROOT / "calibration_data"

# The tests are about what the CPU does; a GPU that happens to be there must not change them.
# (make test-gpu does without this file.)
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# One thread is fastest for models this tiny, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the tests, and the processes that they start, out of the user's cache."""
    os.environ["EDGEBERT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("user-cache"))


TASKS = {
    "single": Task(kind="single_label", labels=("negative", "positive"), text_pair=False),
    "multi": Task(
        kind="multi_label",
        labels=("food", "travel", "technology"),
        text_pair=False,
        thresholds=(0.5, 0.5, 0.5),
    ),
    "pairs": Task(
        kind="single_label", labels=("entails", "contradicts", "neutral"), text_pair=True
    ),
}


def _read(name: str) -> list[dict[str, Any]]:
    lines = (CALIBRATION / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def sentences() -> list[dict[str, Any]]:
    """Rows of ``calibration_data/sentences.jsonl``."""
    return _read("sentences.jsonl")


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, Any]]:
    """Rows of ``calibration_data/pairs.jsonl``."""
    return _read("pairs.jsonl")


@pytest.fixture(scope="session")
def texts_for(sentences: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Real texts for each of ``TASKS``, by its name."""
    single = [row["text"] for row in sentences]
    return {
        "single": single,
        "multi": single,
        "pairs": [(row["premise"], row["hypothesis"]) for row in pairs],
    }


def make_checkpoint(
    path: Path,
    texts: list[str],
    task: Task | None,
    *,
    layers: int = 2,
    hidden: int = 32,
    seed: int = 0,
) -> Checkpoint:
    """Writes a tiny BERT with random weights: an encoder, or a classifier for ``task``."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.implementations import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    # Not trained: the trainer of ``tokenizers`` gives another vocabulary each time.
    words = Counter(re.findall(r"\w+", " ".join(texts).lower()))
    frequent = sorted(words, key=lambda word: (-words[word], word))[:500]
    characters = sorted({character for text in texts for character in text.lower()} - {" "})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    tokens += [f"##{character}" for character in characters]
    tokens += [word for word in frequent if len(word) > 1]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer.from_str(BertWordPieceTokenizer(vocab, lowercase=True).to_str())
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=128,
        initializer_range=0.5,  # wide, so that different texts get clearly different outputs
    )
    if task is None:
        model = BertModel(config)
    else:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: index for index, label in enumerate(task.labels)}
        config.problem_type = f"{task.kind}_classification"
        model = BertForSequenceClassification(config)
    return save_checkpoint(model.eval(), tokenizer, path)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory, sentences: list[dict[str, Any]]) -> Path:
    """Directory of a tiny BERT without a head."""
    path = tmp_path_factory.mktemp("encoder")
    return make_checkpoint(path, [row["text"] for row in sentences], None).path


@pytest.fixture(scope="session")
def tiny_classifiers(
    tmp_path_factory: pytest.TempPathFactory, sentences: list[dict[str, Any]]
) -> dict[str, Checkpoint]:
    """A tiny classifier for each of ``TASKS``, by its name."""
    texts = [row["text"] for row in sentences]
    root = tmp_path_factory.mktemp("classifiers")
    return {name: make_checkpoint(root / name, texts, task) for name, task in TASKS.items()}


@pytest.fixture(scope="session")
def typed_models(
    tmp_path_factory: pytest.TempPathFactory, sentences: list[dict[str, Any]]
) -> dict[str, Path]:
    """Models for TensorRT, ``fp16`` and each form of INT8, with heads large enough to be fused."""
    import onnx
    from int8_forms import FORMS, quantised

    from edgebert_export.graph import open_graph, to_bytes
    from edgebert_export.precision import to_half

    root = tmp_path_factory.mktemp("typed")
    texts = [row["text"] for row in sentences]
    checkpoint = make_checkpoint(root / "checkpoint", texts, TASKS["single"], layers=3, hidden=64)
    plain = to_onnx(checkpoint, TASKS["single"], ExportConfig(max_length=64), root / "fp32.onnx")
    half = onnx.load_from_string(to_bytes(to_half(open_graph(plain.path))))
    found = {name: root / f"{name}.onnx" for name in ("fp16", *FORMS)}
    onnx.save(half, found["fp16"])
    for form in FORMS:
        onnx.save(quantised(half, form), found[form])
    return found


@pytest.fixture(scope="session")
def tiny_bundles(
    tmp_path_factory: pytest.TempPathFactory, tiny_classifiers: dict[str, Checkpoint]
) -> dict[str, Path]:
    """A bundle with an ``fp32`` variant for each of ``TASKS``; treat it as read-only."""
    root = tmp_path_factory.mktemp("bundles")
    return {
        name: _write_tiny_bundle(root / name, checkpoint, TASKS[name])
        for name, checkpoint in tiny_classifiers.items()
    }


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory, sentences: list[dict[str, Any]]) -> Path:
    """A bundle for the task ``single`` with other weights than that of ``tiny_bundles``."""
    root = tmp_path_factory.mktemp("other")
    texts = [row["text"] for row in sentences]
    checkpoint = make_checkpoint(root / "checkpoint", texts, TASKS["single"], seed=1)
    return _write_tiny_bundle(root / "single", checkpoint, TASKS["single"])


_PAIRS = [
    ("Good.", "Bad."),
    ("The train was late again.", "It came on time."),
    ("A long and winding sentence about nothing in particular, which goes on.", "Short."),
]
"""Texts of several lengths, for the known answers."""


def _write_tiny_bundle(path: Path, checkpoint: Checkpoint, task: Task) -> Path:
    provenance = Provenance(
        edgebert="0.1.0",
        recipe_sha256="0" * 64,
        model_sha256="0" * 64,
        data_sha256="0" * 64,
        seed=None,
        versions={},
    )
    config = ExportConfig(max_length=64, fold_token_types=False)  # BERT's three inputs
    model = to_onnx(checkpoint, task, config, path.with_suffix(".onnx"))
    bundle = write_bundle(
        path,
        name=f"tiny-{path.name}",
        task=task,
        checkpoint=checkpoint,
        max_length=64,
        variants={"fp32": VariantSource(model, ("cpu", "cuda"))},
        provenance=provenance,
        texts=_PAIRS if task.text_pair else [first for first, _ in _PAIRS],
    )
    return bundle.path
