"""A bundle's engines on this machine: finding, building, measuring and opening them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

import edgebert_runtime
from edgebert_runtime.cache import remember_right, write_whole
from edgebert_runtime.cuda import Cuda
from edgebert_runtime.engine import (
    EngineKey,
    bundled_keys,
    lean_runtimes,
    unbuildable,
    unusable,
    wanted_key,
)
from edgebert_runtime.engine_cache import CachedEngine, EngineCache
from edgebert_runtime.errors import BundleError, DeviceError, InputError, ModelRefusedError
from edgebert_runtime.known_answers import verify
from edgebert_runtime.manifest import Manifest, Profile, Variant
from edgebert_runtime.tensorrt_api import FLAVOURS, Flavour, import_tensorrt
from edgebert_runtime.tensorrt_build import BuildOptions, build_engine, needed_memory_bytes
from edgebert_runtime.tensorrt_session import TensorRTSession

if TYPE_CHECKING:
    from edgebert_runtime.bundle import Bundle
    from edgebert_runtime.facts import DeviceFacts

__all__ = [
    "BuiltEngines",
    "EngineTiming",
    "Preference",
    "arithmetic_of",
    "available_engines",
    "build_engines",
    "fastest",
    "measure_and_remember",
    "measure_engines",
    "open_engine",
    "open_verified",
    "preferred_variants",
    "read_preference",
    "remember_preference",
    "variants_for",
]

_MIB = 2**20
_ROUNDS = 30
_WARM_UP = 5
_SEED = 7
_TURNS = 3
"""Of the known answers: the second time that a shape comes, its work is recorded as a CUDA graph,
which the third time runs."""


class EngineTiming(msgspec.Struct, frozen=True, kw_only=True):
    """How fast an engine served batches on this machine.

    Attributes:
        variant: Whose engine.
        profile: The shapes that it was timed for; the batch had the profile's ``opt`` shape.
        p50_ms: Median time of a batch: copies, model, and waiting.
        p99_ms: What 99 of 100 batches stayed under.
    """

    variant: str
    profile: Profile
    p50_ms: float
    p99_ms: float


class BuiltEngines(msgspec.Struct, frozen=True, kw_only=True):
    """What ``build_engines`` made of a bundle's variants.

    Attributes:
        keys: Of the engines that are there now, by variant.
        failures: Why there is none, by variant.
    """

    keys: dict[str, EngineKey]
    failures: dict[str, str]


class Preference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which variant was the fastest on this machine.

    Attributes:
        engine: Of the variant; the measurement holds for its TensorRT and GPU alone.
        variant: Its name.
        timings: What was measured.
        gpu: Name of the GPU; an engine for RTX runs on many, and its key names none.
        power_mode: Of the Jetson, at that time; in another, another may be the fastest.
        compared: Names of the variants that were in the running.
    """

    engine: EngineKey
    variant: str
    timings: tuple[EngineTiming, ...]
    gpu: str | None = None
    power_mode: str | None = None
    compared: tuple[str, ...] = ()

    def holds_for(self, keys: dict[str, EngineKey]) -> bool:
        """Whether these engines, and no others, were compared."""
        return set(self.compared) == set(keys) and keys.get(self.variant) == self.engine


def available_engines(bundle: Bundle, cache: EngineCache) -> list[EngineKey]:
    """Lists the engines that are there for a bundle: those it brings, and those in the cache."""
    return [*bundled_keys(bundle.manifest), *(entry.key for entry in cache.entries())]


def variants_for(manifest: Manifest, flavour: Flavour) -> list[Variant]:
    """Lists the variants of a bundle that are for a flavour of TensorRT."""
    return [variant for variant in manifest.variants if flavour in variant.devices]


def read_preference(
    bundle: Bundle, flavour: Flavour, facts: DeviceFacts, cache: EngineCache
) -> Preference | None:
    """Returns what was measured of a bundle on this machine, as it is now; ``None`` if nothing."""
    if unusable(flavour, facts) is not None:
        return None
    try:
        data = cache.preference(bundle.digest, flavour).read_bytes()
        preference = msgspec.json.decode(data, type=Preference)
        variant = bundle.manifest.variant(preference.variant)
    except (OSError, ValueError, BundleError):  # never measured, or not written by this edgebert
        return None
    wanted = wanted_key(bundle.manifest, variant, flavour, facts)
    if facts.gpu is None or preference.gpu != facts.gpu.name:
        return None
    if preference.power_mode != _power_mode(facts):
        return None
    same = ("flavour", "version", "platform", "compute_capability", "model_sha256")
    if any(getattr(preference.engine, name) != getattr(wanted, name) for name in same):
        return None
    return preference


