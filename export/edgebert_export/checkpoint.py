"""Loads a BERT checkpoint without running anything that it contains.

Every checkpoint comes through here. ``transformers``' own loader follows what a ``config.json``
says, which has run code from other people's repositories (CVE-2026-4372: a private
``_attn_implementation_internal`` key). So the configuration is read by ``architecture``, weights
come from safetensors alone, and both go into a model class that is chosen here. Nothing in
edgebert calls ``from_pretrained``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgebert_export.architecture import Architecture, read_config
from edgebert_export.errors import CheckpointError
from edgebert_runtime.encoder import TextEncoder
from edgebert_runtime.manifest import Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

__all__ = [
    "CHECKPOINT_FILES",
    "Checkpoint",
    "check_matches",
    "check_max_length",
    "checkpoint_encoder",
    "count_parameters",
    "load_model",
    "load_tokenizer",
    "model_inputs",
    "open_checkpoint",
    "save_checkpoint",
]

CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
"""The only files that edgebert reads from a checkpoint."""

# Heads and buffers that checkpoints carry and a classifier does not need.
_IGNORED_WEIGHTS = ("cls.", "vocab_", "bert.embeddings.position_ids", "qa_outputs.")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose configuration has been checked.

    Attributes:
        path: Its directory.
        architecture: The model's shape.
        labels: Labels of its classification head, ``None`` when it has none. ``LABEL_0`` and
            so on when the checkpoint does not name them.
        problem_type: What kind of task the head is for, if the checkpoint says so.
        sha256: Over the files that edgebert reads.
    """

    path: Path
    architecture: Architecture
    labels: tuple[str, ...] | None
    problem_type: str | None
    sha256: str

    @property
    def model_type(self) -> str:
        """``bert`` or ``distilbert``."""
        return str(type(self.architecture).__struct_config__.tag)

    @property
    def pad_token_id(self) -> int:
        """Token id that fills short rows."""
        return self.architecture.pad_token_id or 0

    def matches(self, task: Task) -> bool:
        """Whether the head answers ``task``: its kind, and the same labels in the same order.

        A head with generic names (``LABEL_0``, ...) matches by their number.
        """
        if self.labels is None or len(self.labels) != len(task.labels):
            return False
        if self.problem_type not in (None, _problem_type(task)):
            return False
        generic = tuple(f"LABEL_{index}" for index in range(len(self.labels)))
        return self.labels in (task.labels, generic)


def open_checkpoint(path: Path) -> Checkpoint:
    """Checks a checkpoint's files and configuration, and loads no weights.

    Raises:
        CheckpointError: Something is missing, unsafe or not supported; the message names it.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such directory")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the directory that holds the checkpoint")
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(_why_no_weights(path))
    config = read_config(path / "config.json")
    if not (path / "tokenizer.json").is_file() and not (path / "vocab.txt").is_file():
        raise CheckpointError(f"{path} has neither tokenizer.json nor vocab.txt")
    names = _weight_names(weights)
    _check_layers(path, config.architecture, names)
    has_head = any(name.startswith("classifier.") for name in names)
    return Checkpoint(
        path=path,
        architecture=config.architecture,
        labels=config.labels if has_head else None,
        problem_type=config.problem_type,
        sha256=_hash_files(path),
    )


def _why_no_weights(path: Path) -> str:
    if (path / ".stages").is_dir():
        return (
            f"{path} is a build of edgebert; its fine-tuned checkpoint is in "
            ".stages/finetune-*/checkpoint"
        )
    pickles = sorted(f.name for f in path.iterdir() if f.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        return (
            f"{path}: {pickles[0]} refused: it is a pickle, which can run code when loaded. "
            "Save the checkpoint as model.safetensors (save_pretrained does)"
        )
    if (path / "model.safetensors.index.json").is_file():
        return f"{path}: the weights are in shards; save them as one model.safetensors"
    return f"{path} has no model.safetensors"


def _weight_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as weights:
            return list(weights.keys())
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"{path} is not a whole safetensors file: {exc}") from exc


def count_parameters(checkpoint: Checkpoint) -> int:
    """Counts the numbers in a checkpoint's weights that its classifier uses."""
    from safetensors import safe_open

    with safe_open(checkpoint.path / "model.safetensors", framework="np") as weights:
        return sum(
            math.prod(weights.get_slice(name).get_shape())
            for name in weights.keys()  # noqa: SIM118 - it is no dict
            if not name.startswith(_IGNORED_WEIGHTS)
        )


