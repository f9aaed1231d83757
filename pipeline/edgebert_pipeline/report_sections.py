"""The whole report as parts: what is to be known first, then its sections in order."""

from __future__ import annotations

from edgebert_pipeline.parts import Fact, Facts, Notice, Part, Section
from edgebert_pipeline.report import Report
from edgebert_pipeline.sections.calibration import calibration_section
from edgebert_pipeline.sections.differences import differences_section
from edgebert_pipeline.sections.flips import flips_section
from edgebert_pipeline.sections.labels import labels_section
from edgebert_pipeline.sections.latency import latency_section
from edgebert_pipeline.sections.made import (
    data_section,
    engines_section,
    environment_section,
    gate_section,
    not_done_section,
    provenance_section,
)
from edgebert_pipeline.sections.quantisation import quantisation_section
from edgebert_pipeline.sections.training import training_section
from edgebert_pipeline.sections.variants import variants_section
from edgebert_pipeline.wording import NOTHING_LEARNED

__all__ = ["report_lead", "report_sections"]


def report_lead(report: Report) -> list[Part]:
    """Returns what is to be known first: what was built, the verdict, what to take and why."""
    found = report.recommended
    take = f"Recommended: **{found.variant}**." if found.variant else "No variant is recommended."
    nothing = [Notice(f"**{NOTHING_LEARNED}**", "bad")] * report.evaluation.learned_nothing
    return [_built(report), _verdict(report), *nothing, f"{take} {found.reason}", _facts(report)]


def report_sections(report: Report) -> list[Section]:
    """Returns the sections, without those that have nothing to say of this report."""
    sections = [
        variants_section(report),
        gate_section(report),
        latency_section(report),
        differences_section(report),
        flips_section(report),
        labels_section(report),
        calibration_section(report),
        quantisation_section(report),
        training_section(report),
        engines_section(report),
        not_done_section(report),
        data_section(report),
        environment_section(report),
        provenance_section(report),
    ]
    return [section for section in sections if section is not None]


def _built(report: Report) -> str:
    models = []
    for name, model in report.models.items():
        what = [model.model_type or ""]
        what += [] if model.layers is None else [f"{model.layers} layer{'s' * (model.layers != 1)}"]
        what += [] if model.parameters is None else [f"{model.parameters / 1e6:.1f} M parameters"]
        models.append(f"{name} ({', '.join(filter(None, what))})" if any(what) else name)
    shipped, *others = models
    beside = f", measured beside {' and '.join(others)}" if others else ""
    labels = report.task.labels
    kind = "one of" if report.task.kind == "single_label" else "any of"
    of = "a pair of texts" if report.task.text_pair else "a text"
    named = ""
    if len(labels) <= 4 and all(len(label) <= 40 for label in labels):
        named = f" ({', '.join(labels)})"
    variants = [v.name for v in report.evaluation.shipped]
    holds = f"{len(variants)} variants" if len(variants) > 6 else ", ".join(variants)
    return (
        f"A bundle of the {shipped}{beside}. It gives {of} {kind} {len(labels)} labels{named}, "
        f"and holds {holds}."
    )


def _verdict(report: Report) -> Notice:
    if not report.gate:
        return Notice("No gate: the recipe sets no limit.", "warn")
    refused = [check for check in report.gate if not check.passed]
    if not refused:
        return Notice(f"**Gate passed**: {len(report.gate)} checks.", "good")
    listed = "; ".join(
        f"{check.variant}: {check.limit} allows {check.allowed:g}, measured {check.measured:.4g}"
        for check in refused
    )
    return Notice(
        f"**Gate refused**: {len(refused)} of {len(report.gate)} checks failed. {listed}.", "bad"
    )


def _facts(report: Report) -> Facts:
    """Of the recommended variant, or else of the reference."""
    evaluation = report.evaluation
    reference = evaluation.reference(evaluation.variants[0].model)
    item = next(
        (v for v in evaluation.variants if v.full_name == report.recommended.variant), reference
    )
    beside = "" if item is reference else reference.name
    facts = [
        Fact(
            "accuracy",
            f"{item.accuracy:.4f}",
            f"{item.accuracy_low:.4f} to {item.accuracy_high:.4f} on {evaluation.rows:,} rows"
            + (f"; {beside} {reference.accuracy:.4f}" if beside else ""),
        )
    ]
    if item.timing is not None:
        fp32 = reference.timing if beside else None
        facts += [
            Fact(
                "p50 of one text",
                f"{item.timing.latency_p50_ms:.2f} ms",
                f"p99 {item.timing.latency_p99_ms:.2f} ms"
                + (f"; {beside} {fp32.latency_p50_ms:.2f} ms" if fp32 else ""),
            ),
            Fact(
                "texts a second",
                f"{item.timing.throughput_texts_per_s:,.0f}",
                f"{beside} {fp32.throughput_texts_per_s:,.0f}" if fp32 else "in batches",
            ),
        ]
    facts.append(
        Fact(
            "size",
            f"{item.size_bytes / 1e6:.1f} MB",
            f"{beside} {reference.size_bytes / 1e6:.1f} MB" if beside else "its model file",
        )
    )
    if beside:
        facts.append(
            Fact(
                f"answers unlike {beside}",
                f"{item.flips / evaluation.rows:.2%}",
                f"{item.flips:,} of {evaluation.rows:,}; {item.flip_rate_low:.2%} to "
                f"{item.flip_rate_high:.2%}",
            )
        )
    return Facts(facts)
