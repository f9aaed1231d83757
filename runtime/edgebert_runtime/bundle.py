"""The bundle's reader: a directory or one ``.tar``, checked before anything parses it.

What is on disk must be exactly what the manifest lists: the same paths, sizes and SHA-256, no
link, nothing more. The manifest itself is covered by ``manifest.sha256``. Files are handed out
as bytes that have just been hashed, so what is parsed is what was checked. A model, which may be
large, is handed out by its place: once it is loaded, ``check_unchanged`` says that it was.

This guards against damage and mix-ups. It does not prove who made the bundle: someone who can
write to it can also write new hashes.

Paths are strings here and in what else every start runs: importing ``pathlib`` would slow it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgebert_runtime.errors import BundleError
from edgebert_runtime.manifest import FileEntry, Manifest, decode_manifest

if TYPE_CHECKING:
    import io
    import tarfile
    from pathlib import Path

__all__ = ["MANIFEST", "MANIFEST_HASH", "Bundle"]

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
_MANIFEST_LIMIT_BYTES = 16 * 1024 * 1024
# Large, as each chunk waits twice for the interpreter's lock when another thread is at work.
_CHUNK_BYTES = 32 * 1024 * 1024


class _Storage(Protocol):
    """Where a bundle's files lie: their sizes by path, and a stream over one of them.

    ``stamps`` differs once a file was written to or replaced. ``root`` is the directory that the
    files lie in as such, if they do.
    """

    root: str | None
    sizes: dict[str, int]
    stamps: tuple[object, ...]

    def open(self, path: str) -> io.FileIO: ...


class _Directory:
    """A bundle laid out as a directory."""

    def __init__(self, root: str) -> None:
        self.root: str | None = root
        found = dict(sorted(self._walk(root, "")))
        self.sizes = {path: state.st_size for path, state in found.items()}
        self.stamps: tuple[object, ...] = tuple(
            (path, *_stamp(state)) for path, state in found.items()
        )

    def _walk(self, directory: str, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(directory) as entries:
            for entry in entries:
                path = prefix + entry.name
                state = entry.stat(follow_symlinks=False)
                mode = state.st_mode
                if stat.S_ISDIR(mode):
                    yield from self._walk(entry.path, path + "/")
                elif stat.S_ISREG(mode):
                    yield path, state
                else:
                    kind = "a link" if stat.S_ISLNK(mode) else "not a plain file"
                    raise BundleError(f"{self.root}: {path} is {kind}; bundles hold plain files")

    def open(self, path: str) -> io.FileIO:
        # O_NOFOLLOW: a file that was swapped for a link after the walk is refused, too.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        return os.fdopen(os.open(f"{self.root}/{path}", flags), "rb", buffering=0)


def _mode(path: str) -> int:
    """What lies at a path, as ``stat`` has it; 0 if nothing does. Raises ``OSError``."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a NUL is in no path
        return 0


