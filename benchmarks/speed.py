"""edgebert beside what its users would take otherwise: speed, memory, size, and accuracy.

Usage: python benchmarks/speed.py RECIPE BUILD [--quick] [--rounds N] [--out DIR]
(after edgebert export)

The same fine-tuned checkpoints and the same test rows for all: the build's bundles in edgebert,
``transformers.pipeline``, PyTorch's dynamic INT8, Optimum's models in the same pipeline, bare
``tokenizers`` and ``onnxruntime`` on the plain export, and the bare script on edgebert's own
model, which tells what the runtime does from what the export does. Each has a process of its own;
one works at a time, turn by turn in an order that rotates, so that a machine whose speed drifts
slows all alike. A figure is the median of the rounds, with the lowest and the highest; a ratio
is taken within each round first. A peer's throughput is at the better of batch sizes 32 and 1.

Writes ``speed.md``, ``speed.json`` and ``speed.svg``; prints the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from contestant import Contestant, cold_start_s
from finished_build import FinishedModel
from limit import count_products, operations

from edgebert_pipeline.build import library_versions
from edgebert_pipeline.evaluate import machine
from edgebert_pipeline.markdown import table
from edgebert_pipeline.read_report import read_report
from edgebert_pipeline.report import Report
from edgebert_pipeline.scores import TEACHER
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.encoder import TextEncoder

EDGEBERT, PIPELINE, OPTIMUM = "edgebert", "transformers.pipeline", "Optimum + pipeline"
TORCH, BARE, BARE_OURS = "PyTorch dynamic", "bare ONNX Runtime", "bare, edgebert's model"
FP32, INT8 = "FP32", "INT8"
VARIANTS = {INT8: "int8-cpu", FP32: "fp32"}
LIMITS = (16, 64, 128)
"""Lengths at which products are counted; what they need is a polynomial of degree 2 in length."""


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int
    cold: int
    short: int
    long: int
    single: int
    test: int | None


FULL = Effort(rounds=7, cold=5, short=256, long=64, single=100, test=None)
QUICK = Effort(rounds=3, cold=1, short=48, long=12, single=20, test=100)


@dataclass(frozen=True)
class Entry:
    """A contestant, and what is known of it before it runs.

    ``size_mb`` is what a device would need of it, the libraries aside.
    """

    model: str
    system: str
    precision: str
    process: Contestant
    size_mb: float

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the others."""
        return self.model, self.system, self.precision

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes to try; edgebert forms its own."""
        return (32,) if self.system == EDGEBERT else (32, 1)


@dataclass
class Measured:
    """What one contestant did; one value a round, but for ``labels`` and ``peak_mb``."""

    cold_s: list[float] = field(default_factory=list)
    texts_per_s: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    single_ms: list[list[float]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    peak_mb: float = 0.0

    def throughput(self, corpus: str) -> list[float]:
        """Texts per second at the better batch size."""
        return max(self.texts_per_s[corpus].values(), key=statistics.median)

    def p50_ms(self) -> list[float]:
        """The median over texts, of each round."""
        return [float(np.median(times)) for times in self.single_ms]

    def p99_ms(self) -> list[float]:
        """The 99th percentile over texts, of each round."""
        return [float(np.percentile(times, 99)) for times in self.single_ms]


Results = dict[tuple[str, str, str], Measured]


# --- What takes part ------------------------------------------------------------------------------


def bundle_of(build: Path, name: str, report: Report) -> Path:
    """Finds a model's bundle in a build: the one whose variants have the sizes in the report."""
    if name == next(iter(report.models)):
        return build / "bundle"
    sizes = {v.name: v.size_bytes for v in report.evaluation.variants if v.model == name}
    for path in (build / ".stages").glob("bundle-*/bundle"):
        bundle = Bundle.open(path).manifest
        listed = {file.path: file.size_bytes for file in bundle.files}
        if sizes == {variant.name: listed[variant.model] for variant in bundle.variants}:
            return path
    raise SystemExit(f"{build} has no bundle of its {name}; export it anew")


