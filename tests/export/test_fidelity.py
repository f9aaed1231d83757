"""The judge: how a model's answers are held against FP32's, and what a budget lets through."""

from __future__ import annotations

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from scipy.special import expit, log_softmax, rel_entr, softmax

import edgebert_export.graph as graph_module
from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder
from edgebert_export.dataset import Dataset, Example
from edgebert_export.fidelity import Budget, Fidelity, Judge
from edgebert_export.to_onnx import OnnxModel
from edgebert_runtime.encoder import TextEncoder
from edgebert_runtime.manifest import Task
from edgebert_runtime.onnx_session import OnnxSession

NAMES = ["single", "multi", "pairs"]


@pytest.fixture(scope="module")
def encoders(
    tiny_classifiers: dict[str, Checkpoint], tasks: dict[str, Task]
) -> dict[str, TextEncoder]:
    return {
        name: checkpoint_encoder(checkpoint, max_length=64, text_pair=tasks[name].text_pair)
        for name, checkpoint in tiny_classifiers.items()
    }


@pytest.fixture(scope="module")
def examples(datasets: dict[str, Dataset]) -> dict[str, tuple[Example, ...]]:
    """Labelled rows to judge by."""
    return {name: dataset.train for name, dataset in datasets.items()}


@pytest.fixture(scope="module")
def judges(
    onnx_models: dict[str, OnnxModel],
    tasks: dict[str, Task],
    encoders: dict[str, TextEncoder],
    examples: dict[str, tuple[Example, ...]],
) -> dict[str, Judge]:
    return {
        name: Judge(model.path.read_bytes(), tasks[name], encoders[name], examples[name])
        for name, model in onnx_models.items()
    }


def _tampered(model: OnnxModel, change: dict[str, float], factor: float = 1) -> bytes:
    """Returns a model to some of whose weights a number was added; keys end the weights' names."""
    proto = onnx.load(model.path)
    for weight in proto.graph.initializer:
        for suffix, number in change.items():
            if weight.name.endswith(suffix):
                array = numpy_helper.to_array(weight).copy() * np.float32(factor)
                array[0] += np.float32(number)
                weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    data: bytes = proto.SerializeToString()
    return data


@pytest.fixture(scope="module")
def worse(onnx_models: dict[str, OnnxModel]) -> dict[str, bytes]:
    """Models that answer some rows otherwise."""
    return {
        name: _tampered(model, {"classifier.weight": 0.1}, 0.7)
        for name, model in onnx_models.items()
    }


def _logits(
    model: bytes, encoder: TextEncoder, examples: tuple[Example, ...]
) -> NDArray[np.float64]:
    """Raw outputs, each text on its own."""
    session = OnnxSession(model)
    rows = encoder.encode([example.text for example in examples])
    logits = [session.run(encoder.collate([row]))["logits"][0] for row in rows]
    return np.array(logits, dtype=np.float64)


def _answers(logits: NDArray[np.float64], task: Task) -> list[tuple[int, ...]]:
    if task.kind == "single_label":
        return [(int(row.argmax()),) for row in logits]
    assert task.thresholds is not None
    return [tuple(np.flatnonzero(expit(row) >= task.thresholds).tolist()) for row in logits]


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_loses_nothing_against_itself(
    judges: dict[str, Judge],
    onnx_models: dict[str, OnnxModel],
    tasks: dict[str, Task],
    encoders: dict[str, TextEncoder],
    examples: dict[str, tuple[Example, ...]],
    name: str,
) -> None:
    data = onnx_models[name].path.read_bytes()
    found = judges[name].judge(data)
    assert found.rows == judges[name].rows == len(examples[name]) == 48
    assert (found.lost, found.flips) == (0, 0)
    assert found.divergence == pytest.approx(0, abs=1e-12)
    answers = _answers(_logits(data, encoders[name], examples[name]), tasks[name])
    wanted = [tuple(sorted(example.labels)) for example in examples[name]]
    right = sum(given == expected for given, expected in zip(answers, wanted, strict=True))
    assert found.correct == right
    assert 0 < right < 48
    assert found.fits(Budget(max_accuracy_drop=0, max_flip_rate=0, max_divergence=1e-9))


