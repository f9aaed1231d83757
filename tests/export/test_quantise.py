"""INT8 for the CPU and for TensorRT: what is quantised, what is written, and what is refused."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edgebert_export.calibrate import token_batches
from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_model,
    load_tokenizer,
    save_checkpoint,
)
from edgebert_export.closed_loop import Fit
from edgebert_export.dataset import Dataset, Example
from edgebert_export.emulate import emulate
from edgebert_export.errors import DataError, ModelError
from edgebert_export.fidelity import Budget, Fidelity, Judge
from edgebert_export.graph import (
    Product,
    constant,
    copy_of,
    find_products,
    open_graph,
    open_session,
    set_constant,
    vocabulary_size,
    write_graph,
)
from edgebert_export.quantise import QuantiseConfig, included
from edgebert_export.quantise_cpu import quantise_cpu
from edgebert_export.quantise_gpu import GpuLog, check_texts, quantise_gpu
from edgebert_export.to_onnx import ExportConfig, OnnxModel, to_onnx
from edgebert_runtime.classifier import Classifier
from edgebert_runtime.encoder import Text, TextEncoder
from edgebert_runtime.manifest import Task

FUSED_PRODUCTS = {"DynamicQuantizeMatMul": 3, "MatMulIntegerToFloat": 5}
"""ONNX Runtime's 8-bit products, and which of their inputs is the weights' zero point."""
NAMES = ["single", "multi", "pairs"]
MODELS = [*NAMES, "bert", "distilbert"]
ANYTHING = Budget(max_accuracy_drop=1, max_flip_rate=1)
LENIENT = QuantiseConfig(budget=ANYTHING)
PLAIN = QuantiseConfig(budget=ANYTHING, calibrator="max", smoothing="never")
"""The quickest way to INT8 for TensorRT."""
FIRST_BLOCK = ("*.layer.1.*", "bert.pooler.dense", "classifier")
"""Leaves the layers that do most damage in INT8."""


@dataclass(frozen=True)
class _Case:
    """A model with what it takes to quantise it."""

    model: OnnxModel
    encoder: TextEncoder
    task: Task
    judge: Judge
    calibration: list[Text]
    validation: list[Text]

    def cpu(self, config: QuantiseConfig, out: Path, said: list[str] | None = None) -> Fit:
        lines = [] if said is None else said
        return quantise_cpu(self.model, self.judge, config, out, say=lines.append)

    def gpu(self, config: QuantiseConfig, root: Path, said: list[str] | None = None) -> GpuLog:
        """Writes ``fp16.onnx`` and ``int8.onnx`` to a directory."""
        lines = [] if said is None else said
        return quantise_gpu(
            self.model,
            self.calibration,
            self.validation,
            self.encoder,
            self.judge,
            config,
            fp16=root / "fp16.onnx",
            int8=root / "int8.onnx",
            say=lines.append,
        )


def _case(
    model: OnnxModel, checkpoint: Checkpoint, task: Task, dataset: Dataset, rows: int = 32
) -> _Case:
    encoder = checkpoint_encoder(checkpoint, max_length=64, text_pair=task.text_pair)
    examples: tuple[Example, ...] = dataset.validation[:rows]
    judge = Judge(model.path.read_bytes(), task, encoder, examples)
    calibration = [example.text for example in dataset.train]
    return _Case(model, encoder, task, judge, calibration, [e.text for e in examples])


def _with_heads_of_16(model: Any) -> Any:
    """The same weights in heads of the smallest size that TensorRT fuses in INT8."""
    config = type(model.config).from_dict(
        model.config.to_dict() | {"num_attention_heads": model.config.hidden_size // 16}
    )
    changed = type(model)(config).eval()
    changed.load_state_dict(model.state_dict())
    return changed


@pytest.fixture(scope="module")
def cases(
    tmp_path_factory: pytest.TempPathFactory,
    onnx_models: dict[str, OnnxModel],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    datasets: dict[str, Dataset],
    random_distilbert: Callable[..., Any],
) -> dict[str, _Case]:
    """Tiny models: one for each task, and two of which no weights are equal, as if trained.

    Those for a task have heads of 8 channels; the others have heads of 16, and compute only the
    first token in their last layer.
    """
    found = {
        name: _case(onnx_models[name], tiny_classifiers[name], tasks[name], datasets[name])
        for name in NAMES
    }
    root, task = tmp_path_factory.mktemp("trained"), tasks["single"]
    tokenizer = load_tokenizer(tiny_classifiers["single"])
    models: dict[str, Any] = {
        "bert": _with_heads_of_16(load_model(tiny_classifiers["single"], task)),
        "distilbert": random_distilbert(heads=2),
    }
    for name, model in models.items():
        with torch.no_grad():
            for key, weight in model.named_parameters():
                weight *= 0.5 if weight.ndim == 2 else 1  # as wide as it is, rounding decides
                weight += 0.05 * torch.randn(weight.shape)
                if "norm" in key.lower():
                    weight *= (0.7 * torch.randn(weight.shape)).exp()
        checkpoint = save_checkpoint(model, tokenizer, root / name)
        exported = to_onnx(
            checkpoint,
            task,
            ExportConfig(max_length=64, fold_token_types=False),
            root / f"{name}.onnx",
        )
        found[name] = _case(exported, checkpoint, task, datasets["single"])
    return found


@pytest.fixture(scope="module")
def quantised(
    tmp_path_factory: pytest.TempPathFactory, cases: dict[str, _Case]
) -> dict[str, OnnxModel]:
    """The tiny exports in INT8 for a CPU, with default settings."""
    root = tmp_path_factory.mktemp("int8")
    found = {}
    for name in NAMES:
        assert cases[name].cpu(LENIENT, root / f"{name}.onnx").fits
        found[name] = OnnxModel(path=root / f"{name}.onnx", precision="int8")
    return found


@pytest.fixture(scope="module")
def bigger(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    datasets: dict[str, Dataset],
) -> _Case:
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
    exported = to_onnx(
        checkpoint, tasks["single"], ExportConfig(fold_token_types=False), root / "fp32.onnx"
    )
    return _case(exported, checkpoint, tasks["single"], datasets["single"], rows=2)


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


def _int8_products(path: Path) -> int:
    return sum(_count(path, name) for name in FUSED_PRODUCTS)


def _count(path: Path, operator: str) -> int:
    return sum(node.op_type == operator for node in onnx.load(path).graph.node)


def _int8_weights(path: Path) -> int:
    """How many matrices are stored in INT8."""
    weights = onnx.load(path).graph.initializer
    return sum(w.data_type == TensorProto.INT8 and len(w.dims) == 2 for w in weights)


def _logits(path: Path, case: _Case, texts: list[Text]) -> NDArray[np.float32]:
    with Classifier(open_session(path.read_bytes()), case.encoder, case.task) as classifier:
        return classifier.logits(texts)


def _judged(path: Path, case: _Case) -> Fidelity:
    """What a file for TensorRT is worth, with real FP16 stores."""
    return case.judge.judge(emulate(ir.load(path)))


def _between(first: float | None, second: float | None) -> float:
    """A number that is clearly more than one and clearly less than the other."""
    assert first is not None
    assert second is not None
    assert 1.5 * first < second
    return float(np.sqrt(first * second))


# ── For a CPU ──


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_layer_has_int8_weights_with_a_scale_per_output_channel(
    onnx_models: dict[str, OnnxModel], quantised: dict[str, OnnxModel], name: str
) -> None:
    before, after = onnx.load(onnx_models[name].path), onnx.load(quantised[name].path)
    assert _constant_products(after) == []
    weights = _initializers(after)
    shapes = []
    for node in after.graph.node:
        if node.op_type not in FUSED_PRODUCTS:
            continue
        weight = weights[node.input[1]]
        assert weight.data_type == TensorProto.INT8
        scale = weights[weight.name.removesuffix("_quantized") + "_scale"]
        assert list(scale.dims) == [weight.dims[1]]
        zero_point = numpy_helper.to_array(weights[node.input[FUSED_PRODUCTS[node.op_type]]])
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
            node.op_type in {"MatMul", "FusedMatMul"} and not set(node.input) & set(constant)
            for node in proto.graph.node
        )

    # Queries with keys, and probabilities with values, in each of 2 blocks.
    assert activations_only(onnx_models[name]) == activations_only(quantised[name]) == 4


@pytest.mark.parametrize("name", NAMES)
def test_embedding_tables_are_int8_unless_told_otherwise(
    cases: dict[str, _Case], quantised: dict[str, OnnxModel], tmp_path: Path, name: str
) -> None:
    def table_type(path: Path) -> int:
        found = _initializers(onnx.load(path))
        (weight,) = [w for n, w in found.items() if "word_embeddings" in n and len(w.dims) == 2]
        return int(weight.data_type)

    linear_only = QuantiseConfig(embeddings=False, budget=ANYTHING)
    kept = cases[name].cpu(linear_only, tmp_path / "linear-only.onnx")
    assert table_type(quantised[name].path) in (TensorProto.INT8, TensorProto.UINT8)
    assert table_type(tmp_path / "linear-only.onnx") == TensorProto.FLOAT
    assert kept.layers == len(kept.quantised) == 14


@pytest.mark.parametrize("name", NAMES)
def test_int8_answers_most_texts_as_fp32_does(
    cases: dict[str, _Case],
    quantised: dict[str, OnnxModel],
    texts_for: dict[str, list[Any]],
    name: str,
) -> None:
    case, texts = cases[name], texts_for[name][:120]
    logits, labels = [], []
    for model in (case.model, quantised[name]):
        session = open_session(model.path.read_bytes())
        with Classifier(session, case.encoder, case.task) as classifier:
            logits.append(classifier.logits(texts))
            labels.append([p.labels for p in classifier.predict(texts)])
    assert np.isfinite(logits[1]).all()
    for column in range(logits[0].shape[1]):
        assert np.corrcoef(logits[0][:, column], logits[1][:, column])[0, 1] > 0.95
    agree = np.mean([first == second for first, second in zip(*labels, strict=True)])
    assert agree > 0.8
    assert not np.array_equal(*logits)  # else nothing was quantised


def test_int8_takes_less_than_three_tenths_of_the_size(bigger: _Case, tmp_path: Path) -> None:
    source = bigger.model.path
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    whole, linear = tmp_path / "whole.onnx", tmp_path / "linear.onnx"
    bigger.cpu(LENIENT, whole)
    bigger.cpu(QuantiseConfig(embeddings=False, budget=ANYTHING), linear)
    sizes = [path.stat().st_size for path in (source, whole, linear)]
    assert 0.24 < sizes[1] / sizes[0] < 0.30
    assert sizes[1] < sizes[2] < sizes[0]
    # What the embeddings add back is three bytes for each of their 8000 + 128 + 2 rows of 256.
    assert sizes[2] - sizes[1] == pytest.approx(3 * (8000 + 128 + 2) * 256, rel=0.02)
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear.onnx", "whole.onnx"]


def test_quantising_the_same_model_twice_gives_the_same_bytes(
    cases: dict[str, _Case], quantised: dict[str, OnnxModel], tmp_path: Path
) -> None:
    cases["single"].cpu(LENIENT, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == quantised["single"].path.read_bytes()


def test_the_int8_model_takes_the_same_inputs_and_outputs(
    onnx_models: dict[str, OnnxModel], quantised: dict[str, OnnxModel]
) -> None:
    before, after = (onnx.load(m["single"].path).graph for m in (onnx_models, quantised))
    assert list(after.input) == list(before.input)
    assert list(after.output) == list(before.output)


def test_quantising_leaves_logging_as_it_was(
    cases: dict[str, _Case], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    level = logging.getLogger().level
    cases["single"].cpu(LENIENT, tmp_path / "quiet.onnx")
    assert logging.getLogger().level == level
    assert not caplog.records


def test_what_is_written_for_a_cpu_is_what_was_judged(
    cases: dict[str, _Case], quantised: dict[str, OnnxModel], tmp_path: Path
) -> None:
    case = cases["single"]
    found = case.cpu(LENIENT, tmp_path / "int8.onnx")
    assert found.fits
    assert found.layers == len(found.quantised) == 17
    assert (found.given_back, found.sensitivity) == ((), ())
    assert found.last == case.judge.judge((tmp_path / "int8.onnx").read_bytes())
    assert found.last.rows == 32


def test_layers_that_are_excluded_stay_in_fp32_on_a_cpu(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    exclude = ("bert.encoder.layer.0.*", "classifier", "*position_embeddings")
    config = QuantiseConfig(exclude=exclude, budget=ANYTHING)
    found = cases["single"].cpu(config, tmp_path / "int8.onnx")
    assert len(found.quantised) == 17 - 6 - 1 - 1
    assert not [name for name in found.quantised if "layer.0" in name]
    assert "classifier" not in found.quantised
    assert len(_constant_products(onnx.load(tmp_path / "int8.onnx"))) == 7
    assert _int8_products(tmp_path / "int8.onnx") == 7
    tables = _initializers(onnx.load(tmp_path / "int8.onnx"))
    assert tables["bert.embeddings.position_embeddings.weight"].data_type == TensorProto.FLOAT


def test_layers_go_back_to_fp32_until_the_budget_fits_on_a_cpu(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    case, said = cases["single"], list[str]()
    config = msgspec.structs.replace(LENIENT, embeddings=False, sensitivity="always")
    free = case.cpu(config, tmp_path / "free.onnx")
    assert [damage.layer for damage in free.sensitivity] != list(free.quantised)
    least = free.sensitivity[-1].divergence
    limit = _between(least, free.first.divergence)
    budget = Budget(max_accuracy_drop=1, max_flip_rate=1, max_divergence=limit)
    tight = msgspec.structs.replace(config, budget=budget)
    found = case.cpu(tight, tmp_path / "tight.onnx", said)
    back = [step.layer for step in found.given_back]
    assert found.fits
    assert back == [damage.layer for damage in free.sensitivity][: len(back)]
    assert 1 <= len(back) == 14 - len(found.quantised)
    assert found.last.divergence is not None
    assert found.last.divergence <= limit
    assert _int8_products(tmp_path / "tight.onnx") == len(found.quantised)
    assert found.last == case.judge.judge((tmp_path / "tight.onnx").read_bytes())
    assert [line for line in said if f"{back[0]} given back" in line]


def test_there_is_no_int8_model_for_a_cpu_if_no_layer_fits_the_budget(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    said: list[str] = []
    budget = Budget(max_accuracy_drop=0, max_flip_rate=0, max_divergence=1e-12)
    config = QuantiseConfig(budget=budget, exclude=FIRST_BLOCK, embeddings=False)
    found = cases["single"].cpu(config, tmp_path / "int8.onnx", said)
    assert not found.fits
    assert found.quantised == ()
    assert list(tmp_path.iterdir()) == []
    assert said[-1] == "int8-cpu: none of the sets of layers that were tried fits the budget"


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_a_model_that_is_quantised_already_is_refused(
    cases: dict[str, _Case], quantised: dict[str, OnnxModel], tmp_path: Path, where: str
) -> None:
    case = cases["single"]
    again = replace(case, model=quantised["single"])
    with pytest.raises(ModelError, match="quantised already"):
        again.cpu(LENIENT, tmp_path / "no.onnx") if where == "cpu" else again.gpu(PLAIN, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ── What both have in common ──


def test_patterns_leave_out_the_layers_that_they_match(cases: dict[str, _Case]) -> None:
    products = find_products(open_graph(cases["single"].model.path))
    names = [product.name for product in included(products, ("linear", "head"), ())]
    assert len(names) == 14
    inside = [product.name for product in included(products, ("linear",), ())]
    assert inside == [name for name in names if name not in ("bert.pooler.dense", "classifier")]
    kinds = ("linear", "head", "embedding")
    left = included(products, kinds, ("*.layer.0.*", "classifier", "*word*"))
    assert [product.name for product in left] == [
        "bert.embeddings.token_type_embeddings",
        "bert.embeddings.position_embeddings",
        *[name for name in names if ".layer.0." not in name and name != "classifier"],
    ]


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("pattern", ["nothing.like.it", "layer.0", "*.layer.7.*", ""])
def test_a_pattern_that_matches_nothing_is_refused_with_an_example(
    cases: dict[str, _Case], tmp_path: Path, pattern: str, where: str
) -> None:
    config = msgspec.structs.replace(PLAIN, exclude=("classifier", pattern))
    with pytest.raises(ModelError) as caught:
        if where == "cpu":
            cases["single"].cpu(config, tmp_path / "int8.onnx")
        else:
            cases["single"].gpu(config, tmp_path)
    assert f"has no layer {pattern!r}; did you mean '" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_excluding_every_layer_is_refused(
    cases: dict[str, _Case], tmp_path: Path, where: str
) -> None:
    config = msgspec.structs.replace(PLAIN, exclude=("*",))
    with pytest.raises(ModelError, match="leave no layer to quantise"):
        if where == "cpu":
            cases["single"].cpu(config, tmp_path / "int8.onnx")
        else:
            cases["single"].gpu(config, tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {"calibrator": "best"},
        {"percentile": 50},
        {"percentile": 100.1},
        {"include": []},
        {"include": ["softmax"]},
        {"calibration_texts": 0},
        {"smoothing": True},
        {"rounding": "down"},
        {"input_type": "int16"},
        {"budget": {"max_flip_rate": 2}},
        {"scale": 1},
    ],
)
def test_a_configuration_that_makes_no_sense_cannot_be_read(given: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(given, QuantiseConfig)


def test_what_is_measured_for_the_report_alone_can_be_left_out() -> None:
    config = QuantiseConfig(sensitivity="always", calibrator="mse", budget=ANYTHING)
    assert config.without_extras() == QuantiseConfig(calibrator="mse", budget=ANYTHING)


# ── For TensorRT ──


@pytest.mark.parametrize("name", MODELS)
def test_both_models_for_tensorrt_are_valid_and_are_what_was_judged(
    cases: dict[str, _Case], tmp_path: Path, name: str
) -> None:
    case = cases[name]
    before = case.model.path.read_bytes()
    log = case.gpu(QuantiseConfig(budget=ANYTHING, calibrator="percentile"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp16.onnx", "int8.onnx"]
    for path in tmp_path.iterdir():
        onnx.checker.check_model(str(path), full_check=True)
        initializers = onnx.load(path).graph.initializer
        assert TensorProto.FLOAT not in {weight.data_type for weight in initializers}
    assert case.model.path.read_bytes() == before
    assert log.refusal is None
    assert log.fp16 == _judged(tmp_path / "fp16.onnx", case)
    assert log.fit is not None
    assert log.fit.fits
    assert log.fit.last == _judged(tmp_path / "int8.onnx", case)
    # 4 in each of 2 blocks; the last one's queries are apart if they are of the first token only.
    layers = 9 if name in ("bert", "distilbert") else 8
    assert (log.linear_layers, log.linear_int8, log.fit.layers) == (layers, layers, layers)
    assert (log.head_layers, log.unfused) == (2, {})
    weights = [_int8_weights(tmp_path / file) for file in ("fp16.onnx", "int8.onnx")]
    assert weights == [0, layers]
    assert _count(tmp_path / "int8.onnx", "QuantizeLinear") == len(log.scales) == layers
    assert log.texts.texts == 48
    assert log.fp16.divergence is not None
    assert log.fit.last.divergence is not None
    assert log.fp16.divergence < log.fit.last.divergence


@pytest.mark.parametrize("name", MODELS)
def test_models_for_tensorrt_answer_nearly_as_fp32_does(
    cases: dict[str, _Case], tmp_path: Path, name: str
) -> None:
    case = cases[name]
    case.gpu(PLAIN, tmp_path)
    texts = case.calibration[:40]
    expected = _logits(case.model.path, case, texts)
    for file, least in (("fp16.onnx", 0.99), ("int8.onnx", 0.9)):
        found = _logits(tmp_path / file, case, texts)
        assert found.dtype == np.float32
        assert not np.array_equal(found, expected)
        for column in range(expected.shape[1]):
            assert np.corrcoef(found[:, column], expected[:, column])[0, 1] > least


@pytest.mark.parametrize("name", ["single", "distilbert"])
def test_making_models_for_tensorrt_twice_gives_the_same_bytes_and_the_same_log(
    cases: dict[str, _Case], tmp_path: Path, name: str
) -> None:
    found = []
    for directory in (tmp_path / "first", tmp_path / "second"):
        directory.mkdir()
        said: list[str] = []
        config = QuantiseConfig(budget=ANYTHING, calibrator="entropy")
        log = cases[name].gpu(config, directory, said)
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        found.append((log, files, said))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("calibrator", "smoothing", "expected"),
    [
        (
            "auto",
            "auto",
            [(c, s) for s in (False, True) for c in ("max", "percentile", "mse", "entropy")],
        ),
        ("auto", "never", [(c, False) for c in ("max", "percentile", "mse", "entropy")]),
        ("entropy", "auto", [("entropy", False), ("entropy", True)]),
        ("mse", "always", [("mse", True)]),
        ("percentile", "never", [("percentile", False)]),
    ],
)
def test_every_way_to_choose_scales_that_is_allowed_is_tried_and_the_closest_taken(
    cases: dict[str, _Case],
    tmp_path: Path,
    calibrator: Any,
    smoothing: Any,
    expected: list[tuple[str, bool]],
) -> None:
    said: list[str] = []
    config = QuantiseConfig(
        budget=ANYTHING, calibrator=calibrator, smoothing=smoothing, rounding="nearest"
    )
    log = cases["bert"].gpu(config, tmp_path, said)
    assert [(trial.calibrator, trial.smoothed) for trial in log.trials] == expected
    distances = [trial.fidelity.distance for trial in log.trials]
    assert log.chosen == int(np.argmin(distances))
    assert len(set(distances)) == len(distances)  # or else they were all the same
    assert log.fit is not None
    assert log.fit.first == log.trials[log.chosen].fidelity  # fewer rows than a trial takes
    winner, smoothed = expected[log.chosen]
    (line,) = [line for line in said if "ways to choose scales" in line]
    assert f"of {len(expected)} ways" in line
    assert f"{winner}{' after smoothing' if smoothed else ''} comes closest" in line


def test_a_way_that_is_tried_among_others_is_worth_what_it_is_worth_alone(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    config = QuantiseConfig(budget=ANYTHING, calibrator="mse", smoothing="auto")
    both = cases["bert"].gpu(config, tmp_path).trials
    alone = [
        cases["bert"].gpu(msgspec.structs.replace(config, smoothing=smoothing), tmp_path).trials
        for smoothing in ("never", "always")
    ]
    assert both == (*alone[0], *alone[1])


def test_weights_are_rounded_together_unless_told_otherwise(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    """Steps differ; scales, nodes and all else are the same."""
    files, logs = {}, {}
    for rounding, config in {
        "gptq": PLAIN,
        "nearest": msgspec.structs.replace(PLAIN, rounding="nearest"),
    }.items():
        logs[rounding] = cases["bert"].gpu(config, tmp_path)
        assert logs[rounding].rounding == rounding
        files[rounding] = onnx.load(tmp_path / "int8.onnx").graph
    assert logs["gptq"].scales == logs["nearest"].scales
    assert logs["gptq"].trials == logs["nearest"].trials  # they choose scales, by nearest steps
    assert files["gptq"].node == files["nearest"].node
    changed = 0
    for mine, other in zip(files["gptq"].initializer, files["nearest"].initializer, strict=True):
        first, second = numpy_helper.to_array(mine), numpy_helper.to_array(other)
        if mine.data_type == TensorProto.INT8 and first.ndim == 2:
            changed += not np.array_equal(first, second)
        else:
            np.testing.assert_array_equal(first, second)
    assert changed == 9


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_smoothing_changes_scales_and_weights_in_the_file(
    cases: dict[str, _Case], tmp_path: Path, name: str
) -> None:
    logs, files = [], []
    for smoothing in ("never", "always"):
        config = msgspec.structs.replace(PLAIN, smoothing=smoothing)
        logs.append(cases[name].gpu(config, tmp_path))
        files.append(onnx.load(tmp_path / "int8.onnx"))
    assert [log.trials[0].smoothed for log in logs] == [False, True]
    assert len(logs[0].scales) == len(logs[1].scales) == 9
    assert [s.scale for s in logs[0].scales] != [s.scale for s in logs[1].scales]
    stored = [
        [
            numpy_helper.to_array(w)
            for w in file.graph.initializer
            if w.data_type == TensorProto.INT8
        ]
        for file in files
    ]
    changed = sum(not np.array_equal(a, b) for a, b in zip(*stored, strict=True))
    assert changed >= 8


@pytest.mark.parametrize(
    ("include", "quantisers", "matrices", "linear"),
    [
        (("linear",), 9, 9, 9),
        (("linear", "head"), 11, 11, 11),
        (("head",), 2, 2, 2),
        (("linear", "attention"), 13, 9, 9),
        (("linear", "embedding"), 9, 12, 9),
        (("linear", "head", "attention", "embedding"), 15, 14, 11),
        (("attention",), 5, 1, 1),
        (("embedding",), 0, 3, 0),
    ],
)
def test_what_is_included_is_quantised_and_nothing_else(
    cases: dict[str, _Case],
    tmp_path: Path,
    include: tuple[Any, ...],
    quantisers: int,
    matrices: int,
    linear: int,
) -> None:
    config = msgspec.structs.replace(PLAIN, include=include)
    log = cases["bert"].gpu(config, tmp_path)
    assert _count(tmp_path / "int8.onnx", "QuantizeLinear") == len(log.scales) == quantisers
    assert _int8_weights(tmp_path / "int8.onnx") == matrices
    assert log.linear_int8 == linear
    assert (log.linear_layers, log.head_layers) == ((11, 0) if "head" in include else (9, 2))
    assert log.fit is not None
    assert log.fit.last == _judged(tmp_path / "int8.onnx", cases["bert"])


def _in_int8(path: Path) -> set[str]:
    """Names of the products that read dequantised numbers alone."""
    nodes = onnx.load(path).graph.node
    dequantised = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    return {n.name for n in nodes if n.op_type == "MatMul" and set(n.input) <= dequantised}


def test_attention_is_in_int8_where_tensorrt_fuses_it_and_whole_or_not_at_all(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    said: list[str] = []
    config = msgspec.structs.replace(PLAIN, include=("attention",))
    log = cases["bert"].gpu(config, tmp_path, said)
    first, last = (f"bert.encoder.layer.{layer}.attention.self" for layer in (0, 1))
    assert log.fit is not None
    assert (log.fit.layers, log.fit.quantised) == (1, (first,))
    assert _in_int8(tmp_path / "int8.onnx") == {
        "/bert/encoder/layer.0/attention/self/MatMul",
        "/bert/encoder/layer.0/attention/self/MatMul_1",
        "/bert/encoder/layer.0/attention/output/dense/MatMul",
    }
    reason = "its queries are of other tokens than its keys"
    assert log.unfused == {last: reason}
    assert f"int8-gpu: {last} stays in FP16: {reason}" in said


def test_attention_of_which_a_part_is_excluded_stays_in_fp16(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    config = msgspec.structs.replace(
        PLAIN, include=("linear", "attention"), exclude=("*.layer.0.attention.output.dense",)
    )
    log = cases["bert"].gpu(config, tmp_path)
    first = "bert.encoder.layer.0.attention.self"
    assert log.unfused[first] == "a part of it is excluded (quantise.exclude)"
    assert not [name for name in _in_int8(tmp_path / "int8.onnx") if name.endswith("self/MatMul")]
    assert log.linear_int8 == 8


def test_heads_of_a_size_that_tensorrt_does_not_fuse_stay_in_fp16(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    config = msgspec.structs.replace(PLAIN, include=("linear", "attention"))
    log = cases["single"].gpu(config, tmp_path)
    reason = "its heads are of 8 channels, and only 16, 32, 64 are fused"
    names = [f"bert.encoder.layer.{layer}.attention.self" for layer in (0, 1)]
    assert log.unfused == dict.fromkeys(names, reason)
    assert len(_in_int8(tmp_path / "int8.onnx")) == log.linear_int8 == 8
    with pytest.raises(ModelError, match=f"nothing is left to quantise: {reason}"):
        cases["single"].gpu(msgspec.structs.replace(PLAIN, include=("attention",)), tmp_path)


@pytest.mark.parametrize("smoothing", ["never", "always"])
def test_everything_of_a_distilbert_can_be_included(
    cases: dict[str, _Case], tmp_path: Path, smoothing: Any
) -> None:
    """Its queries are divided before their product with the keys; that division goes away."""
    config = msgspec.structs.replace(
        PLAIN, include=("linear", "head", "attention", "embedding"), smoothing=smoothing
    )
    log = cases["distilbert"].gpu(config, tmp_path)
    onnx.checker.check_model(str(tmp_path / "int8.onnx"), full_check=True)
    assert _count(tmp_path / "int8.onnx", "QuantizeLinear") == len(log.scales) == 15
    assert _count(tmp_path / "int8.onnx", "Div") == 0
    assert _int8_weights(tmp_path / "int8.onnx") == 13
    assert log.fit is not None
    # The first attention's output layer goes with its products; the last one is of other tokens.
    assert log.fit.layers == 11 - 1 + 1 + 2
    assert list(log.unfused) == ["distilbert.transformer.layer.1.attention"]


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_tensorrts_parser_takes_both_models_with_everything_included_and_smoothed(
    cases: dict[str, _Case], tmp_path: Path, name: str
) -> None:
    tensorrt_rtx = pytest.importorskip(
        "tensorrt_rtx",
        reason="tensorrt-rtx is not installed: the parser's acceptance is not checked",
    )
    config = msgspec.structs.replace(
        PLAIN,
        include=("linear", "head", "attention", "embedding"),
        smoothing="always",
        input_type="int32",
    )
    cases[name].gpu(config, tmp_path)
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    for file in ("fp16.onnx", "int8.onnx"):
        network = tensorrt_rtx.Builder(logger).create_network(0)
        parser = tensorrt_rtx.OnnxParser(network, logger)
        accepted = parser.parse_from_file(str(tmp_path / file))
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        assert (accepted, errors) == (True, [])


def test_layers_that_are_excluded_stay_in_fp16(cases: dict[str, _Case], tmp_path: Path) -> None:
    config = msgspec.structs.replace(
        PLAIN, include=("linear", "head"), exclude=("*.layer.0.*", "classifier")
    )
    log = cases["bert"].gpu(config, tmp_path)
    assert log.fit is not None
    assert log.fit.layers == log.linear_int8 == _int8_weights(tmp_path / "int8.onnx") == 6
    assert log.linear_layers == 11
    assert not [name for name in log.fit.quantised if ".layer.0." in name or name == "classifier"]
    read = _initializers(onnx.load(tmp_path / "int8.onnx"))
    nodes = onnx.load(tmp_path / "int8.onnx").graph.node
    (head,) = [node for node in nodes if node.name == "/classifier/Gemm"]
    assert read[head.input[1]].data_type == TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("pattern", "on_a_cpu"),
    [("*.query", {"query"}), ("*.query+key+value", {"query", "key", "value"})],
)
def test_merged_layers_are_excluded_by_their_name_and_by_that_of_any_of_them(
    cases: dict[str, _Case], tmp_path: Path, pattern: str, on_a_cpu: set[str]
) -> None:
    """A recipe is written for both; what is one layer on a GPU is three on a CPU."""
    config = msgspec.structs.replace(PLAIN, exclude=(pattern,), embeddings=False)
    everything = [p.name for p in find_products(open_graph(cases["single"].model.path))]
    log = cases["single"].gpu(config, tmp_path)
    assert log.fit is not None
    assert len(log.fit.quantised) == log.linear_int8 == 8 - 2
    assert not [name for name in log.fit.quantised if ".self." in name]
    fit = cases["single"].cpu(config, tmp_path / "cpu.onnx")
    left_out = {name for name in everything if name.rpartition(".")[2] in on_a_cpu}
    assert len(left_out) == 2 * len(on_a_cpu)
    assert len(fit.quantised) == 14 - len(left_out)
    assert not left_out & set(fit.quantised)


def _activations(case: _Case, graph: ir.Model, name: str) -> NDArray[np.float32]:
    """What an activation holds on the calibration texts, padding included: ``[tokens, width]``."""
    watched = copy_of(graph)
    values = {value.name: value for node in watched.graph for value in node.outputs}
    watched.graph.outputs.append(values[name])
    rows, found = case.encoder.encode(case.calibration), []
    session = open_session(watched)
    for batch in token_batches(rows):
        result = session.run(case.encoder.collate([rows[index] for index in batch]))[name]
        found.append(result.reshape(-1, result.shape[-1]))
    session.close()
    return np.concatenate(found)


def test_the_largest_sum_of_each_int8_product_is_measured(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    case = cases["bert"]
    config = msgspec.structs.replace(PLAIN, include=("linear", "attention"))
    log = case.gpu(config, tmp_path)
    assert log.out_of_range == ()
    names = [found.layer for found in log.ranges]
    assert len(names) == len(set(names)) == len(_in_int8(tmp_path / "int8.onnx")) == 9 + 2
    for found in log.ranges:
        assert found.share == pytest.approx(found.largest / 65_504)
        assert 0 < found.share <= 0.5
    # The first product's activation is before all that is quantised, the same as in FP32.
    first = log.ranges[0]
    assert first.layer == "bert.encoder.layer.0.attention.self.query+key+value"
    scale = next(scale for scale in log.scales if "embeddings" in scale.activation)
    activations = _activations(case, open_graph(case.model.path), scale.activation)
    stored = _initializers(onnx.load(tmp_path / "int8.onnx"))
    (name,) = [n for n in stored if "layer.0" in n and n.endswith("query+key+value.weight_int8")]
    weight = numpy_helper.to_array(stored[name]).astype(np.int64)
    unit = numpy_helper.to_array(stored[name.removesuffix("int8") + "scale"]).item()
    steps = np.clip(np.rint(activations / np.float32(scale.scale)), -128, 127).astype(np.int64)
    largest = np.abs(steps @ weight).max() * scale.scale * unit
    assert first.largest == pytest.approx(largest, rel=1e-5)


def _with_a_wide_sum(
    case: _Case, dataset: Dataset, path: Path
) -> tuple[_Case, Product, NDArray[np.float32]]:
    """Returns a model of which one layer's sum leaves FP16 in INT8, the layer, and its results.

    One output of huge weights makes the scale inside large; one of small weights, which all add
    up, is then small only behind the product. Nothing in the model itself comes near the end.
    """
    graph = open_graph(case.model.path)
    wide = "bert.encoder.layer.0.intermediate.dense"
    products = {product.name: product for product in find_products(graph)}
    activations = _activations(case, graph, products[wide].operands[0].value)
    weight = constant(graph, str(products[wide].weight)).copy()
    weight[:, :2] = 0
    weight[np.abs(activations).max(axis=0).argmin(), 0] = 4_000
    weight[:, 1] = 0.2 * np.sign(activations[0])
    behind = constant(graph, str(products["bert.encoder.layer.0.output.dense"].weight)).copy()
    behind[:2] = 0  # the model's answers do not depend on either
    set_constant(graph, str(products[wide].weight), weight)
    set_constant(graph, str(products["bert.encoder.layer.0.output.dense"].weight), behind)
    write_graph(graph, path)
    judge = Judge(path.read_bytes(), case.task, case.encoder, dataset.validation[:32])
    changed = replace(case, model=OnnxModel(path, "fp32"), judge=judge)
    return changed, products[wide], activations @ weight


def test_a_product_whose_sum_could_leave_fp16_stays_in_fp16(
    cases: dict[str, _Case], datasets: dict[str, Dataset], tmp_path: Path
) -> None:
    said: list[str] = []
    (tmp_path / "out").mkdir()
    changed, product, results = _with_a_wide_sum(
        cases["bert"], datasets["single"], tmp_path / "wide.onnx"
    )
    wide = product.name
    assert np.abs(results).max() < 65_504 / 2
    log = changed.gpu(PLAIN, tmp_path / "out", said)
    assert log.refusal is None
    (found,) = log.out_of_range
    assert found.layer == wide
    assert found.share == pytest.approx(found.largest / 65_504)
    assert found.share > 0.5
    assert f"int8-gpu: {wide} stays in FP16: its sum reaches {found.largest:.3g}" in said
    assert log.fit is not None
    assert (log.linear_layers, log.linear_int8, len(log.fit.quantised)) == (9, 8, 8)
    assert wide not in {*log.fit.quantised, *(kept.layer for kept in log.ranges)}
    assert product.node not in _in_int8(tmp_path / "out" / "int8.onnx")
    assert len(_in_int8(tmp_path / "out" / "int8.onnx")) == 8
    assert log.fit.last == _judged(tmp_path / "out" / "int8.onnx", changed)
    assert log.fit.last.divergence is not None


def test_there_is_no_int8_model_if_every_products_sum_could_leave_fp16(
    cases: dict[str, _Case], datasets: dict[str, Dataset], tmp_path: Path
) -> None:
    said: list[str] = []
    (tmp_path / "out").mkdir()
    changed, product, _ = _with_a_wide_sum(
        cases["bert"], datasets["single"], tmp_path / "wide.onnx"
    )
    linear = [p for p in find_products(open_graph(changed.model.path)) if p.kind == "linear"]
    others = tuple(other.name for other in linear if other != product)
    config = msgspec.structs.replace(PLAIN, exclude=others)
    log = changed.gpu(config, tmp_path / "out", said)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fp16.onnx"]
    assert log.refusal == "every product's sum could leave FP16"
    assert said[-1] == f"int8-gpu: {log.refusal}: FP16 it is"
    assert [found.layer for found in log.out_of_range] == [product.name]
    assert (log.linear_int8, log.fit, log.ranges, log.scales) == (0, None, (), ())


def test_where_queries_are_apart_patterns_find_them_and_the_rest_alike(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    """In a last layer that computes the first token alone."""
    prefix = "bert.encoder.layer.1.attention.self"
    found = {}
    for pattern in ("*.1.*.query", "*.1.*.key", "*.1.*.query+key+value"):
        log = cases["bert"].gpu(msgspec.structs.replace(PLAIN, exclude=(pattern,)), tmp_path)
        assert log.fit is not None
        found[pattern] = {name for name in log.fit.quantised if name.startswith(prefix)}
    assert found == {
        "*.1.*.query": {f"{prefix}.key+value"},
        "*.1.*.key": {f"{prefix}.query"},
        "*.1.*.query+key+value": set(),
    }


def test_max_clips_nothing_of_the_calibration_texts_and_percentiles_what_they_say(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    logs = {}
    for calibrator, percentile in (("max", 99.99), ("percentile", 99.9), ("percentile", 90.0)):
        config = msgspec.structs.replace(PLAIN, calibrator=calibrator, percentile=percentile)
        logs[calibrator, percentile] = cases["bert"].gpu(config, tmp_path)
    assert {scale.clipped for scale in logs["max", 99.99].scales} == {0.0}
    for percentile in (99.9, 90.0):
        for scale, largest in zip(
            logs["percentile", percentile].scales, logs["max", 99.99].scales, strict=True
        ):
            assert scale.activation == largest.activation
            assert 0 < scale.scale <= largest.scale
            assert float(np.float16(scale.scale)) == scale.scale
            # The last step of INT8 reaches half a step further than the threshold.
            assert scale.clipped <= 1 - percentile / 100 + 1e-3
    assert max(scale.clipped for scale in logs["percentile", 90.0].scales) > 0.05


def test_inputs_are_of_the_type_that_is_asked_for(cases: dict[str, _Case], tmp_path: Path) -> None:
    found = {}
    for dtype in ("int64", "int32"):
        cases["bert"].gpu(msgspec.structs.replace(PLAIN, input_type=dtype), tmp_path)
        for file in ("fp16.onnx", "int8.onnx"):
            inputs = onnx.load(tmp_path / file).graph.input
            wanted = TensorProto.DataType.Value(dtype.upper())
            assert {value.type.tensor_type.elem_type for value in inputs} == {wanted}
            assert len(inputs) == 3
            found[dtype, file] = _logits(tmp_path / file, cases["bert"], ["a text", "another"])
    for file in ("fp16.onnx", "int8.onnx"):
        assert np.array_equal(found["int64", file], found["int32", file])


def test_neither_model_is_written_if_fp16_alone_misses_the_budget(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    said: list[str] = []
    budget = Budget(max_accuracy_drop=0, max_flip_rate=0, max_divergence=1e-12)
    log = cases["single"].gpu(QuantiseConfig(budget=budget), tmp_path, said)
    assert list(tmp_path.iterdir()) == []
    assert log.refusal == "FP16 alone misses the budget"
    assert log.fp16 is not None
    assert not log.fp16.fits(budget)
    assert (log.trials, log.chosen, log.fit, log.linear_int8, log.scales) == ((), None, None, 0, ())
    assert (log.linear_layers, log.head_layers) == (8, 2)
    assert said[-1] == "neither fp16-gpu nor int8-gpu: FP16 alone misses the budget"


def test_neither_model_is_written_if_a_weight_does_not_fit_into_fp16(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    case, said = cases["single"], list[str]()
    proto = onnx.load(case.model.path)
    (weight,) = [w for w in proto.graph.initializer if w.name == "classifier.weight"]
    array = numpy_helper.to_array(weight).copy()
    array[0, 0] = 1e6
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    (tmp_path / "out").mkdir()
    onnx.save(proto, tmp_path / "blown.onnx")
    blown = replace(case, model=OnnxModel(tmp_path / "blown.onnx", "fp32"))
    log = blown.gpu(LENIENT, tmp_path / "out", said)
    assert list((tmp_path / "out").iterdir()) == []
    assert (log.fp16, log.fit) == (None, None)
    assert log.refusal is not None
    assert "classifier.weight" in log.refusal
    assert "1e+06" in log.refusal
    assert said[-1] == f"neither fp16-gpu nor int8-gpu: {log.refusal}"


@pytest.fixture(scope="module")
def free(
    tmp_path_factory: pytest.TempPathFactory, cases: dict[str, _Case]
) -> tuple[QuantiseConfig, GpuLog]:
    """What the first block in INT8 costs, and each of its layers alone."""
    config = msgspec.structs.replace(PLAIN, exclude=FIRST_BLOCK, sensitivity="always")
    return config, cases["bert"].gpu(config, tmp_path_factory.mktemp("free"))


def test_each_layers_damage_is_measured_if_asked_for(free: tuple[QuantiseConfig, GpuLog]) -> None:
    log = free[1].fit
    assert log is not None
    assert {damage.layer for damage in log.sensitivity} == set(log.quantised)
    divergences = [damage.divergence for damage in log.sensitivity]
    assert None not in divergences
    assert divergences == sorted(divergences, reverse=True)
    assert log.given_back == ()


def test_there_is_an_fp16_model_but_no_int8_model_if_no_layer_fits_the_budget(
    cases: dict[str, _Case], free: tuple[QuantiseConfig, GpuLog], tmp_path: Path
) -> None:
    config, before = free
    assert before.fp16 is not None
    assert before.fit is not None
    limit = _between(before.fp16.divergence, before.fit.sensitivity[-1].divergence)
    said: list[str] = []
    budget = Budget(max_accuracy_drop=1, max_flip_rate=1, max_divergence=limit)
    log = cases["bert"].gpu(msgspec.structs.replace(config, budget=budget), tmp_path, said)
    assert [path.name for path in tmp_path.iterdir()] == ["fp16.onnx"]
    assert log.fp16 == before.fp16
    assert log.refusal == "none of the sets of layers that were tried in INT8 fits the budget"
    assert said[-1] == f"int8-gpu: {log.refusal}: FP16 it is"
    assert log.fit is not None
    assert not log.fit.fits
    assert (log.fit.quantised, log.linear_int8, log.scales) == ((), 0, ())
    assert len(log.fit.given_back) == log.fit.layers - 1 == 3


def test_layers_go_back_to_fp16_until_the_budget_fits(
    cases: dict[str, _Case], free: tuple[QuantiseConfig, GpuLog], tmp_path: Path
) -> None:
    config, before = free
    assert before.fit is not None
    limit = _between(before.fit.sensitivity[-1].divergence, before.fit.first.divergence)
    said: list[str] = []
    budget = Budget(max_accuracy_drop=1, max_flip_rate=1, max_divergence=limit)
    log = cases["bert"].gpu(msgspec.structs.replace(config, budget=budget), tmp_path, said)
    assert log.refusal is None
    assert log.fit is not None
    back = [step.layer for step in log.fit.given_back]
    assert back
    assert back == [damage.layer for damage in before.fit.sensitivity][: len(back)]
    assert log.fit.quantised == tuple(n for n in before.fit.quantised if n not in back)
    assert log.linear_int8 == _int8_weights(tmp_path / "int8.onnx") == 4 - len(back) < 4
    assert log.fit.last.divergence is not None
    assert log.fit.last.divergence <= limit
    assert log.fit.last == _judged(tmp_path / "int8.onnx", cases["bert"])
    quantised = {scale.activation for scale in log.scales}
    nodes = onnx.load(tmp_path / "int8.onnx").graph.node
    assert quantised == {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    assert [line for line in said if line.startswith(f"int8-gpu: {back[0]} given back")]


def test_calibration_texts_unlike_validations_are_warned_of(
    cases: dict[str, _Case], texts_for: dict[str, list[Any]], tmp_path: Path
) -> None:
    case = cases["single"]
    size = vocabulary_size(open_graph(case.model.path))
    lengths = [len(row.ids) for row in case.encoder.encode(texts_for["single"])]
    texts = [texts_for["single"][index] for index in np.argsort(lengths, kind="stable")]
    few = replace(case, calibration=texts[:12], validation=texts[-60:])
    log = few.gpu(PLAIN, tmp_path)
    assert len(log.texts.warnings) == 3
    assert "tokens long in the median" in log.texts.warnings[0]
    assert "only 12 different calibration texts" in log.texts.warnings[1]
    assert "give more of them" in log.texts.warnings[2]
    assert (tmp_path / "int8.onnx").exists()
    for example, expected in ((few, log.texts), (case, case.gpu(PLAIN, tmp_path).texts)):
        found, rows = check_texts(
            example.calibration, example.validation, case.encoder, PLAIN, vocabulary_size=size
        )
        assert found == expected
        assert len(rows) == expected.texts == len(example.calibration)
    assert expected.warnings == ()


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (20, 20), (1_000, 48)])
def test_no_more_calibration_texts_are_taken_than_asked_for(
    cases: dict[str, _Case], tmp_path: Path, limit: int, expected: int
) -> None:
    case = cases["single"]
    log = case.gpu(msgspec.structs.replace(PLAIN, calibration_texts=limit), tmp_path)
    lengths = [len(row.ids) for row in case.encoder.encode(case.calibration[:expected])]
    assert log.texts.texts == expected
    assert log.texts.tokens == sum(lengths)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "there are no calibration texts"),
        (["", " "], "holds a word"),
        (["xyzzy plugh frobozz"] * 9, "tokens long"),
    ],
)
def test_calibration_texts_of_no_use_are_refused_before_anything_is_written(
    cases: dict[str, _Case], tmp_path: Path, texts: list[Text], message: str
) -> None:
    case = cases["single"]
    bad = replace(case, calibration=texts)
    with pytest.raises(DataError, match=message):
        bad.gpu(PLAIN, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_with_all_steps_done(cases: dict[str, _Case], tmp_path: Path) -> None:
    case, told = cases["single"], list[tuple[int, int]]()
    quantise_gpu(
        case.model,
        case.calibration,
        case.validation,
        case.encoder,
        case.judge,
        msgspec.structs.replace(PLAIN, calibrator="auto"),
        fp16=tmp_path / "fp16.onnx",
        int8=tmp_path / "int8.onnx",
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(step, 5) for step in (1, 2, 3, 4, 5)]


def test_activations_that_leave_fp16_are_found_though_a_cpu_does_not_overflow(
    cases: dict[str, _Case], tmp_path: Path
) -> None:
    """ONNX Runtime computes such products in FP32 on a CPU, a GPU would not."""
    case = cases["single"]
    proto = onnx.load(case.model.path)
    consumers = [n for n in proto.graph.node if n.op_type == "Gelu"]
    bias = next(
        w
        for n in proto.graph.node
        if n.op_type == "Add" and n.output[0] == consumers[0].input[0]
        for w in proto.graph.initializer
        if w.name in n.input
    )
    values = numpy_helper.to_array(bias).copy()
    values[0] = -50_000.0  # GELU makes it 0, so that the outputs do not show it
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    path = tmp_path / "huge.onnx"
    onnx.save(proto, path)
    huge = replace(case, model=OnnxModel(path, "fp32"))
    log = huge.gpu(QuantiseConfig(), tmp_path)
    assert log.fp16 is None
    assert log.refusal is not None and "too much for FP16" in log.refusal
    assert sorted(p.name for p in tmp_path.iterdir()) == ["huge.onnx"]