def entries_of(model: FinishedModel, bundle: Path, work: Path) -> Iterator[Entry]:
    """Prepares every way to run one model; what has to be made is made in ``work``."""
    from onnxruntime.quantization import quantize_dynamic
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    manifest = Bundle.open(bundle).manifest
    cut: dict[str, Any] = {"max_length": manifest.max_length}
    parts = {"labels": manifest.task.labels, **cut}
    tokenizer = bundle / manifest.tokenizer
    for precision, variant in VARIANTS.items():
        found = [v.model for v in manifest.variants if v.name == variant]
        if not found:
            raise SystemExit(f"{bundle} has no variant {variant}")
        ours = bundle / found[0]
        size_mb = size_of(ours, tokenizer, bundle / "manifest.json")
        runtime = Contestant("edgebert", bundle=str(bundle), variant=variant)
        yield Entry(model.name, EDGEBERT, precision, runtime, size_mb)
        bare = Contestant("bare", model=str(ours), tokenizer=str(tokenizer), **parts)
        yield Entry(model.name, BARE_OURS, precision, bare, size_of(ours, tokenizer))

    checkpoint = model.checkpoint.path
    size_mb = size_of(*checkpoint.iterdir())
    for kind, name, precision in (("transformers", PIPELINE, FP32), ("torch_int8", TORCH, INT8)):
        process = Contestant(kind, checkpoint=str(checkpoint), **cut)
        yield Entry(model.name, name, precision, process, size_mb)

    work.mkdir()
    plain = model.export(work)
    quantised = work / "int8.onnx"
    quantize_dynamic(plain, quantised, per_channel=True)
    for precision, path in ((FP32, plain), (INT8, quantised)):
        bare = Contestant("bare", model=str(path), tokenizer=str(tokenizer), **parts)
        yield Entry(model.name, BARE, precision, bare, size_of(path, tokenizer))

    fp32 = work / "optimum-fp32"
    shutil.copytree(checkpoint, fp32, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copyfile(plain, fp32 / "model.onnx")
    int8 = shutil.copytree(fp32, work / "optimum-int8", ignore=shutil.ignore_patterns("*.onnx"))
    has_vnni = "avx512_vnni" in processor_flags()
    preset = AutoQuantizationConfig.avx512_vnni if has_vnni else AutoQuantizationConfig.avx2
    quantizer = ORTQuantizer.from_pretrained(fp32, file_name="model.onnx")
    quantizer.quantize(save_dir=int8, quantization_config=preset(is_static=False))
    (int8 / "model_quantized.onnx").rename(int8 / "model.onnx")
    for precision, path in ((FP32, fp32), (INT8, int8)):
        process = Contestant("optimum", checkpoint=str(path), **cut)
        yield Entry(model.name, OPTIMUM, precision, process, size_of(*path.iterdir()))


def size_of(*paths: Path) -> float:
    """Adds up files, in MB."""
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def corpora_of(texts: Sequence[str], encoder: TextEncoder, effort: Effort) -> dict[str, list[str]]:
    """Returns texts as they are, texts joined until one more would be cut, and three to one."""
    short = [texts[i] for i in np.linspace(0, len(texts) - 1, effort.short).astype(int)]
    full = max(len(row.ids) for row in encoder.encode([" ".join(texts[:99])]))  # it is cut there
    long, rest = [], iter(texts * (1 + 20 * effort.long // len(texts)))
    while len(long) < effort.long:
        joined = next(rest)
        while len(encoder.encode([longer := f"{joined} {next(rest)}"])[0].ids) < full:
            joined = longer
        long.append(joined)
    mixed = [*short[: effort.short // 2], *long[: effort.short // 6]]
    order = np.random.default_rng(0).permutation(len(mixed))
    return {"short": short, "long": long, "mixed": [mixed[index] for index in order]}


# --- Measuring ------------------------------------------------------------------------------------


def measure(
    entries: Sequence[Entry], corpora: dict[str, list[str]], test: Sequence[str], effort: Effort
) -> Results:
    """Starts everybody anew some times, then lets everybody label everything in turn."""
    results = {entry.key: Measured() for entry in entries}
    for round_ in range(effort.cold + 1):
        for entry in _rotated(entries, round_):
            seconds = cold_start_s(entry.process)
            if round_:  # the first start finds nothing in the file cache
                results[entry.key].cold_s.append(seconds)
        _say(f"cold starts: round {round_} of {effort.cold}")
    single = [corpora["short"][i] for i in range(0, effort.short, effort.short // effort.single)]
    with ExitStack() as stack:
        for entry in entries:
            stack.enter_context(entry.process)
            results[entry.key].labels = entry.process.ask(test)["labels"]
        _say("everybody has labelled the test rows")
        for round_ in range(effort.rounds):
            for corpus, texts in corpora.items():
                for entry in _rotated(entries, round_):
                    rates = results[entry.key].texts_per_s.setdefault(corpus, {})
                    for batch in entry.batches:
                        (seconds,) = entry.process.ask(texts, batch=batch)["seconds"]
                        rates.setdefault(batch, []).append(len(texts) / seconds)
            for entry in _rotated(entries, round_):
                answer = entry.process.ask(single[: effort.single], batch=1, one_by_one=True)
                results[entry.key].single_ms.append([1000 * s for s in answer["seconds"]])
                results[entry.key].peak_mb = answer["peak_mb"]
            _say(f"speed: round {round_ + 1} of {effort.rounds}")
    return results


def _rotated(entries: Sequence[Entry], by: int) -> list[Entry]:
    return [entries[(index + by) % len(entries)] for index in range(len(entries))]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def limit_of(bundle: Path, rounds: int) -> dict[str, float]:
    """Measures how many operations per second the machine does in products of this model."""
    length = LIMITS[0]
    products = count_products(bundle / "models/fp32.onnx", length)
    shapes = [[*k[2:], n] for k, n in products.items() if k[0] and k[1] == length]
    command = [sys.executable, str(Path(__file__).with_name("limit.py")), json.dumps(shapes)]
    found = [json.loads(subprocess.check_output(command)) for _ in range(rounds)]
    return {kind: max(rates[kind] for rates in found) for kind in found[0]}


def needed(bundle: Path, lengths: Sequence[int]) -> tuple[float, float]:
    """Counts operations of a mean text: in products by constants, and of two activations."""
    counted = [count_products(bundle / "models/fp32.onnx", length) for length in LIMITS]
    means = []
    for constant in (True, False):
        values = [operations(products, constant=constant) for products in counted]
        means.append(float(np.polyval(np.polyfit(LIMITS, values, 2), lengths).mean()))
    return means[0], means[1]


# --- Reporting ------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """Writes a median, the lowest and the highest."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Divides round by round."""
    return [one / other for one, other in zip(over, under, strict=True)]


def accuracy_of(entry: Entry, results: Results, truth: Sequence[str]) -> tuple[str, str]:
    """Returns the accuracy, and how many answers differ from the pipeline's on the same model."""
    labels, reference = results[entry.key].labels, results[entry.model, PIPELINE, FP32].labels
    right = sum(one == other for one, other in zip(labels, truth, strict=True))
    flips = sum(one != other for one, other in zip(labels, reference, strict=True))
    return f"{right / len(truth):.4f}", f"{flips} ({flips / len(truth):.1%})"


def render_model(entries: Sequence[Entry], results: Results, truth: Sequence[str]) -> str:
    """Renders one model's tables."""
    rates, singles, rest = [], [], []
    for entry in entries:
        found, ours = results[entry.key], results[entry.model, EDGEBERT, entry.precision]
        name = f"{entry.system}, {entry.precision}"
        right = accuracy_of(entry, results, truth)

        def gain(of: Callable[[Measured], list[float]], found=found, ours=ours) -> str:  # type: ignore[no-untyped-def]
            return "" if found is ours else spread(ratios(of(ours), of(found)), 2)

        columns = []
        for corpus in found.texts_per_s:
            columns += [
                spread(found.throughput(corpus), 0),
                gain(lambda measured, corpus=corpus: measured.throughput(corpus)),
            ]
        rates.append((name, *right, *columns))
        slower = "" if found is ours else spread(ratios(found.p50_ms(), ours.p50_ms()), 2)
        singles.append(
            (name, right[0], spread(found.p50_ms(), 2), spread(found.p99_ms(), 2), slower)
        )
        rest.append(
            (
                name,
                right[0],
                spread(found.cold_s, 2),
                f"{found.peak_mb:.0f}",
                f"{entry.size_mb:.1f}",
            )
        )
    head = ("system", "accuracy")
    corpora = [c for name in ("short", "long", "mixed") for c in (f"{name}, texts/s", "gain")]
    return "\n\n".join(
        [
            "Throughput, and edgebert's gain over it in the same precision:",
            table((*head, "flips", *corpora), rates),
            "One text a call, warm, and how many times edgebert's p50 in the same precision it is:",
            table((*head, "p50 ms", "p99 ms", "times edgebert's"), singles),
            "A new process to its first label, the most memory held, and model and tokenizer:",
            table((*head, "cold start s", "peak MB", "size MB"), rest),
        ]
    )


def targets(shipped: str, full: str, results: Results) -> Iterator[tuple[str, str, list[float]]]:
    """Yields what edgebert aims at, the aim, and each round's ratio."""
    ours = results[full, EDGEBERT, INT8].throughput("short")
    for system, precision, aim in (
        (BARE, INT8, "1.25"),
        (OPTIMUM, INT8, "2.2"),
        (PIPELINE, FP32, "4.5"),
    ):
        theirs = results[full, system, precision].throughput("short")
        yield (
            f"{full} INT8: throughput over {system} {precision}",
            f">= {aim}",
            ratios(ours, theirs),
        )
    small, large = results[shipped, EDGEBERT, INT8], results[full, PIPELINE, FP32]
    if shipped != full:
        gains = ratios(small.throughput("short"), large.throughput("short"))
        yield f"{shipped} INT8: throughput over the {full} in {PIPELINE}", ">= 11", gains
        shares = ratios(small.p50_ms(), large.p50_ms())
        yield f"{shipped} INT8: p50 over the {full}'s in {PIPELINE}", "<= 0.125", shares
    bare = results[shipped, BARE_OURS, INT8]
    above = [1000 * (a - b) for a, b in zip(small.p50_ms(), bare.p50_ms(), strict=True)]
    yield f"{shipped} INT8: p50 above the bare script's on the same model, µs", "<= 40", above
    colder = ratios(small.cold_s, bare.cold_s)
    yield f"{shipped} INT8: cold start over the bare script's", "<= 1.15", colder


def render_limit(
    rates: dict[str, float], needs: dict[tuple[str, str], tuple[float, float]], results: Results
) -> str:
    """Renders what the machine could do at best, and which share of it edgebert does."""
    rows = []
    for (model, corpus), (linear, attention) in needs.items():
        for precision in VARIANTS:
            seconds = linear / rates[precision.lower()] + attention / rates["fp32"]
            done = results[model, EDGEBERT, precision].throughput(corpus)
            share = f"{statistics.median(done) * seconds:.0%}"
            operations_ = f"{(linear + attention) / 1e6:.0f}"
            rows.append(
                (
                    model,
                    precision,
                    corpus,
                    operations_,
                    f"{1 / seconds:.0f}",
                    spread(done, 0),
                    share,
                )
            )
    speed = ", ".join(f"{kind.upper()} {rate / 1e9:.0f}" for kind, rate in rates.items())
    header = ("model", "precision", "texts", "million operations a text", "texts/s at most")
    return (
        f"This machine's matrix products, in thousand million operations per second: {speed} "
        "(the model's own shapes at 4096 rows; the best round of the quickest library). Products "
        "inside attention count as FP32 in both. Padding counts as idle.\n\n"
        + table((*header, "edgebert's texts/s", "share"), rows)
    )


def processor_flags() -> list[str]:
    """What the processor has of what matters to matrix products."""
    known = {"avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16"}
    known |= {"amx_int8", "amx_bf16", "asimddp", "i8mm", "sve", "bf16"}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(known.intersection(found.split()))


def environment() -> dict[str, str]:
    """States the machine and the libraries."""
    return {
        **machine(),
        "usable": str(len(os.sched_getaffinity(0))),
        "flags": " ".join(processor_flags()),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "libraries": ", ".join(f"{k} {v}" for k, v in library_versions().items()),
    }


def draw(entries: Sequence[Entry], results: Results, truth: Sequence[str]) -> str:
    """Draws throughput on short texts as bars with their spread: an SVG."""
    top = max(max(results[entry.key].throughput("short")) for entry in entries)
    left, width, step, parts, y, model = 270, 480, 20, [], 40, ""
    for entry in entries:
        if entry.model != model:
            model, y = entry.model, y + 26
            parts.append(f'<text x="10" y="{y - 8}" font-weight="bold">{escape(model)}</text>')
        rates = results[entry.key].throughput("short")
        low, middle, high = (
            left + width * rate / top for rate in (min(rates), statistics.median(rates), max(rates))
        )
        colour = "#1b6ca8" if entry.system == EDGEBERT else "#9aa5ae"
        accuracy = accuracy_of(entry, results, truth)[0]
        parts += [
            f'<text x="{left - 6}" y="{y + 12}" text-anchor="end">'
            f"{escape(entry.system)}, {entry.precision}</text>",
            f'<rect x="{left}" y="{y}" width="{middle - left:.1f}" height="15" fill="{colour}"/>',
            f'<path d="M{low:.1f} {y + 7.5}H{high:.1f}" stroke="#222"/>',
            f'<text x="{high + 6:.1f}" y="{y + 12}">{statistics.median(rates):.0f} '
            f'<tspan fill="#666">({accuracy})</tspan></text>',
        ]
        y += step
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 110}" height="{y + 14}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        '<text x="10" y="24" font-size="15">Texts per second, short texts; lowest and highest '
        "round; accuracy in brackets</text>" + "\n".join(parts) + "</svg>\n"
    )


def main() -> None:
    """Measures, and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("build", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer texts and rounds")
    parser.add_argument("--rounds", type=int, help="of everything; 7 (cold starts: 5) if not given")
    parser.add_argument("--out", type=Path, help="where to write; BUILD/speed if not given")
    options = parser.parse_args()
    out, effort = options.out or options.build / "speed", QUICK if options.quick else FULL
    if options.rounds is not None:
        if options.rounds < 1:
            raise SystemExit("--rounds must be 1 or more")
        effort = dataclasses.replace(effort, rounds=options.rounds, cold=options.rounds)
    logging.disable(logging.WARNING)
    where = environment()
    report = read_report(options.build)
    if report.task.kind != "single_label" or report.task.text_pair:
        raise SystemExit("the peers are compared on single texts with a single label")
    shipped = next(iter(report.models))
    full = TEACHER if TEACHER in report.models else shipped
    entries: list[Entry] = []
    with tempfile.TemporaryDirectory() as work:
        bundles = {}
        for name in dict.fromkeys([shipped, full]):
            model = FinishedModel.of(options.recipe, options.build, name)
            bundles[name] = bundle_of(options.build.resolve(), name, report)
            entries += entries_of(model, bundles[name], Path(work, name))
            _say(f"{name}: prepared")
        examples = model.dataset.test[: effort.test]
        truth = [report.task.labels[example.labels[0]] for example in examples]
        texts = [str(example.text) for example in model.dataset.test]
        corpora = corpora_of(texts, model.encoder, effort)
        rates = limit_of(bundles[full], effort.rounds)
        results = measure(entries, corpora, [str(e.text) for e in examples], effort)
        lengths = {
            name: [len(row.ids) for row in model.encoder.encode(chosen)]
            for name, chosen in corpora.items()
        }
        needs = {
            (name, corpus): needed(bundles[name], lengths[corpus])
            for name in bundles
            for corpus in corpora
        }

    described = ", ".join(
        f"{len(found)} {name} (median {statistics.median(found):.0f} tokens)"
        for name, found in lengths.items()
    )
    aims = [(w, aim, spread(r, 2)) for w, aim, r in targets(shipped, full, results)]
    markdown = [
        f"# Speed: {report.name}",
        "\n".join(f"- {name}: {value}" for name, value in where.items()),
        f"{effort.rounds} rounds; texts: {described}; accuracy on {len(truth)} test rows, flips "
        "against transformers.pipeline on the same model. Medians, lowest and highest round.",
        "## Targets",
        table(("what", "aim", "measured"), aims),
        *(
            f"## {name.capitalize()}\n\n"
            + render_model([e for e in entries if e.model == name], results, truth)
            for name in bundles
        ),
        "## The limit",
        render_limit(rates, needs, results),
    ]
    document = {
        "environment": where,
        "effort": dataclasses.asdict(effort),
        "lengths": lengths,
        "truth": truth,
        "operations_per_s": rates,
        "operations_a_text": [[*key, *value] for key, value in needs.items()],
        "contestants": [
            {"model": e.model, "system": e.system, "precision": e.precision, "size_mb": e.size_mb}
            | dataclasses.asdict(results[e.key])
            for e in entries
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.md").write_text("\n\n".join(markdown) + "\n", encoding="utf-8")
    (out / "speed.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (out / "speed.svg").write_text(draw(entries, results, truth), encoding="utf-8")
    print("\n\n".join(markdown))


if __name__ == "__main__":
    main()
