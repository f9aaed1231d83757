"""Fine-tunes a checkpoint into a classifier: Checkpoint and Dataset in, Checkpoint out."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_model,
    load_tokenizer,
    save_checkpoint,
)
from edgebert_export.dataset import Dataset, Example
from edgebert_runtime.manifest import Task

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["FinetuneConfig", "TrainingLog", "finetune", "is_needed"]

_COMPLETE = "edgebert-complete"
"""Lists the files of a Trainer checkpoint, once every one is written; others are thrown away."""


class FinetuneConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to fine-tune. The defaults follow Devlin et al. 2018, appendix A.3."""

    mode: Annotated[
        Literal["auto", "always", "never"],
        Meta(
            description="`auto` fine-tunes unless the checkpoint already is a classifier with the "
            "recipe's labels; `always` trains on (with a new head if the labels differ); `never` "
            "takes the checkpoint as it is."
        ),
    ] = "auto"
    epochs: Annotated[
        int, Meta(ge=1, le=1000, description="Most passes over the training rows.")
    ] = 3
    learning_rate: Annotated[float, Meta(gt=0, description="Peak learning rate of AdamW.")] = 5e-5
    batch_size: Annotated[int, Meta(ge=1, le=65536, description="Rows a step.")] = 32
    warmup_ratio: Annotated[
        float, Meta(ge=0, lt=1, description="Share of all steps in which the rate rises.")
    ] = 0.1
    weight_decay: Annotated[float, Meta(ge=0, description="AdamW's weight decay.")] = 0.01
    evaluations_per_epoch: Annotated[
        int,
        Meta(ge=1, description="How often an epoch is scored on validation rows and saved."),
    ] = 2
    patience: Annotated[
        int,
        Meta(ge=1, description="Stop after this many evaluations in a row that are no better."),
    ] = 4
    seed: Annotated[
        int, Meta(ge=0, le=2**32 - 1, description="Seed of the new head, the order and dropout.")
    ] = 7


