"""What a build came from and how: engines, gate, data, what was not done, environment, origin."""

from __future__ import annotations

from edgebert_pipeline.engines import EngineLog
from edgebert_pipeline.parts import Cell, Column, Part, Section, Table, shorten
from edgebert_pipeline.report import Report
from edgebert_pipeline.sections.audit import audit_parts

__all__ = [
    "data_section",
    "engine_parts",
    "engines_section",
    "environment_section",
    "gate_section",
    "not_done_section",
    "provenance_section",
]


def gate_section(report: Report) -> Section:
    """Returns the section; every report has it."""
    if not report.gate:
        return Section("gate", "Gate", ("The recipe sets no limit.",))
    columns = [
        Column("variant"),
        Column("limit"),
        Column("allowed", numeric=True),
        Column("measured", numeric=True),
        Column("passed"),
    ]
    rows: list[list[Cell | str]] = [
        [
            check.variant,
            check.limit,
            f"{check.allowed:g}",
            f"{check.measured:.4g}",
            Cell("yes" if check.passed else "NO", mood="good" if check.passed else "bad"),
        ]
        for check in report.gate
    ]
    return Section("gate", "Gate", (Table("", columns, rows),))


def engines_section(report: Report) -> Section | None:
    """Returns the section; ``None`` if there are no models for engines."""
    if not report.engines.profiles:
        return None
    return Section("engines", "Engines", engine_parts(report.engines))


def engine_parts(log: EngineLog) -> list[Part]:
    """Returns what is to be told of engines."""
    parts: list[Part] = [
        Table(
            "Shapes that engines are built for, by the lengths of the calibration texts",
            [Column("rows"), Column("fastest at"), Column("tokens"), Column("fastest at")],
            [
                (f"1 to {p.max_batch}", str(p.opt_batch), f"1 to {p.max_seq}", str(p.opt_seq))
                for p in log.profiles
            ],
        )
    ]
    if log.skipped is not None:
        return [*parts, f"No engine was built ahead of time: {log.skipped}."]
    if log.built:
        first = log.built[0]
        parts.append(
            Table(
                f"Built ahead of time with TensorRT-RTX {first.version} for {first.platform}, "
                "without a GPU; not run on one",
                [Column("variant")]
                + [
                    Column(name, numeric=True)
                    for name in ("model MB", "engine MB", "seconds", "peak MB")
                ],
                [
                    (
                        found.variant,
                        f"{found.model_bytes / 1e6:.1f}",
                        f"{found.size_bytes / 1e6:.1f}",
                        f"{found.seconds:.1f}",
                        f"{found.peak_bytes / 1e6:.0f}" if found.peak_bytes else "unknown",
                    )
                    for found in log.built
                ],
            )
        )
        audits = {found.variant: found.audit for found in log.built if found.audit is not None}
        if audits:
            parts += audit_parts(audits)
    return parts


def data_section(report: Report) -> Section:
    """Returns the section; every report has it."""
    data = report.data
    labels = list(next(iter(data.labels.values())))
    listed = labels if len(labels) <= 12 else []
    rows = [
        [
            split,
            str(count),
            *(
                f"{data.labels[split][label]} ({data.labels[split][label] / max(count, 1):.1%})"
                if split in data.labels
                else ""
                for label in listed
            ),
        ]
        for split, count in data.rows.items()
    ]
    columns = [Column("split"), Column("rows", numeric=True)]
    columns += [Column(shorten(label), numeric=True) for label in listed]
    many = f" There are {len(labels)} labels; their counts are in report.json." * (not listed)
    return Section(
        "data",
        "Data",
        (
            Table("", columns, rows),
            f"Left out of the labelled splits: {data.out_of_ranges} rows outside every label's "
            f"range, {data.duplicates} duplicates, {data.contradictions} rows whose text has two "
            f"different labels, {data.moved_out} rows whose text is in another split.{many}",
        ),
    )


def not_done_section(report: Report) -> Section:
    """Returns the section; every report has it."""
    rows = [(item.what, item.reason) for item in report.not_done]
    parts: list[Part] = ["Everything that this report can show was done."]
    if rows:
        parts = [Table("", [Column("what"), Column("why")], rows)]
    return Section("not-done", "Not done", parts)


def environment_section(report: Report) -> Section:
    """Returns the section; every report has it."""
    rows = list(report.evaluation.environment.items())
    return Section(
        "environment", "Environment", (Table("", [Column("what"), Column("value")], rows),)
    )


def provenance_section(report: Report) -> Section:
    """Returns the section; every report has it."""
    provenance, rows = report.provenance, report.evaluation.rows_sha256
    facts = {
        "measured": report.measured_at,
        "edgebert": provenance.edgebert,
        "seed": "none: nothing was trained" if provenance.seed is None else str(provenance.seed),
        "commit of the recipe's repository": report.commit or "none known",
    }
    hashes = {
        "bundle": report.bundle_digest,
        "recipe": provenance.recipe_sha256,
        "model that it started from": provenance.model_sha256,
        **{
            f"checkpoint of the {name}": model.checkpoint_sha256
            for name, model in report.models.items()
        },
        "all rows": report.data.sha256,
        "test rows": rows,
    }
    table: list[list[Cell | str]] = [[name, value] for name, value in facts.items()]
    table += [[name, Cell(value, mood="code")] for name, value in hashes.items() if value]
    parities = [
        f"ONNX against PyTorch, {name}: raw outputs differ by at most "
        f"{model.parity.max_difference:.1e} (limit {model.parity.limit:.0e}) on "
        f"{model.parity.texts} texts of {model.parity.shortest_tokens} to "
        f"{model.parity.longest_tokens} tokens, alone and in padded batches."
        for name, model in report.models.items()
    ]
    stages = Table(
        "When each stage ran",
        [Column("stage"), Column("seconds", numeric=True), Column("ended")],
        [
            [name, f"{record.seconds:.1f}", record.finished_at]
            for name, record in report.stages.items()
        ],
    )
    origin = Table("Hashes are SHA-256", [Column("what"), Column("value")], table)
    return Section("provenance", "How it was made", (origin, *parities, stages))
