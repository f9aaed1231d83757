"""Holds reports of builds and devices against a baseline: differences, and limits on them.

Where two reports note which of the same rows they answer right, their answers are paired, and
McNemar's test tells a difference from chance; otherwise two intervals do, which shows less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import msgspec

from edgebert_pipeline.intervals import (
    enough_rounds,
    mcnemar,
    paired_difference,
    unpaired_difference,
)
from edgebert_pipeline.parts import shorten
from edgebert_pipeline.report import GateCheck
from edgebert_pipeline.sources import LONGEST, Measured, MeasuredAccuracy, Source
from edgebert_runtime.bench import Timing
from edgebert_runtime.errors import InputError
from edgebert_runtime.rows import unpack_right

__all__ = [
    "AccuracyDifference",
    "Compared",
    "Difference",
    "LatencyRatio",
    "Limits",
    "compare_sources",
]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a report may lose against the baseline; ``None`` is no limit.

    Attributes:
        max_accuracy_drop: Most accuracy that may be lost; 0.005 is half a point.
        max_latency_ratio: Highest median latency, as a multiple of the baseline's.
    """

    max_accuracy_drop: float | None = None
    max_latency_ratio: float | None = None


_NO_LIMITS = Limits()


class AccuracyDifference(msgspec.Struct, frozen=True, kw_only=True):
    """How much more accurate a variant is than the baseline's.

    Attributes:
        difference: Its accuracy less the baseline's.
        low: Lower end of the 95 % interval.
        high: Upper end of it.
        rows: Rows of the variant.
        p_value: Of McNemar's exact test on paired rows; ``None`` if they cannot be paired.
        same_rows: Whether both are known to have been measured on the same rows.
        shown: Whether a difference is shown: p < 0.05, or without pairs, an interval without 0.
            Never on other rows, whose difference may be the rows' as well as the models'.
    """

    difference: float
    low: float
    high: float
    rows: int
    p_value: float | None
    same_rows: bool
    shown: bool


class LatencyRatio(msgspec.Struct, frozen=True, kw_only=True):
    """How long a variant takes, as a multiple of the baseline's.

    Attributes:
        ratio: Of the median latencies, one text a call.
        low: The fastest round over the baseline's slowest; ``None`` if rounds are not known.
        high: The slowest round over the baseline's fastest.
        same_texts: Whether both are known to have been timed on the same texts.
        noisy: Whether the machine was noisy when either was timed.
        enough_rounds: Whether there were enough for ``shown`` to be hardly chance.
        shown: Whether no round of the one is as fast as any round of the other, there were enough
            of them, and the machine was quiet. Rounds of one run say nothing of what changes from
            run to run.
    """

    ratio: float
    low: float | None
    high: float | None
    same_texts: bool
    noisy: bool
    enough_rounds: bool
    shown: bool


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A variant of a report, held against the baseline's of the same key.

    Attributes:
        label: The report.
        variant: The variant's name there.
        baseline_variant: Its name in the baseline.
        shipped: Whether both are in their bundles.
        accuracy: ``None`` if either was not measured.
        latency: ``None`` if either was not timed.
        size_ratio: Its model file's size over the baseline's.
    """

    label: str
    variant: str
    baseline_variant: str
    shipped: bool
    accuracy: AccuracyDifference | None
    latency: LatencyRatio | None
    size_ratio: float


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """Any number of reports, side by side.

    Attributes:
        sources: The reports, in the order given.
        baseline: Label of the one that the others are held against.
        differences: Of the others' variants; those that the baseline lacks are in ``notes``.
        checks: Limits, held against the variants in bundles; ``missing_figures`` are those that
            the baseline has, and a report lacks, for a limit to be held against.
        warnings: What makes figures hard to compare; one sentence each.
        notes: What is left out, one sentence each.
    """

    sources: tuple[Source, ...]
    baseline: str | None
    differences: tuple[Difference, ...]
    checks: tuple[GateCheck, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every limit was kept."""
        return all(check.passed for check in self.checks)


