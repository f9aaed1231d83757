"""A bundle's engines on this machine: finding, building, measuring and opening them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgebert_runtime.cuda import Cuda
from edgebert_runtime.engine import EngineKey, bundled_keys, unusable, wanted_key
from edgebert_runtime.engine_cache import CachedEngine, EngineCache
from edgebert_runtime.errors import BundleError, DeviceError
from edgebert_runtime.manifest import Profile, Variant
from edgebert_runtime.tensorrt_api import Flavour, import_tensorrt
from edgebert_runtime.tensorrt_build import BuildOptions, build_engine, needed_memory_bytes
from edgebert_runtime.tensorrt_session import TensorRTSession

if TYPE_CHECKING:
    from edgebert_runtime.bundle import Bundle
    from edgebert_runtime.facts import DeviceFacts

__all__ = [
    "EngineTiming",
    "Preference",
    "available_engines",
    "build_engines",
    "fastest",
    "measure_and_remember",
    "measure_engines",
    "open_engine",
    "preferred_variants",
    "remember_preference",
]

_MIB = 2**20
_ROUNDS = 30
_WARM_UP = 5
_SEED = 7


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


class Preference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which variant was the fastest on this machine.

    Attributes:
        engine: Of the variant; the measurement holds for its TensorRT and GPU alone.
        variant: Its name.
        timings: What was measured.
        power_mode: Of the Jetson, at that time.
    """

    engine: EngineKey
    variant: str
    timings: tuple[EngineTiming, ...]
    power_mode: str | None = None


def available_engines(bundle: Bundle, cache: EngineCache) -> list[EngineKey]:
    """Lists the engines that are there for a bundle: those it brings, and those in the cache."""
    return [*bundled_keys(bundle.manifest), *(entry.key for entry in cache.entries())]


def preferred_variants(bundle: Bundle, cache: EngineCache, facts: DeviceFacts) -> list[str]:
    """Lists the variants that were measured to be the fastest on this machine."""
    found = []
    for flavour in facts.tensorrt:
        try:
            data = cache.preference(bundle.digest, flavour).read_bytes()
            preference = msgspec.json.decode(data, type=Preference)
            variant = bundle.manifest.variant(preference.variant)
            wanted = wanted_key(bundle.manifest, variant, preference.engine.flavour, facts)
        except (OSError, msgspec.DecodeError, ValueError, BundleError, AssertionError):
            continue  # never measured, or of another bundle
        same = ("flavour", "version", "platform", "compute_capability")
        if all(getattr(preference.engine, name) == getattr(wanted, name) for name in same):
            found.append(preference.variant)
    return found


def build_engines(
    bundle: Bundle,
    flavour: Flavour,
    facts: DeviceFacts,
    cache: EngineCache,
    *,
    variants: Sequence[Variant] | None = None,
    options: BuildOptions | None = None,
    force: bool = False,
    log: Callable[[str], None] = lambda line: None,
    say: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    available_bytes: Callable[[], int | None] | None = None,
    trt: Any = None,
) -> dict[str, EngineKey]:
    """Builds the engines of a bundle that are not in the cache yet.

    Args:
        bundle: Whose models.
        flavour: Of TensorRT.
        facts: About this machine.
        cache: Where engines are kept.
        variants: Which; all that are for the flavour if left out.
        options: How.
        force: Whether to build engines anew that are there.
        log: Called with each line that TensorRT logs.
        say: Called with what is being done.
        on_progress: Called with a build's steps done and known.
        available_bytes: Tells how much memory is free, ``None`` if nobody knows.
        trt: The flavour's module; it is imported if left out.

    Returns:
        Keys of the engines, by variant.

    Raises:
        DeviceError: This machine cannot build them, or has too little memory free.
        BundleError: The bundle has nothing to build them from, or TensorRT does not take it.
    """
    options = options or BuildOptions()
    reason = unusable(flavour, facts, building=True)
    if reason is not None:
        raise DeviceError(f"{flavour}: {reason}")
    chosen = variants or [v for v in bundle.manifest.variants if flavour in v.devices]
    if not chosen or not bundle.manifest.profiles:
        raise BundleError(f"{bundle.path}: the bundle has no model to build {flavour} engines from")
    for variant in chosen:
        if flavour not in variant.devices:
            raise BundleError(
                f"{variant.name} is for {' or '.join(variant.devices)}, not for {flavour}"
            )
    module = import_tensorrt(flavour) if trt is None else trt
    found: dict[str, EngineKey] = {}
    for variant in chosen:
        key = found[variant.name] = wanted_key(bundle.manifest, variant, flavour, facts, options)
        if key in bundled_keys(bundle.manifest) and not force:
            say(f"{variant.name}: the bundle brings an engine for {key}")
            continue
        with cache.building(key) as needed:
            if not (needed or force):
                say(f"{variant.name}: there is an engine for {key} already")
                continue
            model = bundle.read(variant.model)
            _check_memory(len(model), options, (available_bytes or _available_bytes)())
            say(f"{variant.name}: building for {key}")
            timing = cache.timing_cache(key)
            try:
                known = timing.read_bytes()
            except OSError:
                known = None
            built = build_engine(
                module,
                flavour,
                model,
                key.profiles,
                options,
                timing_cache=known,
                log=log,
                on_progress=on_progress,
            )
            entry = cache.write(
                key,
                built.engine,
                gpu=facts.gpu.name if facts.gpu else "",
                seconds=built.seconds,
                power_mode=facts.jetson.power_mode if facts.jetson else None,
            )
            if built.timing_cache is not None:
                _keep(timing, built.timing_cache)
            say(f"{variant.name}: {_described(entry)}")
    return found


