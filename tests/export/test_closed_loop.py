"""The closed loop: which layers are given back, in which order, and when it stops."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebert_export.closed_loop import Fit, fit
from edgebert_export.fidelity import Budget, Fidelity

LAYERS = ["query", "key", "value", "output", "classifier"]
BUDGET = Budget(max_accuracy_drop=1, max_flip_rate=0.1)
"""Lets ten of a hundred rows be answered otherwise."""


def _build(names: frozenset[str]) -> bytes:
    return "+".join(sorted(names)).encode()


@dataclass
class _Judge:
    """Judges a model by the layers that it says are in INT8, and writes down which it was given.

    ``damage`` tells how many rows each of them flips, ``divergence`` what it adds to that; both
    add up over layers.
    """

    damage: dict[str, int]
    divergence: dict[str, float | None] = field(default_factory=dict)
    rows: int = 1_000
    seen: list[tuple[int, frozenset[str]]] = field(default_factory=list)

    def part(self, count: int) -> _Judge:
        assert count == 128
        return _Judge(self.damage, self.divergence, count, self.seen)

    def judge(self, model: bytes) -> Fidelity:
        names = frozenset(model.decode().split("+"))
        self.seen.append((self.rows, names))
        parts = [self.divergence.get(name, float(self.damage[name])) for name in sorted(names)]
        known = [part for part in parts if part is not None]
        return Fidelity(
            rows=self.rows,
            correct=self.rows // 2,
            lost=0,
            flips=sum(self.damage[name] for name in names) * self.rows // 1_000,
            divergence=sum(known) if len(known) == len(parts) else None,
        )

    def judged(self, rows: int = 1_000) -> list[frozenset[str]]:
        return [names for count, names in self.seen if count == rows]


def _fit(judge: _Judge, layers: Collection[str] = LAYERS, **given: Any) -> Fit:
    budget = given.pop("budget", BUDGET)
    fitted: Any = fit  # a judge of our own
    result: Fit = fitted(list(layers), _build, judge, budget, **given)
    return result


def _without(*names: str) -> frozenset[str]:
    return frozenset(LAYERS) - set(names)


def test_if_everything_fits_everything_is_quantised_and_nothing_is_measured() -> None:
    judge = _Judge(dict.fromkeys(LAYERS, 20))
    found = _fit(judge)
    assert found.fits
    assert (found.layers, found.quantised) == (5, tuple(LAYERS))
    assert (found.given_back, found.sensitivity) == ((), ())
    assert found.first.flips == 100
    assert found.last is found.first
    assert judge.seen == [(1_000, frozenset(LAYERS))]


def test_each_layers_damage_is_measured_if_asked_for_even_if_everything_fits() -> None:
    judge = _Judge({"query": 1, "key": 30, "value": 20, "output": 4, "classifier": 5})
    found = _fit(judge, sensitivity="always")
    assert found.fits
    assert found.quantised == tuple(LAYERS)
    assert found.given_back == ()
    order = [damage.layer for damage in found.sensitivity]
    assert order == ["key", "value", "classifier", "output", "query"]
    assert [damage.divergence for damage in found.sensitivity] == [30, 20, 5, 4, 1]
    assert {damage.rows for damage in found.sensitivity} == {128}
    assert judge.judged(128) == [frozenset([layer]) for layer in LAYERS]
    assert judge.judged() == [frozenset(LAYERS)]


def test_the_worst_layer_is_given_back_first_and_the_first_that_fits_is_taken() -> None:
    judge = _Judge({"query": 30, "key": 90, "value": 40, "output": 60, "classifier": 5})
    found = _fit(judge)
    assert found.fits
    assert [step.layer for step in found.given_back] == ["key", "output"]
    assert [step.fidelity.flips for step in found.given_back] == [135, 75]
    assert found.quantised == ("query", "value", "classifier")
    assert found.last.flips == 75
    assert found.first.flips == 225
    assert judge.judged() == [frozenset(LAYERS), _without("key"), _without("key", "output")]
    assert len(judge.judged(128)) == 5


def test_what_is_left_is_in_the_graphs_order_whatever_was_given_back() -> None:
    layers = ["z", "y", "x", "w"]
    found = _fit(_Judge({"z": 10, "y": 95, "x": 20, "w": 30}), layers)
    assert found.quantised == ("z", "x", "w")


def test_what_the_divergence_says_is_worst_is_given_back_not_what_flips_most() -> None:
    judge = _Judge(
        {"query": 90, "key": 20, "value": 0, "output": 0, "classifier": 0},
        {"query": 0.1, "key": 0.9, "value": 0.2, "output": 0.3, "classifier": 0.4},
    )
    assert _fit(judge).given_back[0].layer == "key"


def test_if_nothing_fits_nothing_is_quantised() -> None:
    judge = _Judge(dict.fromkeys(LAYERS, 200))
    found = _fit(judge)
    assert not found.fits
    assert found.quantised == ()
    assert [step.layer for step in found.given_back] == LAYERS[:-1]
    assert len(found.sensitivity) == 5
    assert judge.judged()[-1] == frozenset(["classifier"])
    assert frozenset() not in judge.judged()
    assert found.last.flips == 200


def test_a_single_layer_that_does_not_fit_cannot_be_given_back() -> None:
    judge = _Judge({"only": 500})
    found = _fit(judge, ["only"])
    assert (found.fits, found.layers, found.quantised, found.given_back) == (False, 1, (), ())
    assert found.last is found.first


def test_a_single_layer_that_fits_is_quantised() -> None:
    found = _fit(_Judge({"only": 5}), ["only"])
    assert (found.fits, found.quantised) == (True, ("only",))


def test_the_last_layer_alone_may_be_what_fits() -> None:
    found = _fit(_Judge({"query": 150, "key": 140, "value": 130, "output": 120, "classifier": 99}))
    assert found.fits
    assert found.quantised == ("classifier",)
    assert len(found.given_back) == 4


def test_layers_that_do_equal_damage_are_given_back_in_the_graphs_order() -> None:
    found = _fit(_Judge(dict.fromkeys(LAYERS, 30)))
    assert [step.layer for step in found.given_back] == ["query", "key"]
    backwards = _fit(_Judge(dict.fromkeys(LAYERS, 30)), LAYERS[::-1])
    assert [step.layer for step in backwards.given_back] == ["classifier", "output"]
    assert [damage.layer for damage in backwards.sensitivity] == LAYERS[::-1]


def test_a_layer_whose_outputs_are_no_numbers_is_the_worst_of_all() -> None:
    judge = _Judge(
        {"query": 90, "key": 1, "value": 1, "output": 1, "classifier": 1},
        {"key": None, "classifier": None},
    )
    found = _fit(judge)
    assert found.first.divergence is None
    assert [damage.layer for damage in found.sensitivity][:3] == ["key", "classifier", "query"]
    assert [step.layer for step in found.given_back] == ["key", "classifier"]
    assert found.given_back[0].fidelity.divergence is None
    assert found.quantised == ("query", "value", "output")


def test_every_limit_of_the_budget_is_looked_at() -> None:
    judge = _Judge(dict.fromkeys(LAYERS, 0), dict.fromkeys(LAYERS, 0.1))
    budget = Budget(max_divergence=0.35)
    found = _fit(judge, budget=budget)
    assert found.fits
    assert len(found.given_back) == 2


def _many(**damage: int) -> dict[str, int]:
    """Thirty layers, of which those named do damage."""
    return {f"layer{index}": damage.get(f"layer{index}", 0) for index in range(30)}


def test_a_tenth_of_the_layers_is_given_back_to_be_sure_of_a_budget_that_barely_fits() -> None:
    judge = _Judge(_many(layer3=9, layer7=8, layer9=6, layer11=70))
    found = _fit(judge, judge.damage)
    # Of 1,000 rows, 93 flip at first: ten of a hundred are allowed, 84 are surely few enough.
    assert [step.layer for step in found.given_back] == ["layer11"]
    assert found.last.flips == 23
    assert found.fits


def test_no_more_than_a_tenth_of_the_layers_is_given_back_to_be_sure() -> None:
    judge = _Judge(_many(**{f"layer{index}": 4 for index in range(24)}))
    found = _fit(judge, judge.damage)
    assert found.fits
    assert (found.first.flips, found.last.flips) == (96, 84)
    assert len(found.given_back) == 3
    few = _Judge(dict.fromkeys(LAYERS, 19))  # of five layers, a tenth is none
    assert _fit(few).given_back == ()
    assert few.seen == [(1_000, frozenset(LAYERS))]


def test_layers_that_had_to_go_count_towards_that_tenth() -> None:
    judge = _Judge(_many(**{f"layer{index}": 5 for index in range(24)}))
    found = _fit(judge, judge.damage)
    assert found.first.flips == 120
    assert (len(found.given_back), found.last.flips) == (4, 100)  # the first that fits


def test_a_model_that_fits_is_kept_if_trying_to_be_surer_fails() -> None:
    """Errors of two layers can cancel out, so that giving one back flips more rows."""
    judge = _Judge(_many(layer3=5, layer7=-30, layer9=5, layer11=85))
    judge.divergence |= dict.fromkeys(judge.damage, 0.0)
    judge.divergence |= {"layer7": 0.9, "layer3": 0.2, "layer9": 0.1}
    found = _fit(judge, judge.damage, budget=Budget(max_accuracy_drop=1, max_flip_rate=0.07))
    assert judge.judged()[1:] == [
        frozenset(judge.damage) - set(given_back)
        for given_back in (["layer7"], ["layer7", "layer3"], ["layer7", "layer3", "layer9"])
    ]
    assert found.fits
    assert (found.given_back, found.last.flips) == ((), 65)
    assert found.quantised == tuple(judge.damage)


def test_what_was_found_and_decided_is_said() -> None:
    said: list[str] = []
    judge = _Judge(
        {"query": 30, "key": 90, "value": 0, "output": 0, "classifier": 0}, {"key": None}
    )
    _fit(judge, say=said.append)
    assert said == [
        "all 5 layers in INT8: +0.00% accuracy lost, 12.00% flips, divergence not a number: "
        "over the budget",
        "measuring each of 5 layers alone, on 128 rows",
        "key given back: +0.00% accuracy lost, 3.00% flips, divergence 30: within the budget",
    ]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 200))
def test_the_result_is_the_same_every_time_and_the_first_that_fits(
    damages: list[int], allowed: int
) -> None:
    damage = {f"layer {index}": number for index, number in enumerate(damages)}
    budget = Budget(max_accuracy_drop=1, max_flip_rate=allowed / 1_000)
    found = _fit(_Judge(damage), list(damage), budget=budget)
    assert _fit(_Judge(damage), list(damage), budget=budget) == found
    back = [step.layer for step in found.given_back]
    assert [damage[layer] for layer in back] == sorted(damages, reverse=True)[: len(back)]
    assert found.fits == (found.last.flips <= allowed)
    for step in (found.first, *(step.fidelity for step in found.given_back[:-1])):
        assert step.flips > allowed or step is found.last
    if found.fits:
        assert [*found.quantised] == [layer for layer in damage if layer not in back]
    else:
        assert found.quantised == ()
        assert min(damages) > allowed


@pytest.mark.parametrize("sensitivity", ["when_needed", "always"])
def test_when_the_damage_is_measured_makes_no_difference_to_the_result(sensitivity: str) -> None:
    judge = _Judge({"query": 30, "key": 90, "value": 40, "output": 60, "classifier": 5})
    found = _fit(judge, sensitivity=sensitivity)
    assert found.quantised == ("query", "value", "classifier")
    assert len(found.sensitivity) == 5
