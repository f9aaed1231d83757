"""Several training processes at once: who leads, and where they wait for each other.

``accelerate launch`` starts the same command once for each GPU (or machine) and tells each its
number in the environment. Started without it there is one process, which leads and never waits.
All of them see the same build directory; only the leader writes to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from edgebert_runtime.errors import EdgebertError

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = [
    "count",
    "from_leader",
    "is_leader",
    "one_on_each_machine_first",
    "part",
    "rank",
    "wait_for_all",
]

_PATIENCE = timedelta(hours=24)
"""Others wait this long for the leader; the launcher ends them at once if the leader dies."""

_T = TypeVar("_T")
_parted = False


def count() -> int:
    """How many processes there are, or 1 once they have parted."""
    return 1 if _parted else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_leader() -> bool:
    """Whether this process is the one that writes and reports."""
    return rank() == 0


def wait_for_all() -> None:
    """Waits until every process is here."""
    if count() > 1:
        with _others_there():
            _state().wait_for_everyone()


def part() -> None:
    """Ends working together: from here on nobody waits for anybody."""
    global _parted
    if count() > 1:
        _state().destroy_process_group()
        _parted = True


def from_leader(value: _T) -> _T:
    """Returns what the leader passed, on every process."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    shared = [value]
    with _others_there():
        _state()
        broadcast_object_list(shared, from_process=0)
    return shared[0]


@contextmanager
def one_on_each_machine_first() -> Iterator[None]:
    """Lets one process of each machine through, then the others: they find its files cached."""
    if count() == 1:
        yield
        return
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not first:
        wait_for_all()
    yield
    if first:
        wait_for_all()


@contextmanager
def _others_there() -> Iterator[None]:
    """Says in one line that another process has ended, which said itself why."""
    try:
        yield
    except RuntimeError as exc:
        raise EdgebertError("another process of this run has ended; see its message") from exc


def _state() -> PartialState:
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
