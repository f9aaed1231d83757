"""What a device makes of a bundle, as one JSON document that ``edgebert compare`` takes.

Speed by length and batch, memory, temperatures and power mode, and accuracy if there are labelled
rows: all of it measured with the runtime alone, where the model will run.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

import edgebert_runtime
from edgebert_runtime.bench import LatencyCell, Timing, measure, spread_over_lengths
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.classifier import Classifier
from edgebert_runtime.condition import (
    board_name,
    clock_governor,
    processor_name,
    resident_bytes,
    temperatures_c,
)
from edgebert_runtime.device import Choice
from edgebert_runtime.encoder import Text
from edgebert_runtime.errors import DeviceError, InputError
from edgebert_runtime.facts import DeviceFacts, gather_facts
from edgebert_runtime.manifest import Task
from edgebert_runtime.rows import Labelled, pack_right, row_order, rows_sha256, unpack_right

__all__ = [
    "DEVICE_REPORT_VERSION",
    "Accuracy",
    "DeviceReport",
    "DeviceVariant",
    "Memory",
    "measure_device",
    "own_texts",
    "read_device_report",
    "render_device_report",
]

DEVICE_REPORT_VERSION = 1

_SENTENCES = (
    "Great.",
    "The battery lasts two days, which is more than I need.",
    "I returned it after a week: the screen flickers and nobody answers the phone.",
    "The plot takes its time, and for the first half hour I wondered whether anything would "
    "happen at all; then it does, quietly, and the last scene makes you want to start again.",
)
_TIMED_ROWS = 200


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded variant occupies, in bytes; ``None`` where the system does not say.

    Attributes:
        process_bytes: Growth of the process's resident memory by loading the variant and
            answering some texts. The first variant brings the libraries that it needs along.
        gpu_bytes: Fall of the GPU's free memory meanwhile, whoever took it.
    """

    process_bytes: int | None
    gpu_bytes: int | None


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """How many labelled rows a variant answered right on the device.

    Attributes:
        correct: Rows answered right; in ``multi_label``, with every label right.
        rows: Rows in all.
        truncated: Rows that were cut to ``max_length``.
        right_rows: Which rows were answered right, as ``pack_right`` notes it.
    """

    correct: Annotated[int, Meta(ge=0)]
    rows: Annotated[int, Meta(ge=1)]
    truncated: int
    right_rows: str

    def __post_init__(self) -> None:
        if self.correct > self.rows:
            raise ValueError("more right answers than rows")
        unpack_right(self.right_rows, self.rows)

    @property
    def share(self) -> float:
        """``correct`` over ``rows``."""
        return self.correct / self.rows


class DeviceVariant(msgspec.Struct, frozen=True, kw_only=True):
    """One variant, measured.

    Attributes:
        name: The variant.
        precision: Of its weights.
        device: Where it ran: ``cpu``, ``cuda``, ``tensorrt`` or ``rtx``.
        size_bytes: Of its model file in the bundle.
        timing: Latency and throughput.
        memory: What it occupies.
        accuracy: On the labelled rows; ``None`` without any.
    """

    name: str
    precision: str
    device: str
    size_bytes: Annotated[int, Meta(ge=1)]
    timing: Timing
    memory: Memory
    accuracy: Accuracy | None


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True):
    """All of the document.

    Attributes:
        device_report_version: ``DEVICE_REPORT_VERSION``.
        name: Name of the bundle.
        bundle_digest: SHA-256 of the bundle's manifest: exactly what was measured.
        task: What it answers.
        measured_at: When measuring began: UTC, ISO 8601.
        variants: What was measured, in the order in which a device prefers it.
        skipped: Variants that do not run here, and why.
        rows_sha256: Hash of the labelled rows, as ``rows_sha256`` makes it; ``None`` without any.
        intra_op_threads: Cores to use on a CPU; ``None`` for all usable ones.
        facts: What the machine offers; its power mode is in it if it is a Jetson.
        board: What the board calls itself.
        processor: What the processor calls itself.
        clock_governor: What set the processors' clocks.
        temperatures_before_c: By zone, in degrees Celsius, before anything was loaded.
        temperatures_after_c: The same when all was measured.
        environment: Versions of what ran.
    """

    device_report_version: Annotated[int, Meta(ge=DEVICE_REPORT_VERSION, le=DEVICE_REPORT_VERSION)]
    name: str
    bundle_digest: str
    task: Task
    measured_at: str
    variants: Annotated[tuple[DeviceVariant, ...], Meta(min_length=1)]
    skipped: dict[str, str]
    rows_sha256: str | None
    intra_op_threads: int | None
    facts: DeviceFacts
    board: str | None
    processor: str
    clock_governor: str | None
    temperatures_before_c: dict[str, float]
    temperatures_after_c: dict[str, float]
    environment: dict[str, str]


