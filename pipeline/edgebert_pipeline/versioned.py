"""The commit that a recipe was taken from."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["commit_of"]


def commit_of(directory: Path) -> str | None:
    """Returns the commit of the git repository that holds a directory; ``None`` if none does.

    With ``-dirty`` if a file that the repository tracks was changed since.
    """
    # Of a repository's own settings, the file-system monitor is a command that git would run.
    options = ["-c", "core.fsmonitor=false", "--no-optional-locks", "-C", str(directory)]
    try:
        done = subprocess.run(
            ["git", *options, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
