"""Smoothing: outliers get smaller, and nothing that the model computes changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgebert_export.attention import scale_queries
from edgebert_export.calibrate import TensorStatistics, calibrate
from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_model,
    load_tokenizer,
    save_checkpoint,
)
from edgebert_export.graph import (
    constant,
    copy_of,
    find_products,
    open_graph,
    open_session,
    set_constant,
    to_bytes,
)
from edgebert_export.precision import to_half
from edgebert_export.qdq import activation_scale, insert_qdq
from edgebert_export.smooth import smooth
from edgebert_export.to_onnx import ExportConfig, OnnxModel, to_onnx
from edgebert_runtime.encoder import Encoded, TextEncoder
from edgebert_runtime.manifest import Task

MODELS = ["bert", "distilbert"]
BLOWN = 5
"""The channel that is blown up."""


@dataclass(frozen=True)
class _Tiny:
    """A tiny model whose channels differ in size, and of which no two weights are equal."""

    graph: ir.Model
    encoder: TextEncoder
    rows: list[Encoded]

    def statistics(self, graph: ir.Model | None = None) -> dict[str, TensorStatistics]:
        graph = self.graph if graph is None else graph
        operands = [o for p in find_products(graph) if p.kind == "linear" for o in p.operands]
        return calibrate(graph, operands, self.rows, self.encoder)

    def smoothed(self, graph: ir.Model | None = None) -> ir.Model:
        graph = self.graph if graph is None else graph
        return smooth(graph, find_products(graph), self.statistics(graph))

    def logits(self, graph: ir.Model) -> NDArray[np.float32]:
        inputs = self.encoder.collate(self.rows)
        logits: NDArray[np.float32] = open_session(to_bytes(graph)).run(inputs)["logits"]
        return logits


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
    random_distilbert: Callable[..., Any],
) -> dict[str, _Tiny]:
    """A BERT and a DistilBERT; treat them as read-only."""
    import torch

    root = tmp_path_factory.mktemp("smooth")
    source, task = tiny_classifiers["single"], tasks["single"]
    tokenizer = load_tokenizer(source)
    models: dict[str, Any] = {
        "bert": load_model(source, task),
        "distilbert": random_distilbert(initializer_range=0.25),
    }
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            for key, weight in model.named_parameters():
                weight += 0.05 * torch.randn(weight.shape)
                if "norm" in key.lower():
                    weight *= torch.randn(weight.shape).exp()
        checkpoint = save_checkpoint(model, tokenizer, root / name)
        exported = to_onnx(
            checkpoint,
            task,
            ExportConfig(max_length=64, fold_token_types=False),
            root / f"{name}.onnx",
        )
        encoder = checkpoint_encoder(checkpoint, max_length=64, text_pair=False)
        rows = encoder.encode(texts_for["single"][:24])
        found[name] = _Tiny(open_graph(exported.path), encoder, rows)
    return found


def _norm_behind(graph: ir.Model, layer: str) -> ir.Node:
    """The LayerNorm whose result a linear layer reads."""
    (product,) = [product for product in find_products(graph) if product.name.endswith(layer)]
    (node,) = [node for node in graph.graph if node.name == product.node]
    assert node.inputs[0] is not None
    norm = node.inputs[0].producer()
    assert norm is not None
    assert norm.op_type == "LayerNormalization"
    return norm


def _read_by(graph: ir.Model, layer: str) -> str:
    """The activation that a linear layer reads."""
    (product,) = [product for product in find_products(graph) if product.name.endswith(layer)]
    return product.operands[0].value


def _blow_up(graph: ir.Model, layer: str, factor: float) -> ir.Model:
    """Makes one channel of the LayerNorm that ``layer`` reads ``factor`` times as large as most."""
    blown = copy_of(graph)
    _, weight, bias = _norm_behind(blown, layer).inputs
    assert weight is not None
    assert bias is not None
    for name, size in ((str(weight.name), factor), (str(bias.name), 0)):
        array = constant(blown, name).copy()
        array[BLOWN] = size * np.median(np.abs(array))
        set_constant(blown, name, array)
    return blown


def _spread(seen: TensorStatistics) -> float:
    """How much larger the largest channel is than the others."""
    largest = seen.largest_by_channel
    return float(largest.max() / np.median(largest))


@pytest.mark.parametrize("name", MODELS)
def test_smoothing_changes_weights_but_not_what_is_computed(
    tiny: dict[str, _Tiny], name: str
) -> None:
    model = tiny[name]
    smoothed = model.smoothed()
    changed = [
        product.name
        for product in find_products(smoothed)
        if product.kind == "linear"
        and not np.array_equal(
            constant(smoothed, str(product.weight)), constant(model.graph, str(product.weight))
        )
    ]
    assert len(changed) >= 8
    found, expected = model.logits(smoothed), model.logits(model.graph)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_smoothing_keeps_products_under_their_names(tiny: dict[str, _Tiny], name: str) -> None:
    before, after = (
        [(p.name, p.kind, p.node, p.weight) for p in find_products(graph)]
        for graph in (tiny[name].graph, tiny[name].smoothed())
    )
    assert after == before


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_multiplied_by_powers_of_two_along_its_input(
    tiny: dict[str, _Tiny], name: str
) -> None:
    model = tiny[name]
    blown = _blow_up(
        model.graph, "0.attention.self.query" if name == "bert" else "0.attention.q_lin", 64
    )
    smoothed = model.smoothed(blown)
    seen = 0
    for key, value in blown.graph.initializers.items():
        if str(value.dtype) != "FLOAT" or key not in smoothed.graph.initializers:
            continue
        before, after = constant(blown, key), constant(smoothed, key)
        assert np.array_equal(before == 0, after == 0)
        ratios = (after[before != 0] / before[before != 0]).astype(np.float64)
        mantissas, exponents = np.frexp(ratios)
        assert (mantissas == 0.5).all(), key
        assert np.abs(exponents - 1).max(initial=0) <= 8
        seen += bool((ratios != 1).any())
    assert seen > 8


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert", "layer.0.attention.self.query"),
        ("bert", "layer.1.attention.self.key"),
        ("bert", "layer.0.intermediate.dense"),
        ("distilbert", "layer.1.attention.v_lin"),
        ("distilbert", "layer.1.ffn.lin1"),
    ],
)
def test_an_outlying_channel_of_a_norm_is_brought_nearer_to_the_others(
    tiny: dict[str, _Tiny], name: str, layer: str
) -> None:
    model = tiny[name]
    blown = _blow_up(model.graph, layer, 64)
    smoothed = model.smoothed(blown)
    before, after = (model.statistics(g)[_read_by(g, layer)] for g in (blown, smoothed))
    assert before.largest_by_channel.argmax() == BLOWN
    assert _spread(before) > 20
    assert _spread(after) < _spread(before) / 4
    found, expected = model.logits(smoothed), model.logits(blown)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("makes", "reads"),
    [
        ("layer.1.attention.self.value", "layer.1.attention.output.dense"),
        ("layer.0.intermediate.dense", "layer.0.output.dense"),
    ],
    ids=["attention's values", "a GELU"],
)
def test_an_outlying_channel_behind_a_linear_layer_is_brought_nearer_to_the_others(
    tiny: dict[str, _Tiny], makes: str, reads: str
) -> None:
    model = tiny["bert"]
    blown = copy_of(model.graph)
    (product,) = [product for product in find_products(blown) if product.name.endswith(makes)]
    for name in (str(product.weight), f"{product.name}.bias"):
        array = constant(blown, name).copy()
        array[..., BLOWN] *= 64
        set_constant(blown, name, array)
    smoothed = model.smoothed(blown)
    before, after = (model.statistics(g)[_read_by(g, reads)] for g in (blown, smoothed))
    assert before.largest_by_channel.argmax() == BLOWN
    assert _spread(after) < _spread(before) / 4
    found, expected = model.logits(smoothed), model.logits(blown)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_int8_after_smoothing_is_closer_to_fp32_where_a_channel_was_blown_up(
    tiny: dict[str, _Tiny],
) -> None:
    model = tiny["bert"]
    blown = _blow_up(model.graph, "layer.0.attention.self.query", 64)
    # So that the channel matters no more than it did before, as in trained models.
    for part in ("query", "key", "value"):
        (product,) = [
            p for p in find_products(blown) if p.name.endswith(f"layer.0.attention.self.{part}")
        ]
        array = constant(blown, str(product.weight)).copy()
        array[BLOWN] /= 64
        set_constant(blown, str(product.weight), array)
    expected, errors = model.logits(blown), []
    for graph in (blown, model.smoothed(blown)):
        chosen = [p for p in find_products(graph) if ".layer.0.attention.self." in p.name]
        chosen = [product for product in chosen if product.kind == "linear"]
        scales = {
            value: activation_scale(seen.histogram.largest)
            for value, seen in model.statistics(graph).items()
        }
        found = model.logits(insert_qdq(graph, chosen, scales))
        errors.append(np.abs(found - expected).mean())
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("name", MODELS)
def test_smoothing_goes_with_scaled_queries_and_fp16(tiny: dict[str, _Tiny], name: str) -> None:
    model = tiny[name]
    scaled = scale_queries(model.graph, find_products(model.graph))
    found, expected = model.logits(to_half(model.smoothed(scaled))), model.logits(scaled)
    assert np.isfinite(found).all()
    for column in range(expected.shape[1]):
        assert np.corrcoef(found[:, column], expected[:, column])[0, 1] > 0.99


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_that_is_smoothed_does_not_change(tiny: dict[str, _Tiny], name: str) -> None:
    before = to_bytes(tiny[name].graph)
    first = to_bytes(tiny[name].smoothed())
    assert to_bytes(tiny[name].graph) == before
    assert to_bytes(tiny[name].smoothed()) == first != before


@pytest.mark.parametrize("layers", [("query",), ("self.value", "output.dense"), ("classifier",)])
def test_smoothing_for_some_layers_only_changes_nothing_for_the_others(
    tiny: dict[str, _Tiny], layers: tuple[str, ...]
) -> None:
    """As it is when the others are excluded."""
    model = tiny["bert"]
    blown = _blow_up(model.graph, "layer.0.attention.self.query", 64)
    chosen = [product for product in find_products(blown) if product.name.endswith(layers)]
    smoothed = smooth(blown, chosen, model.statistics(blown))
    assert to_bytes(smoothed) != to_bytes(blown)
    found, expected = model.logits(smoothed), model.logits(blown)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_nothing_is_smoothed_of_which_nothing_was_seen(tiny: dict[str, _Tiny]) -> None:
    graph = tiny["bert"].graph
    assert to_bytes(smooth(graph, find_products(graph), {})) == to_bytes(graph)


def test_channels_that_are_always_zero_are_left_alone(tiny: dict[str, _Tiny]) -> None:
    model = tiny["bert"]
    blown = _blow_up(model.graph, "layer.0.attention.self.query", 0)
    smoothed = model.smoothed(blown)
    found, expected = model.logits(smoothed), model.logits(blown)
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    for norm in (
        _norm_behind(graph, "layer.0.attention.self.query") for graph in (blown, smoothed)
    ):
        assert constant(smoothed, str(norm.inputs[1].name))[BLOWN] == 0


def test_a_model_whose_norms_are_all_equal_is_smoothed_too(
    onnx_models: dict[str, OnnxModel], tiny: dict[str, _Tiny]
) -> None:
    """In a fresh model all norms' weights are 1; the exporter stores them once."""
    model = tiny["bert"]
    graph = open_graph(onnx_models["single"].path)
    layer = "layer.0.intermediate.dense"
    (weight,) = [str(p.weight) for p in find_products(graph) if p.name.endswith(layer)]
    small = constant(graph, weight).copy()
    small[BLOWN] /= 64  # so that this channel should be divided by about eight
    set_constant(graph, weight, small)
    smoothed = model.smoothed(graph)
    found, expected = model.logits(smoothed), model.logits(graph)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    before, after = (
        model.statistics(g)[_read_by(g, layer)].largest_by_channel[BLOWN] for g in (graph, smoothed)
    )
    assert np.frexp(before / after)[0] == pytest.approx(0.5)
    assert before > after