@pytest.mark.parametrize("name", NAMES)
def test_losses_flips_and_divergence_are_what_numpy_and_scipy_make_of_the_outputs(
    judges: dict[str, Judge],
    onnx_models: dict[str, OnnxModel],
    worse: dict[str, bytes],
    tasks: dict[str, Task],
    encoders: dict[str, TextEncoder],
    examples: dict[str, tuple[Example, ...]],
    name: str,
) -> None:
    reference, mine = (
        _logits(model, encoders[name], examples[name])
        for model in (onnx_models[name].path.read_bytes(), worse[name])
    )
    answers = [_answers(logits, tasks[name]) for logits in (reference, mine)]
    wanted = [tuple(sorted(example.labels)) for example in examples[name]]
    right = [
        sum(given == expected for given, expected in zip(side, wanted, strict=True))
        for side in answers
    ]
    flips = sum(first != second for first, second in zip(*answers, strict=True))
    if tasks[name].kind == "single_label":
        divergence = rel_entr(softmax(reference, axis=1), softmax(mine, axis=1)).sum(axis=1).mean()
    else:
        p, q = expit(reference), expit(mine)
        divergence = (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean()
    found = judges[name].judge(worse[name])
    assert found.flips == flips > 0
    assert (found.correct, found.lost) == (right[1], right[0] - right[1])
    assert found.divergence == pytest.approx(divergence, rel=1e-3)
    assert divergence > 1e-3


def test_a_model_that_is_better_than_fp32_loses_less_than_nothing(
    onnx_models: dict[str, OnnxModel],
    judges: dict[str, Judge],
    tasks: dict[str, Task],
    encoders: dict[str, TextEncoder],
    examples: dict[str, tuple[Example, ...]],
) -> None:
    """Judged from either side, the loss is the same but for its sign."""
    other = _tampered(onnx_models["single"], {"classifier.bias": 1.0})
    swapped = Judge(other, tasks["single"], encoders["single"], examples["single"])
    forth = judges["single"].judge(other)
    back = swapped.judge(onnx_models["single"].path.read_bytes())
    assert forth.lost == -back.lost != 0
    assert forth.flips == back.flips >= abs(forth.lost)


@pytest.mark.parametrize("thresholds", [(0.5, 0.5, 0.5), (0.9, 0.1, 0.6), (0.0, 1.0, 0.5)])
def test_where_several_labels_may_apply_the_tasks_thresholds_decide(
    onnx_models: dict[str, OnnxModel],
    worse: dict[str, bytes],
    tasks: dict[str, Task],
    encoders: dict[str, TextEncoder],
    examples: dict[str, tuple[Example, ...]],
    thresholds: tuple[float, ...],
) -> None:
    task = msgspec.structs.replace(tasks["multi"], thresholds=thresholds)
    reference = onnx_models["multi"].path.read_bytes()
    found = Judge(reference, task, encoders["multi"], examples["multi"]).judge(worse["multi"])
    answers = [
        _answers(_logits(model, encoders["multi"], examples["multi"]), task)
        for model in (reference, worse["multi"])
    ]
    wanted = [tuple(sorted(example.labels)) for example in examples["multi"]]
    assert found.flips == sum(a != b for a, b in zip(*answers, strict=True))
    assert found.correct == sum(a == b for a, b in zip(answers[1], wanted, strict=True))


def test_other_thresholds_give_other_flips(
    onnx_models: dict[str, OnnxModel],
    worse: dict[str, bytes],
    tasks: dict[str, Task],
    encoders: dict[str, TextEncoder],
    examples: dict[str, tuple[Example, ...]],
) -> None:
    reference = onnx_models["multi"].path.read_bytes()
    flips = set()
    for threshold in (0.0, 0.2, 0.5, 0.8):
        task = msgspec.structs.replace(tasks["multi"], thresholds=(threshold,) * 3)
        judge = Judge(reference, task, encoders["multi"], examples["multi"])
        flips.add(judge.judge(worse["multi"]).flips)
    assert 0 in flips
    assert len(flips) >= 3


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_that_are_no_numbers_have_no_divergence_and_fit_no_budget(
    judges: dict[str, Judge], onnx_models: dict[str, OnnxModel], name: str, number: float
) -> None:
    found = judges[name].judge(_tampered(onnx_models[name], {"classifier.bias": number}))
    assert found.divergence is None
    assert found.distance == float("inf")
    assert not found.fits(Budget(max_accuracy_drop=1, max_flip_rate=1))


def test_one_row_that_is_no_number_is_enough(
    judges: dict[str, Judge],
    onnx_models: dict[str, OnnxModel],
    encoders: dict[str, TextEncoder],
    examples: dict[str, tuple[Example, ...]],
) -> None:
    lengths = [len(r.ids) for r in encoders["single"].encode([e.text for e in examples["single"]])]
    proto = onnx.load(onnx_models["single"].path)
    for weight in proto.graph.initializer:
        if weight.name.endswith("position_embeddings.weight"):
            table = numpy_helper.to_array(weight).copy()
            table[max(lengths) - 1] = np.nan  # so that only the longest texts are affected
            weight.CopyFrom(numpy_helper.from_array(table, weight.name))
    data = proto.SerializeToString()
    affected = np.isnan(_logits(data, encoders["single"], examples["single"])).any(axis=1)
    assert 0 < affected.sum() < len(lengths)
    assert judges["single"].judge(data).divergence is None


def test_a_part_of_a_judge_judges_by_rows_spread_over_all(
    judges: dict[str, Judge],
    onnx_models: dict[str, OnnxModel],
    worse: dict[str, bytes],
    tasks: dict[str, Task],
    encoders: dict[str, TextEncoder],
    examples: dict[str, tuple[Example, ...]],
) -> None:
    whole = judges["single"]
    before = whole.judge(worse["single"])
    for count in (1, 7, 47):
        part = whole.part(count)
        chosen = np.linspace(0, 47, count).astype(int)
        assert part.rows == count == len(set(chosen))
        subset = tuple(examples["single"][index] for index in chosen)
        reference = onnx_models["single"].path.read_bytes()
        alone = Judge(reference, tasks["single"], encoders["single"], subset)
        found, expected = part.judge(worse["single"]), alone.judge(worse["single"])
        assert (found.correct, found.lost, found.flips) == (
            expected.correct,
            expected.lost,
            expected.flips,
        )
        assert found.divergence == pytest.approx(expected.divergence, rel=1e-3)
    assert whole.rows == 48
    assert whole.judge(worse["single"]) == before


@pytest.mark.parametrize("count", [48, 49, 1_000])
def test_a_part_as_large_as_the_whole_judges_as_the_whole_does(
    judges: dict[str, Judge], worse: dict[str, bytes], count: int
) -> None:
    part = judges["multi"].part(count)
    assert part.rows == 48
    assert part.judge(worse["multi"]) == judges["multi"].judge(worse["multi"])


def test_taking_a_part_runs_no_model(
    judges: dict[str, Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(graph_module, "OnnxSession", fail)
    assert judges["single"].part(8).part(3).rows == 3


def test_judging_twice_gives_the_same(judges: dict[str, Judge], worse: dict[str, bytes]) -> None:
    assert judges["pairs"].judge(worse["pairs"]) == judges["pairs"].judge(worse["pairs"])


def _fidelity(
    *, rows: int = 100, lost: int = 0, flips: int = 0, divergence: float | None = 0.0
) -> Fidelity:
    return Fidelity(rows=rows, correct=50, lost=lost, flips=flips, divergence=divergence)


@pytest.mark.parametrize("rows", [1, 7, 100, 200, 872])
def test_a_model_that_spends_its_budget_to_the_last_row_fits(rows: int) -> None:
    for count in range(rows):
        share = count / rows
        flips = Budget(max_accuracy_drop=1, max_flip_rate=share)
        assert _fidelity(rows=rows, flips=count).fits(flips), share
        assert not _fidelity(rows=rows, flips=count + 1).fits(flips), share
        drop = Budget(max_accuracy_drop=share, max_flip_rate=1)
        assert _fidelity(rows=rows, lost=count).fits(drop), share
        assert not _fidelity(rows=rows, lost=count + 1).fits(drop), share


@given(st.floats(1e-9, 10), st.floats(0, 10))
def test_the_largest_divergence_that_fits_is_the_budgets_own(
    limit: float, divergence: float
) -> None:
    budget = Budget(max_divergence=limit)
    assert _fidelity(divergence=limit).fits(budget)
    assert _fidelity(divergence=divergence).fits(budget) == (divergence <= limit)
    assert not _fidelity(divergence=None).fits(budget)


def test_all_limits_of_a_budget_hold_at_once() -> None:
    budget = Budget(max_accuracy_drop=0.02, max_flip_rate=0.05, max_divergence=0.1)
    assert _fidelity(lost=2, flips=5, divergence=0.1).fits(budget)
    assert not _fidelity(lost=3, flips=5, divergence=0.1).fits(budget)
    assert not _fidelity(lost=2, flips=6, divergence=0.1).fits(budget)
    assert not _fidelity(lost=2, flips=5, divergence=0.11).fits(budget)
    assert _fidelity(lost=-30, flips=5, divergence=0.1).fits(budget)


@pytest.mark.parametrize("limit", [0.01, 0.03, 0.2])
@pytest.mark.parametrize("rows", [50, 561, 908])
def test_a_model_at_the_limit_surely_fits_in_one_of_twenty_samples_at_most(
    rows: int, limit: float
) -> None:
    budget = Budget(max_flip_rate=limit)
    sure = [
        flips for flips in range(1, rows) if _fidelity(rows=rows, flips=flips).surely_fits(budget)
    ]
    sure = [0, *sure] if sure else []
    assert sure == list(range(len(sure)))  # the fewer flips, the surer
    samples = np.random.default_rng(4).binomial(rows, limit, size=40_000)
    assert np.isin(samples, sure).mean() <= 0.053
    one_more = [*sure, len(sure)]
    assert np.isin(samples, one_more).mean() > 0.047
    assert len(sure) <= rows * limit


def test_no_flips_are_as_sure_as_few_rows_can_be() -> None:
    for rows in (1, 20, 100):
        assert _fidelity(rows=rows, flips=0).surely_fits(Budget(max_flip_rate=0.03))
        assert not _fidelity(rows=rows, flips=1).surely_fits(Budget(max_flip_rate=0.03))


def test_what_misses_the_budget_surely_does_not_fit() -> None:
    assert not _fidelity(flips=0, lost=1).surely_fits(Budget())
    assert not _fidelity(flips=0, divergence=None).surely_fits(Budget())
    assert _fidelity(flips=100).surely_fits(Budget(max_flip_rate=1))
    assert not _fidelity(flips=1).surely_fits(Budget(max_flip_rate=0))


def test_without_a_limit_any_divergence_fits_that_is_a_number() -> None:
    assert _fidelity(divergence=1e9).fits(Budget())
    assert not _fidelity(divergence=None).fits(Budget())


@pytest.mark.parametrize(
    "given",
    [
        {"max_flip_rate": -0.1},
        {"max_flip_rate": 1.1},
        {"max_accuracy_drop": 2},
        {"max_divergence": 0},
        {"max_loss": 0.1},
    ],
)
def test_a_budget_that_makes_no_sense_cannot_be_read(given: dict[str, float]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(given, Budget)


def test_outputs_so_far_apart_that_probabilities_are_zero_have_a_divergence(
    judges: dict[str, Judge],
    onnx_models: dict[str, OnnxModel],
    encoders: dict[str, TextEncoder],
    examples: dict[str, tuple[Example, ...]],
) -> None:
    model = _tampered(onnx_models["single"], {"classifier.bias": 2_000.0})
    reference, mine = (
        _logits(data, encoders["single"], examples["single"])
        for data in (onnx_models["single"].path.read_bytes(), model)
    )
    logs = [log_softmax(logits, axis=1) for logits in (reference, mine)]
    expected = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).mean()
    found = judges["single"].judge(model)
    assert found.divergence == pytest.approx(expected, rel=1e-3)
    assert expected > 100
