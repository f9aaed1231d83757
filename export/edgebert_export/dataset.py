"""Labelled texts in memory, as every stage that needs data takes them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgebert_runtime.encoder import Text
from edgebert_runtime.manifest import Task

__all__ = ["Dataset", "Example", "label_counts", "text_key"]

_SPLITS = ("train", "validation", "test", "calibration", "unlabelled")


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        text: A text, or a pair of texts.
        labels: Indices of the labels that apply: exactly one in a ``single_label`` task, any
            number in ``multi_label``. Empty for text without a label (calibration, unlabelled).
    """

    text: Text
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """The rows of a task, split. No text is in two of train, validation, test and unlabelled.

    Attributes:
        task: What is to be learnt.
        train: To fine-tune on.
        validation: To choose by (checkpoint, thresholds).
        test: To report on; nothing is ever chosen by it.
        calibration: To look at the distribution of texts; never from ``test``.
        unlabelled: Texts to distil on beside ``train``; only their teacher knows what they say.
    """

    task: Task
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    calibration: tuple[Example, ...]
    unlabelled: tuple[Example, ...] = ()

    def without_unlabelled(self) -> Dataset:
        """The same rows, but for ``unlabelled``."""
        return replace(self, unlabelled=())

    def sha256(self, *splits: str) -> str:
        """Hash of the task and of every row, in order, of ``splits`` (of all if none is named)."""
        digest = hashlib.sha256(repr((self.task.kind, self.task.labels)).encode())
        for name in splits or _SPLITS:
            digest.update(name.encode())
            for example in getattr(self, name):
                digest.update(repr((example.text, example.labels)).encode())
        return digest.hexdigest()


def text_key(text: Text) -> bytes:
    """SHA-256 of a text, or of a pair, ignoring how white space is laid out.

    Splits are made by it, so that a row never changes sides, whatever rows come or go, and so
    that copies of a text stay together.
    """
    parts = (text,) if isinstance(text, str) else text
    normal = "\x1f".join(" ".join(part.split()) for part in parts)
    return hashlib.sha256(normal.encode()).digest()


def label_counts(task: Task, examples: Sequence[Example]) -> dict[str, int]:
    """Counts how many of ``examples`` each label applies to, in the order of the labels."""
    counts = Counter(index for example in examples for index in example.labels)
    return {label: counts[index] for index, label in enumerate(task.labels)}
