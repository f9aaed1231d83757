"""Exports a classifier to ONNX and proves it faithful: Checkpoint in, OnnxModel out."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder, load_model
from edgebert_export.errors import ExportError
from edgebert_runtime.encoder import Text
from edgebert_runtime.manifest import Task
from edgebert_runtime.onnx_session import OnnxSession

__all__ = ["ExportConfig", "OnnxModel", "Parity", "measure_parity", "to_onnx"]


class ExportConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to export to ONNX."""

    max_length: Annotated[
        int,
        Meta(
            ge=3, description="Longest input in tokens, special tokens included; the rest is cut."
        ),
    ] = 128
    first_token: Annotated[
        bool,
        Meta(
            description="Let the last layer compute the first token alone, which is all that a "
            "classifier reads of it."
        ),
    ] = True
    fold_token_types: Annotated[
        bool,
        Meta(description="Single texts: do without the input `token_type_ids`, which is always 0."),
    ] = True
    parity_texts: Annotated[
        int, Meta(ge=1, description="Texts on which ONNX is compared with PyTorch.")
    ] = 200
    max_parity_difference: Annotated[
        float,
        Meta(gt=0, description="Largest difference of raw outputs from PyTorch that passes."),
    ] = 1e-4


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file on disk.

    Attributes:
        path: The file.
        precision: Of the weights of the linear layers.
    """

    path: Path
    precision: Literal["fp32", "fp16", "int8"]

    def sha256(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def input_names(self) -> tuple[str, ...]:
        """Names of its inputs, in the graph's order."""
        import onnx

        graph = onnx.load(self.path, load_external_data=False).graph
        return tuple(value.name for value in graph.input)


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """How far ONNX's raw outputs are from PyTorch's.

    Attributes:
        texts: Texts compared, each alone and in a padded batch.
        shortest_tokens: Length of the shortest of them.
        longest_tokens: Length of the longest of them.
        max_difference: Largest absolute difference of a raw output.
        limit: The largest that passes.
    """

    texts: int
    shortest_tokens: int
    longest_tokens: int
    max_difference: float
    limit: float


def to_onnx(checkpoint: Checkpoint, task: Task, config: ExportConfig, out: Path) -> OnnxModel:
    """Writes the classifier as FP32 ONNX with free batch and sequence length, using Optimum.

    What ``config`` asks for is then computed with less work; see ``rewrite``.

    Raises:
        CheckpointError: The checkpoint cannot be loaded as a classifier for ``task``.
        ExportError: The result is not valid ONNX.
    """
    import onnx
    from optimum.exporters.onnx import export
    from optimum.exporters.tasks import TasksManager

    from edgebert_export.graph import OPSET

    model = load_model(checkpoint, task, attention="eager")
    describe = TasksManager.get_exporter_config_constructor(
        "onnx",
        model_type=checkpoint.model_type,
        task="text-classification",
        library_name="transformers",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of Python branches that BERT always takes
        export(model, describe(model.config, task="text-classification"), out, opset=OPSET)
    try:
        onnx.checker.check_model(str(out), full_check=True)
    except onnx.checker.ValidationError as exc:
        raise ExportError(f"Optimum wrote an ONNX file that is not valid: {exc}") from exc
    _rewrite(out, task, config)
    return OnnxModel(path=out, precision="fp32")


def _rewrite(path: Path, task: Task, config: ExportConfig) -> None:
    from edgebert_export.graph import open_graph, write_graph
    from edgebert_export.rewrite import fold_token_types, keep_first_token

    folding = config.fold_token_types and not task.text_pair
    if not (config.first_token or folding):
        return
    graph = open_graph(path)
    if config.first_token:
        graph = keep_first_token(graph)
    if folding:
        graph = fold_token_types(graph)
    write_graph(graph, path)


def measure_parity(
    checkpoint: Checkpoint,
    task: Task,
    model: OnnxModel,
    texts: Sequence[Text],
    config: ExportConfig,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Compares raw outputs with PyTorch's: each text alone, and all in padded batches.

    Args:
        checkpoint: What was exported.
        task: Its task.
        model: The export.
        texts: Real texts; up to ``config.parity_texts`` of them, spread over all lengths.
        config: The limit.
        on_progress: Called with texts done and texts in all.

    Raises:
        ExportError: A raw output differs by more than ``config.max_parity_difference``.
    """
    import torch

    torch_model: Any = load_model(checkpoint, task, attention="eager")
    encoder = checkpoint_encoder(checkpoint, max_length=config.max_length, text_pair=task.text_pair)
    session = OnnxSession(model.path.read_bytes())
    names = session.input_names
    rows = sorted(encoder.encode(texts), key=lambda row: len(row.ids))
    count = min(config.parity_texts, len(rows))
    rows = [rows[index] for index in np.linspace(0, len(rows) - 1, count).astype(int)]
    # Strides put short and long texts into one batch, so that padding is really exercised.
    stride = -(-count // 16)
    batches = [[row] for row in rows] + [rows[start::stride] for start in range(stride)]
    worst = 0.0
    done = 0
    for batch in batches:
        inputs = encoder.collate(batch)
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            expected = torch_model(**tensors).logits.numpy()
        found = session.run({name: inputs[name] for name in names})["logits"]
        difference = np.abs(found - expected)
        # NaN compares as neither more nor less; as infinity it is the breach that it is.
        worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max()))
        done += len(batch)
        if on_progress is not None:
            on_progress(done, 2 * count)
    session.close()
    if not worst <= config.max_parity_difference:
        raise ExportError(
            f"ONNX and PyTorch differ by {worst:.2e} on {count} texts, the limit is "
            f"{config.max_parity_difference:.0e}: the export is not faithful, nothing was shipped"
        )
    return Parity(
        texts=count,
        shortest_tokens=len(rows[0].ids),
        longest_tokens=len(rows[-1].ids),
        max_difference=worst,
        limit=config.max_parity_difference,
    )
