"""Gives layers back to higher precision, the most harmful first, until a model fits its budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from edgebert_export.fidelity import Budget, Fidelity, Judge

if TYPE_CHECKING:
    from edgebert_export.graph import Model

__all__ = ["Fit", "GivenBack", "LayerDamage", "fit"]

_SENSITIVITY_ROWS = 128
"""Rows on which one layer's damage is measured; the divergence of so many ranks layers well."""


class LayerDamage(msgspec.Struct, frozen=True, kw_only=True):
    """What happens when one layer alone is in INT8.

    Attributes:
        layer: Its name.
        divergence: Mean Kullback-Leibler divergence of the outputs from FP32's, in nats;
            ``None`` if an output is not a number.
        flips: Rows that are answered otherwise.
        rows: Rows that it was measured on.
    """

    layer: str
    divergence: float | None
    flips: int
    rows: int


class GivenBack(msgspec.Struct, frozen=True, kw_only=True):
    """A layer that went back to higher precision, and what the model was then worth."""

    layer: str
    fidelity: Fidelity


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """How a model came within its budget, or did not.

    Attributes:
        fits: Whether a set of layers was found that fits.
        layers: Layers that could be in INT8.
        quantised: Those that are, in the graph's order; none if nothing fits.
        first: What the model with all of them was worth.
        given_back: Layers given back, in that order.
        sensitivity: Damage of each layer alone, the worst first; empty if it was not needed.
    """

    fits: bool
    layers: int
    quantised: tuple[str, ...]
    first: Fidelity
    given_back: tuple[GivenBack, ...]
    sensitivity: tuple[LayerDamage, ...]

    @property
    def last(self) -> Fidelity:
        """What the model with the layers that are left is worth."""
        return self.given_back[-1].fidelity if self.given_back else self.first


def fit(
    layers: Sequence[str],
    build: Callable[[frozenset[str]], Model],
    judge: Judge,
    budget: Budget,
    *,
    sensitivity: Literal["when_needed", "always"] = "when_needed",
    say: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Finds a set of layers that can be in INT8 within a budget.

    All are tried first. If that misses the budget, each layer is put into INT8 alone, to see what
    it does to the outputs; then they are given back one at a time, the worst first, until the
    model fits.

    Args:
        layers: Names of the layers, at least one.
        build: Makes the model in which these layers, and no others, are in INT8.
        judge: Tells what a model is worth.
        budget: What it may cost.
        sensitivity: ``always`` measures each layer's damage even if nothing has to be given back.
        say: Called with what was found and decided.
    """
    first = judge.judge(build(frozenset(layers)))
    fits = first.fits(budget)
    say(f"all {len(layers)} layers in INT8: {_worth(first, fits)}")
    damages: list[LayerDamage] = []
    if not fits or sensitivity == "always":
        part = judge.part(_SENSITIVITY_ROWS)
        say(f"measuring each of {len(layers)} layers alone, on {part.rows} rows")
        for layer in layers:
            found = part.judge(build(frozenset([layer])))
            damages.append(
                LayerDamage(
                    layer=layer, divergence=found.divergence, flips=found.flips, rows=found.rows
                )
            )
        # Layers that do equal damage stay in the graph's order: the result is the same every time.
        damages.sort(key=lambda d: float("-inf") if d.divergence is None else -d.divergence)
    left, given_back = list(layers), []
    for damage in damages:
        if fits or len(left) == 1:
            break
        left.remove(damage.layer)
        fidelity = judge.judge(build(frozenset(left)))
        given_back.append(GivenBack(layer=damage.layer, fidelity=fidelity))
        fits = fidelity.fits(budget)
        say(f"{damage.layer} given back: {_worth(fidelity, fits)}")
    return Fit(
        fits=fits,
        layers=len(layers),
        quantised=tuple(left) if fits else (),
        first=first,
        given_back=tuple(given_back),
        sensitivity=tuple(damages),
    )


def _worth(fidelity: Fidelity, fits: bool) -> str:
    divergence = "not a number" if fidelity.divergence is None else f"{fidelity.divergence:.2g}"
    return (
        f"{fidelity.lost / fidelity.rows:+.2%} accuracy lost, "
        f"{fidelity.flips / fidelity.rows:.2%} flips, divergence {divergence}: "
        f"{'within' if fits else 'over'} the budget"
    )