def compare_sources(
    sources: Sequence[Source],
    *,
    baseline: str | None = None,
    limits: Limits = _NO_LIMITS,
    allow_different_data: bool = False,
) -> Compared:
    """Compares reports.

    Args:
        sources: At least one.
        baseline: Label or file of one of them; the first if ``None``.
        limits: Held against every variant that is in a report's bundle and in the baseline's. What
            the baseline's bundle has, and a report lacks, fails: it could not be held against
            them. Only a device is free to lack variants of a build: it runs what it can.
        allow_different_data: Compare accuracy on different rows, and latency on different texts
            where there is a limit on it; ``warnings`` then says so.

    Raises:
        InputError: The test rows differ or are not known to be the same, the baseline is not
            among the reports, or a limit has nothing in a report to be held against.
    """
    base = _find(sources, baseline)
    warnings = list(_different_rows(sources))
    if warnings and not allow_different_data:
        raise InputError(f"{warnings[0]} To compare them nevertheless: --allow-different-data")
    others = [source for source in sources if source is not base]
    differences, notes = [], []
    for source in others:
        found, missing = _differences(source, base)
        differences += found
        notes += missing
    warnings += _different_texts(differences)
    if limits.max_latency_ratio is not None and not allow_different_data:
        for item in differences:
            if item.shipped and item.latency is not None and not item.latency.same_texts:
                raise InputError(
                    f"{item.label} and {base.label} were not timed on the same texts, or do not "
                    "say so: their latencies are of different work. To hold them against "
                    "--max-latency-ratio nevertheless: --allow-different-data"
                )
    warnings += _different_machines(sources)
    warnings += _noisy(sources)
    return Compared(
        sources=tuple(sources),
        baseline=base.label if others else None,
        differences=tuple(differences),
        checks=_check(others, base, differences, limits),
        warnings=tuple(warnings),
        notes=tuple(notes),
    )


def _find(sources: Sequence[Source], baseline: str | None) -> Source:
    if baseline is None:
        return sources[0]
    found = [s for s in sources if baseline == s.path or shorten(baseline, LONGEST) == s.label]
    found = found or [s for s in sources if s.path == f"{baseline.rstrip('/')}/report.json"]
    if not found:
        labels = ", ".join(source.label for source in sources)
        raise InputError(f"--baseline {baseline} is none of the reports: {labels}")
    return found[0]


def _different_rows(sources: Sequence[Source]) -> list[str]:
    pairs: dict[str, list[str]] = {}
    for one, other in combinations([source for source in sources if source.knows_accuracy], 2):
        if not one.same_rows(other):
            known = one.rows_sha256 is not None and other.rows_sha256 is not None
            fault = (
                "were measured on different test rows"
                if known
                else "are not known to have been measured on the same test rows"
            )
            pairs.setdefault(fault, []).append(f"{one.label} and {other.label}")
    return [
        f"{'; '.join(named)} {fault}: their accuracies do not compare."
        for fault, named in pairs.items()
    ]


def _different_texts(differences: Sequence[Difference]) -> list[str]:
    labels = {d.label: None for d in differences if d.latency and not d.latency.same_texts}
    if not labels:
        return []
    return [
        f"Not known to be timed on the baseline's texts: {', '.join(labels)}. Their latencies are "
        "of other work; compare them by length and batch."
    ]


def _different_machines(sources: Sequence[Source]) -> list[str]:
    if len({source.machine for source in sources}) == 1:
        return []
    return [
        "Not known to be measured on the same machine: differences in speed may be the machines', "
        "too."
    ]


def _noisy(sources: Sequence[Source]) -> list[str]:
    noisy = [
        f"{source.label} ({item.variant}, {item.timing.variation:.0%})"
        for source in sources
        for item in source.variants
        if item.timing is not None and item.timing.noisy and item.timing.variation is not None
    ]
    if not noisy:
        return []
    return [
        "Noisy: the rounds of these vary by more than 5 %, so small differences in speed say "
        f"nothing: {', '.join(noisy)}."
    ]


def _differences(source: Source, base: Source) -> tuple[list[Difference], list[str]]:
    known = {item.key: item for item in base.variants}
    found, missing = [], []
    for item in source.variants:
        other = known.pop(item.key, None)
        if other is None:
            missing.append(item)
            continue
        found.append(
            Difference(
                label=source.label,
                variant=item.variant,
                baseline_variant=other.variant,
                shipped=item.shipped and other.shipped,
                accuracy=_accuracy(item.accuracy, other.accuracy, source.same_rows(base)),
                latency=_latency(item.timing, other.timing, source.same_rows(base)),
                size_ratio=item.size_bytes / other.size_bytes,
            )
        )
    notes = [f"{source.label}: {v.variant} is not in {base.label}." for v in missing]
    if not _may_lack(source, base):
        notes += [f"{source.label} lacks {v.variant} of {base.label}." for v in known.values()]
    return found, notes


