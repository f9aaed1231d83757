"""Chooses from which score a label applies, on validation rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder
from edgebert_export.dataset import Example
from edgebert_export.to_onnx import OnnxModel
from edgebert_runtime.classifier import Classifier
from edgebert_runtime.manifest import Task
from edgebert_runtime.onnx_session import OnnxSession

__all__ = ["choose_thresholds"]


def choose_thresholds(
    checkpoint: Checkpoint,
    task: Task,
    model: OnnxModel,
    examples: Sequence[Example],
    *,
    max_length: int,
) -> tuple[float, ...]:
    """Returns, for each label, the threshold with the best F1 on ``examples``.

    A label that no example has keeps 0.5.
    """
    from sklearn.metrics import precision_recall_curve

    encoder = checkpoint_encoder(
        checkpoint,
        max_length=max_length,
        text_pair=task.text_pair,
        input_names=model.input_names(),
    )
    with Classifier(OnnxSession(model.path.read_bytes()), encoder, task) as classifier:
        scores = classifier.scores([example.text for example in examples])
    thresholds = []
    for index in range(len(task.labels)):
        truth = [index in example.labels for example in examples]
        if not any(truth):
            thresholds.append(0.5)
            continue
        precision, recall, candidates = precision_recall_curve(truth, scores[:, index])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(f1[:-1].argmax())
        # Halfway to the next lower score: rounding on another device then changes nothing.
        below = candidates[best - 1] if best else 0.0
        thresholds.append(float((candidates[best] + below) / 2))
    return tuple(thresholds)