def preferred_variants(bundle: Bundle, cache: EngineCache, facts: DeviceFacts) -> dict[str, str]:
    """Returns the variant that was measured to be the fastest on this machine, by flavour."""
    found = {flavour: read_preference(bundle, flavour, facts, cache) for flavour in FLAVOURS}
    return {flavour: preference.variant for flavour, preference in found.items() if preference}


def build_engines(
    bundle: Bundle,
    flavour: Flavour,
    facts: DeviceFacts,
    cache: EngineCache,
    *,
    variants: Sequence[Variant] | None = None,
    options: BuildOptions | None = None,
    first_only: bool = False,
    force: bool = False,
    log: Callable[[str], None] = lambda line: None,
    say: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    available_bytes: Callable[[], int | None] | None = None,
    trt: Any = None,
) -> BuiltEngines:
    """Builds the engines of a bundle that are not in the cache yet.

    One that cannot be built does not keep the others from it: TensorRT may take a model in FP16
    and not in INT8 (NVIDIA/TensorRT#4832, on Orin).

    Args:
        bundle: Whose models.
        flavour: Of TensorRT.
        facts: About this machine.
        cache: Where engines are kept.
        variants: Which; all that are for the flavour if left out.
        options: How.
        first_only: Whether one engine will do: of the first of ``variants`` that can be built.
        force: Whether to build engines anew that are there, and to measure kernels anew for them.
        log: Called with each line that TensorRT logs.
        say: Called with what is being done.
        on_progress: Called with a build's steps done and known.
        available_bytes: Tells how much memory is free, ``None`` if nobody knows.
        trt: The flavour's module; it is imported if left out.

    Raises:
        InputError: The flavour or this machine does not have these options.
        DeviceError: This machine cannot build them, has too little memory free, or has a TensorRT
            that does not take the models: not a single one.
        BundleError: The bundle has nothing to build them from.
    """
    options = options or BuildOptions()
    refusal = unbuildable(flavour, facts, options)
    if refusal is not None:
        raise InputError(refusal)
    reason = unusable(flavour, facts, building=True)
    if reason is not None:
        raise DeviceError(f"{flavour}: {reason}")
    chosen = variants or variants_for(bundle.manifest, flavour)
    if not chosen or not bundle.manifest.profiles:
        raise BundleError(f"{bundle.path}: the bundle has no model to build {flavour} engines from")
    for variant in chosen:
        if flavour not in variant.devices:
            raise BundleError(
                f"{variant.name} is for {' or '.join(variant.devices)}, not for {flavour}"
            )
    module = import_tensorrt(flavour) if trt is None else trt
    gpu, power_mode = facts.gpu.name if facts.gpu else "", _power_mode(facts)
    found: dict[str, EngineKey] = {}
    faults: dict[str, DeviceError] = {}
    for variant in chosen:
        if found and first_only:
            break
        key = wanted_key(bundle.manifest, variant, flavour, facts, options)
        if key in bundled_keys(bundle.manifest) and not force:
            say(f"{variant.name}: the bundle brings an engine for {key}")
            found[variant.name] = key
            continue
        with cache.building(key, say) as needed:
            if not (needed or force):
                say(f"{variant.name}: there is an engine for {key} already")
                _say_power_mode(cache.entry(key), power_mode, say)
                found[variant.name] = key
                continue
            model = bundle.read(variant.model)
            try:
                available = (available_bytes or _available)()
                _check_memory(len(model), flavour, options, facts, available)
                say(f"{variant.name}: building for {key}")
                built = build_engine(
                    module,
                    flavour,
                    model,
                    key.profiles,
                    options,
                    timing_cache=None if force else cache.read_timings(key, gpu, power_mode),
                    log=log,
                    on_progress=on_progress,
                )
            except DeviceError as exc:
                # Without its frames: what they hold is memory that the next build needs.
                faults[variant.name] = exc.with_traceback(None)
                continue
            entry = cache.write(
                key, built.engine, gpu=gpu, seconds=built.seconds, power_mode=power_mode
            )
            if built.timing_cache is not None:
                cache.write_timings(key, gpu, power_mode, built.timing_cache)
            say(f"{variant.name}: {_described(entry)}")
            found[variant.name] = key
    if not found:
        raise _joined(faults, "no engine could be built")
    return BuiltEngines(keys=found, failures={name: str(exc) for name, exc in faults.items()})


def _joined(faults: dict[str, DeviceError], what: str) -> DeviceError:
    """Makes one error of what is wrong with each variant."""
    if len(faults) == 1:
        return next(iter(faults.values()))
    refused = all(isinstance(exc, ModelRefusedError) for exc in faults.values())
    kind = ModelRefusedError if refused else DeviceError
    said = "; ".join(f"{name}: {exc}" for name, exc in faults.items())
    return kind(f"{what}: {said}")


