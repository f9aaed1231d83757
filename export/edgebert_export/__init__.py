"""The export stages: plain functions from one frozen dataclass to the next.

::

    Checkpoint ─finetune─▶ Checkpoint ─to_onnx─▶ OnnxModel ─quantise_cpu─▶ OnnxModel
    OnnxModel ─quantise_gpu─▶ OnnxModels ─build_rtx_engine─▶ engines
    OnnxModels, engines, Checkpoint ─write_bundle─▶ Bundle

One module per stage. Heavy libraries are imported inside the functions that use them, so that
looking at a recipe or at a bundle does not load torch.
"""
