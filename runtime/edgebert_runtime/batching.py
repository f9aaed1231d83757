"""Which rows share a call of the model, and who waits for whom.

Rows of like length share a batch, so that little of it is padding. A batch is small enough for its
activations to stay in a processor's cache, and large enough to be worth a call of the model. Texts
that come one by one from many threads are gathered into batches by ``Gatherer``.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgebert_runtime.errors import DeviceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgebert_runtime.encoder import Encoded, Text

__all__ = ["Gatherer", "by_length"]


def by_length(
    rows: Sequence[Encoded], most_rows: int, most_tokens: int, call_tokens: int
) -> list[list[int]]:
    """Returns indices of rows, shortest first, in the batches that take the least time together.

    A batch takes the time of its tokens, padding included, and of the call itself. Rows of one
    batch follow each other in length, so the cheapest way to cut the sorted rows is found by
    dynamic programming over where the last batch begins.

    Args:
        rows: Tokenised texts.
        most_rows: Most rows of a batch.
        most_tokens: Most tokens of a batch of several rows, padding included.
        call_tokens: What a call takes besides its tokens, as so many tokens.
    """
    if len(rows) == 1:
        return [[0]]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    cost, begins = [0], [0]  # of the first so many rows; where the last of their batches begins
    for end, index in enumerate(order, start=1):
        longest = len(rows[index].ids)
        least, begin = cost[-1] + longest, end - 1
        for first in range(end - 2, max(-1, end - most_rows - 1), -1):
            tokens = longest * (end - first)
            if tokens > most_tokens:
                break
            if cost[first] + tokens <= least:
                least, begin = cost[first] + tokens, first
        cost.append(least + call_tokens)
        begins.append(begin)
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[begins[end] : end])
        end = begins[end]
    return batches[::-1]


class _Call:
    """What a caller waits for: an answer to each of its texts."""

    __slots__ = ("answers", "done", "fault", "left")

    def __init__(self, count: int) -> None:
        self.answers: list[NDArray[np.float32] | None] = [None] * count
        self.left = count
        self.fault: BaseException | None = None
        self.done = threading.Lock()  # held until all are there: waiting costs least that way
        self.done.acquire()

    def answer(self, place: int, logits: NDArray[np.float32] | None) -> None:
        self.answers[place] = logits
        self.left -= 1
        if not self.left:
            self.done.release()


class _Waiting:
    """A text that waits for its batch.

    Attributes:
        text: The text, until a worker has tokenised it.
        call: Of whom.
        place: Of its answer, among those of the call.
        since: When it came.
        due: Whether it need not wait for others any more.
    """

    __slots__ = ("call", "due", "place", "since", "text")

    def __init__(self, text: Text | Encoded, call: _Call, place: int, since: float) -> None:
        self.text = text
        self.call = call
        self.place = place
        self.since = since
        self.due = False


class Gatherer:
    """Gathers texts that threads bring one by one into batches, without losing or swapping any.

    Those that have waited longest are cut into batches by length, and the one with the oldest is
    run. That begins when as many texts wait as can be expected, by how many callers there are, and
    about ``max_wait_ms`` after that text came, if a worker is free. So a lone caller waits for
    others once after a crowd, and else not at all.

    With more texts to choose from there would be less padding, but then one of a rare length
    would be passed over by those that came after it: the slowest answers would be later for it
    (``benchmarks/streams.py``).

    Workers tokenise what has not been, one text after the other. A tokenizer holds the
    interpreter's lock: a crowd of callers would fight for it, and for the cores with the workers.

    Args:
        encode: Tokenises a text; called by ``workers`` threads.
        run: Computes the raw outputs of a batch, ``float32[rows, labels]``; called by them, too.
        cut: Cuts rows into batches of indices; see ``by_length``.
        most_rows: Most rows of a batch.
        max_wait_ms: Longest time that a text waits for others, in milliseconds.
        workers: Batches that are computed at a time.
    """

    def __init__(
        self,
        encode: Callable[[Text], Encoded],
        run: Callable[[list[Encoded]], NDArray[np.float32]],
        cut: Callable[[Sequence[Encoded]], list[list[int]]],
        *,
        most_rows: int,
        max_wait_ms: float,
        workers: int,
    ) -> None:
        self._encode = encode
        self._run = run
        self._cut = cut
        self._most_rows = most_rows
        self._max_wait_s = max_wait_ms / 1000
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._inside = 0  # texts that wait or are being computed
        self._crowd = 0.0  # most of them lately
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"edgebert-batch-{index}", daemon=True)
            for index in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def logits(self, texts: Sequence[Text | Encoded]) -> list[NDArray[np.float32]]:
        """Returns the raw outputs of each text, ``float32[labels]``; waits for them.

        Args:
            texts: Tokenised or not.

        Raises:
            DeviceError: The backend failed, or this is closed.
        """
        if not texts:
            return []
        call = _Call(len(texts))
        with self._changed:
            if self._closed:
                raise DeviceError("the classifier is closed")
            since = time.monotonic()
            self._waiting += [
                _Waiting(text, call, place, since) for place, text in enumerate(texts)
            ]
            self._inside += len(texts)
            self._crowd = max(self._crowd, self._inside)
            self._changed.notify()
        with call.done:
            if call.fault is not None:
                raise call.fault
            return call.answers  # type: ignore[return-value]  # none is missing

    def _work(self) -> None:
        while True:
            with self._changed:
                taken = self._next()
            if taken is None:
                return
            ready = self._encoded(taken)
            batch = [waiting for waiting, _ in ready]
            fault: BaseException | None = None
            answers: list[NDArray[np.float32]] | list[None]
            try:
                batch, rows = self._best_of(ready)
                answers = list(self._run(rows)) if rows else []
                if len(answers) != len(rows):
                    raise ValueError(f"{len(rows)} rows, and {len(answers)} answers")
            except BaseException as exc:
                fault, answers = exc, [None] * len(batch)
            self._answer(batch, answers, fault)

    def _answer(
        self,
        batch: list[_Waiting],
        answers: list[NDArray[np.float32]] | list[None],
        fault: BaseException | None,
    ) -> None:
        with self._changed:
            self._inside -= len(batch)
            for waiting, logits in zip(batch, answers, strict=True):
                waiting.call.fault = waiting.call.fault or fault
                waiting.call.answer(waiting.place, logits)

    def _next(self) -> list[_Waiting] | None:
        """Waits until a batch is due, and takes what it is cut from; ``None`` when closed."""
        while True:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            first = self._waiting[0]
            if first.due or len(self._waiting) >= self._expected() or self._closed:
                break
            left = first.since + self._max_wait_s - time.monotonic()
            if left <= 0:
                self._crowd = self._inside  # who was waited for did not come: the crowd is gone
                break
            self._changed.wait(left)
        self._crowd = max(self._inside, 0.9 * self._crowd)
        oldest = math.ceil(self._expected() / 2)
        newest = self._waiting[min(oldest, len(self._waiting)) - 1].since
        most = 2 * self._most_rows
        # All of a call came at once, and are answered at once.
        taken = [waiting for waiting in self._waiting[:most] if waiting.since <= newest]
        del self._waiting[: len(taken)]
        if self._waiting:
            self._changed.notify()  # enough for another worker, maybe
        return taken

    def _encoded(self, taken: list[_Waiting]) -> list[tuple[_Waiting, Encoded]]:
        """Tokenises what has not been; one that cannot be has its fault for an answer."""
        found = []
        for waiting in taken:
            try:
                if isinstance(waiting.text, (str, tuple)):
                    waiting.text = self._encode(waiting.text)
            except BaseException as exc:
                self._answer([waiting], [None], exc)
            else:
                found.append((waiting, waiting.text))
        return found

    def _best_of(
        self, taken: list[tuple[_Waiting, Encoded]]
    ) -> tuple[list[_Waiting], list[Encoded]]:
        """Returns the text that has waited longest, and those that it is best computed with.

        The others go on waiting, for a worker alone.
        """
        if not taken:
            return [], []
        batch = next(batch for batch in self._cut([row for _, row in taken]) if 0 in batch)
        chosen = [taken[index] for index in batch]
        others = [waiting for index, (waiting, _) in enumerate(taken) if index not in batch]
        found = [waiting for waiting, _ in chosen], [row for _, row in chosen]
        if others:
            for waiting in others:
                waiting.due = True
            with self._changed:
                # The other workers' may have come before these, or after.
                self._waiting = sorted([*others, *self._waiting], key=lambda w: w.since)
                self._changed.notify()
        return found

    def _expected(self) -> float:
        """As many texts as a batch can hope for: each worker's share of the callers seen lately."""
        return min(self._most_rows, self._crowd / len(self._threads))

    def close(self) -> None:
        """Answers what still waits, and ends the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