def _power_mode(facts: DeviceFacts) -> str | None:
    """The Jetson's power mode: times mean nothing in another one."""
    return facts.jetson.power_mode if facts.jetson else None


def _say_power_mode(
    entry: CachedEngine | None, power_mode: str | None, say: Callable[[str], None]
) -> None:
    """Says of an engine that its kernels were chosen in another power mode, if they were."""
    if entry is not None and entry.power_mode != power_mode:
        say(
            f"its kernels were chosen in power mode {entry.power_mode or 'unknown'}, this is "
            f"{power_mode or 'unknown'}: --force chooses anew"
        )


def open_engine(
    bundle: Bundle,
    key: EngineKey,
    cache: EngineCache,
    *,
    use_graphs: bool = True,
    specialise_at_once: bool = False,
    trt: Any = None,
    driver: Any = None,
) -> TensorRTSession:
    """Opens the engine of a key, after checking every byte of it.

    Args:
        bundle: That brings it, or whose model it was built from.
        key: Of the engine.
        cache: Where it is; what was built here comes before what the bundle brings.
        use_graphs: Whether to record CUDA graphs.
        specialise_at_once: For ``rtx``, whether a new shape waits for kernels of its own; see
            ``TensorRTSession``.
        trt: The flavour's module; it is imported if left out.
        driver: The CUDA driver; it is imported if left out.

    Raises:
        BundleError: The engine in the bundle was altered.
        DeviceError: The one in the cache was, or this machine cannot load it.
        MissingExtraError: TensorRT or cuda-bindings is not installed.
    """
    brought = bundled_keys(bundle.manifest).get(key)
    data = cache.read(key) if brought is None or cache.has(key) else bundle.read(brought.path)
    module: Any = import_tensorrt(key.flavour) if trt is None else trt
    return TensorRTSession(
        module,
        key.flavour,
        data,
        key.profiles,
        Cuda(driver),
        use_graphs=use_graphs,
        runtime_cache=cache.kernels(key) if key.flavour == "rtx" else None,
        specialise_at_once=specialise_at_once,
        lean_runtimes=lean_runtimes(key, module.__version__) if key.flavour == "tensorrt" else (),
    )


def arithmetic_of(
    bundle: Bundle, key: EngineKey, facts: DeviceFacts, cache: EngineCache
) -> tuple[str, ...]:
    """Returns what an engine's answers are of, for ``is_known_right``: its bytes, driver, GPU."""
    brought = bundled_keys(bundle.manifest).get(key)
    sha256 = cache.sha256(key)
    if sha256 is None and brought is not None:
        (sha256,) = (f.sha256 for f in bundle.manifest.files if f.path == brought.path)
    gpu = facts.gpu.name if facts.gpu is not None else ""
    running = facts.tensorrt[key.flavour].version if key.flavour in facts.tensorrt else None
    of_engine = bundle.digest, key.digest, sha256 or ""
    return *of_engine, running or "", facts.driver or "", gpu, edgebert_runtime.__version__


def open_verified(
    bundle: Bundle, key: EngineKey, variant: str, facts: DeviceFacts, cache: EngineCache
) -> TensorRTSession:
    """Opens an engine that gives the bundle's known answers, which is found out now.

    TensorRT for RTX computes with each shape's own kernels, as it does once it has compiled them;
    they are kept for sessions that serve.

    Raises:
        DeviceError: It cannot be loaded, or does not give them.
        BundleError: As ``open_engine`` does; or the known answers cannot be read.
        MissingExtraError: As ``open_engine`` does.
    """
    session = open_engine(bundle, key, cache, specialise_at_once=True)
    try:
        verify(session, bundle, variant, key.flavour, turns=_TURNS)
    except BaseException:
        session.close()
        raise
    remember_right(*arithmetic_of(bundle, key, facts, cache))
    return session


