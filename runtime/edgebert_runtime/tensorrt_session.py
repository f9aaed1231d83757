"""The session over TensorRT: ``tensorrt`` 10.3 to 11.x, and ``tensorrt_rtx``.

Memory is allocated when the session starts, once for each optimisation profile, and never again:
pinned memory on the host, the same on the GPU, and one block for the activations of whichever
profile is at work. A batch is copied in, computed and copied out on a stream of the session's
own; the second time that a shape comes, all three are recorded as a CUDA graph, which later
batches of that shape launch as one piece.

A graph fixes its context's shapes, so each has an execution context of its own (NVIDIA's advice,
NVIDIA/TensorRT#3798); they share the block for activations, as only one works at a time.
TensorRT for RTX records graphs by itself, and keeps the kernels that it compiles on the device in
a runtime cache.
"""

from __future__ import annotations

import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgebert_runtime.cache import write_whole
from edgebert_runtime.cuda import Cuda
from edgebert_runtime.errors import BundleError, DeviceError
from edgebert_runtime.manifest import Profile
from edgebert_runtime.onnx_session import check_inputs
from edgebert_runtime.profiles import padded_length, padded_rows, parts
from edgebert_runtime.session import Inputs, Outputs
from edgebert_runtime.tensorrt_api import (
    Engine,
    ExecutionContext,
    Flavour,
    RtxEngine,
    RuntimeCache,
    TensorRT,
    TensorRTForRTX,
    faults_of_tensorrt,
)
from edgebert_runtime.tensorrt_build import make_logger

__all__ = ["TensorRTSession"]

_MOST_GRAPHS = 64
"""CUDA graphs that are kept, each with its context; the one unused for longest goes first."""

_TYPES: dict[str, type[np.generic]] = {
    "INT32": np.int32,
    "INT64": np.int64,
    "FLOAT": np.float32,
    "HALF": np.float16,
}


