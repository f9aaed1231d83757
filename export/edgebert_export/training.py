"""What fine-tuning and distilling share: the Trainer, made reproducible and exactly resumable."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edgebert_export import processes
from edgebert_export.dataset import Example
from edgebert_export.errors import TrainingError
from edgebert_runtime.encoder import Encoded, Text, TextEncoder
from edgebert_runtime.manifest import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainerCallback

__all__ = [
    "TrainingConfig",
    "TrainingLog",
    "check_batch_size",
    "encode_all",
    "target_of",
    "train",
    "validation_score",
]

_COMPLETE = "edgebert-complete"
"""Lists the files of a Trainer checkpoint, once every one is written; others are thrown away."""

_EVAL_ROWS = 64
_CHUNK_TEXTS = 4096

_Item = TypeVar("_Item")


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every training has. The defaults follow Devlin et al. 2018, appendix A.3."""

    epochs: Annotated[
        int, Meta(ge=1, le=1000, description="Most passes over the training rows.")
    ] = 3
    learning_rate: Annotated[float, Meta(gt=0, description="Peak learning rate of AdamW.")] = 5e-5
    batch_size: Annotated[
        int,
        Meta(ge=1, le=65536, description="Rows a step, over all processes taken together."),
    ] = 32
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
        int, Meta(ge=0, le=2**32 - 1, description="Seed of new weights, the order and dropout.")
    ] = 7

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; it must be a finite number")


class TrainingLog(msgspec.Struct, frozen=True, kw_only=True):
    """How a training went.

    Attributes:
        steps: Optimiser steps taken.
        best_step: The step whose weights were kept.
        metric: What was scored on validation rows: ``accuracy`` or ``average precision``.
        validation_scores: That score after each evaluation, by step.
        processes: Processes that trained together.
    """

    steps: int
    best_step: int
    metric: str
    validation_scores: dict[int, float]
    processes: int = 1


def train(
    model: PreTrainedModel,
    train_rows: Sequence[_Item],
    validation_rows: Sequence[_Item],
    *,
    task: Task,
    config: TrainingConfig,
    collate: Callable[[list[_Item]], dict[str, torch.Tensor]],
    length: Callable[[_Item], int],
    loss: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor] | None = None,
    max_steps: int | None = None,
    work: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> TrainingLog:
    """Trains ``model`` in place and leaves it with the weights that are best on validation rows.

    Resumes from the last whole Trainer checkpoint under ``work``; an interrupted run ends with
    the same weights as one that was not. Under ``accelerate launch``, each batch is split among
    the processes, so that without dropout, which each process draws for itself, their number
    changes the result by no more than rounding.

    Args:
        model: What to train.
        train_rows: At least one.
        validation_rows: At least one; ``collate`` gives their ``labels``.
        task: How validation rows are scored.
        config: How to train.
        collate: Makes the model's inputs, and what ``loss`` needs, of some rows.
        length: Tokens of a row; rows of like length share a batch.
        loss: Of the model and a collated batch, a mean over its rows. The model's own if left
            out.
        max_steps: Ends after these steps, with a schedule of that length, and one evaluation.
        work: Where Trainer checkpoints are kept between runs.
        on_progress: Called with steps done and steps in all.

    Raises:
        TrainingError: The batch cannot be split evenly among the processes, or training diverged.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import EarlyStoppingCallback, Trainer
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_callback import PrinterCallback, TrainerState

    check_batch_size(config)
    all_rows = -(-len(train_rows) // processes.count()) * processes.count()
    batch_size = min(config.batch_size, all_rows)
    steps_per_epoch = -(-len(train_rows) // batch_size)
    # Rounded down, so that the last evaluation comes at the end of training or just before it.
    every = max_steps or max(1, steps_per_epoch // config.evaluations_per_epoch)
    own_loss = loss

    class OurTrainer(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return _grouped_by_length([*map(length, train_rows)], batch_size, config.seed)

        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            if own_loss is None or not model.training:
                return super().compute_loss(model, inputs, return_outputs)
            return own_loss(model, inputs)

    trainer = OurTrainer(
        model=model,
        args=_arguments(config, batch_size, every, max_steps, work),
        train_dataset=train_rows,
        eval_dataset=sorted(validation_rows, key=length),
        data_collator=collate,
        compute_metrics=lambda output: {
            "score": validation_score(task, output.predictions, output.label_ids)
        },
        callbacks=[
            EarlyStoppingCallback(early_stopping_patience=config.patience),
            _bookkeeping(on_progress),
        ],
    )
    if processes.count() > 1:  # the Trainer has seeded all processes alike
        torch.manual_seed(config.seed + processes.rank())
    trainer.model_accepts_loss_kwargs = False  # a batch's loss is the mean over its rows
    trainer.remove_callback(PrinterCallback)  # ours is the only progress on the terminal
    last = processes.from_leader(_last_whole_checkpoint(work) if processes.is_leader() else None)
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
    processes.wait_for_all()  # nobody reads the checkpoints any more
    return TrainingLog(
        steps=trainer.state.global_step,
        best_step=best_step,
        metric="accuracy" if task.kind == "single_label" else "average precision",
        validation_scores=scores,
        processes=processes.count(),
    )


def check_batch_size(config: TrainingConfig) -> None:
    """Raises ``TrainingError`` if a batch cannot be split evenly among the processes."""
    if config.batch_size % processes.count():
        raise TrainingError(
            f"batch_size {config.batch_size} cannot be split evenly among {processes.count()} "
            "processes; choose a multiple of their number"
        )


def _arguments(
    config: TrainingConfig, batch_size: int, every: int, max_steps: int | None, work: Path
) -> Any:
    import torch
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=config.epochs,
        max_steps=max_steps or -1,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=_EVAL_ROWS // processes.count() * processes.count(),
        accelerator_config={"split_batches": True},
        warmup_ratio=config.warmup_ratio,
        weight_decay=config.weight_decay,
        use_cpu=not cuda,
        bf16=bf16,
        fp16=cuda and not bf16,
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
    arguments._n_gpu = min(arguments.n_gpu, 1)  # many GPUs: one process each, not threads
    if not cuda:  # several processes get cpu:0, to which torch.load can restore nothing
        arguments.__dict__["_setup_devices"] = torch.device("cpu")
    return arguments


def encode_all(encoder: TextEncoder, texts: Sequence[Text]) -> list[Encoded]:
    """Tokenises any number of texts, four bytes a token instead of a list of Python's integers."""
    rows = []
    for start in range(0, len(texts), _CHUNK_TEXTS):
        for row in encoder.encode(texts[start : start + _CHUNK_TEXTS], first_index=start):
            ids, type_ids = array("i", row.ids), array("i", row.type_ids)
            rows.append(Encoded(ids, type_ids, row.truncated))
    return rows


