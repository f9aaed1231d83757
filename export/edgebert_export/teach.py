"""Asks the teacher once for each text, and keeps on disk what distilling needs of its answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder, load_model
from edgebert_export.dataset import Dataset
from edgebert_export.training import encode_all
from edgebert_runtime.encoder import Encoded, TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TeacherOutputs", "answers", "open_outputs", "teach"]

_BATCH_ROWS = 64
_FITTED_TEXTS = 8192
_LARGEST = 60000.0
"""Of the numbers that half precision can hold, rounded down."""


@dataclass(frozen=True)
class TeacherOutputs:
    """What a teacher says of texts: of train, unlabelled, validation, in this order.

    The arrays are files, mapped into memory.

    Attributes:
        logits: Raw outputs, ``float32[texts, labels]``.
        first_tokens: Last hidden state of the first token of as many texts (the first) as a
            student's head is fitted to, ``float32[fitted, dim]``; none of a DistilBERT teacher.
        hidden: Last hidden states of every token, one text after the other,
            ``float16[tokens, dim]``, of as many of train and unlabelled (the first) as fit.
        starts: Where each of those texts begins in ``hidden``, and the end,
            ``int64[texts with hidden states + 1]``.
    """

    logits: NDArray[np.float32]
    first_tokens: NDArray[np.float32]
    hidden: NDArray[np.float16]
    starts: NDArray[np.int64]

    def hidden_of(self, text: int) -> NDArray[np.float16] | None:
        """Returns ``float16[seq, dim]`` for a text, ``None`` past the limit."""
        if text + 1 >= len(self.starts):
            return None
        return self.hidden[self.starts[text] : self.starts[text + 1]]


def teach(
    teacher: Checkpoint,
    data: Dataset,
    *,
    max_length: int,
    hidden_limit_mb: int,
    out: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> TeacherOutputs:
    """Runs the teacher on every text once, and writes what it says into the directory ``out``.

    Args:
        teacher: A classifier for the task of ``data``.
        data: The texts to ask about.
        max_length: Longest text in tokens.
        hidden_limit_mb: Most megabytes (10^6 bytes) of hidden states to keep; 0 keeps none.
        out: Created if it is not there.
        on_progress: Called with texts done and texts in all.

    Raises:
        CheckpointError: The teacher is not a classifier for the task, or cannot be loaded.
    """
    task = data.task
    model = load_model(teacher, task)
    encoder = checkpoint_encoder(teacher, max_length=max_length, text_pair=task.text_pair)
    to_learn = [example.text for example in (*data.train, *data.unlabelled)]
    rows = encode_all(encoder, to_learn + [example.text for example in data.validation])
    fitted = min(len(to_learn), _FITTED_TEXTS) if teacher.model_type == "bert" else 0
    dim = int(model.config.hidden_size)
    ends = np.cumsum([len(row.ids) for row in rows[: len(to_learn)]], dtype=np.int64)
    kept = int(np.searchsorted(ends * dim * 2, hidden_limit_mb * 10**6, side="right"))
    starts = np.concatenate([[0], ends[:kept]])
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "starts.npy", starts)

    def create(name: str, dtype: type, shape: tuple[int, int]) -> NDArray[Any]:
        file = out / f"{name}.npy"
        if 0 in shape:  # nothing cannot be mapped
            np.save(file, np.empty(shape, dtype))
            return np.empty(shape, dtype)
        mapped = np.lib.format.open_memmap(file, "w+", dtype, shape)
        _reserve(file)
        return mapped

    logits = create("logits", np.float32, (len(rows), len(task.labels)))
    first_tokens = create("first_tokens", np.float32, (fitted, dim))
    hidden = create("hidden", np.float16, (int(starts[-1]), dim))
    done = 0
    for indices, raw, states in answers(model, encoder, rows, hidden=True):
        logits[indices] = raw
        for index, state in zip(indices, states, strict=True):
            if index < fitted:
                first_tokens[index] = state[0]
            if index < kept:
                hidden[starts[index] : starts[index + 1]] = _halved(state[: len(rows[index].ids)])
        done += len(indices)
        if on_progress is not None:
            on_progress(done, len(rows))
    for array in (logits, first_tokens, hidden):
        if isinstance(array, np.memmap):
            array.flush()
    return open_outputs(out)


def _reserve(file: Path) -> None:
    """Takes the disk space of a sparse file now, when there being too little is an error.

    Later, while a mapped page is written, it would end the process.
    """
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


def _halved(state: NDArray[np.float32]) -> NDArray[np.float16]:
    """Returns a state in half precision; what is too large keeps its direction, all that counts."""
    largest = np.abs(state).max(axis=-1, keepdims=True)
    half: NDArray[np.float16] = (state / np.maximum(1, largest / _LARGEST)).astype(np.float16)
    return half


def open_outputs(path: Path) -> TeacherOutputs:
    """Opens what ``teach`` wrote."""

    def read(name: str) -> Any:
        file = path / f"{name}.npy"
        return np.load(file, mmap_mode="r", allow_pickle=False)

    return TeacherOutputs(read("logits"), read("first_tokens"), read("hidden"), read("starts"))


def answers(
    model: PreTrainedModel, encoder: TextEncoder, rows: Sequence[Encoded], *, hidden: bool = False
) -> Iterator[tuple[list[int], NDArray[np.float32], NDArray[np.float32]]]:
    """Runs a classifier on ``rows``, batches of like length, on a GPU if there is one.

    Yields:
        Of each batch: which rows, raw outputs ``float32[batch, labels]``, and if ``hidden``, last
        hidden states ``float32[batch, seq, dim]``, else none of them, ``float32[batch, 0, 0]``.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_device: Any = model.to(device).eval()  # type: ignore[arg-type]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    for start in range(0, len(order), _BATCH_ROWS):
        batch = order[start : start + _BATCH_ROWS]
        inputs = encoder.collate([rows[index] for index in batch])
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
            said = on_device(**tensors, output_hidden_states=hidden)
        states = said.hidden_states[-1] if hidden else torch.empty(len(batch), 0, 0)
        yield batch, said.logits.cpu().numpy(), states.cpu().numpy()
