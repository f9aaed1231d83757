"""Engines in the user's cache directory: found by key, checked before use, built by one process.

An engine is a file named by its key's digest, renamed into place when it is whole::

    engines/<digest>.engine        a line of JSON (its key, size and SHA-256), and the engine
    engines/<digest>.kernels       kernels that TensorRT for RTX compiled for it on this device
    engines/timing-<digest>.cache  TensorRT's timing cache, by TensorRT, GPU and power mode
    engines/preferred-<…>.json     which variant of a bundle was measured to be the fastest
    engines/lock                   held by the process that builds

One engine is built at a time, whatever it is: two builds would spoil each other's timings.

Whoever can write there can run code as this user, as with any cache of programs: engines are
executable. What is checked is that an entry is what was written: not cut, not altered, of this key.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from edgebert_runtime.cache import cache_dir, write_whole
from edgebert_runtime.engine import EngineKey
from edgebert_runtime.errors import DeviceError, InputError

__all__ = ["CachedEngine", "EngineCache"]

_LIMIT = "EDGEBERT_ENGINE_CACHE_MIB"
_DEFAULT_LIMIT_MIB = 8192
_MIB = 2**20
_LONGEST_LINE = 65536
_HASH_BYTES = 32


class CachedEngine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of an engine in the cache.

    Attributes:
        key: What it was built from and for.
        size_bytes: Of the engine.
        sha256: Of the engine.
        gpu: Name of the GPU it was built on; empty if there was none.
        seconds: That parsing and building took.
        power_mode: Of the Jetson it was built on, at that time.
    """

    key: EngineKey
    size_bytes: int
    sha256: str
    gpu: str
    seconds: float
    power_mode: str | None = None


