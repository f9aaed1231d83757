"""The commands that a device needs: ``edgebert-rt``. The full ``edgebert`` includes them."""

from __future__ import annotations

import functools
import io
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import click
import msgspec

from edgebert_runtime.device import DEVICES
from edgebert_runtime.errors import DeviceError, EdgebertError, InputError
from edgebert_runtime.facts import DeviceFacts, gather_facts
from edgebert_runtime.processor import processor_kind, usable_cores
from edgebert_runtime.tensorrt_api import FLAVOURS, Flavour

if TYPE_CHECKING:
    from edgebert_runtime.encoder import Text
    from edgebert_runtime.engine import EngineKey
    from edgebert_runtime.engines import Preference
    from edgebert_runtime.manifest import Tuning

__all__ = ["COMMANDS", "CommandGroup", "check_output", "main", "printable", "reported_errors"]

_STREAM_TEXTS = 256
"""Most lines of standard input that are answered together."""

_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), " ")


class CommandGroup(click.Group):
    """A group whose commands end with edgebert's exit codes, one line on stderr, no traceback."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Runs the program; wrong options, too, are one line."""
        run: Callable[..., Any] = functools.partial(super().main, standalone_mode=False)
        if not standalone_mode:
            return run(*args, **extra)
        try:
            result = run(*args, **extra)
        except click.exceptions.NoArgsIsHelpError as exc:
            exc.show()
            sys.exit(exc.exit_code)
        except click.ClickException as exc:
            ctx = getattr(exc, "ctx", None)
            hint = f" (see: {ctx.command_path} --help)" if ctx else ""
            message = " ".join(exc.format_message().split())
            click.echo(f"error: {printable(message)}{hint}", err=True)
            sys.exit(exc.exit_code)
        except click.Abort:
            click.echo("stopped; the same command goes on from here", err=True)
            sys.exit(128 + 2)  # as shells say of a program that ^C (SIGINT) ended
        sys.exit(result if isinstance(result, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; see ``reported_errors``."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal need not know every character
                stream.reconfigure(errors="backslashreplace")
        return reported_errors(super().invoke, ctx)


def reported_errors(call: Callable[..., Any], *args: Any) -> Any:
    """Calls ``call``; an error raised on purpose becomes one line on stderr and its exit code.

    A closed output pipe (``| head``) ends quietly, as for any other filter.
    """
    try:
        return call(*args)
    except EdgebertError as exc:
        click.echo(f"error: {printable(str(exc))}", err=True)
        sys.exit(exc.exit_code)
    except OSError as exc:
        # What is left in the buffer cannot be written; keep the interpreter from trying.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(exc, BrokenPipeError):
            sys.exit(0)
        click.echo(f"error: {printable(str(exc))}", err=True)
        sys.exit(1)


def printable(text: str) -> str:
    """Replaces control characters, which could do things to a terminal, by spaces."""
    return text.translate(_CONTROL)


def check_output(path: Path | None, option: str) -> None:
    """Checks, before long work, that a file can be written. Raises ``InputError``.

    It is opened, so that whatever forbids that is met now; what is in it stays, and where there
    was none, there is none.
    """
    if path is None:
        return
    try:
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(f"{option} {path}: give a file in a directory that is there")
        there = path.exists() or path.is_symlink()
        if there and not path.is_file():  # a pipe would end with the first that is closed
            return
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as exc:
        raise InputError(f"{option} {path} cannot be written: {exc.strerror}") from exc


def _bundle_argument(command: Callable[..., None]) -> Callable[..., None]:
    return click.argument("bundle", type=click.Path())(command)


def _session_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--threads", type=click.IntRange(1), help="Cores to use on a CPU; all by default."
        ),
        click.option("--variant", help="Variant to load instead of the device's best."),
        click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True),
    ):
        command = option(command)
    return command


