"""The ``edgebert`` command: export and its tools, and every command of the runtime."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec

from edgebert_pipeline import STAGES
from edgebert_pipeline.errors import GateRefusedError, RecipeError
from edgebert_runtime.cli import COMMANDS, CommandGroup, check_output

if TYPE_CHECKING:
    from edgebert_export.dataset import Example
    from edgebert_pipeline.audit import Audited
    from edgebert_pipeline.scores import Evaluation
    from edgebert_runtime.manifest import Task

__all__ = ["main"]


def _column_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--label-value",
            "label_values",
            multiple=True,
            help="What the file says for each of the labels, in order. Given once a label.",
        ),
        click.option("--label", help="Column of the label. [default: label]"),
        click.option("--text-pair", help="Column of the second text; for a task on pairs."),
        click.option("--text", help="Column of the text. [default: text]"),
        click.option("--format", "format_", type=click.Choice(["csv", "tsv", "jsonl", "parquet"])),
    ):
        command = option(command)
    return command


@click.group(cls=CommandGroup)
@click.version_option(package_name="edgebert")
def main() -> None:
    """Turn a fine-tuned BERT into something a device can run."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Libraries read these when they are imported, which is later; a user's own setting stays.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Build directory. [default: build/ and the name of the recipe's file]",
)
@click.option(
    "--until",
    type=click.Choice(STAGES),
    help="Last stage to run.",
)
@click.option(
    "--force",
    multiple=True,
    type=click.Choice(STAGES),
    help="Run this stage even if it is finished. May be given several times.",
)
@click.option("--wait", is_flag=True, help="Wait for another run on the same directory.")
@click.option(
    "--ablate",
    is_flag=True,
    help="Train the student without its teacher, too, and report what the teacher was worth.",
)
@click.option("--junit", type=click.Path(path_type=Path), help="Write the gate's checks here.")
def export(
    recipe: Path,
    out: Path | None,
    until: str | None,
    force: tuple[str, ...],
    wait: bool,
    ablate: bool,
    junit: Path | None,
) -> None:
    """Build what RECIPE describes: a bundle, and a report on it.

    Ends with exit code 3 when the gate refuses the result.
    """
    from edgebert_export.processes import is_leader
    from edgebert_pipeline.gate import describe_breach
    from edgebert_pipeline.junit import render_junit
    from edgebert_pipeline.report_markdown import render_table
    from edgebert_pipeline.run import export as run
    from edgebert_runtime.errors import InputError

    check_output(junit, "--junit")
    if junit is not None and until is not None:
        raise InputError("--junit is for the gate, which --until leaves out")
    out = out or Path("build") / recipe.stem
    report = run(recipe, out, until=until, force=force, wait=wait, ablate=ablate)
    if not is_leader():
        return
    if report is None:
        click.echo(f"stopped after {until}; finished stages are in {out / '.stages'}", err=True)
        return
    if junit is not None:
        junit.write_bytes(render_junit(report.name, report.gate))
    click.echo(render_table(report.evaluation))
    _warn_if_nothing_is_learnt(report.evaluation)
    refused = [check for check in report.gate if not check.passed]
    for check in refused:
        click.echo(describe_breach(check), err=True)
    if refused:
        raise GateRefusedError(
            f"the gate refused this build; it is in {out / 'bundle.refused'}, the report in "
            f"{out / 'report.html'}"
        )
    click.echo(f"bundle: {out / 'bundle'}   report: {out / 'report.html'}", err=True)


def _warn_if_nothing_is_learnt(evaluation: Evaluation) -> None:
    from edgebert_pipeline.wording import NOTHING_LEARNED

    if evaluation.learned_nothing:
        click.echo(f"warning: {NOTHING_LEARNED} ({evaluation.baseline_accuracy:.4f})", err=True)