def measure_device(
    paths: Sequence[Path],
    *,
    device: str = "auto",
    variant: str | Literal["all"] | None = None,
    intra_op_threads: int | None = None,
    texts: Sequence[Text] | None = None,
    rows: Sequence[Labelled] = (),
    repeats: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[DeviceReport]:
    """Measures bundles on this machine, turn by turn, so that its moods are the same to all.

    Args:
        paths: Bundles for the same task, at least one.
        device: As for ``Classifier.load``.
        variant: The only one to measure, or ``all`` that run here; the best if ``None``.
        intra_op_threads: As for ``Classifier.load``.
        texts: What to time; if ``None``, 200 of ``rows``, spread over their lengths, or without
            rows sentences of edgebert's own, and longer texts made of them.
        rows: Labelled rows to count right answers on.
        repeats: Rounds of timing.
        on_progress: Called with rounds done and rounds in all.

    Returns:
        A report on each bundle.

    Raises:
        BundleError: A bundle is damaged, unsafe or unknown, or has no such variant.
        DeviceError: The device cannot be used.
        InputError: An argument is wrong.
    """
    bundles = [Bundle.open(path) for path in paths]
    task = bundles[0].manifest.task
    for bundle in bundles:
        other = bundle.manifest.task
        if (other.kind, set(other.labels), other.text_pair) != (
            task.kind, set(task.labels), task.text_pair,
        ):  # fmt: skip
            raise InputError(f"{bundle.path} is for another task than {bundles[0].path}")
    grid: Sequence[Text] | None = None
    if texts is None and rows:
        texts = spread_over_lengths([text for text, _ in rows], _TIMED_ROWS)
    elif texts is None:
        longest = max(bundle.manifest.max_length for bundle in bundles)
        texts, grid = own_texts(task, longest)
    temperatures, started = temperatures_c(), datetime.now(timezone.utc)
    with ExitStack() as stack:
        loaded: list[_Loaded] = []
        skipped: list[dict[str, str]] = []
        for bundle in bundles:
            found, reasons = _load(bundle, device, variant, intra_op_threads, texts[0])
            for item in found:
                stack.enter_context(item.classifier)
            loaded += found
            skipped.append(reasons)
        accuracies = [_accuracy(item.classifier, rows) for item in loaded]
        timings = measure(
            {str(number): item.classifier for number, item in enumerate(loaded)},
            texts,
            repeats=repeats,
            grid_texts=grid,
            on_progress=on_progress,
        )
        variants = [
            _variant(item, timings[str(number)], accuracy)
            for number, (item, accuracy) in enumerate(zip(loaded, accuracies, strict=True))
        ]
    facts = gather_facts(look_for_gpu=any(item.device != "cpu" for item in variants))
    return [
        DeviceReport(
            device_report_version=DEVICE_REPORT_VERSION,
            name=bundle.manifest.name,
            bundle_digest=bundle.digest,
            task=bundle.manifest.task,
            measured_at=started.isoformat(timespec="seconds"),
            variants=tuple(
                variant
                for item, variant in zip(loaded, variants, strict=True)
                if item.bundle is bundle
            ),
            skipped=reasons,
            rows_sha256=rows_sha256(rows) if rows else None,
            intra_op_threads=intra_op_threads,
            facts=facts,
            board=board_name(),
            processor=processor_name(),
            clock_governor=clock_governor(),
            temperatures_before_c=temperatures,
            temperatures_after_c=temperatures_c(),
            environment=_environment(facts),
        )
        for bundle, reasons in zip(bundles, skipped, strict=True)
    ]


@dataclass(frozen=True)
class _Loaded:
    """A variant of a bundle, ready to answer."""

    bundle: Bundle
    classifier: Classifier
    choice: Choice
    memory: Memory


def _load(
    bundle: Bundle, device: str, variant: str | None, intra_op_threads: int | None, text: Text
) -> tuple[list[_Loaded], dict[str, str]]:
    """Loads what is to be measured of a bundle; returns what does not run here, too, and why."""
    names: Sequence[str | None] = [variant]
    if variant == "all":
        names = [item.name for item in bundle.manifest.variants]
    loaded: list[_Loaded] = []
    skipped: dict[str, str] = {}
    for name in names:
        free, resident = _free_gpu_bytes(), resident_bytes()
        try:
            classifier = Classifier.load(
                bundle.path, device=device, variant=name, intra_op_threads=intra_op_threads
            )
        except (DeviceError, InputError) as exc:
            if variant != "all":
                raise
            skipped[str(name)] = str(exc)
            continue
        classifier.predict([text])
        assert classifier.choice is not None
        memory = Memory(
            process_bytes=_difference(resident_bytes(), resident),
            gpu_bytes=_difference(free, _free_gpu_bytes()),
        )
        loaded.append(_Loaded(bundle, classifier, classifier.choice, memory))
    if not loaded:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise DeviceError(f"no variant of {bundle.path} runs here: {reasons}")
    return loaded, skipped


def _variant(item: _Loaded, timing: Timing, accuracy: Accuracy | None) -> DeviceVariant:
    sizes = {entry.path: entry.size_bytes for entry in item.bundle.manifest.files}
    variant = item.choice.variant
    return DeviceVariant(
        name=variant.name,
        precision=variant.precision,
        device=item.choice.device,
        size_bytes=sizes[variant.model],
        timing=timing,
        memory=item.memory,
        accuracy=accuracy,
    )


def own_texts(task: Task, max_length: int) -> tuple[list[Text], list[Text]]:
    """Returns texts to time when there are none, and some of every length for the cells.

    Args:
        task: Whether texts are pairs.
        max_length: Of the model, in tokens; the longest texts fill it.
    """
    story = " ".join(_SENTENCES)
    # A word is a token or more, so so many words fill the model.
    words = (story.split() * (max_length // len(story.split()) + 1))[:max_length]
    grid = [" ".join(words[:count]) for count in range(1, len(words) + 1)]
    texts = _SENTENCES * 16
    if task.text_pair:
        return [(text, text) for text in texts], [(text, text) for text in grid]
    return list(texts), list(grid)


def _accuracy(classifier: Classifier, rows: Sequence[Labelled]) -> Accuracy | None:
    if not rows:
        return None
    before = classifier.stats.truncated
    answers = classifier.predict([text for text, _ in rows])
    right = [
        set(answer.labels) == set(labels) for answer, (_, labels) in zip(answers, rows, strict=True)
    ]
    return Accuracy(
        correct=sum(right),
        rows=len(rows),
        truncated=classifier.stats.truncated - before,
        right_rows=pack_right(row_order(rows), right),
    )


def _free_gpu_bytes() -> int | None:
    gpu = gather_facts(look_for_gpu=True).gpu
    return None if gpu is None else gpu.free_bytes


def _difference(larger: int | None, smaller: int | None) -> int | None:
    return None if larger is None or smaller is None else larger - smaller


def _environment(facts: DeviceFacts) -> dict[str, str]:
    found = {
        "edgebert-runtime": edgebert_runtime.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    for item in facts.onnxruntime:
        name, _, version = item.partition(" ")
        found[name] = version
    for name, flavour in facts.tensorrt.items():
        if flavour.version is not None:
            found[f"TensorRT ({name})"] = flavour.version
    return found


class _Head(msgspec.Struct):
    """What every version has."""

    device_report_version: Annotated[int, Meta(ge=1)]


def read_device_report(data: bytes, name: str) -> DeviceReport:
    """Decodes a report that ``measure_device`` made; ``name`` is for messages.

    Raises:
        InputError: It is none, or one of a version that this edgebert does not know.
    """
    try:
        version = msgspec.json.decode(data, type=_Head).device_report_version
        if version > DEVICE_REPORT_VERSION:
            raise InputError(
                f"{name} has device_report_version {version}; this edgebert reads up to "
                f"{DEVICE_REPORT_VERSION}: use a newer one"
            )
        return msgspec.json.decode(data, type=DeviceReport)
    except msgspec.DecodeError as exc:
        raise InputError(f"{name} is not a device's report of this edgebert: {exc}") from exc


def render_device_report(report: DeviceReport) -> str:
    """Returns the essentials, to be read on a terminal."""
    lines = []
    for item in report.variants:
        timing = item.timing
        lines.append(
            f"{item.name} on {item.device}: p50 {timing.latency_p50_ms:.2f} ms, p90 "
            f"{timing.latency_p90_ms:.2f} ms, p99 {timing.latency_p99_ms:.2f} ms a text "
            f"(tokenising included; the session alone: p50 {timing.session_p50_ms:.2f} ms); "
            f"{timing.throughput_texts_per_s:.0f} texts/s in batches of {timing.batch_size}; "
            f"{timing.texts} texts, {timing.repeats} rounds"
        )
        if timing.noisy:
            lines.append(
                f"  noisy: the rounds vary by {timing.variation:.0%}; close other programs, and "
                "measure again"
            )
        lines += _grid(timing.cells)
        if item.memory.process_bytes is not None:
            gpu = item.memory.gpu_bytes
            lines.append(
                f"  memory: {item.memory.process_bytes / 1e6:.0f} MB"
                + ("" if gpu is None else f", and {gpu / 1e6:.0f} MB of the GPU's")
            )
        if item.accuracy is not None:
            lines.append(
                f"  accuracy: {item.accuracy.share:.4f} ({item.accuracy.correct} of "
                f"{item.accuracy.rows} rows)"
            )
    lines += [f"{name} was not measured: {reason}" for name, reason in report.skipped.items()]
    return "\n".join(lines)


def _grid(cells: Sequence[LatencyCell]) -> list[str]:
    """Returns the medians, a line for each length, a column for each number of texts."""
    sizes = sorted({cell.batch_size for cell in cells})
    if not sizes:
        return []
    lines = ["  p50 ms of a call" + "".join(f"{f'{size} texts':>12}" for size in sizes)]
    for length in sorted({cell.max_tokens for cell in cells}):
        found = {cell.batch_size: cell.p50_ms for cell in cells if cell.max_tokens == length}
        columns = "".join(f"{found[size]:>12.2f}" if size in found else " " * 12 for size in sizes)
        lines.append(f"  {f'up to {length} tokens':<16}{columns}")
    return lines