def _check_layers(path: Path, architecture: Architecture, weights: Iterable[str]) -> None:
    """Refuses a configuration with other layers than the file, or that contradicts itself.

    Sizes are compared by ``load_model``, on a model that takes no memory; but the number of
    layers costs time even there.
    """
    layers = {int(found[1]) for name in weights if (found := re.search(r"\blayer\.(\d+)\.", name))}
    if len(layers) != architecture.layers:
        raise CheckpointError(
            f"{path}: config.json says {architecture.layers} layers, model.safetensors has "
            f"{len(layers)}"
        )
    if (architecture.pad_token_id or 0) >= architecture.vocab_size:
        raise CheckpointError(
            f"{path}: config.json says pad_token_id {architecture.pad_token_id} and "
            f"{architecture.vocab_size} tokens"
        )


def _hash_files(path: Path) -> str:
    digest = hashlib.sha256()
    for name in CHECKPOINT_FILES:
        file = path / name
        if file.is_file():
            with file.open("rb") as stream:
                content = hashlib.sha256()
                while chunk := stream.read(1024 * 1024):
                    content.update(chunk)
            digest.update(f"{name} {content.hexdigest()}\n".encode())
    return digest.hexdigest()


def _problem_type(task: Task) -> str:
    return f"{task.kind}_classification"


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Loads the tokenizer, from ``tokenizer.json`` or else from ``vocab.txt``.

    Raises:
        CheckpointError: It cannot be read, or has more tokens than the model's embeddings.
    """
    from tokenizers import Tokenizer
    from tokenizers.implementations import BertWordPieceTokenizer
    from tokenizers.models import WordPiece

    path = checkpoint.path / "tokenizer.json"
    try:
        if path.is_file():
            tokenizer = Tokenizer.from_file(str(path))
        else:
            options = _wordpiece_options(checkpoint.path / "tokenizer_config.json")
            vocab = WordPiece.read_file(str(checkpoint.path / "vocab.txt"))
            built = BertWordPieceTokenizer(vocab, **options)
            tokenizer = Tokenizer.from_str(built.to_str())
    except Exception as exc:  # tokenizers raises bare Exception
        raise CheckpointError(f"{checkpoint.path}: the tokenizer cannot be read: {exc}") from exc
    tokenizer.no_padding()
    tokenizer.no_truncation()
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    rows = checkpoint.architecture.vocab_size
    if max(highest, checkpoint.pad_token_id) >= rows:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has token ids up to "
            f"{max(highest, checkpoint.pad_token_id)} and the model embeds {rows} tokens; they do "
            "not belong together"
        )
    return tokenizer


def _wordpiece_options(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    return {
        "lowercase": bool(config.get("do_lower_case", True)),
        "strip_accents": config.get("strip_accents"),
        "handle_chinese_chars": bool(config.get("tokenize_chinese_chars", True)),
    }


def model_inputs(model_type: str) -> tuple[str, ...]:
    """Names of the inputs, in the order of the exported graph."""
    if model_type == "distilbert":
        return ("input_ids", "attention_mask")
    return ("input_ids", "attention_mask", "token_type_ids")


def checkpoint_encoder(
    checkpoint: Checkpoint,
    *,
    max_length: int,
    text_pair: bool,
    input_names: Sequence[str] | None = None,
) -> TextEncoder:
    """Builds the encoder that training, parity and the device all use.

    Args:
        checkpoint: Whose tokenizer it takes.
        max_length: Longest row in tokens.
        text_pair: Whether each input is a pair.
        input_names: The inputs that it makes; those of the checkpoint's model if left out.

    Raises:
        CheckpointError: The tokenizer cannot be read, or ``max_length`` exceeds what the
            position embeddings allow.
    """
    check_max_length(checkpoint, max_length)
    return TextEncoder(
        load_tokenizer(checkpoint).to_str().encode(),
        input_names=input_names or model_inputs(checkpoint.model_type),
        max_length=max_length,
        pad_token_id=checkpoint.pad_token_id,
        text_pair=text_pair,
    )


def check_max_length(checkpoint: Checkpoint, max_length: int) -> None:
    """Raises ``CheckpointError`` if the model has no positions for so long a row."""
    positions = checkpoint.architecture.max_position_embeddings
    if max_length > positions:
        raise CheckpointError(
            f"max_length is {max_length} and {checkpoint.path} has positions for {positions} "
            "tokens; lower max_length"
        )


def load_model(
    checkpoint: Checkpoint,
    task: Task,
    *,
    attention: str = "sdpa",
    new_head: bool = False,
) -> PreTrainedModel:
    """Builds the classifier in FP32 and fills it with the checkpoint's weights.

    Args:
        checkpoint: From ``open_checkpoint``.
        task: What the head is to answer.
        attention: ``sdpa`` to train, ``eager`` to export (its graph is plain MatMul, Softmax).
        new_head: Whether the head starts fresh (from torch's random state). Otherwise the
            checkpoint's own head is needed.

    Raises:
        CheckpointError: Weights are missing, left over, of another shape, or not finite.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DistilBertConfig,
        DistilBertForSequenceClassification,
    )

    if not new_head:
        check_matches(checkpoint, task)
    values = {
        **msgspec.to_builtins(checkpoint.architecture),
        "id2label": dict(enumerate(task.labels)),
        "label2id": {label: index for index, label in enumerate(task.labels)},
        "problem_type": _problem_type(task),
    }
    distil = values.pop("model_type") == "distilbert"
    config_class = DistilBertConfig if distil else BertConfig
    model_class = DistilBertForSequenceClassification if distil else BertForSequenceClassification
    try:
        config = config_class(**values)
        config._attn_implementation = attention
        with torch.device("meta"):  # shapes without memory, whatever config.json asks for
            expected = {n: w.shape for n, w in model_class(config).state_dict().items()}
        weights = load_file(checkpoint.path / "model.safetensors")
        renamed = {_modern_name(name, checkpoint.model_type): w for name, w in weights.items()}
        if new_head:  # another task's head must not leak into this one; a pooler is worth keeping
            renamed = {k: v for k, v in renamed.items() if not k.startswith("classifier.")}
        _check_weights(checkpoint.path, expected, renamed, new_head=new_head)
        model: Any = model_class(config)
    except (TypeError, ValueError, AttributeError, RuntimeError, OSError, SafetensorError) as exc:
        raise CheckpointError(f"{checkpoint.path} cannot be loaded: {exc}") from exc
    model.load_state_dict(
        {name: renamed[name].float() for name in expected.keys() & renamed.keys()}, strict=False
    )
    classifier: PreTrainedModel = model.eval()
    return classifier


