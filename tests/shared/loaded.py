"""What takes a stage long to import, loaded at once and kept out of the collector's way."""

from __future__ import annotations

import gc
import importlib
import os

__all__ = ["load"]

# Not ONNX Runtime: it starts a thread when it is imported, which a fork would wait for at its end.
_MODULES = (
    "edgebert_export.cpu_kernels",
    "edgebert_export.distill",
    "edgebert_export.engine",
    "edgebert_export.teach",
    "edgebert_export.tuned_bundle",
    "edgebert_pipeline.compare_report",
    "edgebert_pipeline.history",
    "edgebert_pipeline.junit",
    "edgebert_pipeline.run",
    "edgebert_pipeline.tune",
    "accelerate",
    "datasets",
    "onnx.reference",
    "onnx.shape_inference",
    "optimum.exporters.onnx",
    "optimum.exporters.tasks",
    "pyarrow.parquet",
    "rich.progress",
    "sklearn.metrics",
    "torch",
    "torch.utils.data",
    "transformers.models.bert.modeling_bert",
    "transformers.models.distilbert.modeling_distilbert",
    "transformers.trainer",
)


def load() -> None:
    """Imports it all, and has the garbage collector never look at it again.

    A stage collects often, which otherwise takes a large part of the time of a tiny model's.
    """
    # What ``edgebert`` sets before any of it is loaded.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("edgebert_pipeline.cli", *_MODULES):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