class TensorRTSession:
    """Runs one engine. Implements the ``Session`` protocol.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        flavour: Which of the two it is.
        engine: The serialised engine. It is executable code: give none whose hash was not checked.
        profiles: What the engine was built for.
        cuda: The GPU; the session closes it.
        use_graphs: Whether to record CUDA graphs.
        runtime_cache: For ``rtx``: the file in which the kernels compiled on this device are
            kept; read if it is there, written by ``close``.
        specialise_at_once: For ``rtx``: whether a shape that is new waits for the kernels that are
            compiled for it. Without it, it is computed by kernels for any shape until they are
            there, so that no batch is late; who measures or checks kernels means the other ones.
        lean_runtimes: For a version-compatible engine of an earlier release: names under which the
            library of that release that TensorRT runs it with is looked for. It comes from the
            system, never from an engine.
        log: Called with each line that TensorRT logs.

    Raises:
        DeviceError: The engine cannot be loaded on this device, or memory is short.
        BundleError: The engine is not one of a text classifier with these profiles.
    """

    def __init__(
        self,
        trt: TensorRT,
        flavour: Flavour,
        engine: bytes,
        profiles: Sequence[Profile],
        cuda: Cuda,
        *,
        use_graphs: bool = True,
        runtime_cache: Path | None = None,
        specialise_at_once: bool = False,
        lean_runtimes: Sequence[str] = (),
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._lock = threading.Lock()
        self._cuda = cuda
        self._closed = False
        self._profiles = tuple(profiles)
        self._flavour = flavour
        self._log = log
        self._use_graphs = use_graphs and flavour == "tensorrt"  # RTX has its own
        self._seen: OrderedDict[tuple[int, int, int], _Graph | None] = OrderedDict()
        errors: list[str] = []
        try:
            with cuda.current(), faults_of_tensorrt("TensorRT cannot load the engine", errors):
                # TensorRT does not keep these alive.
                self._kept: list[Any] = [make_logger(trt, log, errors)]
                self._kept.append(trt.Runtime(self._kept[0]))
                self._engine: Engine = self._load(engine, lean_runtimes)
                self._tensors = _tensors(trt, self._engine, self._profiles)
                self._make_contexts = _ContextMaker(
                    trt,
                    flavour,
                    self._engine,
                    use_graphs=use_graphs,
                    runtime_cache=runtime_cache,
                    specialise_at_once=specialise_at_once,
                )
                self._stream = cuda.stream()
                size = max(
                    self._engine.get_device_memory_size_for_profile_v2(index)
                    for index in range(len(self._profiles))
                )
                self._activations = (cuda.device_memory(size), size)
                self._slots = [_Slot(profile, self._tensors, cuda) for profile in self._profiles]
                self._contexts = [self._new_context(index) for index in range(len(self._slots))]
        except BaseException as exc:
            # What waits in its frames would outlive the memory that it uses.
            traceback.clear_frames(exc.__traceback__)
            with suppress(DeviceError):  # the first fault is the one to tell
                self._release()
            raise

    def _load(self, data: bytes, lean_runtimes: Sequence[str]) -> Engine:
        """Deserialises the engine, with the lean runtime of its own release if it needs one.

        A file may be there under one of the names and be of another release, which refuses the
        engine; the next name is tried then.
        """
        for name in lean_runtimes:
            lean = self._kept[1].load_runtime(name)
            engine = None if lean is None else lean.deserialize_cuda_engine(data)
            if engine is not None:
                self._kept.append(lean)
                return cast("Engine", engine)
        if lean_runtimes:
            raise DeviceError(
                f"the lean runtime of the TensorRT that built the engine is not installed (tried "
                f"{', '.join(lean_runtimes)}): install it, or build the engine anew"
            )
        engine = self._kept[1].deserialize_cuda_engine(data)
        if engine is None:
            raise RuntimeError("it does not say why")
        return cast("Engine", engine)

    @property
    def input_names(self) -> set[str]:
        """Names of the engine's inputs."""
        return {tensor.name for tensor in self._tensors if tensor.is_input}

    @faults_of_tensorrt("TensorRT cannot prepare a batch")
    def _new_context(self, index: int) -> ExecutionContext:
        """Makes a context for a profile, with its buffers, and waits until it can be used."""
        context = self._make_contexts()
        _check(
            context.set_optimization_profile_async(index, int(self._stream)),
            f"choose profile {index}",
        )
        self._stream.wait()
        context.set_device_memory(*self._activations)
        for tensor in self._tensors:
            address = self._slots[index].device[tensor.name]
            _check(context.set_tensor_address(tensor.name, address), f"place {tensor.name}")
        return context

    def run(self, inputs: Inputs) -> Outputs:
        """Computes one batch; see ``Session.run``.

        Raises:
            InputError: A name, a type or a shape is not what the model takes, or the rows are
                longer than the longest profile.
            DeviceError: The GPU failed, or the session is closed.
        """
        with self._lock:
            if self._closed:
                raise DeviceError("the session is closed")
            check_inputs(inputs, dict.fromkeys(self.input_names, 2))
            rows, tokens = next(iter(inputs.values())).shape
            outputs = {
                tensor.name: np.empty((rows, *tensor.row_shape), dtype=np.float32)
                for tensor in self._tensors
                if not tensor.is_input
            }
            with self._cuda.current():
                for start, stop, index in parts(self._profiles, rows, tokens):
                    part = {name: array[start:stop] for name, array in inputs.items()}
                    for name, found in self._run_part(index, part).items():
                        outputs[name][start:stop] = found
            return outputs

    def _run_part(self, index: int, inputs: Inputs) -> dict[str, NDArray[Any]]:
        """Computes what one profile holds; returns views that the next call overwrites."""
        slot = self._slots[index]
        rows, tokens = next(iter(inputs.values())).shape
        shape = (padded_rows(rows, slot.profile), padded_length(tokens, slot.profile))
        slot.fill(inputs, shape)
        key = (index, *shape)
        graph = self._seen.get(key)
        if graph is not None:
            self._stream.launch(graph.recorded)
        else:
            self._enqueue(self._contexts[index], slot, shape, new_shape=True)
        self._stream.wait()
        if self._use_graphs:
            self._remember(key)
        return {t.name: slot.view(t, shape)[:rows] for t in self._tensors if not t.is_input}

    @faults_of_tensorrt("TensorRT cannot compute a batch")
    def _enqueue(
        self, context: ExecutionContext, slot: _Slot, shape: tuple[int, int], *, new_shape: bool
    ) -> None:
        """Enqueues the copies in, the model, and the copies out."""
        for tensor in self._tensors:
            if tensor.is_input:
                self._stream.to_device(slot.device[tensor.name], slot.view(tensor, shape))
                if new_shape:
                    _check(context.set_input_shape(tensor.name, shape), f"take a batch of {shape}")
        _check(context.execute_async_v3(int(self._stream)), "run the engine")
        for tensor in self._tensors:
            if not tensor.is_input:
                self._stream.to_host(slot.view(tensor, shape), slot.device[tensor.name])

    def _remember(self, key: tuple[int, int, int]) -> None:
        """Notes that a shape came; the second time, its work is recorded."""
        if key in self._seen and self._seen[key] is None:
            try:
                self._seen[key] = self._record(key[0], key[1:])
            except DeviceError as exc:  # the batch was computed; it goes on without graphs
                self._use_graphs = False
                self._log(f"warning: going on without CUDA graphs: {exc}")
        self._seen.setdefault(key, None)
        self._seen.move_to_end(key)
        while len(self._seen) > _MOST_GRAPHS:
            _, graph = self._seen.popitem(last=False)
            if graph is not None:
                self._stream.destroy(graph.recorded)

    def _record(self, index: int, shape: tuple[int, int]) -> _Graph:
        """Records the work for a shape as a graph, with a context of its own."""
        context, slot = self._new_context(index), self._slots[index]
        # The first run after a change of shape does what must not be recorded.
        self._enqueue(context, slot, shape, new_shape=True)
        self._stream.wait()
        recorded = self._stream.capture(
            lambda: self._enqueue(context, slot, shape, new_shape=False)
        )
        return _Graph(recorded, context)

    def close(self) -> None:
        """Frees what the session holds; see ``Session.close``."""
        with self._lock:
            if not self._closed:
                self._release()

    def _release(self) -> None:
        """Frees everything: graphs and contexts, the engine, and then the memory they used."""
        self._closed = True
        with ExitStack() as last:  # in reverse, and each of them whatever becomes of the others
            last.callback(self._cuda.close)
            last.enter_context(self._cuda.current())
            last.callback(self._forget)
            for graph in self._seen.values():
                if graph is not None:
                    last.callback(self._stream.destroy, graph.recorded)
            if hasattr(self, "_make_contexts"):
                last.callback(self._make_contexts.save_runtime_cache)

    def _forget(self) -> None:
        """Lets go of TensorRT's objects, contexts before their engine."""
        self._seen.clear()
        for name in ("_contexts", "_make_contexts", "_engine", "_kept"):
            self.__dict__.pop(name, None)


class _Graph:
    """A recorded graph, and the context that it belongs to."""

    def __init__(self, recorded: Any, context: ExecutionContext) -> None:
        self.recorded = recorded
        self.context = context


class _Tensor:
    """An input or an output of the engine; ``row_shape`` is what one row of an output is."""

    def __init__(
        self, name: str, dtype: type[np.generic], row_shape: tuple[int, ...], *, is_input: bool
    ) -> None:
        self.name = name
        self.dtype = np.dtype(dtype)
        self.row_shape = row_shape
        self.is_input = is_input

    def values(self, rows: int, tokens: int) -> int:
        """How many values a batch has."""
        return rows * (tokens if self.is_input else int(np.prod(self.row_shape)))


class _Slot:
    """The buffers of one profile, on the host and on the GPU, as large as its largest batch."""

    def __init__(self, profile: Profile, tensors: Sequence[_Tensor], cuda: Cuda) -> None:
        self.profile = profile
        self._tensors = tensors
        self.device: dict[str, int] = {}
        self._host: dict[str, NDArray[Any]] = {}
        for tensor in tensors:
            size = tensor.values(profile.max_batch, profile.max_seq) * tensor.dtype.itemsize
            self.device[tensor.name] = cuda.device_memory(size)
            self._host[tensor.name] = cuda.pinned_memory(size).view(tensor.dtype)

    def view(self, tensor: _Tensor, shape: tuple[int, int]) -> NDArray[Any]:
        """Returns the host's buffer of a tensor as a batch of ``shape``."""
        rows, tokens = shape
        row_shape = (tokens,) if tensor.is_input else tensor.row_shape
        flat = self._host[tensor.name][: tensor.values(rows, tokens)]
        return flat.reshape((rows, *row_shape))

    def fill(self, inputs: Inputs, shape: tuple[int, int]) -> None:
        """Copies a batch into the host's buffers, and fills what it does not reach.

        Behind a row's tokens come zeros, which the mask hides. Rows of padding repeat the first
        one: what is computed for them was asked for anyway, so that they can neither hold what an
        earlier batch left nor, as rows with nothing in their mask might, give NaN.
        """
        for tensor in self._tensors:
            if tensor.is_input:
                view, given = self.view(tensor, shape), inputs[tensor.name]
                rows, tokens = given.shape
                view[:rows, :tokens] = given
                view[:rows, tokens:] = 0
                view[rows:] = view[0]


class _ContextMaker:
    """Makes execution contexts that take their activations' memory from the session."""

    def __init__(
        self,
        trt: TensorRT,
        flavour: Flavour,
        engine: Engine,
        *,
        use_graphs: bool,
        runtime_cache: Path | None,
        specialise_at_once: bool,
    ) -> None:
        self._engine = engine
        self._how: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._cache: RuntimeCache | None = None
        self._path = runtime_cache
        if flavour == "rtx":
            rtx = cast("TensorRTForRTX", trt)
            graphs = rtx.CudaGraphStrategy
            kernels = rtx.DynamicShapesKernelSpecializationStrategy
            config = cast("RtxEngine", engine).create_runtime_config()
            config.set_execution_context_allocation_strategy(self._how)
            config.cuda_graph_strategy = (
                graphs.WHOLE_GRAPH_CAPTURE if use_graphs else graphs.DISABLED
            )
            config.dynamic_shapes_kernel_specialization_strategy = (
                kernels.EAGER if specialise_at_once else kernels.LAZY
            )
            self._cache = config.create_runtime_cache()
            if runtime_cache is not None:
                # What another driver or GPU left is refused by the library, and made again.
                with suppress(OSError):
                    self._cache.deserialize(runtime_cache.read_bytes())
            config.set_runtime_cache(self._cache)
            self._how = config

    def __call__(self) -> ExecutionContext:
        context = self._engine.create_execution_context(self._how)
        if context is None:
            raise DeviceError("TensorRT cannot make an execution context: is memory short?")
        return context

    def save_runtime_cache(self) -> None:
        """Keeps the kernels that were compiled on this device; without them it compiles anew."""
        if self._cache is None or self._path is None:
            return
        with suppress(Exception):  # read-only or full, or TensorRT has none to give
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, bytes(self._cache.serialize()))


def _tensors(trt: TensorRT, engine: Engine, profiles: Sequence[Profile]) -> list[_Tensor]:
    """Lists what goes into and comes out of an engine.

    Raises:
        BundleError: It is not what a text classifier with these profiles has.
    """
    if engine.num_optimization_profiles != len(profiles):
        raise BundleError(
            f"the engine has {engine.num_optimization_profiles} profiles, the bundle lists "
            f"{len(profiles)}: build it anew"
        )
    found = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = _TYPES.get(engine.get_tensor_dtype(name).name)
        shape = engine.get_tensor_shape(name)
        lengths = [shape[axis] for axis in range(len(shape))]
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        if dtype is None or len(lengths) < 2 or (not is_input and -1 in lengths[1:]):
            raise BundleError(f"the engine's {name} is no tensor of a text classifier: {lengths}")
        found.append(_Tensor(name, dtype, tuple(lengths[1:]), is_input=is_input))
    return found


def _check(done: bool, what: str) -> None:
    """Raises ``DeviceError`` if TensorRT said that it could not do something."""
    if not done:
        raise DeviceError(f"TensorRT could not {what}")
