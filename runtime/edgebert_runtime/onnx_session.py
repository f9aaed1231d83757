"""The session over ONNX Runtime, on a CPU or on a CUDA GPU."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgebert_runtime.device import import_onnxruntime
from edgebert_runtime.errors import BundleError, DeviceError, InputError
from edgebert_runtime.processor import int8_products_saturate
from edgebert_runtime.session import Collated, Inputs, Outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

__all__ = ["SLOWER_FUSED", "OnnxSession"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_INT64 = np.dtype(np.int64)
SLOWER_FUSED = {"cpu": ["SkipLayerNormFusion"], "cuda": []}
"""Fusions that cost time: on a CPU, the sum and the LayerNorm that this fuses are vectorised, the
fused kernel is not (docs/performance.md)."""


class OnnxSession:
    """Runs one ONNX model. Implements the ``Session`` protocol.

    Args:
        model: The ONNX file's bytes, or where it lies, which takes much less time and memory.
        device: Where to run; the session never falls back to another device.
        intra_op_threads: Threads for one operator; ``None`` leaves it to ONNX Runtime (one per
            physical core).
        weights: Values of the initializers that ``model`` declares as external data; they are
            used as they are, and not copied.
        simulated: Whether ``model`` holds Q/DQ for TensorRT, which is to be computed as it is
            written, and not in a CPU's 8-bit kernels.
        on_parsed: Called once the model is parsed. What is left, half the time or more, ONNX
            Runtime (1.31; not every older release) does without the interpreter's lock, so that
            other threads can run Python meanwhile.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        DeviceError: The device cannot be used.
        BundleError: It is not a model that ONNX Runtime can load.
    """

    def __init__(
        self,
        model: bytes | str,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        intra_op_threads: int | None = None,
        weights: Mapping[str, NDArray[Any]] | None = None,
        simulated: bool = False,
        on_parsed: Callable[[], object] = lambda: None,
    ) -> None:
        ort = import_onnxruntime()
        provider = _PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise DeviceError(
                f"this ONNX Runtime ({ort.__version__}) has no {provider}; for a GPU install "
                "edgebert-runtime[gpu] instead of [cpu]"
            )
        if device == "cuda":
            _preload_cuda(ort)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only; they reach the caller as exceptions
        # A model may name files with its weights: none outside its directory is read. Before 1.24,
        # ONNX Runtime reads any that a model names, unless it is given bytes.
        version = [int(part) for part in ort.__version__.split(".")[:2]]
        if not isinstance(model, bytes) and version < [1, 24]:
            with open(model, "rb") as file:
                model = file.read()
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", os.devnull
        )
        if simulated:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        elif int8_products_saturate():
            # The answers would depend on the processor. Where they do not, this would cost half
            # of the speed (docs/decisions/0016).
            options.add_session_config_entry("session.x64quantprecision", "1")
        # So long do idle threads look for work before they sleep: longer than from one operator to
        # the next, or from one text to the next of a caller who has many (decision 0023). Releases
        # that do not know the entry ignore it.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
        if intra_op_threads is not None:
            options.intra_op_num_threads = intra_op_threads
        if weights:
            values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers(list(weights), values)
        try:
            session = ort.InferenceSession(
                model,
                options,
                providers=[provider],
                disabled_optimizers=_then(SLOWER_FUSED[device], on_parsed),
            )
        except Exception as exc:
            if device == "cpu":
                raise BundleError(f"ONNX Runtime cannot load the model: {exc}") from exc
            raise DeviceError(f"ONNX Runtime cannot start on {device}: {exc}") from exc
        # ONNX Runtime falls back to the CPU with a warning only; an explicit device must not.
        if provider not in session.get_providers():
            raise DeviceError(
                f"ONNX Runtime was asked for {provider} and loaded "
                f"{', '.join(session.get_providers())}; check the driver (edgebert-rt doctor) and "
                "CUDA's libraries (pip install 'onnxruntime-gpu[cuda,cudnn]' brings them)"
            )
        # Some models take INT32, which TensorRT prefers; above the seam ids are INT64 always.
        self._narrow = {s.name for s in session.get_inputs() if s.type == "tensor(int32)"}
        self._ranks = {spec.name: len(spec.shape) for spec in session.get_inputs()}
        self._outputs = [spec.name for spec in session.get_outputs()]
        self._session: Any = session

    @property
    def input_names(self) -> set[str]:
        """Names of the model's inputs."""
        return set(self._ranks)

    def run(self, inputs: Inputs) -> Outputs:
        """Computes one batch; see ``Session.run``."""
        session = self._session
        if session is None:
            raise DeviceError("the session is closed")
        if type(inputs) is not Collated:
            check_inputs(inputs, self._ranks)
        given: Mapping[str, NDArray[Any]] = inputs
        try:
            if self._narrow:
                given = {**inputs, **{name: inputs[name].astype(np.int32) for name in self._narrow}}
            outputs = session.run(self._outputs, given)
        except Exception as exc:
            check_inputs(inputs, self._ranks)  # of another model's encoder, maybe
            raise DeviceError(f"ONNX Runtime failed on a batch: {exc}") from exc
        if len(outputs) == 1:
            return {self._outputs[0]: outputs[0]}
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        """Frees the model; see ``Session.close``."""
        self._session = None


def _then(names: list[str], call: Callable[[], object]) -> Iterator[str]:
    """Yields names of fusions, which a session reads once it has parsed the model, then calls."""
    yield from names
    call()


def _preload_cuda(ort: Any) -> None:
    """Loads CUDA's libraries where pip put them, which no loader searches.

    What is found nowhere is left to the session, which then has no GPU; ONNX Runtime prints it.
    """
    from contextlib import redirect_stdout

    with redirect_stdout(sys.stderr):
        if hasattr(ort, "preload_dlls"):  # from ONNX Runtime 1.21 on
            ort.preload_dlls()


def check_inputs(inputs: Inputs, ranks: dict[str, int]) -> None:
    """Checks names, types and shapes of one batch against the model's inputs.

    Raises:
        InputError: Something is missing, left over, of another type, or of another shape.
    """
    if inputs.keys() != ranks.keys():
        raise InputError(f"the model takes {sorted(ranks)}, it was given {sorted(inputs)}")
    shape: tuple[int, ...] = ()
    for name, array in inputs.items():
        found = array.shape
        if array.dtype != _INT64 or len(found) != ranks[name] or 0 in found:
            raise InputError(
                f"{name} must be int64[batch, seq] and not empty, got {array.dtype}{found}"
            )
        if shape and found != shape:
            raise InputError(f"inputs differ in shape: {shape} and {found}")
        shape = found
