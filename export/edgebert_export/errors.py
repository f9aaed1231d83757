"""Errors of the export stages, below the runtime's tree.

EdgebertError
├── ExportError             exit code 1: a stage's result is not what it must be
└── UsageError
    ├── CheckpointError     exit code 2: a checkpoint is unsafe, damaged or does not fit
    ├── DataError           exit code 2: a data file or what is in it is wrong
    ├── ModelError          exit code 2: an ONNX model is unsafe, damaged or already quantised
    └── TrainingError       exit code 2: a training cannot be done as asked
"""

from __future__ import annotations

from edgebert_runtime.errors import EdgebertError, UsageError

__all__ = ["CheckpointError", "DataError", "ExportError", "ModelError", "TrainingError"]


class ExportError(EdgebertError):
    """A stage ran, and its result is not what it must be."""


class CheckpointError(UsageError):
    """A checkpoint is unsafe, damaged, or does not fit the task."""


class DataError(UsageError):
    """A data file, or what is in it, is wrong."""


class ModelError(UsageError):
    """An ONNX model is unsafe, damaged, or not one that can be quantised."""


class TrainingError(UsageError):
    """A training cannot be done as it is asked for."""
