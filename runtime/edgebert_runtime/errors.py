"""Every error that the runtime raises on purpose.

    EdgebertError               exit code 1: a fault of ours or of the environment
    ├── DeviceError             the device, its driver or a session on it cannot be used
    │   └── ModelRefusedError   the device's TensorRT does not take a model
    ├── MissingExtraError       an optional dependency is not installed (or two clash)
    └── UsageError              exit code 2: what the caller gave is wrong
        ├── BundleError         the bundle is truncated, altered, unsafe or unknown
        └── InputError          a text, an argument or an option is wrong

A message says what is wrong with what, and what to do about it. ``exit_code`` is what the
command line ends with, so that a script can tell wrong use from a broken machine.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "DeviceError",
    "EdgebertError",
    "InputError",
    "MissingExtraError",
    "ModelRefusedError",
    "UsageError",
]


class EdgebertError(Exception):
    """Base of every error raised on purpose; a fault of ours or of the environment."""

    exit_code = 1


class DeviceError(EdgebertError):
    """The device, its driver or a session on it cannot be used."""


class ModelRefusedError(DeviceError):
    """TensorRT does not take a model, which may be whole: another release of it, or device, may."""


class MissingExtraError(EdgebertError):
    """An optional dependency is not installed, or two that clash both are."""


class UsageError(EdgebertError):
    """What the caller gave is wrong; running it again unchanged cannot help."""

    exit_code = 2


class BundleError(UsageError):
    """The bundle is truncated, altered, unsafe, or of an unknown format."""


class InputError(UsageError):
    """A text, an argument or an option is wrong."""