def target_of(example: Example, task: Task) -> NDArray[Any]:
    """Returns a row's label as the model takes it: ``int64[]``, or ``float32[labels]`` of 0, 1."""
    if task.kind == "single_label":
        return np.asarray(example.labels[0], dtype=np.int64)
    target = np.zeros(len(task.labels), dtype=np.float32)
    target[list(example.labels)] = 1.0
    return target


def validation_score(task: Task, logits: NDArray[Any], targets: NDArray[Any]) -> float:
    """Accuracy, or micro-averaged average precision where several labels may apply.

    Average precision needs no threshold, so it tells progress even while every score is low.

    Args:
        task: What the columns mean.
        logits: ``float32[n, labels]``.
        targets: ``int64[n]``, or ``float32[n, labels]`` of zeros and ones.

    Raises:
        TrainingError: The outputs are not finite.
    """
    if not np.isfinite(logits).all():
        raise TrainingError("training diverged: the outputs are not finite; lower learning_rate")
    if task.kind == "single_label":
        return float((logits.argmax(axis=-1) == targets).mean())
    from sklearn.metrics import average_precision_score

    if not (targets > 0.5).any():  # undefined: nothing to find
        return 0.0
    return float(average_precision_score(targets > 0.5, logits, average="micro"))


def _bookkeeping(on_progress: Callable[[int, int], None] | None) -> TrainerCallback:
    from transformers import TrainerCallback

    class Bookkeeping(TrainerCallback):
        """Reports steps, and marks a Trainer checkpoint as whole once all of it is written."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_progress is not None:
                on_progress(state.global_step, state.max_steps)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            processes.wait_for_all()  # each writes a file of its own into it
            if processes.is_leader():
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
    Every batch is full, the last one with some rows of the epoch twice, so that each can be split
    evenly among processes.
    """
    import torch

    class GroupedByLength(torch.utils.data.Sampler[int]):
        def __init__(self) -> None:
            self._epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self._epoch = epoch

        def __len__(self) -> int:
            return -(-len(lengths) // batch_size) * batch_size

        def __iter__(self) -> Iterator[int]:
            random = np.random.default_rng((seed, self._epoch))
            order = np.resize(random.permutation(len(lengths)), len(self))
            # Sorted within stretches of 50 batches, as in transformers; then batches shuffled.
            stretch = 50 * batch_size
            batches = []
            for start in range(0, len(order), stretch):
                part = sorted(order[start : start + stretch], key=lambda row: -lengths[row])
                batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
            for index in random.permutation(len(batches)):
                yield from map(int, batches[index])

    return GroupedByLength()
