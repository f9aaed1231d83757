"""Reads reports of builds and of devices as one kind of thing: variants that were measured.

Names are made fit to be shown here, once: printable, and not endless.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from edgebert_pipeline.intervals import wilson
from edgebert_pipeline.parts import shorten
from edgebert_pipeline.read_report import read_report
from edgebert_pipeline.report import Report
from edgebert_pipeline.scores import Comparison
from edgebert_runtime.bench import Timing
from edgebert_runtime.device_report import DeviceReport, DeviceVariant, read_device_report
from edgebert_runtime.errors import InputError

__all__ = ["LONGEST", "Measured", "MeasuredAccuracy", "Source", "read_source", "read_sources"]


LONGEST = 200
"""Of a label, in characters."""


class MeasuredAccuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Right answers on labelled rows.

    Attributes:
        correct: Rows answered right.
        rows: Rows in all.
        share: ``correct`` over ``rows``.
        low: Lower end of Wilson's 95 % interval.
        high: Upper end of it.
        right_rows: Which rows; see ``edgebert_runtime.rows.pack_right``. ``None`` in older reports.
    """

    correct: int
    rows: int
    share: float
    low: float
    high: float
    right_rows: str | None


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One variant, as one report measured it.

    Attributes:
        variant: Its name, with the model's before it if its report has several.
        key: What makes it the same variant in another report: its name alone if it is in the
            bundle, whichever model that holds; otherwise ``variant``.
        shipped: Whether it is in the bundle.
        precision: Of its weights.
        ran_on: Where it ran: ``cpu``, ``cuda``, ``tensorrt`` or ``rtx``.
        size_bytes: Of its model file.
        accuracy: ``None`` if it was not measured.
        timing: ``None`` if it was not timed.
        memory_bytes: What it occupies in memory, the GPU's not included; ``None`` if unknown.
        gpu_memory_bytes: What it occupies of a GPU's own memory.
    """

    variant: str
    key: str
    shipped: bool
    precision: str
    ran_on: str
    size_bytes: int
    accuracy: MeasuredAccuracy | None
    timing: Timing | None
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """One report.

    Attributes:
        label: What it is called beside others.
        path: Its file.
        kind: Of a ``build``, or of a ``device``.
        name: Of the model.
        measured_at: When measuring ended in a build, and began on a device: UTC, ISO 8601.
        commit: That the build was made from, if known.
        bundle_digest: Of the bundle that was measured.
        machine: The processor, board, GPU and power mode; what makes figures of speed comparable.
            A build and a device say not all of the same: where this differs, the machine may yet
            be one.
        notes: What else bears on the figures: temperatures, for instance.
        rows_sha256: Hash of the labelled rows; ``None`` without any, and in older reports.
        data_sha256: Hash of all rows of the build's data, the test rows among them; ``None`` on
            a device.
        variants: What was measured.
        comparisons: Paired tests that the report itself made.
    """

    label: str
    path: str
    kind: Literal["build", "device"]
    name: str
    measured_at: str
    commit: str | None
    bundle_digest: str
    machine: str
    notes: tuple[str, ...]
    rows_sha256: str | None
    data_sha256: str | None
    variants: tuple[Measured, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def knows_accuracy(self) -> bool:
        """Whether accuracy was measured."""
        return any(item.accuracy is not None for item in self.variants)

    def same_rows(self, other: Source) -> bool:
        """Whether both are known to have been measured on the same labelled rows."""
        if self.rows_sha256 is not None and other.rows_sha256 is not None:
            return self.rows_sha256 == other.rows_sha256
        return self.data_sha256 is not None and self.data_sha256 == other.data_sha256


def read_sources(arguments: Sequence[str]) -> tuple[Source, ...]:
    """Reads reports that are named ``FILE`` or ``LABEL=FILE``; a directory has ``report.json``.

    Without a label, a report is called after its file, or after the directory of its
    ``report.json``; when two are called the same, after their whole paths.

    Raises:
        InputError: A file cannot be read or is no report, or one is named twice.
    """
    named = [_named(argument) for argument in arguments]
    short = [label for label, _ in named]
    found: list[Source] = []
    for label, path in named:
        source = read_source(path, label if short.count(label) == 1 else str(path))
        if any(other.label == source.label for other in found):
            raise InputError(
                f"{source.label} is there twice; name each report once, or give LABEL=FILE"
            )
        found.append(source)
    return tuple(found)


def _named(argument: str) -> tuple[str, Path]:
    label, equals, file = argument.partition("=")
    path = Path(argument)
    if equals and label and file and not os.path.exists(argument):  # noqa: PTH110 - any length
        return label, Path(file)
    if os.path.isdir(argument):  # noqa: PTH112
        path = path / "report.json"
    stem = path.absolute().parent.name if path.name == "report.json" else path.stem
    return stem or str(path), path


def read_source(path: Path, label: str) -> Source:
    """Reads one report of a build (of any version) or of a device.

    Raises:
        InputError: It cannot be read, or is neither.
    """
    try:
        path = path / "report.json" if path.is_dir() else path
        data = path.read_bytes()
    except OSError as exc:
        raise InputError(f"{path} cannot be read: {exc.strerror}") from exc
    label = shorten(label, LONGEST)
    if b'"device_report_version"' in data[:4096]:
        return _of_device(read_device_report(data, str(path)), path, label)
    return _of_build(read_report(path), path, label)


def _of_build(report: Report, path: Path, label: str) -> Source:
    evaluation = report.evaluation
    environment, shipped = evaluation.environment, evaluation.shipped
    machine = environment.get("processor", "unknown processor")
    if "processors" in environment:
        machine += f" x {environment['processors']}"
    if evaluation.intra_op_threads is not None:
        machine += f", {evaluation.intra_op_threads} threads"
    return Source(
        label=label,
        path=str(path),
        kind="build",
        name=shorten(report.name),
        measured_at=report.measured_at,
        commit=report.commit,
        bundle_digest=report.bundle_digest,
        machine=shorten(machine, LONGEST),
        notes=(),
        rows_sha256=evaluation.rows_sha256,
        data_sha256=report.data.sha256,
        variants=tuple(
            Measured(
                variant=shorten(item.full_name),
                key=item.name if item in shipped else item.full_name,
                shipped=item in shipped,
                precision=item.precision,
                ran_on="cpu",
                size_bytes=item.size_bytes,
                accuracy=MeasuredAccuracy(
                    correct=item.correct,
                    rows=evaluation.rows,
                    share=item.accuracy,
                    low=item.accuracy_low,
                    high=item.accuracy_high,
                    right_rows=item.right_rows,
                ),
                timing=item.timing,
            )
            for item in evaluation.variants
        ),
        comparisons=evaluation.comparisons,
    )


def _of_device(report: DeviceReport, path: Path, label: str) -> Source:
    facts = report.facts
    parts = [f"{report.processor} x {facts.cpu_count}"]
    if report.board is not None:
        parts.insert(0, report.board)
    if facts.gpu is not None:
        parts.append(facts.gpu.name)
    if report.intra_op_threads is not None:
        parts.append(f"{report.intra_op_threads} threads")
    if facts.jetson is not None and facts.jetson.power_mode is not None:
        parts.append(f"power mode {facts.jetson.power_mode}")
    notes = []
    if report.clock_governor is not None:
        notes.append(f"clock governor {report.clock_governor}")
    for zone, after in report.temperatures_after_c.items():
        before = report.temperatures_before_c.get(zone)
        notes.append(f"{zone} {'?' if before is None else f'{before:.0f}'} to {after:.0f} °C")
    if report.skipped:
        notes.append(f"does not run {', '.join(report.skipped)}")
    return Source(
        label=label,
        path=str(path),
        kind="device",
        name=shorten(report.name),
        measured_at=report.measured_at,
        commit=None,
        bundle_digest=report.bundle_digest,
        machine=shorten(", ".join(parts), LONGEST),
        notes=tuple(shorten(note, LONGEST) for note in notes),
        rows_sha256=report.rows_sha256,
        data_sha256=None,
        variants=tuple(_of_variant(item) for item in report.variants),
        comparisons=(),
    )


def _of_variant(item: DeviceVariant) -> Measured:
    accuracy = None
    if item.accuracy is not None:
        low, high = wilson(item.accuracy.correct, item.accuracy.rows)
        accuracy = MeasuredAccuracy(
            correct=item.accuracy.correct,
            rows=item.accuracy.rows,
            share=item.accuracy.share,
            low=low,
            high=high,
            right_rows=item.accuracy.right_rows,
        )
    return Measured(
        variant=shorten(item.name),
        key=item.name,
        shipped=True,
        precision=item.precision,
        ran_on=item.device,
        size_bytes=item.size_bytes,
        accuracy=accuracy,
        timing=item.timing,
        memory_bytes=item.memory.process_bytes,
        gpu_memory_bytes=item.memory.gpu_bytes,
    )