@click.command(short_help="Label texts, from arguments or standard input.")
@_bundle_argument
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@_session_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def predict(
    bundle: str,
    texts: tuple[str, ...],
    device: str,
    variant: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Label each TEXT, or each line of standard input when TEXT is "-" or left out.

    Prints the label, its score and the text, separated by tabs; several labels are separated
    by commas, none is "-". For a model on pairs of texts, separate the two by a tab.
    """
    from edgebert_runtime.classifier import Classifier

    lines: Iterable[list[str]] = [list(texts)]
    if texts in {(), ("-",)}:
        lines = _stdin_lines()
    with Classifier.load(bundle, device=device, variant=variant, intra_op_threads=threads) as clf:
        first = True
        for chunk in lines:
            inputs = [_split_pair(text) if clf.task.text_pair else text for text in chunk]
            for text, prediction in zip(chunk, clf.predict(inputs), strict=True):
                if as_json:
                    row = {"text": text, **msgspec.to_builtins(prediction)}
                    click.echo(
                        ("[" if first else ",\n ") + msgspec.json.encode(row).decode(), nl=False
                    )
                else:
                    label = printable(",".join(prediction.labels)) or "-"
                    click.echo(f"{label}\t{prediction.score:.4f}\t{printable(text)}")
                first = False
            sys.stdout.flush()
        if as_json:
            click.echo("[]" if first else "]")
        if clf.stats.truncated:
            click.echo(
                f"{clf.stats.truncated} of {clf.stats.texts} texts were cut to fit", err=True
            )


def _split_pair(text: str) -> tuple[str, str]:
    first, tab, second = text.partition("\t")
    if not tab:
        raise InputError(f"this model takes two texts separated by a tab, got {text!r:.80}")
    return first, second


def _stdin_lines() -> Iterator[list[str]]:
    """Yields the lines that have arrived, so that a slow pipe is answered line by line."""
    if sys.stdin is None:
        raise InputError("standard input is closed; give texts as arguments")
    try:
        # A file of its own: the interpreter, when it ends, closes sys.stdin, which it cannot
        # while the thread below waits in it.
        stream: BinaryIO = open(os.dup(sys.stdin.fileno()), "rb")  # noqa: SIM115
    except io.UnsupportedOperation:
        stream = sys.stdin.buffer
    arrived: queue.Queue[bytes | OSError | None] = queue.Queue(maxsize=4 * _STREAM_TEXTS)

    def read() -> None:
        try:
            for line in stream:
                arrived.put(line)
        except OSError as exc:
            arrived.put(exc)
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    number = 0
    ended = False
    while not ended:
        chunk: list[str] = []
        raw = arrived.get()
        while raw is not None:
            if isinstance(raw, OSError):
                raise InputError(f"standard input cannot be read: {raw}")
            number += 1
            chunk.append(_decoded(raw, number, "standard input"))
            if len(chunk) == _STREAM_TEXTS or arrived.empty():
                break
            raw = arrived.get()
        ended = raw is None
        if chunk:
            yield chunk


def _decoded(raw: bytes, number: int, source: str) -> str:
    try:
        return raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as exc:
        raise InputError(f"{source}, line {number}, is not UTF-8: {exc}") from exc


@click.command(short_help="Measure a bundle, or several, on this machine.")
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@_session_options
@click.option("--all-variants", is_flag=True, help="Every variant that runs here, turn by turn.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Labelled rows to count right answers on: CSV, TSV or JSON Lines with columns text and "
    "label (and text_pair).",
)
@click.option("--texts", "path", type=click.Path(), help="File with one text a line, to time.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--out",
    "outs",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Write the JSON document here. Given once for each BUNDLE.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the JSON document, of one BUNDLE.")
def bench(
    bundles: tuple[Path, ...],
    device: str,
    variant: str | None,
    threads: int | None,
    all_variants: bool,
    data: Path | None,
    path: str | None,
    repeats: int,
    outs: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Measure each BUNDLE on this machine: latency, throughput, memory, and accuracy on --data.

    What is timed: the lines of --texts, or up to 200 texts of --data, or sentences of edgebert's
    own. Several bundles are timed turn by turn. `edgebert compare` takes the JSON documents.
    """
    from edgebert_runtime.bundle import Bundle
    from edgebert_runtime.device_report import measure_device, render_device_report
    from edgebert_runtime.rows import read_labelled

    if all_variants and variant is not None:
        raise InputError("give --variant or --all-variants, not both")
    if outs and len(set(outs)) != len(bundles):
        raise InputError(f"give --out once for each bundle, with a file for each of {len(bundles)}")
    if as_json and len(bundles) > 1:
        raise InputError("--json prints one document; for several bundles, give --out for each")
    for out in outs:
        check_output(out, "--out")
    task = Bundle.open(bundles[0]).manifest.task
    texts: list[Text] | None = None
    if path is not None:
        lines = _lines_of(path)
        texts = [_split_pair(line) if task.text_pair else line for line in lines]
    reports = measure_device(
        bundles,
        device=device,
        variant="all" if all_variants else variant,
        intra_op_threads=threads,
        texts=texts,
        rows=read_labelled(data, task) if data is not None else (),
        repeats=repeats,
        on_progress=lambda done, total: click.echo(f"  round {done} of {total}", err=True),
    )
    documents = [
        msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n" for report in reports
    ]
    for out, document in zip(outs, documents, strict=False):  # if they are to be written
        out.write_bytes(document)
        click.echo(f"wrote {out}", err=True)
    if as_json:
        click.echo(documents[0], nl=False)
        return
    for bundle, report in zip(bundles, reports, strict=True):
        if len(bundles) > 1:
            click.echo(f"{printable(str(bundle))}:")
        for line in render_device_report(report).splitlines():
            click.echo(printable(line))


def _lines_of(path: str) -> list[str]:
    try:
        with open(path, "rb") as stream:
            lines = [_decoded(raw, number, path) for number, raw in enumerate(stream, start=1)]
    except OSError as exc:
        raise InputError(f"{path} cannot be read: {exc.strerror}") from exc
    if not lines:
        raise InputError(f"{path} has no text; put one on each line")
    return lines


@click.command(short_help="Hold what a bundle computes here against its known answers.")
@_bundle_argument
@_session_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def verify(
    bundle: str, device: str, variant: str | None, threads: int | None, as_json: bool
) -> None:
    """Run BUNDLE's known inputs on this machine, and say how far the outputs are off.

    Without --device and --variant, everything that runs here is verified: each variant on each of
    its devices. Ends with 1 if an output is wrong.
    """
    from edgebert_runtime.bundle import Bundle
    from edgebert_runtime.verify import verify_here

    found = verify_here(Bundle.open(bundle), device=device, variant=variant, threads=threads)
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        for item in found.verified:
            click.echo(printable(str(item)))
    for name, reason in found.not_run.items():
        click.echo(f"not run: {name}: {printable(reason)}", err=True)
    if not all(item.passed for item in found.verified):
        click.echo("error: this machine computes wrongly what is marked as wrong", err=True)
        sys.exit(DeviceError.exit_code)


@click.command()
@_bundle_argument
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def inspect(bundle: str, as_json: bool) -> None:
    """Check every byte of BUNDLE and say what is in it."""
    from edgebert_runtime.bundle import Bundle
    from edgebert_runtime.manifest import encode_manifest

    opened = Bundle.open(bundle)
    opened.verify()
    manifest = opened.manifest
    if as_json:
        click.echo(encode_manifest(manifest), nl=False)
        return
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    kind = manifest.task.kind.replace("_", " ") + (", pairs" if manifest.task.text_pair else "")
    click.echo(f"{printable(manifest.name)}: {kind}; up to {manifest.max_length} tokens")
    click.echo(f"labels: {printable(', '.join(manifest.task.labels))}")
    for item in manifest.variants:
        devices = ", ".join(item.devices)
        click.echo(f"{item.name}: {sizes[item.model] / 1e6:.1f} MB, {item.precision}, on {devices}")
    for built in manifest.engines:
        click.echo(
            f"engine of {built.variant}: {sizes[built.path] / 1e6:.1f} MB, TensorRT-RTX "
            f"{printable(built.version)}, {printable(built.platform)}"
        )
    for tuning in manifest.tunings:
        click.echo(
            f"tuned for {printable(tuning.processor)}, {tuning.cores} cores: {tuning.variant}, "
            f"{_worth(tuning)}"
        )
    click.echo(f"digest: {opened.digest} (every file checked)")


def _worth(tuning: Tuning) -> str:
    found = tuning.measured
    return (
        f"{found.latency_ratio:.2f} times as fast for one text as {found.before} was, "
        f"{found.throughput_ratio:.2f} times for many"
    )


@click.command(short_help="Build a bundle's TensorRT engines on this device.")
@_bundle_argument
@click.option("--flavour", type=click.Choice(FLAVOURS), help="TensorRT, or TensorRT for RTX.")
@click.option("--variant", "names", multiple=True, help="Variant to build; all if left out.")
@click.option("--workspace-mib", type=click.IntRange(1), default=512, show_default=True)
@click.option("--version-compatible", is_flag=True, help="Let later TensorRT releases load it.")
@click.option("--hardware-compatible", is_flag=True, help="Let every GPU from Ampere on run it.")
@click.option("--force", is_flag=True, help="Build engines anew that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def engine(
    bundle: str,
    flavour: Flavour | None,
    names: tuple[str, ...],
    workspace_mib: int,
    version_compatible: bool,
    hardware_compatible: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Build BUNDLE's engines with this device's TensorRT, and measure which is the fastest.

    Engines are kept in the user's cache directory; predict, bench and applications find them
    there. Without --flavour, the first that this device can build is taken.
    """
    from edgebert_runtime import engines
    from edgebert_runtime.bundle import Bundle
    from edgebert_runtime.engine import unusable
    from edgebert_runtime.engine_cache import EngineCache
    from edgebert_runtime.tensorrt_build import BuildOptions

    opened = Bundle.open(bundle)
    facts = gather_facts(flavour or "auto")
    usable = [name for name in FLAVOURS if unusable(name, facts, building=True) is None]
    chosen: Flavour = flavour or (usable or FLAVOURS)[0]
    cache = EngineCache()
    log = _BuildLog(cache.directory / f"build-{chosen}.log")
    try:
        built = engines.build_engines(
            opened,
            chosen,
            facts,
            cache,
            variants=[opened.manifest.variant(name) for name in names] or None,
            options=BuildOptions(
                workspace_mib=workspace_mib,
                version_compatible=version_compatible,
                hardware_compatible=hardware_compatible,
            ),
            force=force,
            log=log,
            say=lambda line: click.echo(line, err=True),
            on_progress=_StepCounter(),
        )
    finally:
        log.close()
    keys = built.keys
    for name, failure in built.failures.items():
        click.echo(f"{name}: not built: {printable(failure)}", err=True)
    known = None if force else engines.read_preference(opened, chosen, facts, cache)
    preference = None
    reason = unusable(chosen, facts)
    tried = len(keys) + len(built.failures)
    if reason is None and tried < len(engines.variants_for(opened.manifest, chosen)):
        reason = "that compares an engine of each variant"
    if reason is not None:
        click.echo(f"not measured: {reason}", err=True)
    elif known is not None and known.holds_for(keys):
        preference = known
    else:
        preference = engines.measure_and_remember(
            opened, keys, facts, cache, lambda line: click.echo(printable(line), err=True)
        )
    if as_json:
        document = {"engines": keys, "failures": built.failures, "preference": preference}
        click.echo(msgspec.json.encode(document))
    else:
        _print_engines(keys, preference)
    if names and built.failures:  # what was asked for by name is missing
        sys.exit(DeviceError.exit_code)


def _print_engines(keys: dict[str, EngineKey], preference: Preference | None) -> None:
    for name, key in keys.items():
        click.echo(f"{name}: {key}")
    if preference is not None:
        for timing in preference.timings:
            shape = f"{timing.profile.opt_batch} x {timing.profile.opt_seq} tokens"
            click.echo(
                f"{timing.variant}, {shape}: p50 {timing.p50_ms:.2f} ms, p99 {timing.p99_ms:.2f} ms"
            )
        click.echo(f"preferred: {preference.variant}")


class _BuildLog:
    """Writes each line at once, since a build that is killed is the one whose log is needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: TextIO | None = None

    def __call__(self, line: str) -> None:
        if self._stream is None:
            self._stream = self._path.open("w", encoding="utf-8", buffering=1)
        self._stream.write(f"{line}\n")

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            click.echo(f"TensorRT's log: {self._path}", err=True)


class _StepCounter:
    """Shows a build's steps: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._shown = -1

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        step = 1 if sys.stderr.isatty() else 25
        if percent // step == self._shown // step:
            return
        self._shown = percent
        end = done >= total
        if sys.stderr.isatty():
            click.echo(f"\r  {percent} % of the steps known so far", nl=end, err=True)
        else:
            click.echo(f"  {percent} % of the steps known so far", err=True)


@click.command(short_help="Say what would run here, and why.")
@click.argument("bundle", type=click.Path(), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(bundle: str | None, as_json: bool) -> None:
    """Say what this machine offers and, for a BUNDLE, what would run here and why."""
    from edgebert_runtime.bundle import Bundle
    from edgebert_runtime.classifier import choose_for, tuning_for
    from edgebert_runtime.verify import is_verified

    opened = None if bundle is None else Bundle.open(bundle)
    facts = gather_facts(look_for_gpu=True)
    choice, fault = None, None
    tuning = tuning_for(opened.manifest, usable_cores()) if opened is not None else None
    if opened is not None:
        try:
            choice = choose_for(opened, facts, tuning=tuning)
        except EdgebertError as exc:
            fault = exc
    if as_json:
        said = None if fault is None else str(fault)
        click.echo(
            msgspec.json.encode({"facts": facts, "choice": choice, "tuning": tuning, "fault": said})
        )
    else:
        for line in _described(facts):
            click.echo(printable(line))
        if choice is not None:
            click.echo(f"would run: {choice.variant.name} on {choice.device}")
            right = opened is not None and is_verified(opened, choice, facts)
            known = "given here" if right else "not asked for here yet; edgebert-rt verify does"
            click.echo(f"known answers: {known}")
            for reason in choice.passed_over:
                click.echo(f"passed over: {printable(reason)}")
            if choice.device == "cpu":
                click.echo(f"tuned: {printable(_tuned(tuning))}")
        if fault is not None:
            click.echo(f"would run: nothing: {printable(str(fault))}")
    if fault is not None:
        sys.exit(fault.exit_code)


def _tuned(tuning: Tuning | None) -> str:
    if tuning is None:
        return f"not for this processor ({processor_kind()}); edgebert tune BUNDLE would"
    here = usable_cores()
    cores = "" if tuning.cores == here else f" on {tuning.cores} cores (here: {here})"
    return f"for this processor{cores}, {tuning.variant}: {_worth(tuning)}"


def _described(facts: DeviceFacts) -> Iterator[str]:
    """Yields what a machine offers, a line for each part of it."""
    memory = f", {facts.memory_bytes / 2**30:.1f} GiB" if facts.memory_bytes else ""
    yield f"machine: {facts.platform}, {facts.cpu_count} processors{memory}"
    if facts.jetson is not None:
        jetpack = f" (JetPack {facts.jetson.jetpack})" if facts.jetson.jetpack else ""
        mode = facts.jetson.power_mode or "unknown"
        yield f"Jetson Linux: {facts.jetson.release}{jetpack}, power mode {mode}"
    if facts.gpu is not None:
        gpu = facts.gpu
        capability = ".".join(map(str, gpu.compute_capability))
        kind = ", memory shared with the processor" if gpu.integrated else ""
        yield (
            f"GPU: {gpu.name}, compute capability {capability}, {gpu.free_bytes / 2**30:.1f} of "
            f"{gpu.total_bytes / 2**30:.1f} GiB free{kind}"
        )
        yield f"driver: {facts.driver or 'unknown'}, CUDA up to {gpu.cuda[0]}.{gpu.cuda[1]}"
    else:
        driver = f"driver {facts.driver}; " if facts.driver else ""
        yield f"GPU: {driver}{facts.gpu_fault}"
    for flavour, module in (("tensorrt", "TensorRT"), ("rtx", "TensorRT-RTX")):
        found = facts.tensorrt.get(flavour)
        if found is None:
            yield f"{module}: not installed"
        else:
            cuda = f", for CUDA {found.cuda}" if found.cuda else ""
            yield f"{module}: {found.version or found.fault}{cuda}"
    if facts.onnxruntime_fault is not None:
        yield f"ONNX Runtime: {facts.onnxruntime_fault}"
    else:
        yield f"ONNX Runtime: {', '.join(facts.onnxruntime)}; {', '.join(facts.providers)}"


COMMANDS: tuple[click.Command, ...] = (predict, verify, bench, engine, inspect, doctor)


@click.group(cls=CommandGroup)
@click.version_option(package_name="edgebert-runtime")
def main() -> None:
    """Run edgebert bundles on this device."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


for _command in COMMANDS:
    main.add_command(_command)
