"""The build directory: finished stages by key, nothing half-written, one run at a time.

::

    OUT/
      bundle/  report.json  report.md  report.html    what the user came for
      .stages/<name>-<key>/                a finished stage's output; never changed
      .stages/work-<name>-<key>/           what a stage keeps between interrupted runs
      .stages/tmp-*                        of a run that is going on, or was killed
      .stages/aside-<name>                 OUT/<name> while it is being replaced
      .lock  .lock.json                    held by a run, and who that is

A stage's key is a hash of its inputs, its configuration, its code and the libraries that shape
its result. Its output is written beside its place and renamed into it, so what is there is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata, util
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import filelock
import msgspec

from edgebert_export import processes
from edgebert_pipeline.errors import BuildError, RecipeError
from edgebert_pipeline.progress import Progress, Reporter
from edgebert_runtime.errors import EdgebertError

__all__ = [
    "LOADING",
    "TRAINING",
    "BuildDirectory",
    "StageRecord",
    "disk_is_full",
    "full_disk_message",
    "library_versions",
    "stage_key",
]

_LIBRARIES = (
    "accelerate",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "optimum",
    "optimum-onnx",
    "safetensors",
    "scikit-learn",
    "tokenizers",
    "torch",
    "transformers",
)
# Modules whose source decides what many stages make; see stage_key.
LOADING = (
    "edgebert_export.architecture",
    "edgebert_export.checkpoint",
    "edgebert_export.dataset",
    "edgebert_runtime.encoder",
)
TRAINING = ("edgebert_export.training",)

_RECORD = "stage.json"
_RESULT = "result.json"
_T = TypeVar("_T")
_NEARLY_FULL_BYTES = 1024 * 1024


class StageRecord(msgspec.Struct, frozen=True):
    """When a stage ended (UTC, ISO 8601), and how long it took."""

    seconds: float
    finished_at: str


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape what the stages make; none of them is imported."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def stage_key(name: str, code: Sequence[str], *inputs: object) -> str:
    """Returns the key of a stage: a hash of all that its output depends on.

    Args:
        name: The stage.
        code: Names of the modules that do its work; their source is part of the key.
        inputs: Hashes of what goes in, and configuration (structs).
    """
    digest = hashlib.sha256(name.encode())
    for module in code:
        spec = util.find_spec(module)
        assert spec is not None and spec.origin is not None
        digest.update(Path(spec.origin).read_bytes())
    digest.update(msgspec.json.encode([library_versions(), *inputs]))
    return digest.hexdigest()[:16]


class BuildDirectory:
    """One run's hold on a build directory. A context manager; the lock goes with the process.

    Args:
        path: The directory; created if it is not there.
        reporter: Where stages report to.
        force: Names of stages to run even if they are finished.
        wait: Whether to wait for another run to end, rather than stop.

    Raises:
        BuildError: Another run holds the directory, or it cannot be written.
        RecipeError: There is something else in it.
    """

    @staticmethod
    def refuse_foreign(path: Path) -> None:
        """Raises ``RecipeError`` if ``path`` holds something that is not a build."""
        if path.is_dir() and ((path / ".stages").is_dir() or not any(path.iterdir())):
            return
        if path.exists():
            raise RecipeError(
                f"{path} is not empty and no build directory of edgebert; give another --out"
            )

    def __init__(
        self, path: Path, reporter: Reporter, *, force: Sequence[str] = (), wait: bool = False
    ) -> None:
        self.path = path
        self._reporter = reporter
        self._force = set(force)
        self._stages = path / ".stages"
        self._owner = path / ".lock.json"
        self._used: set[str] = set()
        if not processes.is_leader():
            return
        self.refuse_foreign(path)
        try:
            self._stages.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(path / ".lock")
            self._acquire(wait)
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}
            self._owner.write_text(json.dumps(owner))
            self._recover()
        except OSError as exc:
            raise BuildError(_explain(exc, path)) from exc

    def _acquire(self, wait: bool) -> None:
        try:
            self._lock.acquire(timeout=0)
            return
        except filelock.Timeout:
            who = self._who()
        if not wait:
            raise BuildError(
                f"{self.path} is in use by {who}; wait for it to end, use --wait, or build into "
                "another directory"
            )
        self._reporter.line(f"waiting for {who} to finish with {self.path}")
        self._lock.acquire()

    def _who(self) -> str:
        try:
            owner = json.loads(self._owner.read_text())
            return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
        except (OSError, ValueError, KeyError):
            return "another run"

    def __enter__(self) -> BuildDirectory:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if processes.is_leader():
            self._owner.unlink(missing_ok=True)
            self._lock.release()

    def stage(
        self,
        name: str,
        key: str,
        what: str,
        produce: Callable[[Path, Progress], msgspec.Struct | None],
        *,
        together: bool = False,
    ) -> Path:
        """Returns the directory with a stage's output, produced now unless it is there.

        Args:
            name: The stage, as in ``--until`` and ``--force``.
            key: From ``stage_key``.
            what: What is being done, for people.
            produce: Writes the output into an empty directory. What it returns is written
                beside it, for ``result``.
            together: Whether every process of ``accelerate launch`` takes part, or the leader
                alone.

        Raises:
            BuildError: The disk is full or cannot be written.
        """
        finished = self._stages / f"{name}-{key}"
        self.keep(name, key)
        if not processes.is_leader():
            self._follow(produce if together else None)
            return finished
        work = self._stages / self.work_name(name, key)
        if finished.is_dir() and name not in self._force:
            self._discard(work)  # left if a run was killed just after the stage had ended
            self._reporter.reused(name)
            processes.from_leader(None)
            return finished
        start = time.monotonic()
        with self._reporter.stage(name, what) as progress, self.writing() as partial:
            if name in self._force:
                self._discard(work)
            result = produce(processes.from_leader(partial), progress)
            processes.wait_for_all()
            if result is not None:
                (partial / _RESULT).write_bytes(msgspec.json.encode(result))
            record = StageRecord(seconds=round(time.monotonic() - start, 3), finished_at=_now())
            (partial / _RECORD).write_bytes(msgspec.json.encode(record))
            self._discard(finished)
            partial.rename(finished)
        self._discard(work)
        processes.wait_for_all()
        return finished

    def keep(self, name: str, key: str) -> None:
        """Spares a stage's output from ``remove_unused``, though this run does not need it."""
        self._used |= {f"{name}-{key}", self.work_name(name, key)}

    def _follow(self, produce: Callable[[Path, Progress], object] | None) -> None:
        """Does a process's share of a stage that the leader runs, if it runs it at all."""
        partial: Path | None = processes.from_leader(None)
        if partial is None:
            return
        if produce is not None:
            produce(partial, lambda done, total: None)
        processes.wait_for_all()
        processes.wait_for_all()

    def result(self, finished: Path, type_: type[_T]) -> _T:
        """Returns what the ``produce`` of a finished stage returned."""
        return msgspec.json.decode((finished / _RESULT).read_bytes(), type=type_)

    def _discard(self, path: Path) -> None:
        """Removes a directory whose name says that it is whole, never showing half of it."""
        if path.is_dir():
            doomed = Path(tempfile.mkdtemp(prefix="tmp-", dir=self._stages))
            path.rename(doomed / path.name)
            shutil.rmtree(doomed)

    def _recover(self) -> None:
        """Brings back what a killed run had set aside to replace, and removes what it left."""
        for aside in self._stages.glob("aside-*"):
            target = self.path / aside.name.removeprefix("aside-")
            if target.exists():
                self._discard(aside)
            else:
                aside.rename(target)
        for left in self._stages.glob("tmp-*"):
            shutil.rmtree(left)

    def record(self, finished: Path) -> StageRecord:
        """Returns when a finished stage ran, and for how long."""
        return msgspec.json.decode((finished / _RECORD).read_bytes(), type=StageRecord)

    @staticmethod
    def work_name(name: str, key: str) -> str:
        """Name of the directory that a stage keeps between interrupted runs."""
        return f"work-{name}-{key}"

    def work(self, name: str, key: str) -> Path:
        """Returns the directory that a stage keeps between interrupted runs."""
        path = self._stages / self.work_name(name, key)
        path.mkdir(exist_ok=True)
        return path

    def going_on(self, name: str, key: str) -> str:
        """Says that a killed run of a stage left something to go on from, if it did."""
        work = self._stages / self.work_name(name, key)
        if work.is_dir() and any(work.iterdir()):
            return ", going on from the last save of an interrupted run"
        return ""

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Yields a new directory, removed if it is left over; explains a full disk."""
        partial: Path | None = None
        try:
            partial = Path(tempfile.mkdtemp(prefix="tmp-", dir=self._stages))
            partial.chmod(0o755)
            yield partial
        except EdgebertError:
            raise
        except Exception as exc:
            if disk_is_full(exc, self.path):
                raise BuildError(full_disk_message(self.path)) from exc
            raise
        finally:
            if partial is not None and partial.exists():
                shutil.rmtree(partial, ignore_errors=True)

    def publish(self, source: Path, name: str) -> Path:
        """Copies a file or directory of a stage to ``OUT/name``, replacing what is there.

        A file is replaced at once. A directory is set aside first, for the blink of an eye in
        which there is none; a run that is killed in it leaves it to the next run to bring back.

        Raises:
            BuildError: The disk is full or cannot be written.
        """
        target = self.path / name
        with self.writing() as partial:
            new, aside = partial / "new", self._stages / f"aside-{name}"
            if source.is_dir():
                shutil.copytree(source, new)
            else:
                shutil.copyfile(source, new)
            if target.is_dir():
                target.rename(aside)
            try:
                new.replace(target)
            except BaseException:
                if aside.is_dir():
                    aside.rename(target)
                raise
            self._discard(aside)
        return target

    def withdraw(self, name: str) -> None:
        """Removes the directory ``OUT/name`` if it is there."""
        self._discard(self.path / name)

    def remove_unused(self) -> None:
        """Removes outputs that this run did not use: of older recipes, data or code."""
        for path in self._stages.iterdir():
            if path.name not in self._used:
                self._discard(path)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def disk_is_full(exc: BaseException, path: Path) -> bool:
    """Whether ``exc`` came of a full disk under ``path``.

    Libraries wrap that error in errors of their own, so this looks at the disk, too.
    """
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left" in str(seen) or "os error 28" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return shutil.disk_usage(path).free < _NEARLY_FULL_BYTES


def full_disk_message(path: Path) -> str:
    """Returns what to do about a full disk."""
    return (
        f"the disk that holds {path} is full; free some space and run the same command again: "
        "finished stages are kept"
    )


def _explain(exc: OSError, path: Path) -> str:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return full_disk_message(path)
    return f"{path} cannot be used as a build directory: {exc.strerror or exc}"