@main.command(short_help="Distil a fine-tuned checkpoint into a smaller student.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Labelled rows (CSV, TSV, JSON Lines, Parquet), split by a hash of the text; or a "
    "recipe, with CHECKPOINT in place of its model.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="For the student.")
@click.option("--layers", type=click.IntRange(1), help="Of the student. [default: half]")
@click.option("--layer-map", help="Teacher layers to start from, counted from 0: 1,3,5")
@click.option("--unlabelled", type=click.Path(path_type=Path), help="More texts, without labels.")
@click.option("--epochs", type=click.IntRange(1))
@click.option("--trial-steps", type=click.IntRange(1), help="For each choice of layers.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True))
@click.option("--temperature", type=click.FloatRange(0, min_open=True))
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True))
@click.option("--seed", type=click.IntRange(0))
@click.option("--max-length", type=click.IntRange(3), help="Longest text in tokens.")
@_column_options
@click.option(
    "--ablate",
    is_flag=True,
    help="Train the student without its teacher, too, and report what the teacher was worth.",
)
@click.option("--wait", is_flag=True, help="Wait for another run on the same directory.")
def distill(
    checkpoint: Path,
    data: Path,
    out: Path,
    layers: int | None,
    layer_map: str | None,
    unlabelled: Path | None,
    max_length: int | None,
    ablate: bool,
    wait: bool,
    **options: Any,
) -> None:
    """Distil the fine-tuned CHECKPOINT into a DistilBERT student.

    OUT becomes a checkpoint, with the report beside it: both models are exported to ONNX and
    measured on test rows. Run again, the same command goes on from where it was stopped. For what
    has no option here, give a recipe with a [distill] table as --data.
    """
    from edgebert_export.processes import is_leader
    from edgebert_pipeline.distill_options import recipe_for
    from edgebert_pipeline.report_markdown import render_table
    from edgebert_pipeline.run import distill_checkpoint

    recipe = recipe_for(
        checkpoint,
        data,
        layers=layers,
        layer_map=layer_map,
        unlabelled=unlabelled,
        max_length=max_length,
        **options,
    )
    report = distill_checkpoint(recipe, data.parent, out, wait=wait, ablate=ablate)
    if report is not None and is_leader():
        click.echo(render_table(report.evaluation))
        _warn_if_nothing_is_learnt(report.evaluation)
        click.echo(f"student: {out}   report: {out / 'report.html'}", err=True)


