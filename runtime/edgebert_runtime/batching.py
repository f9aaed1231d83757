"""Which rows share a call of the model, and who waits for whom.

Rows of like length share a batch, so that little of it is padding; a batch holds so many tokens
that its activations stay in a processor's cache. Texts that come one by one from many threads
are gathered into batches by ``Gatherer``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from edgebert_runtime.errors import DeviceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgebert_runtime.encoder import Encoded

__all__ = ["Gatherer", "by_length"]


def by_length(rows: Sequence[Encoded], most_rows: int, most_tokens: int) -> list[list[int]]:
    """Returns indices of rows, shortest first, in batches.

    Args:
        rows: Tokenised texts.
        most_rows: Most rows of a batch.
        most_tokens: Most tokens of a batch of several rows, padding included.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index].ids)):
        batch = batches[-1] if batches else []
        room = len(rows[index].ids) * (len(batch) + 1) <= most_tokens
        if batch and room and len(batch) < most_rows:
            batch.append(index)
        else:
            batches.append([index])
    return batches


class _Waiting:
    """A row that waits for its batch."""

    __slots__ = ("answer", "row", "since")

    def __init__(self, row: Encoded) -> None:
        self.row = row
        self.since = time.monotonic()
        self.answer: Future[NDArray[np.float32]] = Future()


class Gatherer:
    """Gathers rows that threads bring one by one into batches, without losing or swapping any.

    A batch starts with the row that has waited longest; those nearest to it in length join it. It
    is run when there are as many rows as can be expected, by how many callers there are, and at
    the latest ``max_wait_ms`` after its first row came, if a worker is free. So a lone caller never
    waits for others.

    Args:
        run: Computes the raw outputs of a batch, ``float32[rows, labels]``; called by ``workers``
            threads.
        most_rows: Most rows of a batch.
        most_tokens: Most tokens of a batch of several rows, padding included.
        max_wait_ms: Longest time that a row waits for others, in milliseconds.
        workers: Batches that are computed at a time.
    """

    def __init__(
        self,
        run: Callable[[list[Encoded]], NDArray[np.float32]],
        *,
        most_rows: int,
        most_tokens: int,
        max_wait_ms: float,
        workers: int,
    ) -> None:
        self._run = run
        self._most_rows = most_rows
        self._most_tokens = most_tokens
        self._max_wait_s = max_wait_ms / 1000
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._inside = 0  # rows that wait or are being computed
        self._crowd = 0.0  # most of them lately
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"edgebert-batch-{index}", daemon=True)
            for index in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def logits(self, rows: Sequence[Encoded]) -> list[NDArray[np.float32]]:
        """Returns the raw outputs of each row, ``float32[labels]``; waits for them.

        Raises:
            DeviceError: The backend failed, or this is closed.
        """
        mine = [_Waiting(row) for row in rows]
        with self._changed:
            if self._closed:
                raise DeviceError("the classifier is closed")
            self._waiting += mine
            self._inside += len(mine)
            self._crowd = max(self._crowd, self._inside)
            self._changed.notify()
        return [waiting.answer.result() for waiting in mine]

    def _work(self) -> None:
        while True:
            with self._changed:
                batch = self._next()
            if batch is None:
                return
            try:
                found = self._run([waiting.row for waiting in batch])
            except BaseException as exc:
                for waiting in batch:
                    waiting.answer.set_exception(exc)
            else:
                for waiting, logits in zip(batch, found, strict=True):
                    waiting.answer.set_result(logits)
            with self._changed:
                self._inside -= len(batch)

    def _next(self) -> list[_Waiting] | None:
        """Waits for the next batch; ``None`` when this is closed."""
        while True:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            left = self._waiting[0].since + self._max_wait_s - time.monotonic()
            if len(self._waiting) >= self._expected() or left <= 0 or self._closed:
                break
            self._changed.wait(left)
        self._crowd = max(self._inside, 0.9 * self._crowd)
        batch = self._take()
        if self._waiting:
            self._changed.notify()  # enough for another worker, maybe
        return batch

    def _expected(self) -> float:
        """As many rows as a batch can hope for: each worker's share of the callers seen lately."""
        return min(self._most_rows, self._crowd / len(self._threads))

    def _take(self) -> list[_Waiting]:
        """Takes the row that has waited longest, and those nearest to it in length."""
        first = self._waiting[0]
        length = len(first.row.ids)
        batch, longest = [first], length
        for other in sorted(self._waiting[1:], key=lambda w: abs(len(w.row.ids) - length)):
            longest = max(longest, len(other.row.ids))
            if len(batch) == self._most_rows or longest * (len(batch) + 1) > self._most_tokens:
                break
            batch.append(other)
        taken = set(map(id, batch))
        self._waiting = [waiting for waiting in self._waiting if id(waiting) not in taken]
        return batch

    def close(self) -> None:
        """Answers what still waits, and ends the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