def _check_weights(
    path: Path, expected: dict[str, Any], found: dict[str, Any], *, new_head: bool
) -> None:
    """Compares weights with the model that ``config.json`` describes, by name, shape and value."""
    import torch

    heads = ("classifier.", "pre_classifier.", "bert.pooler.")
    fresh = {name for name in expected if new_head and name.startswith(heads)}
    missing = sorted(expected.keys() - found.keys() - fresh)
    unknown = sorted(
        name for name in found.keys() - expected.keys() if not name.startswith(_IGNORED_WEIGHTS)
    )
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has the unknown weight {unknown[0]}"
        raise CheckpointError(f"{path}: model.safetensors {what}")
    for name in expected.keys() & found.keys():
        if found[name].shape != expected[name]:
            raise CheckpointError(
                f"{path}: {name} has shape {list(found[name].shape)}, config.json says "
                f"{list(expected[name])}"
            )
        if not bool(torch.isfinite(found[name]).all()):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity")


def check_matches(
    checkpoint: Checkpoint,
    task: Task,
    *,
    hint: str = '. To train a new head, set finetune.mode = "always"',
) -> None:
    """Raises ``CheckpointError`` if the head does not answer ``task``, saying what differs."""
    if checkpoint.matches(task):
        return
    have = "no classification head"
    if checkpoint.labels is not None:
        kind = checkpoint.problem_type or "classification"
        have = f"a {kind} head for {len(checkpoint.labels)} labels ({', '.join(checkpoint.labels)})"
    raise CheckpointError(
        f"{checkpoint.path} has {have}; the task is {task.kind} with {len(task.labels)} labels "
        f"({', '.join(task.labels)}){hint}"
    )


def _modern_name(name: str, model_type: str) -> str:
    """Adds the prefix that bare encoders lack, and renames TensorFlow's LayerNorm weights."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    name = name.replace("LayerNorm.beta", "LayerNorm.bias")
    if name.split(".")[0] in {"embeddings", "encoder", "pooler", "transformer"}:
        return f"{model_type}.{name}"
    return name


def save_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, path: Path) -> Checkpoint:
    """Writes a checkpoint that edgebert and ``transformers`` both load, and opens it.

    Args:
        model: The classifier.
        tokenizer: Its tokenizer.
        path: A directory; created if it is not there.
    """
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(path, safe_serialization=True)
    special = {
        f"{name}_token": f"[{name.upper()}]"
        for name in ("pad", "unk", "cls", "sep", "mask")
        if tokenizer.token_to_id(f"[{name.upper()}]") is not None
    }
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(
        tokenizer_object=tokenizer,
        model_input_names=list(model_inputs(model.config.model_type)),
        model_max_length=model.config.max_position_embeddings,
        **special,
    ).save_pretrained(path)
    return open_checkpoint(path)
