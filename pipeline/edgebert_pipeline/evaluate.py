"""Measures a bundle on labelled rows, through the runtime that devices use."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from edgebert_export.dataset import Example
from edgebert_export.emulate import open_emulated
from edgebert_pipeline.answers import Answers, compare, find_flips, score
from edgebert_pipeline.build import library_versions
from edgebert_pipeline.scores import TEACHER, Evaluation, VariantScores, full_name
from edgebert_runtime.bench import measure, spread_over_lengths
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.classifier import Classifier, encoder_for
from edgebert_runtime.condition import processor_name
from edgebert_runtime.manifest import Variant
from edgebert_runtime.rows import pack_right, row_order, rows_sha256

__all__ = ["evaluate", "machine", "reference_variant"]


def reference_variant(variants: Sequence[Variant]) -> str:
    """Returns the FP32 variant's name, or the first one's when there is none."""
    fp32 = [item.name for item in variants if item.precision == "fp32"]
    return fp32[0] if fp32 else variants[0].name


def evaluate(
    bundles: Mapping[str, Path],
    examples: Sequence[Example],
    *,
    latency_texts: int,
    latency_repeats: int,
    intra_op_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Labels ``examples`` with every variant, and times those that are for a CPU.

    What is for a GPU is computed by ONNX Runtime on the CPU, too: the same graph that TensorRT
    gets, with each result that it types FP16 stored as FP16 (``edgebert_export.emulate``). A GPU
    adds up in another order, and TensorRT fuses operators, so that it stores less often.

    Args:
        bundles: Bundles on disk, by model; the one that is shipped first.
        examples: Labelled rows, at least one.
        latency_texts: Texts to time, spread over the lengths of ``examples``.
        latency_repeats: Rounds of timing.
        intra_op_threads: Threads for one operator.
        on_progress: Called with steps done and steps in all.

    Raises:
        BundleError: A bundle is damaged.
        DeviceError: It cannot be run.
    """
    opened = {model: Bundle.open(path) for model, path in bundles.items()}
    entries = [
        (model, variant) for model, bundle in opened.items() for variant in bundle.manifest.variants
    ]
    texts = [example.text for example in examples]
    steps = len(entries) + latency_repeats
    answers: dict[str, Answers] = {}
    with ExitStack() as stack:
        classifiers: dict[str, Classifier] = {}
        for done, (model, variant) in enumerate(entries, start=1):
            name = full_name(model, variant.name)
            classifier = _load(opened[model], variant, intra_op_threads)
            answers[name] = Answers.of(classifier, examples)
            if "cpu" in variant.devices:
                classifiers[name] = stack.enter_context(classifier)
            else:  # it is not timed
                classifier.close()
            if on_progress is not None:
                on_progress(done, steps)
        timings = measure(
            classifiers,
            spread_over_lengths(texts, latency_texts),
            repeats=latency_repeats,
            on_progress=lambda done, _: (
                on_progress(len(entries) + done, steps) if on_progress else None
            ),
        )
    references = {
        model: reference_variant([variant for owner, variant in entries if owner == model])
        for model in bundles
    }
    labels = opened[entries[0][0]].manifest.task.labels
    rows = [(e.text, tuple(labels[index] for index in e.labels)) for e in examples]
    order = row_order(rows)
    variants = []
    for model, variant in entries:
        name = full_name(model, variant.name)
        sizes = {entry.path: entry.size_bytes for entry in opened[model].manifest.files}
        reference = answers[full_name(model, references[model])]
        teacher = answers[full_name(TEACHER, references[TEACHER])] if TEACHER in bundles else None
        variants.append(
            VariantScores(
                model=model,
                name=variant.name,
                precision=variant.precision,
                devices=variant.devices,
                size_bytes=sizes[variant.model],
                **score(answers[name], reference, teacher),
                timing=timings.get(name),
                right_rows=pack_right(order, answers[name].correct),
            )
        )
    return Evaluation(
        rows=len(examples),
        rows_sha256=rows_sha256(rows),
        baseline_accuracy=max(Counter(e.labels for e in examples).values()) / len(examples),
        references=references,
        variants=tuple(variants),
        comparisons=compare(variants, references, answers),
        flips=find_flips(variants, references, answers),
        intra_op_threads=intra_op_threads,
        environment=_environment(),
    )


def _load(bundle: Bundle, variant: Variant, intra_op_threads: int | None) -> Classifier:
    if "cpu" in variant.devices:
        return Classifier.load(
            bundle.path, device="cpu", variant=variant.name, intra_op_threads=intra_op_threads
        )
    session = open_emulated(bundle.read(variant.model))
    return Classifier(session, encoder_for(bundle), bundle.manifest.task)


def _environment() -> dict[str, str]:
    return {
        **machine(),
        "system": f"{platform.system()} {platform.release()}",
        **library_versions(),
    }


def machine() -> dict[str, str]:
    """What makes a figure of speed comparable: processor, their number, Python."""
    return {
        "processor": processor_name(),
        "processors": str(os.cpu_count()),
        "python": platform.python_version(),
    }
