"""Time that a report takes, and the size of its page, at the size that it is made for.

20 variants, 10,000 test rows, and more than 1,000 rows with long texts that variants answer
differently. Ends with exit code 1 beyond 5 seconds or 3 MB.

    python benchmarks/report.py [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from edgebert_export.dataset import Example
from edgebert_export.fidelity import Budget
from edgebert_export.to_onnx import Parity
from edgebert_export.training import TrainingLog
from edgebert_pipeline.answers import Answers, compare, find_flips, score, with_texts
from edgebert_pipeline.build import StageRecord, library_versions
from edgebert_pipeline.data import DataSummary
from edgebert_pipeline.engines import EngineLog
from edgebert_pipeline.evaluate import machine
from edgebert_pipeline.not_done import list_not_done
from edgebert_pipeline.recommend import recommend
from edgebert_pipeline.report import REPORT_VERSION, ModelSummary, Report
from edgebert_pipeline.report_html import render_html
from edgebert_pipeline.report_markdown import render_markdown
from edgebert_pipeline.scores import MODEL, Evaluation, VariantScores
from edgebert_runtime.bench import LatencyCell, Timing
from edgebert_runtime.manifest import Provenance, Task
from edgebert_runtime.rows import pack_right, row_order, rows_sha256

VARIANTS, ROWS, LABELS = 20, 10_000, 12
MOST_SECONDS, MOST_BYTES = 5.0, 3_000_000
WORDS = [
    "ein",
    "sehr",
    "langer",
    "Text",
    "über",
    "<b>alles</b>",
    "&",
    "nichts,",
    "日本語の文章,",
    "текст,",
    "šťastný",
    "🙂",
]


def answers_of(task: Task, truth: np.ndarray, seed: int) -> Answers:
    """Answers that are right nine times out of ten, and differ a little from seed to seed."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    logits = shared.normal(size=truth.shape) + 3.2 * truth + own.normal(size=truth.shape) * 0.15
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    given = np.zeros_like(truth)
    given[np.arange(len(truth)), scores.argmax(axis=1)] = True
    return Answers(task, given, truth, scores.astype(np.float32), 0)


def timing_of(number: int) -> Timing:
    """Made up: only its place in the report matters here."""
    p50 = 1.0 + number / 3
    return Timing(
        texts=200,
        repeats=5,
        latency_p50_ms=p50,
        latency_p90_ms=p50 * 1.6,
        latency_p99_ms=p50 * 2.5,
        throughput_texts_per_s=1500 / p50,
        batch_size=32,
        warmup_calls=9,
        session_p50_ms=p50 * 0.9,
        session_p90_ms=p50 * 1.5,
        session_p99_ms=p50 * 2.3,
        latency_p50_low_ms=p50 * 0.97,
        latency_p50_high_ms=p50 * 1.05,
        throughput_low_texts_per_s=1400 / p50,
        throughput_high_texts_per_s=1550 / p50,
        variation=0.01 * (number % 8),
        noisy=number % 8 > 5,
        cells=tuple(
            LatencyCell(
                max_tokens=tokens,
                batch_size=size,
                texts=40,
                calls=100,
                p50_ms=p50 * tokens * size / 16,
                p90_ms=p50 * tokens * size / 13,
                p99_ms=p50 * tokens * size / 9,
            )
            for tokens in (16, 32, 64, 128)
            for size in (1, 8, 32)
        ),
    )


def evaluate_made_up_answers(examples: list[Example], task: Task) -> Evaluation:
    """Does what ``evaluate`` does once the models have answered."""
    truth = np.zeros((len(examples), len(task.labels)), dtype=bool)
    for row, example in enumerate(examples):
        truth[row, list(example.labels)] = True
    names = ["fp32", *(f"int8-choice-{number}" for number in range(1, VARIANTS))]
    answers = {name: answers_of(task, truth, seed + 1) for seed, name in enumerate(names)}
    rows = [(e.text, tuple(task.labels[index] for index in e.labels)) for e in examples]
    references, order = {MODEL: "fp32"}, row_order(rows)
    variants = [
        VariantScores(
            model=MODEL,
            name=name,
            precision=name[:4],
            devices=("cpu",),
            size_bytes=90_000_000 - 3_000_000 * number,
            **score(answers[name], answers["fp32"], None),
            timing=timing_of(VARIANTS - number),
            right_rows=pack_right(order, answers[name].correct),
        )
        for number, name in enumerate(names)
    ]
    return Evaluation(
        rows=len(examples),
        rows_sha256=rows_sha256(rows),
        baseline_accuracy=1 / len(task.labels),
        references=references,
        variants=tuple(variants),
        comparisons=compare(variants, references, answers),
        flips=find_flips(variants, references, answers),
        intra_op_threads=None,
        environment=machine() | library_versions(),
    )


