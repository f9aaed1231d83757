"""What a ``config.json`` may say: the shape of a known model and its labels, and nothing else.

Only the keys below reach ``transformers``. A key that names code to run is refused by name;
every other key is left behind, so that no key of a later release can do harm.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgebert_export.errors import CheckpointError

__all__ = ["Architecture", "CheckpointConfig", "read_config"]

_ATTENTION_KERNELS = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
_SMALL_FILE_LIMIT_BYTES = 64 * 1024 * 1024

_Size = Annotated[int, Meta(ge=1, le=2**24)]
_Probability = Annotated[float, Meta(ge=0, lt=1)]
_Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh"]


class _Model(msgspec.Struct, frozen=True, kw_only=True, tag_field="model_type"):
    """What tells the architectures below apart; other keys of the file are left behind."""


class _Bert(_Model, frozen=True, kw_only=True, tag="bert"):
    """A BERT's shape, under the names and with the defaults that ``transformers`` uses."""

    vocab_size: _Size = 30522
    hidden_size: _Size = 768
    num_hidden_layers: _Size = 12
    num_attention_heads: _Size = 12
    intermediate_size: _Size = 3072
    hidden_act: _Activation = "gelu"
    hidden_dropout_prob: _Probability = 0.1
    attention_probs_dropout_prob: _Probability = 0.1
    classifier_dropout: _Probability | None = None
    max_position_embeddings: _Size = 512
    type_vocab_size: _Size = 2
    initializer_range: Annotated[float, Meta(gt=0)] = 0.02
    layer_norm_eps: Annotated[float, Meta(gt=0)] = 1e-12
    pad_token_id: Annotated[int, Meta(ge=0)] | None = 0
    position_embedding_type: Literal["absolute"] = "absolute"

    @property
    def layers(self) -> int:
        """Transformer layers."""
        return self.num_hidden_layers


class _DistilBert(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="model_type", tag="distilbert"
):
    """A DistilBERT's shape, under the names and with the defaults that ``transformers`` uses."""

    vocab_size: _Size = 30522
    dim: _Size = 768
    n_layers: _Size = 6
    n_heads: _Size = 12
    hidden_dim: _Size = 3072
    activation: _Activation = "gelu"
    dropout: _Probability = 0.1
    attention_dropout: _Probability = 0.1
    seq_classif_dropout: _Probability = 0.2
    max_position_embeddings: _Size = 512
    sinusoidal_pos_embds: bool = False
    initializer_range: Annotated[float, Meta(gt=0)] = 0.02
    pad_token_id: Annotated[int, Meta(ge=0)] | None = 0

    @property
    def layers(self) -> int:
        """Transformer layers."""
        return self.n_layers


Architecture = _Bert | _DistilBert


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """What a configuration says of the classification head."""

    id2label: dict[str, str] | None = None
    num_labels: _Size | None = None
    problem_type: str | None = None


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A checked ``config.json``.

    Attributes:
        architecture: The model's shape.
        labels: Label names in order, ``LABEL_0`` and so on where it names none.
        problem_type: What kind of task the head is for, if it says so.
    """

    architecture: Architecture
    labels: tuple[str, ...]
    problem_type: str | None


def read_config(path: Path) -> CheckpointConfig:
    """Reads a ``config.json``.

    Raises:
        CheckpointError: It cannot be read, names code to run, or describes no model that
            edgebert knows; the message names the key.
    """
    try:
        if path.stat().st_size > _SMALL_FILE_LIMIT_BYTES:
            raise CheckpointError(f"{path} is too large to be a configuration")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    _refuse_code(config, path)
    if config.get("model_type") not in ("bert", "distilbert"):
        raise CheckpointError(
            f"{path}: model_type {config.get('model_type')!r:.80} refused; edgebert knows bert and "
            "distilbert"
        )
    try:
        architecture = msgspec.convert(config, Architecture)
        head = msgspec.convert(config, _Head)
    except (msgspec.ValidationError, OverflowError) as exc:
        raise CheckpointError(f"{path}: {exc}") from exc
    return CheckpointConfig(
        architecture=architecture,
        labels=_labels(head, path),
        problem_type=head.problem_type,
    )


def _refuse_code(config: dict[str, Any], path: Path) -> None:
    for key, value in config.items():
        kernel = key.lstrip("_").startswith("attn_implementation")
        if kernel and isinstance(value, dict | list):
            raise CheckpointError(f"{path}: {key!r} refused: it must name one built-in kernel")
        if kernel and isinstance(value, str) and value not in _ATTENTION_KERNELS:
            raise CheckpointError(
                f"{path}: {key!r} refused: {value!r:.80} would load attention code from elsewhere; "
                "remove the key if you trust the rest of the checkpoint"
            )
        if key in {"auto_map", "custom_pipelines"}:
            raise CheckpointError(
                f"{path}: {key!r} refused: it names Python code to run, and edgebert runs none; "
                "remove the key if the model is a plain BERT"
            )
        if key in {"is_decoder", "add_cross_attention"} and value:
            raise CheckpointError(f"{path}: {key!r} refused: edgebert exports encoders")
        if key == "quantization_config":
            raise CheckpointError(f"{path}: {key!r} refused: give the checkpoint before quantising")


def _labels(head: _Head, path: Path) -> tuple[str, ...]:
    if head.id2label is None:
        return tuple(f"LABEL_{index}" for index in range(head.num_labels or 2))
    try:
        by_index = {int(index): name for index, name in head.id2label.items()}
        return tuple(by_index[index] for index in range(len(by_index)))
    except (ValueError, KeyError) as exc:
        raise CheckpointError(f"{path}: id2label does not number the labels from 0") from exc
