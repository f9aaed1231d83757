"""Builds an engine from an ONNX model, with the TensorRT that is given.

The model says in which precision each of its tensors is, and the engine keeps to it: networks are
strongly typed. RTX engines need no GPU to be built; all others are built on the GPU that runs them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from edgebert_runtime.errors import ModelRefusedError
from edgebert_runtime.manifest import Profile
from edgebert_runtime.tensorrt_api import Flavour, Network, TensorRT, faults_of_tensorrt

__all__ = ["BuildOptions", "Built", "build_engine", "make_logger", "needed_memory_bytes"]

_MIB = 2**20
_LIBRARY_MIB = 1700
"""What TensorRT's builder library takes of a memory that GPU and processor share, when it starts:
928 for the processor and 752 for the GPU on an Orin with 10.3 (the log in NVIDIA/TensorRT#4494),
1153 and 722 with 8.6.2 (#3640)."""
_SAID = 5
"""How many of the parser's errors a message repeats."""


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an engine is built; part of what names it in the cache.

    Attributes:
        workspace_mib: Most memory that one of its kernels may use for itself.
        version_compatible: Whether later TensorRT releases of the same major version can load
            it, together with the lean runtime of the release that built it; slower.
        hardware_compatible: Whether it runs on all GPUs from Ampere (compute capability 8.0) on,
            instead of the one kind it was built on; slower. Not on Jetson.
    """

    workspace_mib: int = 512
    version_compatible: bool = False
    hardware_compatible: bool = False


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """What a build gave.

    Attributes:
        engine: The serialised engine.
        timing_cache: What the next build on this device need not measure again; ``None`` if the
            flavour measures nothing.
        seconds: Of parsing and building.
    """

    engine: bytes
    timing_cache: bytes | None
    seconds: float


def needed_memory_bytes(
    model_bytes: int, options: BuildOptions, *, integrated: bool = False
) -> int:
    """Returns how much memory must be free to build an engine from a model of this size.

    The builder holds the model, the network made of it, kernels' weights in the layout it tries,
    and the engine, so about four times the model; and the workspace. ``benchmarks/engine_cost.py``
    measures it for TensorRT for RTX.

    Args:
        model_bytes: Size of the model.
        options: How the engine is built.
        integrated: Whether TensorRT's own library, too, takes its share of that memory: it does
            where a GPU uses the processor's, as on a Jetson.
    """
    library = _LIBRARY_MIB if integrated else 0
    return 4 * model_bytes + (options.workspace_mib + 256 + library) * _MIB


def build_engine(
    trt: TensorRT,
    flavour: Flavour,
    model: bytes,
    profiles: Sequence[Profile],
    options: BuildOptions | None = None,
    *,
    timing_cache: bytes | None = None,
    log: Callable[[str], None] = lambda line: None,
    verbose: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Built:
    """Builds an engine.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        flavour: Which of the two it is.
        model: An ONNX model in which every tensor has the type that it is to be computed in.
        profiles: Shapes that the engine must serve.
        options: How to build it.
        timing_cache: Of an earlier build on the same device.
        log: Called with each line that TensorRT logs.
        verbose: Called with each message that is for TensorRT's own developers, as it is: among
            them the list of the engine's kernels, with the ONNX nodes that went into each. The
            engine is the same size with it (RTX 1.7.1).
        on_progress: Called with steps done and steps known so far.

    Raises:
        ModelRefusedError: This TensorRT does not take the model.
        DeviceError: There is no GPU where one is needed, or the build failed.
    """
    from concurrent.futures import ThreadPoolExecutor, wait  # for builds alone

    start = time.monotonic()
    errors: list[str] = []
    raised: list[Exception] = []
    stop = threading.Event()

    def kept(call: Callable[..., None]) -> Callable[..., None]:
        """Keeps what a callback raises: the binding would swallow it."""

        def guarded(*args: Any) -> None:
            try:
                call(*args)
            except Exception as exc:
                raised.append(exc)

        return guarded

    def build() -> tuple[bytes, bytes | None]:
        with faults_of_tensorrt("TensorRT cannot build the engine", errors):
            tell = None if verbose is None else kept(verbose)
            logger = make_logger(trt, kept(log), errors, tell)
            monitor = _make_monitor(
                trt, kept(on_progress), lambda: not raised and not stop.is_set()
            )
            how = options or BuildOptions()
            return _build(
                trt, flavour, model, profiles, how, timing_cache, logger, monitor, tell is not None
            )

    # The library runs beside this thread, so that ^C comes here, where nobody swallows it.
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(build)
        try:
            wait([job])
        except BaseException:
            stop.set()
            raise
    if raised:
        raise raised[0]
    engine, measured = job.result()
    return Built(engine=engine, timing_cache=measured, seconds=time.monotonic() - start)


def _build(
    trt: TensorRT,
    flavour: Flavour,
    model: bytes,
    profiles: Sequence[Profile],
    options: BuildOptions,
    timing_cache: bytes | None,
    logger: Any,
    monitor: Any,
    detailed: bool,
) -> tuple[bytes, bytes | None]:
    """Returns the engine, and the timings to keep."""
    builder = trt.Builder(logger)
    # In TensorRT 11 there are no others, and the flag may go.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [f"{e.desc()} (node {e.node_name()}, {e.node_operator()})" for e in found]
        raise ModelRefusedError(f"TensorRT does not take the model: {'; '.join(said[:_SAID])}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
    # One stream: a BERT's kernels follow each other, and those that do not (reshaping queries, keys
    # and values) take less time than streams take to wait for each other. As many kernels, and no
    # waits where RTX 1.7.1 makes 2 to 22 (docs/gpu.md).
    config.max_aux_streams = 0
    if detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in profiles:
        config.add_optimization_profile(_profile(trt, builder, network, profile))
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # A runtime inside would be code from a file, which the session does not allow.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if flavour == "tensorrt":  # for RTX, a timing cache would ask for a GPU
        for timings in (timing_cache or b"", b""):  # what is of another device is refused
            known = config.create_timing_cache(timings)
            if known is not None and config.set_timing_cache(known, False):
                break
    config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError("it does not say why")
    measured = config.get_timing_cache() if flavour == "tensorrt" else None
    kept = None if measured is None else measured.serialize()
    return bytes(engine), None if kept is None else bytes(kept)


def _profile(trt: TensorRT, builder: Any, network: Network, profile: Profile) -> Any:
    """Makes an optimisation profile: the same shapes for every input."""
    made = builder.create_optimization_profile()
    shapes = (
        [1, 1],
        [profile.opt_batch, profile.opt_seq],
        [profile.max_batch, profile.max_seq],
    )
    for index in range(network.num_inputs):
        made.set_shape(network.get_input(index).name, *(trt.Dims(shape) for shape in shapes))
    return made


def make_logger(
    trt: TensorRT,
    log: Callable[[str], None],
    errors: list[str],
    verbose: Callable[[str], None] | None = None,
) -> Any:
    """Makes a logger for TensorRT that passes on its lines and collects its errors.

    ``verbose`` gets what is for TensorRT's own developers, with its line breaks.
    """
    levels = trt.ILogger
    wrong = (levels.INTERNAL_ERROR, levels.ERROR)
    names = {**dict.fromkeys(wrong, "error"), levels.WARNING: "warning", levels.INFO: "info"}
    base: Any = levels

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity == levels.VERBOSE:
                if verbose is not None:
                    verbose(str(msg))
                return
            line = " ".join(str(msg).split())
            if severity in wrong:
                errors.append(line)
            if severity in names:
                log(f"{names[severity]}: {line}")

    return Logger()


def _make_monitor(
    trt: TensorRT, on_progress: Callable[[int, int], None], goes_on: Callable[[], bool]
) -> Any:
    """Makes a progress monitor: steps done of all phases, of the steps known so far.

    ``goes_on`` says after each step whether the build does.
    """
    base: Any = trt.IProgressMonitor
    done: dict[str, int] = {}
    total: dict[str, int] = {}

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            total[phase_name], done[phase_name] = num_steps, 0

        def step_complete(self, phase_name: str, step: int) -> bool:
            done[phase_name] = min(step + 1, total.get(phase_name, 0))
            on_progress(sum(done.values()), sum(total.values()))
            return goes_on()

        def phase_finish(self, phase_name: str) -> None:
            done[phase_name] = total.get(phase_name, 0)
            on_progress(sum(done.values()), sum(total.values()))

    return Monitor()