def _accuracy(
    one: MeasuredAccuracy | None, base: MeasuredAccuracy | None, same_rows: bool
) -> AccuracyDifference | None:
    if one is None or base is None:
        return None
    if same_rows and one.right_rows is not None and base.right_rows is not None:
        right = unpack_right(one.right_rows, one.rows)
        base_right = unpack_right(base.right_rows, base.rows)
        only, only_base = int((right & ~base_right).sum()), int((base_right & ~right).sum())
        low, high = paired_difference(only, only_base, one.rows)
        p_value = mcnemar(only, only_base)
        return AccuracyDifference(
            difference=(only - only_base) / one.rows,
            low=low,
            high=high,
            rows=one.rows,
            p_value=p_value,
            same_rows=True,
            shown=p_value < 0.05,
        )
    low, high = unpaired_difference(one.correct, one.rows, base.correct, base.rows)
    return AccuracyDifference(
        # In whole rows, so that a drop of just the limit is not above it by rounding.
        difference=(one.correct * base.rows - base.correct * one.rows) / (one.rows * base.rows),
        low=low,
        high=high,
        rows=one.rows,
        p_value=None,
        same_rows=same_rows,
        shown=same_rows and (low > 0 or high < 0),
    )


def _latency(one: Timing | None, base: Timing | None, same_rows: bool) -> LatencyRatio | None:
    if one is None or base is None:
        return None
    if one.texts_sha256 is not None and base.texts_sha256 is not None:
        same_texts = one.texts_sha256 == base.texts_sha256
    else:  # older reports took so many of the test rows, always the same ones
        same_texts = same_rows and one.texts == base.texts
    low = high = None
    if (
        one.latency_p50_low_ms is not None
        and one.latency_p50_high_ms is not None
        and base.latency_p50_low_ms is not None
        and base.latency_p50_high_ms is not None
    ):
        low = one.latency_p50_low_ms / base.latency_p50_high_ms
        high = one.latency_p50_high_ms / base.latency_p50_low_ms
    noisy = one.noisy or base.noisy
    enough = enough_rounds(one.repeats, base.repeats)
    apart = low is not None and high is not None and (low > 1 or high < 1)
    return LatencyRatio(
        ratio=one.latency_p50_ms / base.latency_p50_ms,
        low=low,
        high=high,
        same_texts=same_texts,
        noisy=noisy,
        enough_rounds=enough,
        shown=apart and enough and not noisy,
    )


def _may_lack(source: Source, base: Source) -> bool:
    """Whether variants of the baseline may be missing: a device does not run all of a build's."""
    return source.kind == "device" and base.kind == "build"


def _check(
    others: Sequence[Source], base: Source, differences: Sequence[Difference], limits: Limits
) -> tuple[GateCheck, ...]:
    """Holds each report against each limit; what is not there to be held fails, too."""
    given = {
        limit: allowed
        for limit, allowed in msgspec.structs.asdict(limits).items()
        if allowed is not None
    }
    if given and not others:
        raise InputError(
            f"{_option(next(iter(given)))} has nothing to be held against: {base.label} is the "
            "only report"
        )
    checks: list[GateCheck] = []
    for source in others:
        found = [item for item in differences if item.label == source.label and item.shipped]
        for limit, allowed in given.items():
            held = [
                GateCheck(
                    variant=f"{item.label}: {item.variant}",
                    limit=limit,
                    allowed=allowed,
                    measured=measured,
                    passed=measured <= allowed,
                )
                for item in found
                if (measured := _measured(item, limit)) is not None
            ]
            if not held:
                raise InputError(
                    f"{_option(limit)} has nothing in {source.label} to be held against: no "
                    f"variant's {_FIGURES[limit]} is both there and in {base.label}"
                )
            checks += held
        if not _may_lack(source, base):
            checks += _missing(source, base, given)
    return tuple(checks)


_FIGURES = {"max_accuracy_drop": "accuracy", "max_latency_ratio": "latency"}


def _option(limit: str) -> str:
    return f"--{limit.replace('_', '-')}"


def _missing(source: Source, base: Source, limits: Iterable[str]) -> list[GateCheck]:
    """Returns a failed check for each variant of the baseline's bundle without a figure here."""
    shipped = {item.key: item for item in source.variants if item.shipped}
    checks = []
    for item in base.variants:
        here = shipped.get(item.key)
        missing = [
            limit
            for limit in limits
            if _has(item, limit) and (here is None or not _has(here, limit))
        ]
        if item.shipped and missing:
            checks.append(
                GateCheck(
                    variant=f"{source.label}: {item.variant}",
                    limit="missing_figures",
                    allowed=0,
                    measured=len(missing),
                    passed=False,
                )
            )
    return checks


def _has(item: Measured, limit: str) -> bool:
    return (item.accuracy if limit == "max_accuracy_drop" else item.timing) is not None


def _measured(item: Difference, limit: str) -> float | None:
    if limit == "max_accuracy_drop":
        return None if item.accuracy is None else 0.0 - item.accuracy.difference
    return None if item.latency is None else item.latency.ratio
