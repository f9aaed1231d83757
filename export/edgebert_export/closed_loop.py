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
_SPARE = 10
"""Of so many layers, one may be given back to be sure of a budget that fits as it is."""


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
    model fits. Up to a tenth of the layers are given back the same way for a model that fits, but
    so barely that other rows may well see more flips (``Fidelity.surely_fits``).

    Args:
        layers: Names of the layers, at least one.
        build: Makes the model in which these layers, and no others, are in INT8.
        judge: Tells what a model is worth.
        budget: What it may cost.
        sensitivity: ``always`` measures each layer's damage even if nothing has to be given back.
        say: Called with what was found and decided.
    """
    first = judge.judge(build(frozenset(layers)))
    say(f"all {len(layers)} layers in INT8: {_worth(first, budget)}")
    damages: list[LayerDamage] = []
    spare = len(layers) // _SPARE
    if _goes_on([first], budget, spare) or sensitivity == "always":
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
    tried = [first]
    for count, damage in enumerate(damages[:-1], start=1):
        if not _goes_on(tried, budget, spare):
            break
        left = frozenset(layers) - {damage.layer for damage in damages[:count]}
        tried.append(judge.judge(build(left)))
        say(f"{damage.layer} given back: {_worth(tried[-1], budget)}")
    # The last that fits: what was tried to be sure may have missed the budget by chance.
    fitting = [count for count, fidelity in enumerate(tried) if fidelity.fits(budget)]
    taken = fitting[-1] if fitting else len(tried) - 1
    given_back = [damage.layer for damage in damages[:taken]]
    return Fit(
        fits=bool(fitting),
        layers=len(layers),
        quantised=tuple(name for name in layers if name not in given_back) if fitting else (),
        first=first,
        given_back=tuple(
            GivenBack(layer=layer, fidelity=fidelity)
            for layer, fidelity in zip(given_back, tried[1 : taken + 1], strict=True)
        ),
        sensitivity=tuple(damages),
    )


def _goes_on(tried: Sequence[Fidelity], budget: Budget, spare: int) -> bool:
    """Whether another layer is given back; ``tried`` has one entry more than layers that were."""
    if not any(fidelity.fits(budget) for fidelity in tried):
        return True
    return len(tried) <= spare and not tried[-1].surely_fits(budget)


def _worth(fidelity: Fidelity, budget: Budget) -> str:
    divergence = "not a number" if fidelity.divergence is None else f"{fidelity.divergence:.2g}"
    fits = "within" if fidelity.fits(budget) else "over"
    if fits == "within" and not fidelity.surely_fits(budget):
        fits = "just within"
    return (
        f"{fidelity.lost / fidelity.rows:+.2%} accuracy lost, "
        f"{fidelity.flips / fidelity.rows:.2%} flips, divergence {divergence}: {fits} the budget"
    )
