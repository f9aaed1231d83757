"""The seam: a session turns token tensors into raw outputs, and nothing else.

It lies at tensors, not at text, so that tokenising, batching and labelling exist once above it
and every backend is compared on the same raw outputs. Two methods are enough; whatever a
backend needs besides them is its constructor's affair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Collated", "Inputs", "Outputs", "Session"]

# As text: the type checker reads it, and importing numpy.typing would slow every start.
Inputs: TypeAlias = "Mapping[str, NDArray[np.int64]]"
Outputs: TypeAlias = "Mapping[str, NDArray[Any]]"


class Collated(dict[str, "NDArray[np.int64]"]):
    """Inputs that a ``TextEncoder`` made, all of one shape: a session need not look at them."""


class Session(Protocol):
    """A loaded model on a device. Implementations are safe to use from several threads."""

    def run(self, inputs: Inputs) -> Outputs:
        """Computes one batch.

        Args:
            inputs: ``int64[batch, seq]`` for each input of the model.

        Returns:
            ``float32[batch, ...]`` for each output, ``logits`` among them.

        Raises:
            InputError: A name or a shape is not what the model takes.
            DeviceError: The backend failed, or the session is closed.
        """
        ...

    def close(self) -> None:
        """Frees what the session holds; a second call does nothing."""
        ...