def measure_engines(
    sessions: dict[str, TensorRTSession], profiles: Sequence[Profile], vocabulary: int
) -> list[EngineTiming]:
    """Times engines side by side, each profile at the shape it is fastest at, in turns.

    Args:
        sessions: By variant; each gives the bundle's known answers.
        profiles: Shapes.
        vocabulary: Token ids are below it; what they are makes no difference to the time.
    """
    random = np.random.default_rng(_SEED)
    taken: dict[tuple[str, Profile], list[float]] = {}
    for profile in profiles:
        shape = (profile.opt_batch, profile.opt_seq)
        batch = {
            "input_ids": random.integers(1, vocabulary, size=shape),
            "attention_mask": np.ones(shape, dtype=np.int64),
            "token_type_ids": np.zeros(shape, dtype=np.int64),
        }
        for turn in range(_WARM_UP + _ROUNDS):
            for name, session in sessions.items():
                inputs = {key: batch[key] for key in session.input_names}
                start = time.perf_counter()
                session.run(inputs)
                if turn >= _WARM_UP:
                    seconds = time.perf_counter() - start
                    taken.setdefault((name, profile), []).append(seconds * 1000)
    return [
        EngineTiming(
            variant=name,
            profile=profile,
            p50_ms=statistics.median(times),
            p99_ms=float(np.percentile(times, 99)),
        )
        for (name, profile), times in taken.items()
    ]


def fastest(timings: Sequence[EngineTiming]) -> str:
    """Returns the variant whose batches took the least time, each profile counting the same."""
    names = list(dict.fromkeys(timing.variant for timing in timings))
    cost = {
        name: float(np.mean([np.log(t.p50_ms) for t in timings if t.variant == name]))
        for name in names
    }
    return min(names, key=lambda name: cost[name])


def remember_preference(
    bundle: Bundle,
    cache: EngineCache,
    keys: dict[str, EngineKey],
    timings: Sequence[EngineTiming],
    facts: DeviceFacts,
) -> Preference:
    """Notes which variant was the fastest here; ``auto`` takes it from now on."""
    variant = fastest(timings)
    preference = Preference(
        engine=keys[variant],
        variant=variant,
        timings=tuple(timings),
        gpu=facts.gpu.name if facts.gpu else None,
        power_mode=_power_mode(facts),
        compared=tuple(keys),
    )
    with suppress(OSError):  # a cache that cannot be written to: it is measured again next time
        path = cache.preference(bundle.digest, keys[variant].flavour)
        write_whole(path, msgspec.json.encode(preference))
    return preference


def measure_and_remember(
    bundle: Bundle,
    keys: dict[str, EngineKey],
    facts: DeviceFacts,
    cache: EngineCache,
    say: Callable[[str], None] = lambda line: None,
) -> Preference:
    """Times the engines of ``keys`` on this machine, and notes the fastest variant.

    TensorRT for RTX compiles a shape's own kernels first: those for any shape, which it has until
    then, do not serve for long.

    Args:
        bundle: Whose engines.
        keys: Of the engines, by variant.
        facts: About this machine.
        cache: Where the engines are.
        say: Called with what is wrong with an engine, if another one can be used.

    Raises:
        DeviceError: No engine can be used.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(bundle.read(bundle.manifest.tokenizer))
    with ExitStack() as opened:
        sessions: dict[str, TensorRTSession] = {}
        faults: dict[str, DeviceError] = {}
        for name, key in keys.items():
            try:
                sessions[name] = open_verified(bundle, key, name, facts, cache)
            except DeviceError as exc:
                faults[name] = exc.with_traceback(None)
            else:
                opened.callback(sessions[name].close)
        if not sessions:
            raise _joined(faults, "no engine can be used")
        profiles = bundle.manifest.profiles
        timings = measure_engines(sessions, profiles, tokenizer.get_vocab_size())
    for name, fault in faults.items():
        say(f"{name}: not measured: {fault}")
    used = {name: keys[name] for name in sessions}
    return remember_preference(bundle, cache, used, timings, facts)


def _check_memory(
    model_bytes: int,
    flavour: Flavour,
    options: BuildOptions,
    facts: DeviceFacts,
    available: int | None,
) -> None:
    """Refuses to begin a build that would not fit into memory."""
    gpu = facts.gpu if flavour == "tensorrt" else None  # RTX engines are built without one
    is_shared = gpu is not None and gpu.integrated
    needed = needed_memory_bytes(model_bytes, options, integrated=is_shared)
    library = ""
    if is_shared:
        own = needed - needed_memory_bytes(model_bytes, options)
        library = f" ({own / _MIB:.0f} for TensorRT's own library)"
    free = {"memory": available}
    if gpu is not None and not is_shared:
        free["GPU memory"] = gpu.free_bytes
    for kind, found in free.items():
        if found is not None and found < needed:
            raise DeviceError(
                f"building the engine needs about {needed / _MIB:.0f} MiB of free {kind}{library}, "
                f"found {found / _MIB:.0f} MiB: end other programs, or lower --workspace-mib "
                f"({options.workspace_mib} now)"
            )


def _available() -> int | None:
    """Memory that is free, as Linux counts it: without swap, which the GPU cannot use."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _described(entry: CachedEngine) -> str:
    return f"{entry.size_bytes / 1e6:.1f} MB, built in {entry.seconds:.1f} s"
