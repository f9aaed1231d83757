"""The stage that builds engines ahead of time, and what it tells the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder
from edgebert_export.dataset import Dataset
from edgebert_export.engine import (
    EngineBuild,
    EngineConfig,
    build_rtx_engine,
    engine_profiles,
    refusal,
    rtx_or_reason,
)
from edgebert_export.errors import ExportError
from edgebert_export.write_bundle import EngineSource, VariantSource
from edgebert_pipeline.build import BuildDirectory, stage_key
from edgebert_pipeline.errors import RecipeError
from edgebert_pipeline.progress import Progress
from edgebert_runtime.manifest import Profile

__all__ = ["EngineLog", "check_engines", "profiles_for", "run_engines"]

_BUILDING = (
    "edgebert_pipeline.engines",
    "edgebert_export.audit.constants",
    "edgebert_export.audit.log",
    "edgebert_export.audit.model",
    "edgebert_export.audit.result",
    "edgebert_export.audit.verdict",
    "edgebert_export.engine",
    "edgebert_runtime.profiles",
    "edgebert_runtime.tensorrt_build",
)


REFUSED = "engines.refused"
"""Directory of a build that keeps the compiler's logs of engines that were refused."""


class EngineLog(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the engines.

    Attributes:
        profiles: Shapes that engines are built for.
        built: Engines that were built ahead of time.
        skipped: Why none was; ``None`` if they were.
    """

    profiles: tuple[Profile, ...]
    built: tuple[EngineBuild, ...] = ()
    skipped: str | None = None


@dataclass(frozen=True)
class Engines:
    """The engines of a bundle, and where they come from; no stage if none was built."""

    sources: tuple[EngineSource, ...]
    log: EngineLog
    stage: Path | None


def check_engines(config: EngineConfig) -> None:
    """Refuses a recipe that asks for engines that cannot be built here, before all the rest.

    Raises:
        RecipeError: ``rtx = "always"``, and TensorRT-RTX is not here.
    """
    reason = rtx_or_reason() if config.rtx == "always" else None
    if isinstance(reason, str):
        raise RecipeError(f'engine.rtx = "always": {reason}')


def profiles_for(
    checkpoint: Checkpoint, dataset: Dataset, config: EngineConfig, max_length: int
) -> tuple[Profile, ...]:
    """Returns the shapes that engines are built for, by the lengths of the calibration texts."""
    encoder = checkpoint_encoder(
        checkpoint, max_length=max_length, text_pair=dataset.task.text_pair
    )
    rows = encoder.encode([example.text for example in dataset.calibration])
    return engine_profiles([len(row.ids) for row in rows], max_length, config.batch_sizes)


def run_engines(
    build: BuildDirectory,
    config: EngineConfig,
    variants: Mapping[str, VariantSource],
    profiles: Sequence[Profile],
    *,
    say: Callable[[str], None],
) -> Engines:
    """Runs the stage that builds a TensorRT-RTX engine of each variant that is for it.

    Args:
        build: Where the stage's output is kept.
        config: What to build.
        variants: Of the bundle.
        profiles: Shapes.
        say: Called with the reason, if nothing is built.

    Raises:
        ModelError: TensorRT-RTX does not take a model.
        ExportError: A build failed, or an engine's audit refuses it; what the compiler said is
            kept then.
    """
    chosen = {name: source for name, source in variants.items() if "rtx" in source.devices}
    here = rtx_or_reason() if config.rtx != "never" else "the recipe says so (engine.rtx)"
    if not chosen:
        here = "no variant is for TensorRT"
    if isinstance(here, str):
        say(f"engines: none is built ahead of time: {here}")
        return Engines((), EngineLog(profiles=tuple(profiles), skipped=here), None)
    version, platform = here
    key = stage_key(
        "engine",
        _BUILDING,
        {name: source.model.sha256() for name, source in chosen.items()},
        list(profiles),
        version,
        platform,
        config.audit,
    )

    def produce(out: Path, progress: Progress) -> EngineLog:
        built = tuple(
            build_rtx_engine(
                name,
                source.model.path,
                profiles,
                out / f"{name}.engine",
                version=version,
                platform=platform,
                log=out / "tensorrt.log",
                on_progress=progress,
            )
            for name, source in chosen.items()
        )
        refused = [line for found in built if (line := refusal(found, config.audit)) is not None]
        if refused:
            for name in chosen:
                (out / f"{name}.engine").unlink()
            kept = build.publish(out, REFUSED)
            raise ExportError(f"{'; '.join(refused)}; TensorRT's kernels are listed in {kept}")
        return EngineLog(profiles=tuple(profiles), built=built)

    build.withdraw(REFUSED)
    stage = build.stage(
        "engine", key, f"TensorRT-RTX {version}, of {' and '.join(chosen)}", produce
    )
    log = build.result(stage, EngineLog)
    sources = tuple(
        EngineSource(
            stage / f"{found.variant}.engine", found.variant, found.version, found.platform
        )
        for found in log.built
    )
    return Engines(sources, log, stage)
