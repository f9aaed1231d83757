"""A session without a model, for testing what stands on one."""

from __future__ import annotations

import numpy as np

from edgebert_runtime.errors import DeviceError
from edgebert_runtime.onnx_session import check_inputs
from edgebert_runtime.session import Inputs, Outputs

__all__ = ["FakeSession"]


class FakeSession:
    """Answers from token ids alone, deterministically, and keeps what it was given.

    A row's outputs depend on its own unmasked tokens only, so a padded batch gives what single
    rows give: batching that swaps, drops or leaks rows shows in the answers. Implements the
    ``Session`` protocol, with the same refusals as the real ones.

    Args:
        labels: Columns of ``logits``.
        inputs: Names of the model's inputs.

    Attributes:
        shapes: ``(batch, seq)`` of each call, in order.
    """

    def __init__(
        self,
        labels: int = 2,
        inputs: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids"),
    ) -> None:
        self._labels = labels
        self._inputs = dict.fromkeys(inputs, 2)
        self._closed = False
        self.shapes: list[tuple[int, int]] = []

    def run(self, inputs: Inputs) -> Outputs:
        """Computes one batch; see ``Session.run``."""
        if self._closed:
            raise DeviceError("the session is closed")
        check_inputs(inputs, self._inputs)
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", np.ones_like(ids))
        self.shapes.append((ids.shape[0], ids.shape[1]))
        position = np.arange(1, ids.shape[1] + 1)
        mixed = ((ids * 31 + position * 17) % 97 * mask).sum(axis=1)
        columns = np.arange(1, self._labels + 1)
        logits = ((mixed[:, None] * columns) % 13 - 6).astype(np.float32)
        return {"logits": logits}

    def close(self) -> None:
        """Refuses further work; see ``Session.close``."""
        self._closed = True
