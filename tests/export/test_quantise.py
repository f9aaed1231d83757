"""INT8 for the CPU: what is quantised, how small it gets, and that it still answers alike."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_tokenizer,
    save_checkpoint,
)
from edgebert_export.quantise import QuantiseConfig, quantise_cpu
from edgebert_export.to_onnx import ExportConfig, OnnxModel, to_onnx
from edgebert_runtime.classifier import Classifier
from edgebert_runtime.manifest import Task
from edgebert_runtime.onnx_session import OnnxSession

NAMES = ["single", "multi", "pairs"]


@pytest.fixture(scope="module")
def quantised(
    tmp_path_factory: pytest.TempPathFactory, onnx_models: dict[str, OnnxModel]
) -> dict[str, OnnxModel]:
    """The tiny exports in INT8, with default settings."""
    root = tmp_path_factory.mktemp("int8")
    return {
        name: quantise_cpu(model, QuantiseConfig(), root / f"{name}.onnx")
        for name, model in onnx_models.items()
    }


@pytest.fixture(scope="module")
def bigger(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
) -> OnnxModel:
    """A random BERT in which, as in real small ones, embeddings are a good part of the size."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(2)
    labels = tasks["single"].labels
    config = BertConfig(
        vocab_size=8000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=128,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    root = tmp_path_factory.mktemp("bigger")
    model = BertForSequenceClassification(config).eval()
    checkpoint = save_checkpoint(model, load_tokenizer(tiny_classifiers["single"]), root / "model")
    return to_onnx(checkpoint, tasks["single"], ExportConfig(), root / "fp32.onnx")


def _initializers(proto: onnx.ModelProto) -> dict[str, TensorProto]:
    return {weight.name: weight for weight in proto.graph.initializer}


def _constant_products(proto: onnx.ModelProto) -> list[tuple[int, ...]]:
    """Shapes ``[in, out]`` of the weights of all linear layers in FP32, sorted."""
    weights = _initializers(proto)
    shapes = []
    for node in proto.graph.node:
        if node.op_type in {"MatMul", "Gemm"} and node.input[1] in weights:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            shape = tuple(weights[node.input[1]].dims)
            shapes.append(shape[::-1] if transposed else shape)
    return sorted(shapes)


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_layer_has_int8_weights_with_a_scale_per_output_channel(
    onnx_models: dict[str, OnnxModel], quantised: dict[str, OnnxModel], name: str
) -> None:
    before, after = onnx.load(onnx_models[name].path), onnx.load(quantised[name].path)
    assert quantised[name].precision == "int8"
    assert _constant_products(after) == []
    weights = _initializers(after)
    shapes = []
    for node in after.graph.node:
        if node.op_type != "MatMulInteger":
            continue
        weight = weights[node.input[1]]
        assert weight.data_type == TensorProto.INT8
        scale = weights[weight.name.removesuffix("_quantized") + "_scale"]
        assert list(scale.dims) == [weight.dims[1]]
        zero_point = numpy_helper.to_array(weights[node.input[3]])
        assert not zero_point.any()  # symmetric
        values = np.abs(numpy_helper.to_array(weight).astype(int))
        assert (values.max(axis=0) == 127).all()  # each channel uses its whole range
        shapes.append(tuple(weight.dims))
    # 6 linear layers in each of 2 blocks, the pooler, and the head.
    assert sorted(shapes) == _constant_products(before)
    assert len(shapes) == 14


@pytest.mark.parametrize("name", NAMES)
def test_products_inside_attention_stay_in_fp32(
    onnx_models: dict[str, OnnxModel], quantised: dict[str, OnnxModel], name: str
) -> None:
    def activations_only(model: OnnxModel) -> int:
        proto = onnx.load(model.path)
        constant = _initializers(proto)
        return sum(
            node.op_type == "MatMul" and not set(node.input) & set(constant)
            for node in proto.graph.node
        )

    # Queries with keys, and probabilities with values, in each of 2 blocks.
    assert activations_only(onnx_models[name]) == activations_only(quantised[name]) == 4


@pytest.mark.parametrize("name", NAMES)
def test_embedding_tables_are_int8_unless_told_otherwise(
    onnx_models: dict[str, OnnxModel], quantised: dict[str, OnnxModel], tmp_path: Path, name: str
) -> None:
    def table_type(model: OnnxModel) -> int:
        found = _initializers(onnx.load(model.path))
        (weight,) = [w for n, w in found.items() if "word_embeddings" in n and len(w.dims) == 2]
        return int(weight.data_type)

    kept = quantise_cpu(
        onnx_models[name], QuantiseConfig(embeddings=False), tmp_path / "linear-only.onnx"
    )
    assert table_type(quantised[name]) in (TensorProto.INT8, TensorProto.UINT8)
    assert table_type(kept) == TensorProto.FLOAT


@pytest.mark.parametrize("name", NAMES)
def test_int8_answers_most_texts_as_fp32_does(
    onnx_models: dict[str, OnnxModel],
    quantised: dict[str, OnnxModel],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
    name: str,
) -> None:
    encoder = checkpoint_encoder(
        tiny_classifiers[name], max_length=64, text_pair=tasks[name].text_pair
    )
    texts = texts_for[name][:120]
    logits, labels = [], []
    for model in (onnx_models[name], quantised[name]):
        with Classifier(OnnxSession(model.path.read_bytes()), encoder, tasks[name]) as classifier:
            logits.append(classifier.logits(texts))
            labels.append([p.labels for p in classifier.predict(texts)])
    assert np.isfinite(logits[1]).all()
    for column in range(logits[0].shape[1]):
        assert np.corrcoef(logits[0][:, column], logits[1][:, column])[0, 1] > 0.95
    agree = np.mean([first == second for first, second in zip(*labels, strict=True)])
    assert agree > 0.8
    assert not np.array_equal(*logits)  # else nothing was quantised


def test_int8_takes_less_than_three_tenths_of_the_size(bigger: OnnxModel, tmp_path: Path) -> None:
    before = hashlib.sha256(bigger.path.read_bytes()).hexdigest()
    whole = quantise_cpu(bigger, QuantiseConfig(), tmp_path / "whole.onnx")
    linear = quantise_cpu(bigger, QuantiseConfig(embeddings=False), tmp_path / "linear.onnx")
    sizes = [model.path.stat().st_size for model in (bigger, whole, linear)]
    assert 0.24 < sizes[1] / sizes[0] < 0.30
    assert sizes[1] < sizes[2] < sizes[0]
    # What the embeddings add back is three bytes for each of their 8000 + 128 + 2 rows of 256.
    assert sizes[2] - sizes[1] == pytest.approx(3 * (8000 + 128 + 2) * 256, rel=0.02)
    assert hashlib.sha256(bigger.path.read_bytes()).hexdigest() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear.onnx", "whole.onnx"]


def test_quantising_the_same_model_twice_gives_the_same_bytes(
    onnx_models: dict[str, OnnxModel], quantised: dict[str, OnnxModel], tmp_path: Path
) -> None:
    again = quantise_cpu(onnx_models["single"], QuantiseConfig(), tmp_path / "again.onnx")
    assert again.path.read_bytes() == quantised["single"].path.read_bytes()


def test_the_int8_model_takes_the_same_inputs_and_outputs(
    onnx_models: dict[str, OnnxModel], quantised: dict[str, OnnxModel]
) -> None:
    before, after = (onnx.load(m["single"].path).graph for m in (onnx_models, quantised))
    assert list(after.input) == list(before.input)
    assert list(after.output) == list(before.output)


def test_quantising_leaves_logging_as_it_was(
    onnx_models: dict[str, OnnxModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    level = logging.getLogger().level
    quantise_cpu(onnx_models["single"], QuantiseConfig(), tmp_path / "quiet.onnx")
    assert logging.getLogger().level == level
    assert not caplog.records
