"""Engines in the user's cache directory: found by key, checked before use, built by one process.

An entry is a directory named by its key's digest, written whole and renamed into place::

    engines/<digest>/engine        the serialised engine
    engines/<digest>/entry.json    its key, size and SHA-256, and what was measured of it
    engines/<digest>/runtime.cache kernels that TensorRT for RTX compiled on this device
    engines/<digest>.lock          held while it is built
    engines/timing-<digest>.cache  TensorRT's timing cache, by TensorRT and GPU
    engines/preferred-<…>.json     which variant of a bundle was measured to be the fastest

Whoever can write there can run code as this user, as with any cache of programs: engines are
executable. What is checked is that an entry is what was written: not cut, not altered, of this key.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from edgebert_runtime.cache import cache_dir
from edgebert_runtime.engine import EngineKey
from edgebert_runtime.errors import DeviceError

__all__ = ["CachedEngine", "EngineCache"]

_ENGINE, _ENTRY, _RUNTIME_CACHE = "engine", "entry.json", "runtime.cache"
_DEFAULT_LIMIT_MIB = 8192
_MIB = 2**20


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
    """

    def __init__(self, directory: Path | None = None, *, limit_mib: int | None = None) -> None:
        self.directory = directory or cache_dir() / "engines"
        if limit_mib is None:
            given = os.environ.get("EDGEBERT_ENGINE_CACHE_MIB", "")
            limit_mib = int(given) if given.isdigit() else _DEFAULT_LIMIT_MIB
        self._limit_bytes = limit_mib * _MIB

    def entries(self) -> list[CachedEngine]:
        """Lists what is there, the last used first; what cannot be read is no entry."""
        try:
            found = [path for path in self.directory.iterdir() if (path / _ENTRY).is_file()]
        except OSError:
            return []
        dated = sorted(found, key=_last_use, reverse=True)
        return [entry for path in dated if (entry := _read_entry(path)) is not None]

    def read(self, key: EngineKey) -> bytes:
        """Returns an engine's bytes, which have just been checked.

        Raises:
            DeviceError: It is not there, or is not what was written; then it is removed.
        """
        place = self.directory / key.digest
        entry = _read_entry(place)
        if entry is None:
            raise DeviceError(f"no engine for {key} is in {self.directory}")
        try:
            data = (place / _ENGINE).read_bytes()
        except OSError as exc:
            raise DeviceError(f"{place / _ENGINE} cannot be read: {exc}") from exc
        sha256 = hashlib.sha256(data).hexdigest()
        if entry.key != key or len(data) != entry.size_bytes or sha256 != entry.sha256:
            shutil.rmtree(place, ignore_errors=True)
            raise DeviceError(
                f"the engine in {place} was altered ({len(data)} bytes, sha256 {sha256[:12]}…; it "
                f"was written with {entry.size_bytes}, {entry.sha256[:12]}…): it is removed, build "
                "it again"
            )
        with suppress(OSError):  # a cache that cannot be written to keeps its order
            os.utime(place)
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
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f"{key.digest}.part-", dir=self.directory))
            try:
                (part / _ENGINE).write_bytes(engine)
                (part / _ENTRY).write_bytes(msgspec.json.encode(entry))
                place = self.directory / key.digest
                shutil.rmtree(place, ignore_errors=True)
                part.rename(place)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
        except OSError as exc:
            raise DeviceError(
                f"the engine cannot be kept in {self.directory}: {exc.strerror}; make room, or set "
                "EDGEBERT_CACHE_DIR"
            ) from exc
        self._make_room(key.digest)
        return entry

    @contextmanager
    def building(self, key: EngineKey) -> Iterator[bool]:
        """Keeps other processes from building the same engine; waits while one does.

        Yields:
            Whether it is still to be built: ``False`` if another process has done so meanwhile.

        Raises:
            DeviceError: The directory cannot be written to.
        """
        from filelock import FileLock

        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.directory / f"{key.digest}.lock")
            lock.acquire()
        except OSError as exc:
            raise DeviceError(
                f"engines cannot be kept in {self.directory}: {exc.strerror}; set "
                "EDGEBERT_CACHE_DIR"
            ) from exc
        try:
            for part in self.directory.glob(f"{key.digest}.part-*"):  # of a process that was ended
                shutil.rmtree(part, ignore_errors=True)
            yield _read_entry(self.directory / key.digest) is None
        finally:
            lock.release()

    def runtime_cache(self, key: EngineKey) -> Path:
        """Where the kernels that were compiled for an engine on this device are kept."""
        place = self.directory / key.digest
        place.mkdir(parents=True, exist_ok=True)
        return place / _RUNTIME_CACHE

    def preference(self, digest: str, flavour: str) -> Path:
        """Where it is kept which variant of a bundle was measured to be the fastest here."""
        return self.directory / f"preferred-{flavour}-{digest[:32]}.json"

    def timing_cache(self, key: EngineKey) -> Path:
        """Where TensorRT's timings for this TensorRT and GPU are kept."""
        name = hashlib.sha256(str((key.version, key.platform, key.compute_capability)).encode())
        return self.directory / f"timing-{name.hexdigest()[:16]}.cache"

    def _make_room(self, keep: str) -> None:
        kept = 0
        places = [path for path in self.directory.iterdir() if path.is_dir() and not path.suffix]
        for place in sorted(places, key=lambda path: (path.name == keep, _last_use(path)))[::-1]:
            kept += sum(file.stat().st_size for file in place.iterdir())
            if kept > self._limit_bytes and place.name != keep:
                shutil.rmtree(place, ignore_errors=True)


def _last_use(place: Path) -> float:
    try:
        return place.stat().st_mtime
    except OSError:
        return 0.0


def _read_entry(place: Path) -> CachedEngine | None:
    try:
        return msgspec.json.decode((place / _ENTRY).read_bytes(), type=CachedEngine)
    except (OSError, msgspec.DecodeError, ValueError):
        return None
