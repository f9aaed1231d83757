"""The chain: a recipe in, a bundle and its report out. Reads from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

import edgebert_runtime
from edgebert_export.checkpoint import Checkpoint, open_checkpoint
from edgebert_export.dataset import Dataset
from edgebert_export.finetune import TrainingLog, finetune, is_needed
from edgebert_export.quantise import quantise_cpu
from edgebert_export.thresholds import choose_thresholds
from edgebert_export.to_onnx import OnnxModel, Parity, measure_parity, to_onnx
from edgebert_export.write_bundle import VariantSource, write_bundle
from edgebert_pipeline.build import (
    BuildDirectory,
    disk_is_full,
    full_disk_message,
    library_versions,
    stage_key,
)
from edgebert_pipeline.data import DataSummary, load_dataset
from edgebert_pipeline.errors import BuildError, FetchError
from edgebert_pipeline.evaluate import Evaluation, evaluate, machine
from edgebert_pipeline.fetch import fetch_checkpoint
from edgebert_pipeline.gate import apply_gate
from edgebert_pipeline.progress import Progress, Reporter
from edgebert_pipeline.recipe import Recipe, load_recipe
from edgebert_pipeline.report import REPORT_VERSION, Report, render_markdown
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.cache import cache_dir
from edgebert_runtime.device import import_onnxruntime
from edgebert_runtime.errors import BundleError
from edgebert_runtime.manifest import Provenance, Task

__all__ = ["export"]

# The modules whose source decides what a stage makes; see stage_key.
_LOADING = (
    "edgebert_pipeline.run",
    "edgebert_export.architecture",
    "edgebert_export.checkpoint",
    "edgebert_export.dataset",
    "edgebert_runtime.encoder",
)
_SERVING = (
    "edgebert_runtime.bench",
    "edgebert_runtime.bundle",
    "edgebert_runtime.classifier",
    "edgebert_runtime.encoder",
    "edgebert_runtime.manifest",
    "edgebert_runtime.onnx_session",
)


def export(
    recipe_path: Path,
    out: Path,
    *,
    until: str | None = None,
    force: Sequence[str] = (),
    wait: bool = False,
    reporter: Reporter | None = None,
) -> Report | None:
    """Builds what a recipe describes: fine-tunes, exports, quantises, bundles, measures, judges.

    Writes ``report.json`` and ``report.md`` into ``out``, and ``bundle/`` if the gate passed
    (``bundle.refused/`` if it did not; an older ``bundle/`` that passed is left alone then).

    Args:
        recipe_path: The recipe.
        out: The build directory. Stages that an earlier run finished there are reused.
        until: Last of ``edgebert_pipeline.STAGES`` to run.
        force: Stages to run even if they are finished.
        wait: Whether to wait for another run on ``out`` rather than stop.
        reporter: Where progress goes; stderr if left out.

    Returns:
        The report; ``None`` if ``until`` stopped before it.

    Raises:
        UsageError: The recipe, the data or the checkpoint is wrong.
        EdgebertError: A stage failed, or the directory cannot be used.
    """
    reporter = reporter or Reporter()
    recipe = load_recipe(recipe_path)
    # Before an hour of training, not after it:
    import_onnxruntime()
    BuildDirectory.refuse_foreign(out)
    base = recipe_path.parent
    source, dataset, summary = _fetch(recipe, base, reporter)
    for split, count in summary.rows.items():
        balance = ", ".join(f"{k} {v}" for k, v in summary.labels.get(split, {}).items())
        reporter.line(f"  {split}: {count} rows" + (f" ({balance})" if balance else ""))
    task = dataset.task

    with BuildDirectory(out, reporter, force=force, wait=wait) as build:
        checkpoint, training = source, None
        stages: dict[str, Path] = {}
        if is_needed(source, task, recipe.finetune):
            stages["finetune"] = _finetune_stage(build, recipe, source, dataset)
            checkpoint, training = _read_finetuned(stages["finetune"])
        if until == "finetune":
            return None

        stages["onnx"] = _onnx_stage(build, recipe, checkpoint, dataset)
        fp32 = OnnxModel(stages["onnx"] / "fp32.onnx", "fp32")
        parity = msgspec.json.decode((stages["onnx"] / "parity.json").read_bytes(), type=Parity)
        if until == "onnx":
            return None

        variants = {"fp32": VariantSource(fp32, ("cpu", "cuda"))}
        if recipe.quantise.cpu:
            stages["quantise"] = _quantise_stage(build, recipe, fp32)
            int8 = OnnxModel(stages["quantise"] / "int8-cpu.onnx", "int8")
            # Before FP32: the order is what a device prefers.
            variants = {"int8-cpu": VariantSource(int8, ("cpu",)), **variants}
        if until == "quantise":
            return None

        provenance = Provenance(
            edgebert=edgebert_runtime.__version__,
            recipe_sha256=recipe.sha256(),
            model_sha256=source.sha256,
            data_sha256=summary.sha256,
            seed=recipe.finetune.seed if training else None,
            versions=library_versions(),
        )
        stages["bundle"] = _bundle_stage(build, recipe, checkpoint, dataset, variants, provenance)
        bundle = Bundle.open(stages["bundle"] / "bundle")
        if until == "bundle":
            return None

        stages["evaluate"] = _evaluate_stage(build, recipe, bundle, dataset)
        data = (stages["evaluate"] / "evaluation.json").read_bytes()
        evaluation = msgspec.json.decode(data, type=Evaluation)
        report = Report(
            report_version=REPORT_VERSION,
            name=recipe.name,
            bundle_digest=bundle.digest,
            task=bundle.manifest.task,
            data=summary,
            training=training,
            parity=parity,
            evaluation=evaluation,
            gate=apply_gate(evaluation, recipe.gate),
            stages={name: build.record(path) for name, path in stages.items()},
            provenance=provenance,
        )
        _publish(build, bundle, report, reporter)
        build.remove_unused()
        return report


def _fetch(
    recipe: Recipe, base: Path, reporter: Reporter
) -> tuple[Checkpoint, Dataset, DataSummary]:
    try:
        with reporter.stage("fetch", "model and data, checked by hash") as progress:
            source = open_checkpoint(fetch_checkpoint(recipe.model, base, progress))
            return source, *load_dataset(recipe.data, base)
    except (OSError, FetchError) as exc:
        cache = cache_dir()
        if cache.is_dir() and disk_is_full(exc, cache):
            raise BuildError(full_disk_message(cache)) from exc
        raise


def _finetune_stage(
    build: BuildDirectory, recipe: Recipe, source: Checkpoint, dataset: Dataset
) -> Path:
    key = stage_key(
        "finetune",
        (*_LOADING, "edgebert_export.finetune"),
        source.sha256,
        dataset.sha256("train", "validation"),
        recipe.finetune,
        recipe.export.max_length,
    )

    def produce(out: Path, progress: Progress) -> None:
        _, log = finetune(
            source,
            dataset,
            recipe.finetune,
            max_length=recipe.export.max_length,
            work=build.work("finetune", key),
            out=out / "checkpoint",
            on_progress=progress,
        )
        (out / "training.json").write_bytes(msgspec.json.encode(log))

    what = f"{len(dataset.train)} rows, up to {recipe.finetune.epochs} epochs"
    if build.interrupted("finetune", key):
        what += ", going on from the last save of an interrupted run"
    return build.stage("finetune", key, what, produce)


def _read_finetuned(stage: Path) -> tuple[Checkpoint, TrainingLog]:
    log = msgspec.json.decode((stage / "training.json").read_bytes(), type=TrainingLog)
    return open_checkpoint(stage / "checkpoint"), log


def _onnx_stage(
    build: BuildDirectory, recipe: Recipe, checkpoint: Checkpoint, dataset: Dataset
) -> Path:
    key = stage_key(
        "onnx",
        (*_LOADING, "edgebert_export.to_onnx", "edgebert_runtime.onnx_session"),
        checkpoint.sha256,
        dataset.sha256("train", "validation"),
        recipe.export,
    )

    def produce(out: Path, progress: Progress) -> None:
        model = to_onnx(checkpoint, dataset.task, recipe.export, out / "fp32.onnx")
        texts = [example.text for example in (*dataset.validation, *dataset.train)]
        parity = measure_parity(
            checkpoint, dataset.task, model, texts, recipe.export, on_progress=progress
        )
        (out / "parity.json").write_bytes(msgspec.json.encode(parity))

    return build.stage("onnx", key, "export, and comparison with PyTorch", produce)


def _quantise_stage(build: BuildDirectory, recipe: Recipe, fp32: OnnxModel) -> Path:
    key = stage_key(
        "quantise",
        ("edgebert_pipeline.run", "edgebert_export.quantise"),
        fp32.sha256(),
        recipe.quantise,
    )

    def produce(out: Path, progress: Progress) -> None:
        quantise_cpu(fp32, recipe.quantise, out / "int8-cpu.onnx")

    return build.stage("quantise", key, "INT8 for CPUs, dynamic, per channel", produce)


def _bundle_stage(
    build: BuildDirectory,
    recipe: Recipe,
    checkpoint: Checkpoint,
    dataset: Dataset,
    variants: dict[str, VariantSource],
    provenance: Provenance,
) -> Path:
    key = stage_key(
        "bundle",
        (*_LOADING, *_SERVING, "edgebert_export.write_bundle", "edgebert_export.thresholds"),
        [(name, source.model.sha256(), source.devices) for name, source in variants.items()],
        checkpoint.sha256,
        dataset.sha256("validation"),
        recipe.name,
        recipe.bundle,
        recipe.export.max_length,
        provenance,
    )

    def produce(out: Path, progress: Progress) -> None:
        write_bundle(
            out / "bundle",
            name=recipe.name,
            task=_with_thresholds(recipe, checkpoint, dataset, variants["fp32"].model),
            checkpoint=checkpoint,
            max_length=recipe.export.max_length,
            variants=variants,
            provenance=provenance,
        )

    return build.stage("bundle", key, "models, tokenizer, manifest", produce)


def _with_thresholds(
    recipe: Recipe, checkpoint: Checkpoint, dataset: Dataset, fp32: OnnxModel
) -> Task:
    thresholds = recipe.bundle.thresholds
    if thresholds == "validation":
        thresholds = choose_thresholds(
            checkpoint,
            dataset.task,
            fp32,
            dataset.validation,
            max_length=recipe.export.max_length,
        )
    return recipe.data.as_task(thresholds if isinstance(thresholds, tuple) else None)


def _evaluate_stage(
    build: BuildDirectory, recipe: Recipe, bundle: Bundle, dataset: Dataset
) -> Path:
    key = stage_key(
        "evaluate",
        (*_SERVING, "edgebert_pipeline.run", "edgebert_pipeline.evaluate"),
        bundle.digest,
        dataset.sha256("test"),
        recipe.evaluate,
        machine(),  # speed measured elsewhere must not pass for this machine's
    )

    def produce(out: Path, progress: Progress) -> None:
        evaluation = evaluate(
            bundle.path,
            dataset.test,
            latency_texts=recipe.evaluate.latency_texts,
            latency_repeats=recipe.evaluate.latency_repeats,
            intra_op_threads=recipe.evaluate.intra_op_threads,
            on_progress=progress,
        )
        (out / "evaluation.json").write_bytes(msgspec.json.encode(evaluation))

    return build.stage("evaluate", key, f"{len(dataset.test)} test rows, and speed", produce)


def _publish(build: BuildDirectory, bundle: Bundle, report: Report, reporter: Reporter) -> None:
    """Puts the report, and the bundle that it judges, where the user looks for them.

    Only a bundle that passed is called ``bundle``: what devices pick up is signed off.
    """
    with build.writing() as partial:
        json = msgspec.json.format(msgspec.json.encode(report), indent=2)
        (partial / "report.json").write_bytes(json + b"\n")
        (partial / "report.md").write_text(render_markdown(report), encoding="utf-8")
        name = "bundle" if report.passed else "bundle.refused"
        if not _is_copy_of(bundle, build.path / name):
            build.publish(bundle.path, name)
        if report.passed:
            build.withdraw("bundle.refused")
        elif _is_copy_of(bundle, build.path / "bundle"):  # it passed a more lenient gate once
            build.withdraw("bundle")
            reporter.line(f"{build.path / 'bundle'} is this very build: withdrawn")
        for file in ("report.json", "report.md"):
            build.publish(partial / file, file)


def _is_copy_of(bundle: Bundle, path: Path) -> bool:
    try:
        there = Bundle.open(path)
        there.verify()
    except BundleError:
        return False
    return there.digest == bundle.digest