class TrainingLog(msgspec.Struct, frozen=True, kw_only=True):
    """How fine-tuning went.

    Attributes:
        steps: Optimiser steps taken.
        best_step: The step whose weights were kept.
        metric: What was scored on validation rows: ``accuracy`` or ``micro-F1``.
        validation_scores: That score after each evaluation, by step.
    """

    steps: int
    best_step: int
    metric: str
    validation_scores: dict[int, float]


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
    """Fine-tunes on ``data.train`` and keeps the checkpoint that is best on ``data.validation``.

    Resumes from the last whole Trainer checkpoint under ``work``; an interrupted run ends with
    the same weights as one that was not.

    Args:
        checkpoint: An encoder, or a classifier.
        data: At least one batch of training rows, and validation rows.
        config: How.
        max_length: Longest row in tokens.
        work: Where Trainer checkpoints are kept between runs.
        out: Where the result is written.
        on_progress: Called with steps done and steps in all.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
    """
    from safetensors.torch import load_file
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_callback import PrinterCallback, TrainerState

    set_seed(config.seed)
    new_head = not checkpoint.matches(data.task)
    model = load_model(checkpoint, data.task, new_head=new_head)
    encoder = checkpoint_encoder(checkpoint, max_length=max_length, text_pair=data.task.text_pair)

    def rows(examples: Sequence[Example]) -> list[dict[str, Any]]:
        encoded = encoder.encode([example.text for example in examples])
        return [
            {"input_ids": row.ids, "row": row, "labels": _target(example, data.task)}
            for row, example in zip(encoded, examples, strict=True)
        ]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        inputs = encoder.collate([item["row"] for item in batch])
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        tensors["labels"] = torch.tensor(np.stack([item["labels"] for item in batch]))
        return tensors

    steps_per_epoch = -(-len(data.train) // config.batch_size)
    # Rounded down, so that the last evaluation comes at the end of training or just before it.
    every = max(1, steps_per_epoch // config.evaluations_per_epoch)
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=64,
        warmup_ratio=config.warmup_ratio,
        weight_decay=config.weight_decay,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        seed=config.seed,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the sampler and the step count are for one
    train_rows = rows(data.train)

    class LengthGroupedTrainer(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            lengths = [len(row["input_ids"]) for row in train_rows]
            return _grouped_by_length(lengths, config.batch_size, config.seed)

    trainer = LengthGroupedTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=rows(data.validation),
        data_collator=collate,
        compute_metrics=lambda output: {
            "score": validation_score(data.task, output.predictions, output.label_ids)
        },
        callbacks=[
            EarlyStoppingCallback(early_stopping_patience=config.patience),
            _bookkeeping(on_progress),
        ],
    )
    trainer.remove_callback(PrinterCallback)  # ours is the only progress on the terminal
    last = _last_whole_checkpoint(work)
    if last is not None and _stopped_early(last, config.patience):
        trainer.state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
    else:
        with warnings.catch_warnings():
            # It warns that checkpoints of the same second are ordered by number, as they should.
            warnings.filterwarnings("ignore", message="mtime may not be reliable")
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    scores = {
        int(entry["step"]): float(entry["eval_score"])
        for entry in trainer.state.log_history
        if "eval_score" in entry
    }
    best_step = max(scores, key=lambda step: (scores[step], -step))
    model.load_state_dict(load_file(work / f"checkpoint-{best_step}" / "model.safetensors"))
    log = TrainingLog(
        steps=trainer.state.global_step,
        best_step=best_step,
        metric="accuracy" if data.task.kind == "single_label" else "micro-F1",
        validation_scores=scores,
    )
    return save_checkpoint(model.cpu(), load_tokenizer(checkpoint), out), log


def _target(example: Example, task: Task) -> NDArray[Any]:
    if task.kind == "single_label":
        return np.asarray(example.labels[0], dtype=np.int64)
    target = np.zeros(len(task.labels), dtype=np.float32)
    target[list(example.labels)] = 1.0
    return target


def validation_score(task: Task, logits: NDArray[Any], targets: NDArray[Any]) -> float:
    """Accuracy, or micro-averaged F1 at a threshold of 0.5 where several labels may apply.

    Args:
        task: What the columns mean.
        logits: ``float32[n, labels]``.
        targets: ``int64[n]``, or ``float32[n, labels]`` of zeros and ones.
    """
    if task.kind == "single_label":
        return float((logits.argmax(axis=-1) == targets).mean())
    from sklearn.metrics import f1_score

    return float(f1_score(targets > 0.5, logits > 0, average="micro", zero_division=0))


def _bookkeeping(on_progress: Callable[[int, int], None] | None) -> TrainerCallback:
    from transformers import TrainerCallback

    class Bookkeeping(TrainerCallback):
        """Reports steps, and marks a Trainer checkpoint as whole once all of it is written."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_progress is not None:
                on_progress(state.global_step, state.max_steps)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (checkpoint / _COMPLETE).write_text(json.dumps(_sizes(checkpoint)))

    return Bookkeeping()


def _sizes(checkpoint: Path) -> dict[str, int]:
    return {f.name: f.stat().st_size for f in checkpoint.iterdir() if f.name != _COMPLETE}


def _last_whole_checkpoint(work: Path) -> Path | None:
    """Returns the newest whole Trainer checkpoint, and removes what a killed run left of others."""
    whole = []
    for path in work.glob("checkpoint-*"):
        try:
            is_whole = json.loads((path / _COMPLETE).read_text()) == _sizes(path)
        except (OSError, ValueError):
            is_whole = False
        if is_whole:
            whole.append(path)
        else:
            shutil.rmtree(path)
    if not whole:
        return None
    last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
    # The state names the best checkpoint by an absolute path; the build may have been moved.
    file = last / "trainer_state.json"
    state = json.loads(file.read_text())
    if state["best_model_checkpoint"] is not None:
        best = work / Path(state["best_model_checkpoint"]).name
        state["best_model_checkpoint"] = str(best)
        file.write_text(json.dumps(state))
        (last / _COMPLETE).write_text(json.dumps(_sizes(last)))
    return last


def _stopped_early(checkpoint: Path, patience: int) -> bool:
    """Whether training had ended by patience when ``checkpoint`` was saved."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    stopper = state["stateful_callbacks"]["EarlyStoppingCallback"]
    return int(stopper["attributes"]["early_stopping_patience_counter"]) >= patience


def _grouped_by_length(lengths: Sequence[int], batch_size: int, seed: int) -> Any:
    """Returns a sampler that puts rows of like length into one batch, in a random order.

    The order is a function of seed and epoch alone; that of ``transformers``'
    ``LengthGroupedSampler`` depends on all random numbers drawn before, so a resumed run differs.
    """
    import torch

    class GroupedByLength(torch.utils.data.Sampler[int]):
        def __init__(self) -> None:
            self._epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self._epoch = epoch

        def __len__(self) -> int:
            return len(lengths)

        def __iter__(self) -> Iterator[int]:
            random = np.random.default_rng((seed, self._epoch))
            order = random.permutation(len(lengths))
            # Sorted within stretches of 50 batches, as in transformers; then batches shuffled.
            stretch = 50 * batch_size
            batches = []
            for start in range(0, len(order), stretch):
                part = sorted(order[start : start + stretch], key=lambda row: -lengths[row])
                batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
            # A short batch stays last: the loader cuts batches by counting rows.
            full = [batch for batch in batches if len(batch) == batch_size]
            rest = [row for batch in batches if len(batch) < batch_size for row in batch]
            for index in random.permutation(len(full)):
                yield from map(int, full[index])
            yield from map(int, rest)

    return GroupedByLength()
