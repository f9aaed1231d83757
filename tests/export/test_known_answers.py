"""Known answers, as the export makes them: whose arithmetic, how far off, and nobody's texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder
from edgebert_export.emulate import open_emulated
from edgebert_export.errors import ExportError
from edgebert_export.graph import find_products, open_graph, write_graph
from edgebert_export.known_answers import draw_batches, expect, open_variant
from edgebert_export.precision import to_half
from edgebert_export.qdq import insert_qdq
from edgebert_export.to_onnx import OnnxModel
from edgebert_runtime.encoder import TextEncoder
from edgebert_runtime.known_answers import Expected, inputs_of
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


@pytest.mark.parametrize("name", NAMES)
def test_rows_have_the_lengths_and_tokens_of_the_texts_and_are_none_of_them(
    encoders: dict[str, TextEncoder], texts_for: dict[str, list[Any]], name: str
) -> None:
    texts = texts_for[name][:40]
    rows = encoders[name].encode(texts)
    batches = draw_batches(texts, encoders[name])
    assert batches == draw_batches(texts, encoders[name])
    *alone, together = batches
    assert [len(batch) for batch in alone] == [1, 1, 1] and len(together) == 6
    lengths = [len(row.input_ids) for row in together]
    assert lengths[0] == min(len(row.ids) for row in rows)
    assert lengths[-1] == max(len(row.ids) for row in rows)
    known = {number for row in rows for number in row.ids}
    assert {number for row in together for number in row.input_ids} <= known
    longest = max(together, key=lambda row: len(row.input_ids))
    assert tuple(longest.input_ids) not in {tuple(row.ids) for row in rows}
    for row in together:
        assert len(row.token_type_ids) == len(row.input_ids)


@pytest.mark.parametrize("texts", [[""], ["a film"], ["", "a great film"]])
def test_few_texts_even_without_a_word_will_do(
    encoders: dict[str, TextEncoder], texts: list[str]
) -> None:
    batches = draw_batches(texts, encoders["single"])
    assert all(row.input_ids for batch in batches for row in batch)


@pytest.fixture(scope="module")
def int8(onnx_models: dict[str, OnnxModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT8 graph for TensorRT."""
    graph = open_graph(onnx_models["single"].path)
    products = [p for p in find_products(graph) if p.kind == "linear" and not p.head]
    scales = {operand.value: 0.05 for product in products for operand in product.operands}
    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    write_graph(to_half(insert_qdq(graph, products, scales)), path)
    return path


def test_what_is_for_a_gpu_is_expected_as_a_gpu_stores_it(
    int8: Path, encoders: dict[str, TextEncoder], texts_for: dict[str, list[Any]]
) -> None:
    batches = draw_batches(texts_for["single"][:20], encoders["single"])
    names = {"input_ids", "attention_mask", "token_type_ids"}
    session = open_variant(int8.read_bytes(), ("tensorrt", "rtx"))
    found = expect(batches, session, names, 0, None)
    emulated = open_emulated(int8.read_bytes())
    for batch, logits in zip(batches, found.logits, strict=True):
        expected = emulated.run(inputs_of(batch, names, 0))["logits"]
        np.testing.assert_array_equal(np.array(logits, dtype=np.float32), expected)
    plain = OnnxSession(int8.read_bytes(), simulated=True)
    inputs = inputs_of(batches[-1], names, 0)
    assert not np.array_equal(plain.run(inputs)["logits"], emulated.run(inputs)["logits"])


class Constant:
    """A session that gives the same outputs for every row, but for one that it adds."""

    def __init__(self, first: float, second: float, step: float) -> None:
        self._row, self._step = np.array([first, second], dtype=np.float32), step

    def run(self, inputs: Any) -> dict[str, Any]:
        rows = len(inputs["input_ids"])
        return {"logits": self._row + self._step * np.arange(rows, dtype=np.float32)[:, None]}

    def close(self) -> None:
        """Has nothing to free."""


def _expected(
    first: float, second: float, step: float, reference: Expected | None, encoder: TextEncoder
) -> Expected:
    batches = draw_batches(["a", "a great film", "a long and winding sentence"], encoder)
    session: Any = Constant(first, second, step)
    return expect(batches, session, {"input_ids"}, 0, reference)


def test_the_tolerance_is_what_the_documents_say(encoders: dict[str, TextEncoder]) -> None:
    encoder = encoders["single"]
    fp32 = _expected(-3.0, 3.0, 0.2, None, encoder)
    assert fp32.tolerance == pytest.approx(0.01 * 4.0)  # the largest is 3 + 5 * 0.2
    near = _expected(-3.1, 3.0, 0.2, fp32, encoder)
    assert near.tolerance == pytest.approx(2 * 0.1, rel=1e-3)


def test_outputs_of_almost_zero_are_not_held_to_less_than_another_processor_changes(
    encoders: dict[str, TextEncoder],
) -> None:
    assert _expected(0.0, 1e-6, 0.0, None, encoders["single"]).tolerance == 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_variant_that_is_not_finite_is_refused_when_the_bundle_is_made(
    encoders: dict[str, TextEncoder], value: float
) -> None:
    with pytest.raises(ExportError, match="not finite numbers"):
        _expected(0.0, value, 0.0, None, encoders["single"])
