"""Writes a bundle anew with a tuning in it, in the place of the old one or elsewhere.

A bundle is never changed where it lies: the new one is written whole beside it, checked as a device
would check it, and then takes its place. ``Replacing`` holds the place while that takes minutes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import filelock
import msgspec

from edgebert_export.cpu_kernels import CANDIDATES
from edgebert_export.errors import ExportError
from edgebert_export.known_answers import encode_known_answers, expect, open_variant
from edgebert_runtime.bundle import MANIFEST, MANIFEST_HASH, Bundle
from edgebert_runtime.errors import InputError
from edgebert_runtime.known_answers import read_known_answers
from edgebert_runtime.manifest import (
    FileEntry,
    Tuning,
    Variant,
    encode_manifest,
)

__all__ = ["Replacing", "bring_back", "write_tuned"]

_HERE, _EXCHANGE = -100, 2
"""``AT_FDCWD`` and ``RENAME_EXCHANGE`` of Linux."""


def write_tuned(
    bundle: Bundle, out: Path, tuning: Tuning, added: tuple[Variant, bytes] | None = None
) -> Bundle:
    """Writes a copy of a bundle that holds a tuning, and opens it as a device would.

    A tuning for the same kind of processor and as many cores is replaced. A variant that some
    tuning added (its name tells) goes when none is left that names it.

    Args:
        bundle: The one to copy; every byte of it is checked on the way.
        out: An empty directory.
        tuning: Of a variant that the bundle has, or of the one that is added.
        added: A variant and its model, to stand after those that are there.

    Raises:
        BundleError: ``bundle`` is damaged.
    """
    manifest = bundle.manifest
    contents = {entry.path: bundle.read(entry.path) for entry in manifest.files}
    others = [
        other
        for other in manifest.tunings
        if (other.processor, other.cores) != (tuning.processor, tuning.cores)
    ]
    stale = {kernels.name for kernels in CANDIDATES}
    stale -= {one.variant for one in (*others, tuning)}
    variants = tuple(
        variant
        for variant in manifest.variants
        if variant.name not in stale or variant.devices != ("cpu",)
    )
    for gone in {v.model for v in manifest.variants} - {v.model for v in variants}:
        del contents[gone]
    if added is not None:
        variant, contents[variant.model] = added
        variants = (*variants, variant)
    contents[manifest.known_answers] = _known_answers(bundle, variants, contents)
    for path, data in contents.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(data)
    data = encode_manifest(
        msgspec.structs.replace(
            manifest,
            variants=variants,
            tunings=(*others, tuning),
            files=tuple(
                FileEntry(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
                for path, data in contents.items()
            ),
        )
    )
    (out / MANIFEST).write_bytes(data)
    (out / MANIFEST_HASH).write_text(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n")
    written = Bundle.open(out)
    written.verify()
    read_known_answers(written)
    return written


def _known_answers(
    bundle: Bundle, variants: Sequence[Variant], contents: Mapping[str, bytes]
) -> bytes:
    """Adds what a new variant answers to a bundle's known answers, and drops what is gone."""
    answers, manifest = read_known_answers(bundle), bundle.manifest
    names = {spec.name for spec in manifest.inputs}
    expected = dict(answers.expected)
    for variant in variants:
        if variant.name not in expected:
            session = open_variant(contents[variant.model], variant.devices)
            expected[variant.name] = expect(
                answers.batches,
                session,
                names,
                manifest.pad_token_id,
                answers.expected[answers.reference],
            )
            session.close()
    kept = {variant.name: expected[variant.name] for variant in variants}
    return encode_known_answers(answers.batches, kept, answers.reference)


def bring_back(target: Path) -> None:
    """Brings back the bundle that a killed run had set aside to replace, if there is one.

    Raises:
        InputError: It cannot be, or a run is about to replace it.
    """
    if not target.exists() and _aside(target.resolve()).is_dir():
        with Replacing(target):
            """Holding the place does it."""


class Replacing:
    """The place of a bundle's directory, held until a new one is there. A context manager.

    ``directory`` is where the new one is to be written, beside its place; ``publish`` puts it
    there. Whatever happens in between, and at every moment, the old bundle can be used: on Linux
    the two change places at once. Elsewhere the old one is set aside for the blink of an eye, and
    if a run is killed in it, the next brings it back. The old one is removed only after the new
    one is on the disk, so this holds for a loss of power, too (but on Windows).

    The lock is an empty file beside the place. It stays: if it were removed, two runs could each
    hold one of that name.

    Args:
        target: The bundle's directory; or one that is not there or empty.

    Raises:
        InputError: It cannot be written there, or another run is about to.
    """

    def __init__(self, target: Path) -> None:
        self._target = target.resolve()  # a link to the directory stays one
        self._aside = _aside(self._target)
        parent, prefix = self._target.parent, self._aside.name.removesuffix("aside")
        self._lock = filelock.FileLock(parent / f"{prefix}lock")
        try:
            # Where nothing can be written, the lock would say that another run holds it.
            Path(self._lock.lock_file).touch()
            self._lock.acquire(timeout=0)
            self._clean_up(parent, prefix)
            self.directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        except filelock.Timeout as exc:
            raise InputError(f"{target} is being tuned by another run; wait for its end") from exc
        except OSError as exc:
            self._lock.release()
            raise InputError(
                f"{target} cannot be written: {exc.strerror}; give another place with --out"
            ) from exc

    def _clean_up(self, parent: Path, prefix: str) -> None:
        """Mends what a killed run left."""
        if self._aside.is_dir() and not self._target.exists():
            self._aside.rename(self._target)
        for left in parent.iterdir():
            if left.name.startswith(prefix) and left.is_dir():
                shutil.rmtree(left)

    def publish(self) -> None:
        """Puts what was written into its place; what was there is removed.

        Raises:
            ExportError: The disk cannot be written; what was there stays.
        """
        try:
            self.directory.chmod(0o755)
            _to_disk(self.directory, *self.directory.rglob("*"))
            if not self._target.exists():
                self.directory.rename(self._target)
            elif not _exchange(self.directory, self._target):
                self._target.rename(self._aside)
                try:
                    self.directory.rename(self._target)
                except BaseException:
                    self._aside.rename(self._target)
                    raise
            _to_disk(self._target.parent)
            if self._aside.is_dir():
                shutil.rmtree(self._aside)
        except OSError as exc:
            raise ExportError(f"{self._target} cannot be replaced: {exc.strerror}") from exc

    def __enter__(self) -> Replacing:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.release()


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.tuning-aside"


def _to_disk(*paths: Path) -> None:
    """Waits until files are on the disk, and what directories list."""
    if os.name == "nt":
        return  # it cannot be asked to by a directory
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two directories change places at once; returns whether the system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)
