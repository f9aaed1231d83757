"""The user's cache directory, and the memory there of what was found to be in order.

Hashing every byte of a bundle takes longer than all the rest of a start. So ``Classifier.load``
hashes the files that it parses each time, and the others only if the bundle has been written to
since they were last hashed: size, inode, and times of modification and change of every file
are compared. A write changes a file's change time, which programs cannot set. So it is with known
answers: a session is held against them the first time that its arithmetic is met on this machine.
"""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from edgebert_runtime.bundle import Bundle

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "cache_dir",
    "is_known_right",
    "is_known_whole",
    "remember_right",
    "remember_whole",
    "write_whole",
]

_MOST_REMEMBERED = 256


def cache_dir() -> Path:
    """Where edgebert keeps what it can make again; ``EDGEBERT_CACHE_DIR`` overrides the place.

    Raises ``RuntimeError`` for a user without a home directory.
    """
    from pathlib import Path

    return Path(_cache_dir())


def _cache_dir() -> str:
    override = os.environ.get("EDGEBERT_CACHE_DIR")
    if override:
        return override
    if sys.platform == "linux":  # as platformdirs does, whose import would slow every start
        kept = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if kept == "~/.cache" and os.path.expanduser("~") == "~":
            raise RuntimeError("this user has no home directory")
        return f"{kept}/edgebert"
    import platformdirs

    return platformdirs.user_cache_dir("edgebert")


def write_whole(path: Path, *parts: bytes) -> None:
    """Writes a file so that others find all of it or what was there before. Raises ``OSError``."""
    import tempfile  # few starts write anything
    from pathlib import Path

    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.writelines(parts)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def is_known_whole(bundle: Bundle) -> bool:
    """Whether every byte of ``bundle`` was checked, and no file was written to since then."""
    return _is_marked(_whole(bundle))


def remember_whole(bundle: Bundle) -> None:
    """Notes that every byte of ``bundle`` was checked; does nothing where nothing can be kept."""
    _remember(_whole(bundle))


def is_known_right(*what: object) -> bool:
    """Whether a session gave the known answers of its bundle, by all that its arithmetic is of."""
    return _is_marked(("right", what))


def remember_right(*what: object) -> None:
    """Notes that a session gave the known answers; does nothing where nothing can be kept."""
    _remember(("right", what))


_Mark = tuple[str, object]
"""The directory of a mark, and what is remembered."""


def _whole(bundle: Bundle) -> _Mark:
    return "whole", (bundle.digest, bundle.stamps)


def _is_marked(mark: _Mark) -> bool:
    try:
        return os.path.isfile(_path_of(mark))
    except (OSError, RuntimeError):  # no home directory, or none that may be read
        return False


def _remember(mark: _Mark) -> None:
    try:
        from pathlib import Path

        path = Path(_path_of(mark))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        marks = sorted(path.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in marks[:-_MOST_REMEMBERED]:
            old.unlink(missing_ok=True)
    except (OSError, RuntimeError):  # read-only, full, or no home: the next start does it again
        return


def _path_of(mark: _Mark) -> str:
    directory, what = mark
    return f"{_cache_dir()}/{directory}/{hashlib.sha256(repr(what).encode()).hexdigest()}"
