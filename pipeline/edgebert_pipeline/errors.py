"""Errors of the pipeline, below the runtime's tree.

EdgebertError
├── BuildError          exit code 1: the build directory is in use, or the disk is full
├── AuditRefusedError   exit code 3: an audit found something wrong with an engine
├── GateRefusedError    exit code 3: the accuracy or latency gate refused the result
└── UsageError
    ├── RecipeError     exit code 2: the recipe is missing, not TOML, or wrong
    └── FetchError      exit code 2: a source cannot be fetched, or has another hash
"""

from __future__ import annotations

from edgebert_runtime.errors import EdgebertError, UsageError

__all__ = ["AuditRefusedError", "BuildError", "FetchError", "GateRefusedError", "RecipeError"]


class BuildError(EdgebertError):
    """The build directory cannot be used: in use by another run, or on a full disk."""


class GateRefusedError(EdgebertError):
    """A measured figure is past the limit that the recipe sets."""

    exit_code = 3


class AuditRefusedError(EdgebertError):
    """A compiler made something of a model that it should not have."""

    exit_code = 3


class RecipeError(UsageError):
    """The recipe is missing, not TOML, or says something that cannot be."""


class FetchError(UsageError):
    """A source cannot be fetched, or what came has another hash."""