def open_engine(
    bundle: Bundle, key: EngineKey, cache: EngineCache, *, trt: Any = None, driver: Any = None
) -> TensorRTSession:
    """Opens the engine of a key, after checking every byte of it.

    Args:
        bundle: That brings it, or whose model it was built from.
        key: Of the engine.
        cache: Where it is, if the bundle does not bring it.
        trt: The flavour's module; it is imported if left out.
        driver: The CUDA driver; it is imported if left out.

    Raises:
        BundleError: The engine in the bundle was altered.
        DeviceError: The one in the cache was, or this machine cannot load it.
        MissingExtraError: TensorRT or cuda-bindings is not installed.
    """
    entry = bundled_keys(bundle.manifest).get(key)
    data = cache.read(key) if entry is None else bundle.read(entry.path)
    module = import_tensorrt(key.flavour) if trt is None else trt
    runtime_cache = cache.runtime_cache(key) if key.flavour == "rtx" else None
    return TensorRTSession(
        module, key.flavour, data, key.profiles, Cuda(driver), runtime_cache=runtime_cache
    )


def measure_engines(
    sessions: dict[str, TensorRTSession], profiles: Sequence[Profile], vocabulary: int = 1000
) -> list[EngineTiming]:
    """Times engines side by side, each profile at the shape it is fastest at, in turns.

    Args:
        sessions: By variant.
        profiles: Shapes.
        vocabulary: Token ids are below it; what they are makes no difference to the time.
    """
    random = np.random.default_rng(_SEED)
    timings = []
    for profile in profiles:
        shape = (profile.opt_batch, profile.opt_seq)
        batch = {
            "input_ids": random.integers(1, vocabulary, size=shape),
            "attention_mask": np.ones(shape, dtype=np.int64),
            "token_type_ids": np.zeros(shape, dtype=np.int64),
        }
        taken: dict[str, list[float]] = {name: [] for name in sessions}
        for turn in range(_WARM_UP + _ROUNDS):
            for name, session in sessions.items():
                inputs = {key: batch[key] for key in session.input_names}
                start = time.perf_counter()
                session.run(inputs)
                if turn >= _WARM_UP:
                    taken[name].append((time.perf_counter() - start) * 1000)
        timings += [
            EngineTiming(
                variant=name,
                profile=profile,
                p50_ms=statistics.median(times),
                p99_ms=float(np.percentile(times, 99)),
            )
            for name, times in taken.items()
        ]
    return timings


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
        power_mode=facts.jetson.power_mode if facts.jetson else None,
    )
    _keep(cache.preference(bundle.digest, keys[variant].flavour), msgspec.json.encode(preference))
    return preference


def measure_and_remember(
    bundle: Bundle, keys: dict[str, EngineKey], facts: DeviceFacts, cache: EngineCache
) -> Preference:
    """Times the engines of ``keys`` on this machine, and notes the fastest variant."""
    with ExitStack() as opened:
        sessions = {}
        for name, key in keys.items():
            sessions[name] = open_engine(bundle, key, cache)
            opened.callback(sessions[name].close)
        timings = measure_engines(sessions, bundle.manifest.profiles)
    return remember_preference(bundle, cache, keys, timings, facts)


def _check_memory(model_bytes: int, options: BuildOptions, available: int | None) -> None:
    """Refuses to begin a build that would not fit into memory."""
    needed = needed_memory_bytes(model_bytes, options)
    if available is not None and available < needed:
        raise DeviceError(
            f"building the engine needs about {needed / _MIB:.0f} MiB of free memory, found "
            f"{available / _MIB:.0f} MiB: end other programs, lower --workspace-mib "
            f"({options.workspace_mib} now), or add swap"
        )


def _available_bytes() -> int | None:
    """Memory that is free, as Linux counts it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _described(entry: CachedEngine) -> str:
    return f"{entry.size_bytes / 1e6:.1f} MB, built in {entry.seconds:.1f} s"


def _keep(path: Path, data: bytes) -> None:
    """Writes a small file whole, or not at all."""
    part = path.with_suffix(".part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:  # what is measured again next time
        part.unlink(missing_ok=True)
