"""The recipe, the chain of stages, evaluation, the report, and the ``edgebert`` command."""

__all__ = ["STAGES"]

STAGES = (
    "finetune",
    "teach",
    "distill",
    "ablate",
    "onnx",
    "quantise",
    "engine",
    "bundle",
    "evaluate",
)
"""The stages of the chain, in order, as ``--until`` and ``--force`` name them."""