@main.command(short_help="Measure a bundle on labelled rows of a file.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@_column_options
@click.option("--latency-texts", type=click.IntRange(1), default=200, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Cores to use on a CPU; all by default.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def evaluate(
    bundle: Path,
    data: Path,
    format_: Literal["csv", "tsv", "jsonl", "parquet"] | None,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    label_values: tuple[str, ...],
    latency_texts: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure every variant of BUNDLE on the labelled rows of DATA."""
    from edgebert_pipeline.evaluate import evaluate as run
    from edgebert_pipeline.progress import Reporter
    from edgebert_pipeline.report_markdown import render_table
    from edgebert_pipeline.scores import MODEL
    from edgebert_runtime.bundle import Bundle

    task = Bundle.open(bundle).manifest.task
    examples = _read_examples(task, data, format_, text, text_pair, label, label_values)
    with Reporter().stage("evaluate", f"{len(examples)} rows, and speed") as progress:
        found = run(
            {MODEL: bundle},
            examples,
            latency_texts=latency_texts,
            latency_repeats=3,
            intra_op_threads=threads,
            on_progress=progress,
        )
    click.echo(msgspec.json.encode(found) if as_json else render_table(found))


def _read_examples(
    task: Task,
    data: Path,
    format_: Literal["csv", "tsv", "jsonl", "parquet"] | None,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    label_values: tuple[str, ...],
) -> tuple[Example, ...]:
    """Reads the labelled rows of a file, for a bundle's task."""
    from edgebert_pipeline.data import load_examples
    from edgebert_pipeline.recipe import DataConfig, RowsSource
    from edgebert_runtime.errors import InputError

    if task.text_pair and text_pair is None:
        raise InputError("this bundle takes pairs of texts; name the second column: --text-pair")
    if not task.text_pair and text_pair is not None:
        raise InputError("this bundle takes one text a row; leave --text-pair out")
    try:
        rows = RowsSource(path=str(data.absolute()), format=format_)
        config = DataConfig(
            task=task.kind,
            labels=task.labels,
            text=text or "text",
            text_pair=text_pair,
            label=label or "label",
            label_values=label_values or None,
            train=rows,
        )
    except ValueError as exc:
        raise InputError(str(exc)) from exc
    return load_examples(config, rows, Path())


@main.command(short_help="Find what is fastest on this CPU, and keep it in the bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Labelled rows to judge answers by. Without them, nothing new is tried.",
)
@_column_options
@click.option(
    "--goal",
    type=click.Choice(["both", "latency", "throughput"]),
    default="both",
    show_default=True,
    help="One text, many texts, or the geometric mean of both.",
)
@click.option(
    "--max-accuracy-drop",
    type=click.FloatRange(0, 1),
    default=0.005,
    show_default=True,
    help="Most accuracy that a variant may lose against FP32.",
)
@click.option(
    "--max-flip-rate",
    type=click.FloatRange(0, 1),
    default=0.03,
    show_default=True,
    help="Largest share of rows that it may answer unlike FP32.",
)
@click.option("--threads", type=click.IntRange(1), help="Cores to use; all by default.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the tuned bundle here instead.")
@click.option("--dry-run", is_flag=True, help="Write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def tune(
    bundle: Path,
    data: Path | None,
    format_: Literal["csv", "tsv", "jsonl", "parquet"] | None,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    label_values: tuple[str, ...],
    goal: Literal["both", "latency", "throughput"],
    max_accuracy_drop: float,
    max_flip_rate: float,
    threads: int | None,
    out: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find what runs BUNDLE fastest on this kind of CPU, and keep it in BUNDLE.

    Tries kernels of ONNX Runtime on the model, within a budget of answers on the rows of --data,
    and ways to compute many texts. Machines with another kind of CPU run BUNDLE as before.
    """
    from edgebert_export.fidelity import Budget
    from edgebert_pipeline.progress import Reporter
    from edgebert_pipeline.tune import open_to_tune
    from edgebert_pipeline.tune import tune as run
    from edgebert_pipeline.tune_markdown import render_tuned
    from edgebert_runtime.device_report import own_texts
    from edgebert_runtime.errors import InputError

    if data is None and (format_ or text or text_pair or label or label_values):
        raise InputError("columns are given, but no rows; name their file with --data")
    opened = open_to_tune(bundle)
    task = opened.manifest.task
    examples: tuple[Example, ...] = ()
    texts, _ = own_texts(task, opened.manifest.max_length)
    if data is not None:
        examples = _read_examples(task, data, format_, text, text_pair, label, label_values)
        texts = [example.text for example in examples]
    tuned = run(
        opened,
        examples,
        texts,
        goal=goal,
        budget=Budget(max_accuracy_drop=max_accuracy_drop, max_flip_rate=max_flip_rate),
        cores=threads,
        out=out,
        dry_run=dry_run,
        reporter=Reporter(),
    )
    click.echo(msgspec.json.encode(tuned) if as_json else render_tuned(tuned))
    if tuned.digest is None:
        click.echo("nothing was written", err=True)
    else:
        click.echo(f"bundle: {out or bundle}   digest: {tuned.digest}", err=True)


@main.command(short_help="Print the rows of a split, for a device to measure on.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--split",
    type=click.Choice(["test", "validation", "train"]),
    default="test",
    show_default=True,
)
def rows(recipe: Path, split: str) -> None:
    """Print the labelled rows of a split of RECIPE's data as JSON Lines.

    `edgebert-rt bench BUNDLE --data FILE` takes them, so that a device is measured on the very
    rows that the report is about.
    """
    from edgebert_pipeline.data import load_dataset
    from edgebert_pipeline.recipe import load_recipe

    dataset, _ = load_dataset(load_recipe(recipe).data, recipe.parent)
    for example in getattr(dataset, split):
        parts = (example.text,) if isinstance(example.text, str) else example.text
        labels = [dataset.task.labels[index] for index in example.labels]
        row = dict(zip(("text", "text_pair"), parts, strict=False))
        label = labels if dataset.task.kind == "multi_label" else labels[0]
        click.echo(msgspec.json.encode({**row, "label": label}))


@main.command(short_help="Bound what a device could do with a bundle, on paper.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--device", required=True, help="Whose peak rates to take; an unknown one lists all.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Texts.")
@click.option(
    "--tokens", type=click.IntRange(1), default=32, show_default=True, help="Tokens of each text."
)
@click.option("--variant", help="The only variant to look at.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def estimate(
    bundle: Path, device: str, batch: int, tokens: int, variant: str | None, as_json: bool
) -> None:
    """Bound what a device could do at most with BUNDLE: an estimate, never a measurement.

    Operations and bytes are counted in the models and held against published peak rates; nothing
    is run. What the bounds leave out is in docs/performance.md.
    """
    from edgebert_pipeline.estimate import estimate as run
    from edgebert_pipeline.estimate import find_device, render_estimate
    from edgebert_runtime.bundle import Bundle

    peaks = find_device(device)
    opened = Bundle.open(bundle)
    opened.verify()
    found = run(opened, peaks, batch=batch, tokens=tokens, variant=variant)
    click.echo(msgspec.json.encode(found) if as_json else render_estimate(found))


@main.command(short_help="Print the report of a build as Markdown, or write it as HTML.")
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page to this file instead.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of report.json.")
def report(run: Path | None, as_json: bool, html: Path | None, schema: bool) -> None:
    """Print the report of a build directory RUN (or of a report.json) as Markdown.

    Reports of older versions are read, too; --json prints them in this version's form.
    """
    if schema:
        from edgebert_pipeline.report_schema import render_schema

        click.echo(render_schema(), nl=False)
        return
    if run is None:
        raise click.UsageError("give a build directory or a report.json, or --schema")
    from edgebert_pipeline.read_report import read_report

    check_output(html, "--html")
    found = read_report(run)
    if html is not None:
        from edgebert_pipeline.report_html import render_html

        html.write_text(render_html(found), encoding="utf-8")
    elif as_json:
        click.echo(msgspec.json.encode(found))
    else:
        from edgebert_pipeline.report_markdown import render_markdown

        click.echo(render_markdown(found), nl=False)


@main.command(short_help="Put reports of builds and devices side by side.")
@click.argument("reports", nargs=-1, required=True, metavar="REPORT...")
@click.option("--baseline", help="Report to hold the others against. [default: the first]")
@click.option(
    "--max-accuracy-drop",
    type=click.FloatRange(0, 1),
    help="Most accuracy that a variant may lose against the baseline; 0.005 is half a point.",
)
@click.option(
    "--max-latency-ratio",
    type=click.FloatRange(0, min_open=True),
    help="Highest median latency, as a multiple of the baseline's; 1.1 is a tenth more.",
)
@click.option(
    "--allow-different-data",
    is_flag=True,
    help="Compare what was measured on different rows or texts, and say so.",
)
@click.option("--html", type=click.Path(path_type=Path), help="Write a page here.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write the checks here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def compare(
    reports: tuple[str, ...],
    baseline: str | None,
    max_accuracy_drop: float | None,
    max_latency_ratio: float | None,
    allow_different_data: bool,
    html: Path | None,
    junit: Path | None,
    as_json: bool,
) -> None:
    """Compare REPORTs: build directories, report.json files, and what devices brought by bench.

    Prints Markdown. A REPORT is FILE or NAME=FILE; the name is what it is called in tables. Ends
    with exit code 3 when a variant in a bundle is past a limit, or is no longer there to be held
    against one.
    """
    from edgebert_pipeline.compare import Limits, compare_sources
    from edgebert_pipeline.compare_report import render_compared_html, render_compared_markdown
    from edgebert_pipeline.gate import describe_breach
    from edgebert_pipeline.junit import render_junit
    from edgebert_pipeline.sources import read_sources

    check_output(html, "--html")
    check_output(junit, "--junit")
    found = compare_sources(
        read_sources(reports),
        baseline=baseline,
        limits=Limits(max_accuracy_drop=max_accuracy_drop, max_latency_ratio=max_latency_ratio),
        allow_different_data=allow_different_data,
    )
    if html is not None:
        html.write_text(render_compared_html(found), encoding="utf-8")
    if junit is not None:
        junit.write_bytes(render_junit(f"against {found.baseline}", found.checks))
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        click.echo(render_compared_markdown(found), nl=False)
    refused = [check for check in found.checks if not check.passed]
    for check in refused:
        click.echo(describe_breach(check), err=True)
    if refused:
        raise GateRefusedError(f"{len(refused)} checks against {found.baseline} failed")


@main.command(short_help="Show accuracy, latency and size over many reports.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with charts here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def history(directory: Path, html: Path | None, as_json: bool) -> None:
    """Show every report of a build or a device under DIRECTORY, in the order of measuring.

    Prints Markdown. The time is the one in the report, not the file's.
    """
    from edgebert_pipeline.history import (
        read_history,
        render_history_html,
        render_history_markdown,
    )

    check_output(html, "--html")
    found = read_history(directory)
    if html is not None:
        html.write_text(render_history_html(found), encoding="utf-8")
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        click.echo(render_history_markdown(found), nl=False)


@main.command(short_help="Say what TensorRT-RTX makes of ONNX models; no GPU needed.")
@click.argument(
    "models", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="MODEL..."
)
@click.option(
    "--batch", type=click.IntRange(1, 65536), default=32, show_default=True, help="Most rows."
)
@click.option(
    "--tokens",
    type=click.IntRange(1, 65536),
    default=128,
    show_default=True,
    help="Most tokens of a row.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def audit(models: tuple[Path, ...], batch: int, tokens: int, as_json: bool) -> None:
    """Build engines of MODELs (ONNX files) with TensorRT-RTX, and say what became of each.

    From the compiler's log and the engine's constants: which INT8 products run in INT8, whether
    their sums are scaled before they are stored as FP16, which attentions are fused, how many
    kernels there are. Nothing is kept. Ends with exit code 3 if an engine is refused, and with 1
    if a log is not understood.
    """
    from edgebert_pipeline.audit import audit_files

    _print_audited(audit_files(models, batch, tokens, _say), as_json)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _print_audited(audited: Sequence[Audited], as_json: bool) -> None:
    from edgebert_pipeline.audit import check_audited, render_audited

    click.echo(msgspec.json.encode(audited) if as_json else render_audited(audited))
    check_audited(audited)


def _with_audit(command: click.Command) -> click.Command:
    """The runtime's command with an option that needs the export package."""
    build = command.callback
    assert build is not None

    def run(audit: bool, **options: Any) -> None:
        if not audit:
            build(**options)
            return
        from edgebert_pipeline.audit import audit_bundle
        from edgebert_runtime.errors import InputError

        if options["flavour"] == "tensorrt":
            raise InputError("an audit builds with TensorRT for RTX; leave --flavour out")
        found = audit_bundle(options["bundle"], options["names"], _say)
        _print_audited(found, options["as_json"])

    option = click.Option(
        ["--audit"],
        is_flag=True,
        help="Say what TensorRT-RTX makes of the models: needs no GPU, keeps nothing.",
    )
    return click.Command(
        command.name,
        params=[*command.params, option],
        callback=run,
        help=command.help,
        short_help=command.short_help,
    )


@main.command()
@click.option("--check", type=click.Path(path_type=Path), help="Validate this recipe.")
@click.option("--reference", is_flag=True, help="Print the reference of all keys, as Markdown.")
def recipe(check: Path | None, reference: bool) -> None:
    """Validate a recipe, or print the reference of all keys.

    Checks every key, and that files named by path are there; rows are not read.
    """
    from edgebert_pipeline.recipe import check_paths, load_recipe
    from edgebert_pipeline.recipe_reference import render_reference

    if reference:
        click.echo(render_reference(), nl=False)
    elif check is not None:
        found = load_recipe(check)
        check_paths(found, check)
        click.echo(f"{check}: {found.name}, {found.data.task}, {len(found.data.labels)} labels: ok")
    else:
        raise RecipeError("give --check FILE or --reference")


for _command in COMMANDS:
    main.add_command(_with_audit(_command) if _command.name == "engine" else _command)
