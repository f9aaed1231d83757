"""The chain: a recipe in, a bundle and its report out. Reads from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

import edgebert_runtime
from edgebert_export import processes
from edgebert_export.checkpoint import (
    CHECKPOINT_FILES,
    Checkpoint,
    check_max_length,
    count_parameters,
    open_checkpoint,
)
from edgebert_export.dataset import Dataset
from edgebert_export.distill import check_layers
from edgebert_export.errors import CheckpointError
from edgebert_export.finetune import FinetuneConfig, finetune, is_needed
from edgebert_export.quantise import QuantiseConfig
from edgebert_export.thresholds import choose_thresholds
from edgebert_export.to_onnx import OnnxModel, Parity, measure_parity, to_onnx
from edgebert_export.training import TrainingLog, check_batch_size
from edgebert_export.write_bundle import EngineSource, VariantSource, write_bundle
from edgebert_pipeline.answers import with_texts
from edgebert_pipeline.build import (
    LOADING,
    TRAINING,
    BuildDirectory,
    disk_is_full,
    full_disk_message,
    library_versions,
    stage_key,
)
from edgebert_pipeline.data import DataSummary, load_dataset
from edgebert_pipeline.distillation import run_distillation
from edgebert_pipeline.engines import check_engines, profiles_for, run_engines
from edgebert_pipeline.errors import BuildError, FetchError, RecipeError
from edgebert_pipeline.evaluate import evaluate, machine
from edgebert_pipeline.fetch import fetch_checkpoint
from edgebert_pipeline.gate import apply_gate
from edgebert_pipeline.not_done import list_not_done
from edgebert_pipeline.progress import Progress, Reporter
from edgebert_pipeline.quantisation import Quantisation, check_calibration, run_quantisation
from edgebert_pipeline.recipe import GateConfig, Recipe, load_recipe
from edgebert_pipeline.recommend import recommend
from edgebert_pipeline.report import REPORT_VERSION, ModelSummary, Report
from edgebert_pipeline.report_html import render_html
from edgebert_pipeline.report_markdown import render_markdown
from edgebert_pipeline.scores import MODEL, Evaluation
from edgebert_pipeline.versioned import commit_of
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.cache import cache_dir
from edgebert_runtime.device import import_onnxruntime
from edgebert_runtime.errors import BundleError
from edgebert_runtime.manifest import Profile, Provenance, Task

__all__ = ["distill_checkpoint", "export"]

# Modules whose source decides what a stage makes; see stage_key.
_LOADING = ("edgebert_pipeline.run", *LOADING)
_SERVING = (
    "edgebert_runtime.batching",
    "edgebert_runtime.bench",
    "edgebert_runtime.bundle",
    "edgebert_runtime.classifier",
    "edgebert_runtime.encoder",
    "edgebert_runtime.manifest",
    "edgebert_runtime.onnx_session",
)

_REPORT_FILES = ("report.json", "report.md", "report.html")


def export(
    recipe_path: Path,
    out: Path,
    *,
    until: str | None = None,
    force: Sequence[str] = (),
    wait: bool = False,
    ablate: bool = False,
    reporter: Reporter | None = None,
) -> Report | None:
    """Builds what a recipe describes: trains, exports, quantises, bundles, measures, judges.

    Writes ``report.json``, ``report.md`` and ``report.html`` into ``out``, and ``bundle/`` if the
    gate passed (``bundle.refused/`` if it did not; an older ``bundle/`` that passed is left alone
    then).

    Under ``accelerate launch``, every process trains and the leader does the rest.

    Args:
        recipe_path: The recipe.
        out: The build directory. Stages that an earlier run finished there are reused.
        until: Last of ``edgebert_pipeline.STAGES`` to run.
        force: Stages to run even if they are finished.
        wait: Whether to wait for another run on ``out`` rather than stop.
        ablate: Whether to train the student on hard labels alone, too, and to report on it.
        reporter: Where progress goes; stderr if left out.

    Returns:
        The report; ``None`` if ``until`` stopped before it, and on all processes but the leader.

    Raises:
        UsageError: The recipe, the data or the checkpoint is wrong.
        EdgebertError: A stage failed, or the directory cannot be used.
    """
    recipe = load_recipe(recipe_path)
    _refuse_idle_stages(recipe, recipe_path, until, force, ablate)
    if (out / "config.json").exists():
        raise RecipeError(f"{out} holds a student of edgebert distill; give another --out")
    return _run(
        recipe,
        recipe_path.parent,
        out,
        until=until,
        force=force,
        wait=wait,
        ablate=ablate,
        reporter=reporter or Reporter(),
        publish=_publish,
    )


def distill_checkpoint(
    recipe: Recipe,
    base: Path,
    out: Path,
    *,
    wait: bool = False,
    ablate: bool = False,
    reporter: Reporter | None = None,
) -> Report | None:
    """Distils the model of ``recipe``, which is not fine-tuned, and measures the student.

    Writes the student's checkpoint and the report into ``out``.

    Args:
        recipe: With a ``distill`` table.
        base: Directory that its paths are relative to.
        out: As for ``export``.
        wait: As for ``export``.
        ablate: As for ``export``.
        reporter: As for ``export``.

    Returns:
        The report; ``None`` on all processes but the leader.

    Raises:
        UsageError: The data or the checkpoint is wrong.
        EdgebertError: A stage failed, or the directory cannot be used.
    """
    teacher = (base / str(recipe.model.path)).resolve()
    if teacher.is_relative_to(out.resolve()) or out.resolve().is_relative_to(teacher):
        raise RecipeError(f"--out {out} is in the teacher's way; give another directory")
    if any((out / name).exists() for name in ("bundle", "bundle.refused")):
        raise RecipeError(f"{out} holds a build of edgebert export; give another --out")
    alone = msgspec.structs.replace(
        recipe,
        finetune=FinetuneConfig(mode="never"),
        quantise=QuantiseConfig(cpu=False, gpu=False),
        gate=GateConfig(),
    )
    return _run(
        alone,
        base,
        out,
        wait=wait,
        ablate=ablate,
        reporter=reporter or Reporter(),
        publish=_publish_student,
    )


def _refuse_idle_stages(
    recipe: Recipe, path: Path, until: str | None, force: Sequence[str], ablate: bool
) -> None:
    """Refuses to be asked for stages that this recipe does not have."""
    if recipe.distill is None:
        if ablate:
            raise RecipeError(f"{path} has no [distill] table: there is nothing to ablate")
        for stage in ("teach", "distill", "ablate"):
            if stage == until or stage in force:
                raise RecipeError(f"{path} has no [distill] table: it has no stage {stage!r}")
    elif not ablate and (until == "ablate" or "ablate" in force):
        raise RecipeError("the stage 'ablate' runs with --ablate only")


def _run(
    recipe: Recipe,
    base: Path,
    out: Path,
    *,
    until: str | None = None,
    force: Sequence[str] = (),
    wait: bool,
    ablate: bool,
    reporter: Reporter,
    publish: Callable[[BuildDirectory, Checkpoint, Bundle, Report, Reporter], None],
) -> Report | None:
    # Before an hour of training, not after it:
    import_onnxruntime()
    BuildDirectory.refuse_foreign(out)
    with processes.one_on_each_machine_first():
        source, dataset, summary = _fetch(recipe, base, reporter)
    _describe(summary, reporter)
    check_max_length(source, recipe.export.max_length)
    for warning in check_calibration(recipe.quantise, source, dataset, recipe.export.max_length):
        reporter.line(f"  warning: {warning}")
    check_engines(recipe.engine)
    if recipe.distill is not None:
        check_batch_size(recipe.distill)
    with BuildDirectory(out, reporter, force=force, wait=wait) as build:
        checkpoint, training, stages = source, None, {}
        if is_needed(source, dataset.task, recipe.finetune):
            if recipe.distill is not None:
                check_layers(source, recipe.distill)
            stages["finetune"] = _finetune_stage(build, recipe, source, dataset)
            checkpoint = open_checkpoint(stages["finetune"] / "checkpoint")
            training = build.result(stages["finetune"], TrainingLog)
        if until == "finetune":
            return None

        models, distillation = {MODEL: checkpoint}, None
        if recipe.distill is not None:
            distilled = run_distillation(
                build,
                recipe.distill,
                checkpoint,
                dataset,
                recipe.export.max_length,
                until=until,
                ablate=ablate,
            )
            stages |= distilled.stages
            models, distillation = distilled.models, distilled.log
        processes.part()
        if until in ("teach", "distill", "ablate") or not processes.is_leader():
            return None

        exported: dict[str, OnnxModel] = {}
        parities: dict[str, Parity] = {}
        for name, model in models.items():
            stage = _onnx_stage(build, recipe, name, model, dataset)
            stages[_stage_name("onnx", name)] = stage
            exported[name] = OnnxModel(stage / "fp32.onnx", "fp32")
            parities[name] = build.result(stage, Parity)
        if until == "onnx":
            return None

        shipped = next(iter(models))  # the others are there to be compared with
        # FP32 last: the order is what a device prefers.
        variants: dict[str, dict[str, VariantSource]] = {}
        quantisations: dict[str, Quantisation] = {}
        for name, fp32 in exported.items():
            variants[name] = {}
            if recipe.quantise.cpu or recipe.quantise.gpu:
                quantised = run_quantisation(
                    build,
                    recipe.quantise if name == shipped else recipe.quantise.without_extras(),
                    models[name],
                    fp32,
                    dataset,
                    recipe.export.max_length,
                    what=f"{_of(name)}INT8 and FP16, held against FP32 on validation rows",
                    task=partial(_with_thresholds, recipe, models[name], dataset, fp32),
                    thresholds=recipe.bundle.thresholds,
                    say=lambda line: reporter.line(f"  {line}"),
                )
                stages[_stage_name("quantise", name)] = quantised.stage
                variants[name] |= quantised.variants
                quantisations[name] = quantised.log
            variants[name]["fp32"] = VariantSource(fp32, ("cpu", "cuda"))
        if until == "quantise":
            return None

        profiles: tuple[Profile, ...] = ()
        if recipe.quantise.gpu:
            profiles = profiles_for(
                models[shipped], dataset, recipe.engine, recipe.export.max_length
            )
        engines = run_engines(
            build,
            recipe.engine,
            variants[shipped],
            profiles,
            say=lambda line: reporter.line(f"  {line}"),
        )
        if engines.stage is not None:
            stages["engine"] = engines.stage
        if until == "engine":
            return None

        trained = recipe.distill or (recipe.finetune if training else None)
        provenance = Provenance(
            edgebert=edgebert_runtime.__version__,
            recipe_sha256=recipe.sha256(),
            model_sha256=source.sha256,
            data_sha256=summary.sha256,
            seed=trained.seed if trained else None,
            versions=library_versions(),
        )
        bundles: dict[str, Bundle] = {}
        for name, model in models.items():
            stage = _bundle_stage(
                build,
                recipe,
                name,
                model,
                dataset,
                variants[name],
                provenance,
                profiles=profiles,
                engines=engines.sources if name == shipped else (),
            )
            stages[_stage_name("bundle", name)] = stage
            bundles[name] = Bundle.open(stage / "bundle")
        if until == "bundle":
            return None

        stages["evaluate"] = _evaluate_stage(build, recipe, bundles, dataset)
        evaluation = build.result(stages["evaluate"], Evaluation)
        if recipe.report.texts:
            evaluation = with_texts(evaluation, dataset.test)
        gate = apply_gate(evaluation, recipe.gate)
        bundle = next(iter(bundles.values()))
        report = Report(
            report_version=REPORT_VERSION,
            name=recipe.name,
            measured_at=build.record(stages["evaluate"]).finished_at,
            commit=commit_of(base),
            bundle_digest=bundle.digest,
            task=bundle.manifest.task,
            data=summary,
            training=training,
            distillation=distillation,
            models={
                name: ModelSummary(
                    model_type=model.model_type,
                    layers=model.architecture.layers,
                    parameters=count_parameters(model),
                    checkpoint_sha256=model.sha256,
                    parity=parities[name],
                )
                for name, model in models.items()
            },
            quantisation=quantisations,
            engines=engines.log,
            budget=recipe.quantise.budget,
            evaluation=evaluation,
            gate=gate,
            recommended=recommend(evaluation, gate),
            not_done=list_not_done(
                fine_tuned=training is not None,
                distillation=distillation,
                quantisation=quantisations,
                engines=engines.log,
                evaluation=evaluation,
                gated=bool(gate),
            ),
            stages={name: build.record(path) for name, path in stages.items()},
            provenance=provenance,
        )
        publish(build, next(iter(models.values())), bundle, report, reporter)
        build.remove_unused()
        return report


def _describe(summary: DataSummary, reporter: Reporter) -> None:
    for split, count in summary.rows.items():
        balance = ", ".join(f"{k} {v}" for k, v in summary.labels.get(split, {}).items())
        reporter.line(f"  {split}: {count} rows" + (f" ({balance})" if balance else ""))


def _stage_name(stage: str, model: str) -> str:
    """How the report calls a stage that runs once for each model."""
    return stage if model == MODEL else f"{stage}, {model}"


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
        (*_LOADING, *TRAINING, "edgebert_export.finetune"),
        source.sha256,
        dataset.sha256("train", "validation"),
        recipe.finetune,
        recipe.export.max_length,
    )

    def produce(out: Path, progress: Progress) -> TrainingLog:
        _, log = finetune(
            source,
            dataset,
            recipe.finetune,
            max_length=recipe.export.max_length,
            work=build.work("finetune", key),
            out=out / "checkpoint",
            on_progress=progress,
        )
        return log

    what = f"{len(dataset.train)} rows, up to {recipe.finetune.epochs} epochs"
    what += build.going_on("finetune", key)
    return build.stage("finetune", key, what, produce, together=True)


def _onnx_stage(
    build: BuildDirectory, recipe: Recipe, name: str, checkpoint: Checkpoint, dataset: Dataset
) -> Path:
    key = stage_key(
        "onnx",
        (
            "edgebert_pipeline.run",
            *LOADING,
            "edgebert_export.graph",
            "edgebert_export.rewrite",
            "edgebert_export.to_onnx",
            "edgebert_runtime.onnx_session",
        ),
        checkpoint.sha256,
        dataset.sha256("train", "validation"),
        recipe.export,
    )

    def produce(out: Path, progress: Progress) -> Parity:
        model = to_onnx(checkpoint, dataset.task, recipe.export, out / "fp32.onnx")
        texts = [example.text for example in (*dataset.validation, *dataset.train)]
        return measure_parity(
            checkpoint, dataset.task, model, texts, recipe.export, on_progress=progress
        )

    what = f"{_of(name)}export, and comparison with PyTorch"
    return build.stage("onnx", key, what, produce)


def _of(model: str) -> str:
    return "" if model == MODEL else f"{model}, "


def _bundle_stage(
    build: BuildDirectory,
    recipe: Recipe,
    name: str,
    checkpoint: Checkpoint,
    dataset: Dataset,
    variants: dict[str, VariantSource],
    provenance: Provenance,
    *,
    profiles: Sequence[Profile],
    engines: Sequence[EngineSource],
) -> Path:
    key = stage_key(
        "bundle",
        (
            "edgebert_pipeline.run",
            *LOADING,
            *_SERVING,
            "edgebert_export.emulate",
            "edgebert_export.graph",
            "edgebert_export.known_answers",
            "edgebert_export.write_bundle",
            "edgebert_export.thresholds",
            "edgebert_runtime.known_answers",
        ),
        [(variant, source.model.sha256(), source.devices) for variant, source in variants.items()],
        checkpoint.sha256,
        dataset.sha256("validation"),
        recipe.name,
        recipe.bundle,
        recipe.export.max_length,
        provenance,
        list(profiles),
        [(engine.variant, engine.version, engine.sha256()) for engine in engines],
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
            texts=[example.text for example in dataset.validation],
            profiles=profiles,
            engines=engines,
        )

    return build.stage("bundle", key, f"{_of(name)}models, tokenizer, manifest", produce)


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
    build: BuildDirectory, recipe: Recipe, bundles: Mapping[str, Bundle], dataset: Dataset
) -> Path:
    key = stage_key(
        "evaluate",
        (
            *_SERVING,
            "edgebert_export.emulate",
            "edgebert_export.graph",
            "edgebert_pipeline.run",
            "edgebert_pipeline.answers",
            "edgebert_pipeline.evaluate",
            "edgebert_pipeline.intervals",
            "edgebert_pipeline.scores",
            "edgebert_runtime.rows",
        ),
        [(name, bundle.digest) for name, bundle in bundles.items()],
        dataset.sha256("test"),
        recipe.evaluate,
        machine(),  # speed measured elsewhere must not pass for this machine's
    )

    def produce(out: Path, progress: Progress) -> Evaluation:
        return evaluate(
            {name: bundle.path for name, bundle in bundles.items()},
            dataset.test,
            latency_texts=recipe.evaluate.latency_texts,
            latency_repeats=recipe.evaluate.latency_repeats,
            intra_op_threads=recipe.evaluate.intra_op_threads,
            on_progress=progress,
        )

    return build.stage("evaluate", key, f"{len(dataset.test)} test rows, and speed", produce)


def _publish(
    build: BuildDirectory,
    checkpoint: Checkpoint,
    bundle: Bundle,
    report: Report,
    reporter: Reporter,
) -> None:
    """Puts the report, and the bundle that it judges, where the user looks for them.

    Only a bundle that passed is called ``bundle``: what devices pick up is signed off.
    """
    with build.writing() as partial:
        _write_report(partial, report)
        name = "bundle" if report.passed else "bundle.refused"
        if not _is_copy_of(bundle, build.path / name):
            build.publish(bundle.path, name)
        if report.passed:
            build.withdraw("bundle.refused")
        elif _is_copy_of(bundle, build.path / "bundle"):  # it passed a more lenient gate once
            build.withdraw("bundle")
            reporter.line(f"{build.path / 'bundle'} is this very build: withdrawn")
        for file in _REPORT_FILES:
            build.publish(partial / file, file)


def _publish_student(
    build: BuildDirectory,
    checkpoint: Checkpoint,
    bundle: Bundle,
    report: Report,
    reporter: Reporter,
) -> None:
    """Puts the student's checkpoint into the build directory itself, and the report beside it."""
    with build.writing() as partial:
        _write_report(partial, report)
        there = _is_checkpoint(build.path, checkpoint.sha256)
        # Last comes what makes it a checkpoint: half of one and half of an older one is none.
        if not there:
            (build.path / "config.json").unlink(missing_ok=True)
        for name in _REPORT_FILES:
            build.publish(partial / name, name)
        for name in sorted(() if there else CHECKPOINT_FILES, key="config.json".__eq__):
            file = checkpoint.path / name
            if file.is_file():
                build.publish(file, name)


def _is_checkpoint(path: Path, sha256: str) -> bool:
    try:
        return open_checkpoint(path).sha256 == sha256
    except CheckpointError:
        return False


def _write_report(directory: Path, report: Report) -> None:
    json = msgspec.json.format(msgspec.json.encode(report), indent=2)
    (directory / "report.json").write_bytes(json + b"\n")
    (directory / "report.md").write_text(render_markdown(report), encoding="utf-8")
    (directory / "report.html").write_text(render_html(report), encoding="utf-8")


def _is_copy_of(bundle: Bundle, path: Path) -> bool:
    try:
        there = Bundle.open(path)
        there.verify()
    except BundleError:
        return False
    return there.digest == bundle.digest