def report_of(evaluation: Evaluation, task: Task) -> Report:
    """A report around an evaluation."""
    training = TrainingLog(
        steps=900, best_step=600, metric="accuracy", validation_scores={300: 0.8, 600: 0.9}
    )
    return Report(
        report_version=REPORT_VERSION,
        name="made-up",
        measured_at="2026-01-01T00:00:00+00:00",
        commit=None,
        bundle_digest="0" * 64,
        task=task,
        data=DataSummary(
            rows={"train": 50_000, "test": evaluation.rows},
            labels={"train": dict.fromkeys(task.labels, 1)},
            out_of_ranges=0,
            duplicates=0,
            contradictions=0,
            moved_out=0,
            sha256="0" * 64,
        ),
        training=training,
        distillation=None,
        models={
            MODEL: ModelSummary(
                model_type="bert",
                layers=6,
                parameters=22_700_000,
                checkpoint_sha256="0" * 64,
                parity=Parity(
                    texts=200,
                    shortest_tokens=3,
                    longest_tokens=60,
                    max_difference=1e-6,
                    limit=1e-4,
                ),
            )
        },
        quantisation={},
        engines=EngineLog(profiles=()),
        budget=Budget(),
        evaluation=evaluation,
        gate=(),
        recommended=recommend(evaluation, ()),
        not_done=list_not_done(
            fine_tuned=True,
            distillation=None,
            quantisation={},
            engines=EngineLog(profiles=()),
            evaluation=evaluation,
            gated=False,
        ),
        stages={"evaluate": StageRecord(1.0, "2026-01-01T00:00:00+00:00")},
        provenance=Provenance(
            edgebert="0.1.0",
            recipe_sha256="0" * 64,
            model_sha256="0" * 64,
            data_sha256="0" * 64,
            seed=7,
            versions={},
        ),
    )


def make(out: Path | None) -> tuple[dict[str, float], dict[str, int]]:
    """Makes one report from made-up answers; returns seconds and bytes."""
    task = Task(
        kind="single_label", labels=tuple(f"label {n}" for n in range(LABELS)), text_pair=False
    )
    draw = random.Random(0)
    examples = [
        Example(" ".join(draw.choices(WORDS, k=draw.randrange(20, 400))), (row % LABELS,))
        for row in range(ROWS)
    ]
    start = time.perf_counter()
    evaluation = with_texts(evaluate_made_up_answers(examples, task), examples)
    scored = time.perf_counter()
    report = report_of(evaluation, task)
    texts = {
        "report.json": msgspec.json.format(msgspec.json.encode(report), indent=2).decode(),
        "report.md": render_markdown(report),
        "report.html": render_html(report),
    }
    done = time.perf_counter()
    for name, text in texts.items():
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text, encoding="utf-8")
    assert evaluation.flips is not None
    print(f"{evaluation.flips.count} rows flipped, {len(evaluation.flips.kept)} kept")
    seconds = {"statistics": scored - start, "rendering": done - scored, "both": done - start}
    return seconds, {name: len(text.encode()) for name, text in texts.items()}


def main() -> int:
    """Prints seconds and bytes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="Where to leave the report.")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.once:  # in a process of its own: what is loaded once counts, too
        start = time.perf_counter()
        out = ["--out", str(options.out)] if options.out else []
        done = subprocess.run([sys.executable, __file__, "--once", *out], check=False)
        print(f"the whole process, imports too: {time.perf_counter() - start:.2f} s")
        return done.returncode
    seconds, sizes = make(options.out)
    for name, value in seconds.items():
        print(f"{name}: {value:.2f} s")
    for name, value in sizes.items():
        print(f"{name}: {value / 1e6:.2f} MB")
    return int(seconds["both"] > MOST_SECONDS or sizes["report.html"] > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
