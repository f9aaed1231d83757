"""What a compiler made of models, by its log and the engines' constants: a table and its limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from edgebert_export.audit import Audit
from edgebert_pipeline.parts import Cell, Column, Part, Table

__all__ = ["audit_parts"]

_LIMITS = (
    "This is what the compiler says in its log, held against the model and the constants in the "
    "engine: which products run in INT8, and where their sums are scaled. Sums that are stored as "
    "FP16 before they are scaled exceed it in most products. No GPU has run any of it, so it does "
    "not prove that a GPU computes what the list of kernels says, nor how fast. Figures joined by "
    "a slash are of the engine's profiles, in order."
)


def audit_parts(audits: Mapping[str, Audit]) -> list[Part]:
    """Returns a table with a row for each engine, what is wrong, and what it all proves.

    Args:
        audits: By the name of what was compiled.
    """
    columns = [Column("engine"), Column("audit")]
    columns += [
        Column(name, numeric=True)
        for name in (
            "INT8 products",
            "scaled inside",
            "after FP16",
            "undecided",
            "weights dequantised",
            "attentions fused",
            "kernels",
            "a layer",
            "waits",
            "FP32 between",
        )
    ]
    parts: list[Part] = [
        Table(
            "What the compiler made of them",
            columns,
            [_row(name, found) for name, found in audits.items()],
        )
    ]
    for name, found in audits.items():
        if found.not_understood is not None:
            parts.append(f"{name} is not understood: {found.not_understood}.")
        parts += [f"{name}: {said}." for said in found.breaches()]
    return [*parts, _LIMITS]


def _row(name: str, found: Audit) -> list[Cell | str]:
    mood = {"fine": "good", "refused": "bad"}.get(found.verdict, "")
    verdict = Cell(found.verdict, mood=mood)
    if found.not_understood is not None:
        return [name, verdict, *[""] * 10]
    per_layer = [profile.kernels_per_layer for profile in found.profiles]
    return [
        name,
        verdict,
        f"{found.count(ran='int8')} of {len(found.products)}",
        str(found.count(scale="inside")),
        str(found.count(scale="after")),
        str(found.count(scale="undecided")),
        str(found.count(ran="dequantised")),
        f"{found.fused} of {found.attentions}",
        _joined(str(profile.kernels) for profile in found.profiles),
        _joined("-" if value is None else f"{value:.1f}" for value in per_layer),
        _joined(str(profile.waits) for profile in found.profiles),
        _joined(str(profile.fp32_tensors) for profile in found.profiles),
    ]


def _joined(values: Iterable[str]) -> str:
    """One figure for each profile; one for all if they are the same."""
    figures = list(values)
    return figures[0] if len(set(figures)) == 1 else " / ".join(figures)
