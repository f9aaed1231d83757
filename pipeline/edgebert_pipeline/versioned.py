"""The commit that a recipe was taken from."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["commit_of"]


def commit_of(directory: Path) -> str | None:
    """Returns the commit of the git repository that holds a directory; ``None`` if none does.

    Whether files were changed since is not asked: git would run what a stranger's repository sets
    as filters to find out.
    """
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), "rev-parse", "--verify", "--quiet", "HEAD"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