def _stamp(state: os.stat_result) -> tuple[int, ...]:
    return (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


class _Tar:
    """A bundle packed as one uncompressed tar file; nothing is unpacked to disk."""

    def __init__(self, path: str) -> None:
        import tarfile  # brings half of the standard library, and most bundles are directories

        self.root: str | None = None
        self._path = path
        self._members: dict[str, tarfile.TarInfo] = {}
        try:
            with tarfile.open(path, mode="r:") as archive:
                self._add_members(archive)
        except (tarfile.TarError, OverflowError, ValueError) as exc:
            with open(path, "rb") as stream:
                packed = "; it is gzip: gunzip it first" if stream.read(2) == b"\x1f\x8b" else ""
            raise BundleError(
                f"{path} is neither a bundle directory nor a whole uncompressed .tar: {exc}{packed}"
            ) from exc
        self._strip_top_directory()
        self.stamps: tuple[object, ...] = _stamp(os.stat(path))
        self.sizes = {name: member.size for name, member in self._members.items()}

    def _strip_top_directory(self) -> None:
        tops = {name.partition("/")[0] for name in self._members}
        if MANIFEST not in self._members and len(tops) == 1 and not tops & {"", ".", ".."}:
            self._members = {
                name.partition("/")[2]: member for name, member in self._members.items()
            }

    def _add_members(self, archive: tarfile.TarFile) -> None:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse() or member.size < 0:
                raise BundleError(f"{self._path}: {name} is not a plain file")
            if name in self._members:
                raise BundleError(f"{self._path}: {name} is in the archive twice")
            self._members[name] = member

    def open(self, path: str) -> io.FileIO:
        member = self._members[path]
        stream = open(self._path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
        stream.seek(member.offset_data)
        return stream


class Bundle:
    """A bundle whose layout has been checked; files are hashed when they are read.

    Attributes:
        manifest: The decoded manifest.
        digest: SHA-256 of ``manifest.json``; it names this bundle and every byte in it.
        stamps: Where and when each file was written; differs once one was written to.
    """

    def __init__(self, root: str, storage: _Storage, manifest: Manifest, digest: str) -> None:
        self._root = root
        self.manifest = manifest
        self.digest = digest
        self.stamps = storage.stamps
        self._storage = storage
        self._entries = {entry.path: entry for entry in manifest.files}
        self._hashed: dict[str, tuple[str, tuple[int, ...]]] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Opens a bundle and checks its manifest, its list of files and their sizes.

        Raises:
            BundleError: There is no bundle, or it is not exactly what its manifest says.
        """
        root = os.fsdecode(path) or os.curdir
        storage: _Storage
        try:
            mode = _mode(root)
            if stat.S_ISDIR(mode):
                if not _mode(f"{root}/{MANIFEST}"):
                    below = stat.S_ISDIR(_mode(f"{root}/bundle"))
                    hint = "; did you mean its bundle/?" if below else ""
                    raise BundleError(f"{root}: {MANIFEST} is missing; this is no bundle{hint}")
                storage = _Directory(root)
            elif stat.S_ISREG(mode):
                storage = _Tar(root)
            elif mode:
                raise BundleError(f"{root} is neither a directory nor a file")
            else:
                raise BundleError(f"{root}: there is no bundle there")
            manifest, digest = _read_manifest(root, storage)
        except (OSError, RecursionError) as exc:
            raise BundleError(f"{root} cannot be read: {exc}") from exc
        bundle = cls(root, storage, manifest, digest)
        bundle._check_listing()
        return bundle

    @property
    def path(self) -> Path:
        """Where it lies, as given to ``open``."""
        from pathlib import Path

        return Path(self._root)

    def _check_listing(self) -> None:
        found = self._storage.sizes
        for entry in self.manifest.files:
            if entry.path not in found:
                raise BundleError(f"{self._root}: {entry.path} is missing; copy the bundle again")
            if found[entry.path] != entry.size_bytes:
                raise BundleError(
                    f"{self._root}: {entry.path} has {found[entry.path]} bytes where the manifest "
                    f"says {entry.size_bytes}; copy the bundle again"
                )
        extra = sorted(found.keys() - self._entries.keys() - {MANIFEST, MANIFEST_HASH})
        if extra:
            raise BundleError(
                f"{self._root}: {extra[0]} is not listed in the manifest; remove it, or keep "
                "your own files outside the bundle"
            )

    def read(self, path: str) -> bytes:
        """Returns the bytes of one listed file, after checking their hash.

        Raises:
            BundleError: The file is not listed, cannot be read, or has other bytes.
        """
        entry = self._entry(path)
        try:
            with self._storage.open(path) as stream:
                data = stream.read(entry.size_bytes)
        except OSError as exc:
            raise BundleError(f"{self._root}: {path} cannot be read: {exc}") from exc
        self._check_hash(path, hashlib.sha256(data).hexdigest())
        return data

    def read_model(self, path: str) -> bytes | str:
        """Checks the hash of one listed file, and returns where it lies, or its bytes in a tar.

        What is given the place reads the file again: call ``check_unchanged`` afterwards.

        Raises:
            BundleError: The file is not listed, cannot be read, or has other bytes.
        """
        if self._storage.root is None:
            return self.read(path)
        entry = self._entry(path)
        place = f"{self._storage.root}/{path}"
        self._hashed[path] = place, self._stamp_of(place)
        self._check_bytes(entry, _buffer(entry.size_bytes))
        return place

    def check_unchanged(self, path: str) -> None:
        """Checks that a file was not written to or replaced since ``read_model`` hashed it.

        Raises:
            BundleError: It was.
        """
        place, stamp = self._hashed.get(path, ("", ()))
        if place and stamp != self._stamp_of(place):
            raise BundleError(f"{self._root}: {path} was written to while it was loaded; try again")

    def _stamp_of(self, place: str) -> tuple[int, ...]:
        try:
            return _stamp(os.lstat(place))
        except OSError as exc:
            raise BundleError(f"{self._root}: {place} cannot be read: {exc}") from exc

    def verify(self) -> None:
        """Hashes every listed file.

        Raises:
            BundleError: A file has other bytes than the manifest says.
        """
        buffer = _buffer(max(entry.size_bytes for entry in self.manifest.files))
        for entry in self.manifest.files:
            self._check_bytes(entry, buffer)

    def _check_bytes(self, entry: FileEntry, buffer: memoryview) -> None:
        """Hashes a file through ``buffer``."""
        digest = hashlib.sha256()
        left = entry.size_bytes
        try:
            with self._storage.open(entry.path) as stream:
                while left and (count := stream.readinto(buffer[:left])):
                    digest.update(buffer[:count])
                    left -= count
        except OSError as exc:
            raise BundleError(f"{self._root}: {entry.path} cannot be read: {exc}") from exc
        self._check_hash(entry.path, digest.hexdigest())

    def _entry(self, path: str) -> FileEntry:
        if path not in self._entries:
            raise BundleError(f"{self._root}: {path} is not listed in the manifest")
        return self._entries[path]

    def _check_hash(self, path: str, found: str) -> None:
        expected = self._entries[path].sha256
        if found != expected:
            raise BundleError(
                f"{self._root}: {path} was altered (sha256 {found[:12]}…, the manifest says "
                f"{expected[:12]}…); copy the bundle again"
            )


def _buffer(size_bytes: int) -> memoryview:
    """Room to read a file into, some of it at a time if it is large.

    Of numpy, which asks for huge pages: a fault for every 4 KiB takes long, too.
    """
    return np.empty(min(size_bytes, _CHUNK_BYTES), np.uint8).data


def _read_manifest(root: str, storage: _Storage) -> tuple[Manifest, str]:
    """Reads the manifest and compares it with ``manifest.sha256``, byte for byte."""
    for name in (MANIFEST, MANIFEST_HASH):
        if name not in storage.sizes:
            raise BundleError(f"{root}: {name} is missing; this is not a whole bundle")
    size = storage.sizes[MANIFEST]
    if size > _MANIFEST_LIMIT_BYTES:
        raise BundleError(f"{root}: {MANIFEST} has {size} bytes, more than any manifest needs")
    with storage.open(MANIFEST) as stream:
        data = stream.read(size)
    with storage.open(MANIFEST_HASH) as stream:
        recorded = stream.read(min(storage.sizes[MANIFEST_HASH], 4096))
    digest = hashlib.sha256(data).hexdigest()
    if recorded != f"{digest}  {MANIFEST}\n".encode():
        raise BundleError(
            f"{root}: {MANIFEST} does not match {MANIFEST_HASH}; the bundle was altered or is "
            "only partly copied: copy it again"
        )
    return decode_manifest(data, root), digest