class EngineCache:
    """The engines that were built on this machine.

    Args:
        directory: Where; the user's cache directory if left out.
        limit_mib: How much room they may take; the environment's ``EDGEBERT_ENGINE_CACHE_MIB``
            if left out, or 8 GiB. What was not used for longest goes first.

    Raises:
        InputError: The environment's limit is no number.
    """

    def __init__(self, directory: Path | None = None, *, limit_mib: int | None = None) -> None:
        if directory is None:
            try:
                directory = cache_dir() / "engines"
            except RuntimeError:  # a user without a home: nothing is found, nothing can be kept
                directory = Path(os.devnull) / "engines"
        self.directory = directory
        if limit_mib is None:
            given = os.environ.get(_LIMIT) or str(_DEFAULT_LIMIT_MIB)
            if not given.isdecimal():
                raise InputError(f"{_LIMIT} is {given!r}; it must be a number of MiB, as 8192 is")
            limit_mib = int(given)
        self._limit_bytes = limit_mib * _MIB

    def entries(self) -> list[CachedEngine]:
        """Lists what is there, the last used first; what cannot be read is no entry."""
        dated = sorted(self.directory.glob("*.engine"), key=_last_use, reverse=True)
        return [entry for path in dated if (entry := _read_entry(path)) is not None]

    def entry(self, key: EngineKey) -> CachedEngine | None:
        """Returns what is known of an engine; ``None`` if it is not there, or not all of it."""
        return _read_entry(self._path(key))

    def has(self, key: EngineKey) -> bool:
        """Whether an engine is there, as far as can be told without reading all of it."""
        return self.entry(key) is not None

    def sha256(self, key: EngineKey) -> str | None:
        """Returns the hash that an engine was written with; ``None`` if it is not there."""
        entry = _read_entry(self._path(key))
        return None if entry is None else entry.sha256

    def read(self, key: EngineKey) -> bytes:
        """Returns an engine's bytes, which have just been checked.

        Raises:
            DeviceError: It is not there, or is not what was written; then it is removed.
        """
        path = self._path(key)
        try:
            with path.open("rb") as stream:
                entry = _decoded(stream.readline(_LONGEST_LINE))
                data = stream.read()
        except FileNotFoundError:
            raise DeviceError(f"no engine for {key} is in {self.directory}") from None
        except OSError as exc:
            raise DeviceError(f"{path} cannot be read: {exc}") from exc
        if entry is None or entry.key != key or hashlib.sha256(data).hexdigest() != entry.sha256:
            from filelock import FileLock

            # While another process builds, it may have written another one by now: it stays.
            with suppress(OSError), FileLock(self.directory / "lock", timeout=0):
                path.unlink()
            raise DeviceError(
                f"the engine {path} was altered: it is not what was written there, and is removed; "
                "build it again"
            )
        with suppress(OSError):  # a cache that cannot be written to keeps its order
            os.utime(path)
        return data

    def write(
        self,
        key: EngineKey,
        engine: bytes,
        *,
        gpu: str = "",
        seconds: float = 0.0,
        power_mode: str | None = None,
    ) -> CachedEngine:
        """Adds an engine; makes room by removing those that were not used for longest.

        Raises:
            DeviceError: It cannot be written.
        """
        entry = CachedEngine(
            key=key,
            size_bytes=len(engine),
            sha256=hashlib.sha256(engine).hexdigest(),
            gpu=gpu,
            seconds=seconds,
            power_mode=power_mode,
        )
        path = self._path(key)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_whole(path, msgspec.json.encode(entry), b"\n", engine)
        except OSError as exc:
            raise self._unwritable(exc) from exc
        with suppress(OSError):
            self._make_room(path)
        return entry

    @contextmanager
    def building(
        self, key: EngineKey, say: Callable[[str], None] = lambda line: None
    ) -> Iterator[bool]:
        """Keeps other processes from building; waits while one does, and says so.

        Yields:
            Whether the engine is still to be built: ``False`` if there is one.

        Raises:
            DeviceError: The directory cannot be written to.
        """
        from filelock import FileLock, Timeout  # few starts need it, and it is slow to import

        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.directory / "lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                say("waiting for another process, which builds an engine")
                lock.acquire()
        except OSError as exc:
            raise self._unwritable(exc) from exc
        try:
            for part in self.directory.glob("*.part"):  # of a process that was ended
                part.unlink(missing_ok=True)
            yield not self.has(key)
        finally:
            lock.release()

    def kernels(self, key: EngineKey) -> Path:
        """Where the kernels that were compiled for an engine on this device are kept."""
        return self._path(key).with_suffix(".kernels")

    def preference(self, digest: str, flavour: str) -> Path:
        """Where it is kept which variant of a bundle was measured to be the fastest here."""
        return self.directory / f"preferred-{flavour}-{digest[:32]}.json"

    def read_timings(self, key: EngineKey, gpu: str, power_mode: str | None) -> bytes | None:
        """Returns TensorRT's timing cache, or ``None`` if there is none.

        Args:
            key: Names the TensorRT and the compute capability.
            gpu: Name of the GPU: those of one capability differ in how fast a kernel is.
            power_mode: Of the Jetson, now: times hold for none but the one they were taken in.
        """
        try:
            stored = self._timings(key, gpu, power_mode).read_bytes()
        except OSError:
            return None
        data = stored[_HASH_BYTES:]
        return data if hashlib.sha256(data).digest() == stored[:_HASH_BYTES] else None

    def write_timings(self, key: EngineKey, gpu: str, power_mode: str | None, data: bytes) -> None:
        """Keeps TensorRT's timing cache; if that cannot be, the next build measures anew."""
        with suppress(OSError):
            path = self._timings(key, gpu, power_mode)
            write_whole(path, hashlib.sha256(data).digest(), data)

    def _path(self, key: EngineKey) -> Path:
        return self.directory / f"{key.digest}.engine"

    def _timings(self, key: EngineKey, gpu: str, power_mode: str | None) -> Path:
        where = (key.version, key.platform, key.compute_capability, gpu, power_mode)
        name = hashlib.sha256(str(where).encode())
        return self.directory / f"timing-{name.hexdigest()[:16]}.cache"

    def _unwritable(self, exc: OSError) -> DeviceError:
        return DeviceError(
            f"engines cannot be kept in {self.directory}: {exc.strerror}; make room, or set "
            "EDGEBERT_CACHE_DIR"
        )

    def _make_room(self, keep: Path) -> None:
        used = keep.stat().st_size
        found = [*self.directory.glob("*.engine"), *self.directory.glob("*.kernels")]
        for path in sorted(found, key=_last_use, reverse=True):
            if path != keep:
                used += path.stat().st_size
                if used > self._limit_bytes:
                    path.unlink()


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read_entry(path: Path) -> CachedEngine | None:
    """Reads what is known of an engine; ``None`` if there is none, or not all of it."""
    try:
        with path.open("rb") as stream:
            line = stream.readline(_LONGEST_LINE)
            size = stream.seek(0, os.SEEK_END) - len(line)
    except OSError:
        return None
    entry = _decoded(line)
    return entry if entry is not None and entry.size_bytes == size else None


def _decoded(line: bytes) -> CachedEngine | None:
    try:
        return msgspec.json.decode(line, type=CachedEngine)
    except ValueError:  # msgspec's errors are, too
        return None
