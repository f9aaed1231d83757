"""Makes a DistilBERT student out of a teacher's own layers, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from edgebert_export.checkpoint import Checkpoint
from edgebert_export.errors import TrainingError
from edgebert_runtime.manifest import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["check_layer_map", "layer_maps", "make_student"]

_Weights = dict[str, Any]

# BERT's names for the parts of a layer, and DistilBERT's.
_LAYER_PARTS = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}

_RIDGE = 1e-3
"""Weight of the penalty, for each text, that holds the fitted head to the one it starts from."""


def layer_maps(teacher_layers: int, student_layers: int) -> dict[str, tuple[int, ...]]:
    """Returns the sensible choices of teacher layers (from 0), by name; equal ones once.

    Taking the lowest layers alone is not among them (docs/decisions/0010).
    """
    n, k = teacher_layers, student_layers
    maps = {
        "last of each block": tuple((i + 1) * n // k - 1 for i in range(k)),
        "first to last": tuple(i * (n - 1) // (k - 1) for i in range(k)) if k > 1 else (n - 1,),
        "first of each block": tuple(i * n // k for i in range(k)),
    }
    names: dict[tuple[int, ...], str] = {}
    for name, map_ in maps.items():
        names.setdefault(map_, name)
    return {name: map_ for map_, name in names.items()}


def check_layer_map(teacher: Checkpoint, layers: int, layer_map: Sequence[int] | None) -> None:
    """Checks how many layers are wanted, and which.

    Raises:
        TrainingError: There are not that many, or not those.
    """
    there = teacher.architecture.layers
    if layers > there:
        raise TrainingError(
            f"a student of {layers} layers cannot be made of a teacher of {there} "
            f"({teacher.path}); ask for {there} or fewer"
        )
    if layer_map is None:
        return
    if len(layer_map) != layers:
        raise TrainingError(
            f"layer_map names {len(layer_map)} layers and the student has {layers}; "
            "give one teacher layer for each"
        )
    if list(layer_map) != sorted(set(layer_map)):
        raise TrainingError(
            f"layer_map names layers {', '.join(map(str, layer_map))}; name each once, from the "
            "lowest to the highest"
        )
    for layer in layer_map:
        if not 0 <= layer < there:
            raise TrainingError(
                f"layer_map names layer {layer}; the teacher ({teacher.path}) has layers 0 to "
                f"{there - 1}"
            )


def make_student(
    teacher: Checkpoint,
    model: PreTrainedModel,
    task: Task,
    layer_map: Sequence[int],
    *,
    dropout: float,
    first_tokens: torch.Tensor,
    logits: torch.Tensor,
) -> PreTrainedModel:
    """Builds a ``DistilBertForSequenceClassification`` from some of the teacher's layers.

    Embeddings and layers are copied; token type 0, which every token of a single text has, is
    added to the position embeddings. DistilBERT's head has a ReLU where BERT's pooler has a tanh;
    how it is carried over is in docs/decisions/0010.

    Args:
        teacher: Where the weights come from; a BERT or a DistilBERT.
        model: The same, loaded.
        task: What the head answers.
        layer_map: Which of the teacher's layers to take, from 0.
        dropout: Of the student, everywhere.
        first_tokens: The teacher's last hidden state of the first token, ``float32[n, dim]``;
            not looked at for a DistilBERT, whose head is copied.
        logits: The teacher's raw outputs for the same texts, ``float32[n, labels]``.
    """
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    values: dict[str, Any] = {
        **_shape_of_student(teacher),
        "n_layers": len(layer_map),
        "dropout": dropout,
        "attention_dropout": dropout,
        "seq_classif_dropout": dropout,
        "id2label": dict(enumerate(task.labels)),
        "label2id": {label: index for index, label in enumerate(task.labels)},
        "problem_type": model.config.problem_type,
    }
    make_config: Any = DistilBertConfig  # it has no types
    config = make_config(**values)
    config._attn_implementation = "sdpa"
    weights = dict(model.state_dict())
    if teacher.model_type == "distilbert":
        taken = _take_distilbert(weights, layer_map)
    else:
        taken = _take_bert(weights, layer_map) | _fit_head(weights, first_tokens, logits)
    student: PreTrainedModel = DistilBertForSequenceClassification(config)
    student.load_state_dict(taken)
    return student


def _shape_of_student(teacher: Checkpoint) -> _Weights:
    shape: _Weights = msgspec.to_builtins(teacher.architecture)
    del shape["model_type"]
    if teacher.model_type == "distilbert":
        return shape
    return {
        "vocab_size": shape["vocab_size"],
        "dim": shape["hidden_size"],
        "n_heads": shape["num_attention_heads"],
        "hidden_dim": shape["intermediate_size"],
        "activation": shape["hidden_act"],
        "max_position_embeddings": shape["max_position_embeddings"],
        "initializer_range": shape["initializer_range"],
        "pad_token_id": shape["pad_token_id"],
    }


def _take_distilbert(weights: _Weights, layer_map: Sequence[int]) -> _Weights:
    taken = {k: w for k, w in weights.items() if not k.startswith("distilbert.transformer.layer.")}
    for to, layer in enumerate(layer_map):
        old, new = (f"distilbert.transformer.layer.{i}." for i in (layer, to))
        taken |= {new + k[len(old) :]: w for k, w in weights.items() if k.startswith(old)}
    return taken


def _take_bert(weights: _Weights, layer_map: Sequence[int]) -> _Weights:
    old, new = "bert.embeddings.", "distilbert.embeddings."
    taken = {
        f"{new}word_embeddings.weight": weights[f"{old}word_embeddings.weight"],
        f"{new}position_embeddings.weight": weights[f"{old}position_embeddings.weight"]
        + weights[f"{old}token_type_embeddings.weight"][0],
    }
    for kind in ("weight", "bias"):
        taken[f"{new}LayerNorm.{kind}"] = weights[f"{old}LayerNorm.{kind}"]
        for to, layer in enumerate(layer_map):
            for bert, distilbert in _LAYER_PARTS.items():
                taken[f"distilbert.transformer.layer.{to}.{distilbert}.{kind}"] = weights[
                    f"bert.encoder.layer.{layer}.{bert}.{kind}"
                ]
    return taken


def _fit_head(weights: _Weights, first_tokens: torch.Tensor, logits: torch.Tensor) -> _Weights:
    """Carries BERT's head over: dense, tanh, dense becomes dense, ReLU, dense.

    A unit of the pooler works mostly on one side of zero. On that side, ``tanh(x)`` is taken for
    ``min(x, 1)`` (mirrored for the negative side), which is ``1 - relu(1 - x)``: exact where tanh
    is linear and where it is saturated. The last layer is then fitted to the teacher's raw
    outputs by ridge regression around that start, so that an exact start stays as it is.
    """
    import torch

    dense, bias = (weights[f"bert.pooler.dense.{kind}"].double() for kind in ("weight", "bias"))
    last, last_bias = (weights[f"classifier.{kind}"].double() for kind in ("weight", "bias"))
    before_tanh = first_tokens.double() @ dense.T + bias
    side = torch.where(before_tanh.mean(dim=0) < 0, -1.0, 1.0).double()
    units = torch.relu(1 - side * before_tanh)
    start, start_bias = -last * side, last_bias + (last * side).sum(dim=1)
    residual = logits.double() - units @ start.T - start_bias
    known = torch.cat([units, torch.ones(len(units), 1, dtype=torch.double)], dim=1)
    penalty = _RIDGE * len(known) * torch.eye(known.shape[1], dtype=torch.double)
    change = torch.linalg.solve(known.T @ known + penalty, known.T @ residual)
    return {
        "pre_classifier.weight": (-side[:, None] * dense).float(),
        "pre_classifier.bias": (1 - side * bias).float(),
        "classifier.weight": (start + change[:-1].T).float(),
        "classifier.bias": (start_bias + change[-1]).float(),
    }
