"""Fine-tunes a checkpoint into a classifier: Checkpoint and Dataset in, Checkpoint out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edgebert_export import processes
from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_model,
    load_tokenizer,
    open_checkpoint,
    save_checkpoint,
)
from edgebert_export.dataset import Dataset, Example
from edgebert_export.training import TrainingConfig, TrainingLog, encode_all, target_of, train
from edgebert_runtime.encoder import Encoded
from edgebert_runtime.manifest import Task

if TYPE_CHECKING:
    import torch

__all__ = ["FinetuneConfig", "finetune", "is_needed"]


class FinetuneConfig(TrainingConfig, frozen=True, kw_only=True):
    """How to fine-tune."""

    mode: Annotated[
        Literal["auto", "always", "never"],
        Meta(
            description="`auto` fine-tunes unless the checkpoint already is a classifier with the "
            "recipe's labels; `always` trains on (with a new head if the labels differ); `never` "
            "takes the checkpoint as it is."
        ),
    ] = "auto"


@dataclass(frozen=True)
class _Row:
    encoded: Encoded
    target: NDArray[Any]


def is_needed(checkpoint: Checkpoint, task: Task, config: FinetuneConfig) -> bool:
    """Whether ``config`` asks for fine-tuning this checkpoint.

    With ``auto``, a checkpoint that has a head for *other* labels is not silently retrained:
    loading it then says what differs.
    """
    if config.mode == "auto":
        return checkpoint.labels is None
    return config.mode == "always"


def finetune(
    checkpoint: Checkpoint,
    data: Dataset,
    config: FinetuneConfig,
    *,
    max_length: int,
    work: Path,
    out: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Checkpoint, TrainingLog]:
    """Fine-tunes on ``data.train`` and keeps the weights that are best on ``data.validation``.

    Args:
        checkpoint: An encoder, or a classifier.
        data: Training rows, and validation rows.
        config: How.
        max_length: Longest row in tokens.
        work: What an interrupted run leaves for the next; see ``training.train``.
        out: Where the result is written.
        on_progress: Called with steps done and steps in all.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        TrainingError: The batch cannot be split evenly among the processes.
    """
    from transformers import set_seed

    set_seed(config.seed)
    new_head = not checkpoint.matches(data.task)
    model = load_model(checkpoint, data.task, new_head=new_head)
    encoder = checkpoint_encoder(checkpoint, max_length=max_length, text_pair=data.task.text_pair)

    def rows(examples: Sequence[Example]) -> list[_Row]:
        encoded = encode_all(encoder, [example.text for example in examples])
        targets = [target_of(example, data.task) for example in examples]
        return [_Row(*row) for row in zip(encoded, targets, strict=True)]

    def collate(batch: list[_Row]) -> dict[str, torch.Tensor]:
        import torch

        inputs = encoder.collate([row.encoded for row in batch])
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        tensors["labels"] = torch.from_numpy(np.stack([row.target for row in batch]))
        return tensors

    log = train(
        model,
        rows(data.train),
        rows(data.validation),
        task=data.task,
        config=config,
        collate=collate,
        length=lambda row: len(row.encoded.ids),
        work=work,
        on_progress=on_progress,
    )
    if processes.is_leader():
        save_checkpoint(model.cpu(), load_tokenizer(checkpoint), out)
    processes.wait_for_all()
    return open_checkpoint(out), log
