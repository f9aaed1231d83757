"""Opening and writing graphs: what is found in them, what is refused, and that nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.torch import load_file

from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_model,
    load_tokenizer,
    open_checkpoint,
    save_checkpoint,
)
from edgebert_export.errors import ExportError, ModelError
from edgebert_export.graph import (
    add_constant,
    constant,
    copy_of,
    find_products,
    open_graph,
    open_session,
    remove_unused_constants,
    set_constant,
    to_bytes,
    vocabulary_size,
    write_graph,
)
from edgebert_export.to_onnx import ExportConfig, OnnxModel, to_onnx
from edgebert_runtime.manifest import Task

NAMES = ["single", "multi", "pairs"]
Inputs = dict[str, NDArray[np.int64]]


@pytest.fixture(scope="module")
def inputs(
    tiny_classifiers: dict[str, Checkpoint], tasks: dict[str, Task], texts_for: dict[str, list[Any]]
) -> dict[str, Inputs]:
    """A padded batch of real texts for each of the tasks."""
    found = {}
    for name, checkpoint in tiny_classifiers.items():
        encoder = checkpoint_encoder(checkpoint, max_length=64, text_pair=tasks[name].text_pair)
        found[name] = encoder.collate(encoder.encode(texts_for[name][:12]))
    return found


def _logits(model: bytes, batch: Inputs) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = open_session(model).run(batch)["logits"]
    return logits


def _operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_layer_and_table_is_found_under_its_modules_name_with_its_weight(
    onnx_models: dict[str, OnnxModel],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    name: str,
) -> None:
    import torch

    model = load_model(tiny_classifiers[name], tasks[name], attention="eager")
    graph = open_graph(onnx_models[name].path)
    products = {product.name: product for product in find_products(graph)}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    tables = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    assert [p.name for p in products.values() if p.kind == "linear"] == list(linear)
    assert len(linear) == 14
    assert {p.name for p in products.values() if p.kind == "embedding"} == set(tables)
    assert len(tables) == 3
    for path, module in linear.items():
        weight = constant(graph, str(products[path].weight))
        assert np.array_equal(weight, module.weight.detach().numpy().T)
    for path, table in tables.items():
        found = constant(graph, str(products[path].weight))
        assert np.array_equal(found, table.weight.detach().numpy())
        assert products[path].operands == ()


def test_the_two_products_inside_each_attention_are_found_with_the_axes_of_their_tokens(
    onnx_models: dict[str, OnnxModel],
) -> None:
    graph = open_graph(onnx_models["single"].path)
    attention = [p for p in find_products(graph) if p.kind == "attention"]
    assert [product.name for product in attention] == [
        f"bert.encoder.layer.{layer}.attention.self.{what}"
        for layer in (0, 1)
        for what in ("scores", "context")
    ]
    for product in attention:
        assert product.weight is None
        keys_in_columns = product.name.endswith("scores")
        axes = [operand.token_axis for operand in product.operands]
        assert axes == [-2, -1 if keys_in_columns else -2]


def test_products_come_in_the_graphs_order_and_name_their_nodes(
    onnx_models: dict[str, OnnxModel],
) -> None:
    graph = open_graph(onnx_models["single"].path)
    order = [str(node.name) for node in graph.graph]
    nodes = {str(node.name): node for node in graph.graph}
    products = find_products(graph)
    positions = [order.index(product.node) for product in products]
    assert positions == sorted(positions)
    for product in products:
        read = {value.name for value in nodes[product.node].inputs if value is not None}
        assert {operand.value for operand in product.operands} <= read
        assert product.weight is None or product.weight in read


def test_queries_keys_and_values_read_one_activation(onnx_models: dict[str, OnnxModel]) -> None:
    graph = open_graph(onnx_models["single"].path)
    read = {p.name: p.operands[0].value for p in find_products(graph) if p.kind == "linear"}
    for layer in (0, 1):
        prefix = f"bert.encoder.layer.{layer}.attention.self"
        assert len({read[f"{prefix}.{part}"] for part in ("query", "key", "value")}) == 1
    assert len(set(read.values())) == 10


def _heads(path: Path) -> list[str]:
    return [product.name for product in find_products(open_graph(path)) if product.head]


def _exported(
    model: Any, like: Checkpoint, task: Task, root: Path, *, first_token: bool = False
) -> Path:
    checkpoint = save_checkpoint(model, load_tokenizer(like), root / "model")
    config = ExportConfig(max_length=64, first_token=first_token)
    return to_onnx(checkpoint, task, config, root / "model.onnx").path


@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bert", ["bert.pooler.dense", "classifier"]),
        ("distilbert", ["pre_classifier", "classifier"]),
    ],
)
def test_the_layers_behind_the_last_transformer_layer_are_its_head(
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    random_distilbert: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    expected: list[str],
    first_token: bool,
) -> None:
    like, task = tiny_classifiers["single"], tasks["single"]
    model = load_model(like, task) if kind == "bert" else random_distilbert()
    assert _heads(_exported(model, like, task, tmp_path, first_token=first_token)) == expected


@pytest.mark.parametrize(("channels", "small"), [(15, True), (16, False)])
def test_a_layer_with_fewer_than_16_inputs_or_outputs_counts_as_head_wherever_it_is(
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    tmp_path: Path,
    channels: int,
    small: bool,
) -> None:
    like, task = tiny_classifiers["single"], tasks["single"]
    base = load_model(like, task)
    config = type(base.config).from_dict(base.config.to_dict() | {"intermediate_size": channels})
    narrow = [
        f"bert.encoder.layer.{layer}.{part}.dense"
        for layer in (0, 1)
        for part in ("intermediate", "output")
    ]
    expected = [*(narrow if small else []), "bert.pooler.dense", "classifier"]
    assert _heads(_exported(type(base)(config).eval(), like, task, tmp_path)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_that_is_opened_and_written_computes_what_its_source_does(
    onnx_models: dict[str, OnnxModel], inputs: dict[str, Inputs], tmp_path: Path, name: str
) -> None:
    source = onnx_models[name].path
    write_graph(open_graph(source), tmp_path / "written.onnx")
    assert "Gemm" in _operators(source)
    assert "Gemm" not in _operators(tmp_path / "written.onnx")
    assert "Constant" not in _operators(tmp_path / "written.onnx")
    expected = _logits(source.read_bytes(), inputs[name])
    found = _logits((tmp_path / "written.onnx").read_bytes(), inputs[name])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    before, after = onnx.load(source).graph, onnx.load(tmp_path / "written.onnx").graph
    assert list(after.input) == list(before.input)
    assert list(after.output) == list(before.output)


def test_the_same_graph_gives_the_same_bytes(onnx_models: dict[str, OnnxModel]) -> None:
    path = onnx_models["single"].path
    graph = open_graph(path)
    assert to_bytes(graph) == to_bytes(graph) == to_bytes(open_graph(path))


def _model_of(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def _gemm_model(path: Path, *, bias: bool, **attributes: float) -> None:
    """Writes a model of one plain linear layer and one ``Gemm`` with some attributes."""
    random = np.random.default_rng(0)
    shapes = {"plain": (5, 5), "weight": (3, 5) if attributes.get("transB") else (5, 3), "bias": 3}
    weights = {
        key: random.normal(size=shape).astype(np.float32)
        for key, shape in shapes.items()
        if bias or key != "bias"
    }
    wanted = ["hidden", "weight"] + ["bias"] * bias
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "plain"], ["hidden"], name="/first/MatMul"),
            helper.make_node("Gemm", wanted, ["logits"], name="/head/Gemm", **attributes),
        ],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )
    onnx.save(_model_of(graph), path)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("attributes", "split"),
    [
        ({}, True),
        ({"transB": 1}, True),
        ({"transB": 1, "alpha": 1.0, "beta": 1.0}, True),
        ({"alpha": 2.0}, False),
    ],
)
def test_a_plain_gemm_becomes_a_product_and_a_sum_whatever_its_form(
    tmp_path: Path, attributes: dict[str, float], split: bool, bias: bool
) -> None:
    source, written = tmp_path / "source.onnx", tmp_path / "written.onnx"
    _gemm_model(source, bias=bias, **attributes)
    graph = open_graph(source)
    write_graph(graph, written)
    assert [p.name for p in find_products(graph)] == (["first", "head"] if split else ["first"])
    expected = ["MatMul", "Add"] if bias else ["MatMul"]
    assert _operators(written) == ["MatMul", *(expected if split else ["Gemm"])]
    batch = {"x": np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)}
    found = [
        onnxruntime.InferenceSession(file.read_bytes()).run(["logits"], batch)[0]
        for file in (source, written)
    ]
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)


def test_a_copy_can_be_changed_without_changing_the_graph(
    onnx_models: dict[str, OnnxModel],
) -> None:
    graph = open_graph(onnx_models["single"].path)
    before = to_bytes(graph)
    copy = copy_of(graph)
    name = str(find_products(copy)[-1].weight)
    set_constant(copy, name, constant(copy, name) * 2)
    add_constant(copy, "another", np.zeros(3, dtype=np.float32))
    copy.graph.remove(next(iter(copy.graph)))
    assert to_bytes(graph) == before
    assert to_bytes(copy) != before


def test_a_constant_is_added_once_and_removed_when_nothing_reads_it(
    onnx_models: dict[str, OnnxModel],
) -> None:
    graph = open_graph(onnx_models["single"].path)
    before = set(graph.graph.initializers)
    first = add_constant(graph, "another", np.ones(2, dtype=np.float32))
    assert add_constant(graph, "another", np.ones(2, dtype=np.float32)) is first
    with pytest.raises(ModelError, match="has a constant 'another' of its own"):
        add_constant(graph, "another", np.zeros(2, dtype=np.float32))
    assert constant(graph, "another").tolist() == [1, 1]
    assert set(graph.graph.initializers) == before | {"another"}
    remove_unused_constants(graph)
    assert set(graph.graph.initializers) == before


def test_a_constant_that_is_set_takes_its_new_type_with_it(
    onnx_models: dict[str, OnnxModel],
) -> None:
    graph = open_graph(onnx_models["single"].path)
    name = str(find_products(graph)[-1].weight)
    set_constant(graph, name, constant(graph, name).astype(np.float16))
    written = onnx.ModelProto.FromString(to_bytes(graph))
    (weight,) = [w for w in written.graph.initializer if w.name == name]
    assert weight.data_type == TensorProto.FLOAT16
    assert str(graph.graph.initializers[name].dtype) == "FLOAT16"


def test_a_graph_that_is_not_valid_onnx_is_not_passed_off_as_written(
    onnx_models: dict[str, OnnxModel], tmp_path: Path
) -> None:
    graph = open_graph(onnx_models["single"].path)
    weight = str(find_products(graph)[-1].weight)
    set_constant(graph, weight, constant(graph, weight).astype(np.float16))
    with pytest.raises(ExportError, match=r"bad\.onnx is not valid ONNX"):
        write_graph(graph, tmp_path / "bad.onnx")


def test_the_vocabulary_is_as_large_as_the_table_of_words(
    onnx_models: dict[str, OnnxModel], tiny_classifiers: dict[str, Checkpoint]
) -> None:
    from edgebert_export.checkpoint import load_tokenizer

    for name, model in onnx_models.items():
        wanted = load_tokenizer(tiny_classifiers[name]).get_vocab_size()
        assert vocabulary_size(open_graph(model.path)) == wanted


def test_a_model_that_looks_up_no_words_has_no_vocabulary(tmp_path: Path) -> None:
    _gemm_model(tmp_path / "gemm.onnx", bias=True)
    with pytest.raises(ModelError, match="no table of word embeddings"):
        vocabulary_size(open_graph(tmp_path / "gemm.onnx"))


def _shared(weights: dict[str, Any]) -> dict[str, Any]:
    """Gives two layers one weight; the exporter then stores it once, behind an ``Identity``."""
    prefix = "bert.encoder.layer.{}.attention.self.query.weight"
    return weights | {prefix.format(1): weights[prefix.format(0)].clone()}


def test_layers_with_equal_weights_are_linear_layers_all_the_same(
    edited: Callable[..., Path], tasks: dict[str, Task], inputs: dict[str, Inputs], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(edited(weights=_shared))
    stored = load_file(checkpoint.path / "model.safetensors")
    wanted = stored["bert.encoder.layer.1.attention.self.query.weight"].numpy().T
    model = to_onnx(
        checkpoint,
        tasks["single"],
        ExportConfig(max_length=64, fold_token_types=False),
        tmp_path / "m.onnx",
    )
    graph = open_graph(model.path)
    products = {product.name: product for product in find_products(graph)}
    kinds = [product.kind for product in products.values()]
    assert (kinds.count("linear"), kinds.count("attention")) == (14, 4)
    query = products["bert.encoder.layer.1.attention.self.query"]
    assert np.array_equal(constant(graph, str(query.weight)), wanted)
    expected = _logits(model.path.read_bytes(), inputs["single"])
    np.testing.assert_allclose(_logits(to_bytes(graph), inputs["single"]), expected, atol=1e-5)


def _refusal(path: Path) -> str:
    """Returns why a model is refused: one line that names the file."""
    with pytest.raises(ModelError) as caught:
        find_products(open_graph(path))
    message = str(caught.value)
    assert "\n" not in message.strip()
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x00garbage\xff" * 40, id="garbage"),
        pytest.param(b"this is a text, not a model\n", id="text"),
        pytest.param(b"", id="empty"),
    ],
)
def test_what_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert str(path) in _refusal(path)


def test_half_a_file_is_refused(onnx_models: dict[str, OnnxModel], tmp_path: Path) -> None:
    data = onnx_models["single"].path.read_bytes()
    (tmp_path / "half.onnx").write_bytes(data[: len(data) // 2])
    assert "is not an ONNX model" in _refusal(tmp_path / "half.onnx")


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    assert "No such file" in _refusal(tmp_path / "nothing.onnx")
    assert "directory" in _refusal(tmp_path)


def _changed(source: OnnxModel, out: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    proto = onnx.load(source.path)
    change(proto)
    onnx.save(proto, out)
    return out


def _without_a_weight_input(proto: onnx.ModelProto) -> None:
    product = next(node for node in proto.graph.node if node.op_type == "MatMul")
    del product.input[1]


def _reading_nothing(proto: onnx.ModelProto) -> None:
    softmax = next(node for node in proto.graph.node if node.op_type == "Softmax")
    softmax.input[0] = "nothing"


def _with_wrong_dims(proto: onnx.ModelProto) -> None:
    weight = next(w for w in proto.graph.initializer if w.name == "classifier.weight")
    weight.dims[0] = 99


@pytest.mark.parametrize("change", [_without_a_weight_input, _reading_nothing, _with_wrong_dims])
def test_a_damaged_graph_is_refused(
    onnx_models: dict[str, OnnxModel],
    tmp_path: Path,
    change: Callable[[onnx.ModelProto], None],
) -> None:
    path = _changed(onnx_models["single"], tmp_path / "damaged.onnx", change)
    assert str(path) in _refusal(path)


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
def test_a_dynamically_quantised_model_is_refused(
    onnx_models: dict[str, OnnxModel], tmp_path: Path, kind: QuantType
) -> None:
    path = tmp_path / "int8.onnx"
    quantize_dynamic(onnx_models["single"].path, path, weight_type=kind)
    assert "quantised already" in _refusal(path)


@pytest.mark.parametrize("operator", ["QuantizeLinear", "DequantizeLinear", "MatMulInteger"])
def test_a_model_with_a_quantised_node_is_refused(
    onnx_models: dict[str, OnnxModel], tmp_path: Path, operator: str
) -> None:
    def change(proto: onnx.ModelProto) -> None:
        proto.graph.node.append(helper.make_node(operator, ["logits", "step"], ["unused"]))

    path = _changed(onnx_models["single"], tmp_path / "model.onnx", change)
    assert f"quantised already (it holds {operator})" in _refusal(path)


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "INT8"])
def test_a_weight_in_another_precision_is_refused(
    onnx_models: dict[str, OnnxModel], tmp_path: Path, kind: str
) -> None:
    def change(proto: onnx.ModelProto) -> None:
        weight = next(w for w in proto.graph.initializer if w.name == "classifier.weight")
        values = np.rint(numpy_helper.to_array(weight)).ravel().tolist()
        dims = list(weight.dims)
        wanted = TensorProto.DataType.Value(kind)
        if kind == "INT8":
            values = [int(value) for value in values]
        weight.CopyFrom(helper.make_tensor(weight.name, wanted, dims, values))

    path = _changed(onnx_models["single"], tmp_path / "model.onnx", change)
    assert f"classifier.weight is {kind} already; give the FP32 model" in _refusal(path)


@pytest.mark.parametrize("opset", [19, 21])
def test_another_opset_than_20_is_refused(
    onnx_models: dict[str, OnnxModel], tmp_path: Path, opset: int
) -> None:
    def change(proto: onnx.ModelProto) -> None:
        proto.opset_import[0].version = opset

    path = _changed(onnx_models["single"], tmp_path / "model.onnx", change)
    assert f"opset {opset}; export it with 20" in _refusal(path)


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
    )
    onnx.save(_model_of(graph), tmp_path / "relu.onnx")
    assert "no linear layer" in _refusal(tmp_path / "relu.onnx")


def test_two_products_of_one_name_are_refused(
    onnx_models: dict[str, OnnxModel], tmp_path: Path
) -> None:
    def change(proto: onnx.ModelProto) -> None:
        for node in [node for node in proto.graph.node if node.op_type == "MatMul"][:2]:
            node.name = "/same/MatMul"

    path = _changed(onnx_models["single"], tmp_path / "model.onnx", change)
    assert "the same name" in _refusal(path)


@pytest.fixture
def external(onnx_models: dict[str, OnnxModel], tmp_path: Path) -> Path:
    """A model whose weights, all of them, lie in ``weights.bin`` beside it."""
    path = tmp_path / "model" / "model.onnx"
    path.parent.mkdir()
    onnx.save(
        onnx.load(onnx_models["single"].path),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    return path


def _set_external(path: Path, **entries: str | None) -> None:
    """Changes what a model says of where its first weight lies; ``None`` leaves an entry out."""
    proto = onnx.load(path, load_external_data=False)
    weight = next(w for w in proto.graph.initializer if w.external_data)
    found = {entry.key: entry.value for entry in weight.external_data} | entries
    del weight.external_data[:]
    for key, value in found.items():
        if value is not None:
            weight.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def test_weights_beside_the_model_are_read_and_written_into_one_file(
    onnx_models: dict[str, OnnxModel], external: Path, inputs: dict[str, Inputs], tmp_path: Path
) -> None:
    assert onnx.load(external, load_external_data=False).graph.initializer[0].external_data
    write_graph(open_graph(external), tmp_path / "written.onnx")
    written = onnx.load(tmp_path / "written.onnx", load_external_data=False)
    assert not [w.name for w in written.graph.initializer if w.external_data]
    expected = _logits(onnx_models["single"].path.read_bytes(), inputs["single"])
    found = _logits((tmp_path / "written.onnx").read_bytes(), inputs["single"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_weights_in_a_file_that_is_missing_are_refused(external: Path) -> None:
    (external.parent / "weights.bin").unlink()
    assert "there is no file 'weights.bin' beside it" in _refusal(external)


@pytest.mark.parametrize("length", ["as it says", None])
def test_weights_in_a_file_that_is_too_short_are_refused(
    external: Path, length: str | None
) -> None:
    weights = external.parent / "weights.bin"
    if length is None:
        _set_external(external, length=None)
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    assert "'weights.bin' is too short for the weight" in _refusal(external)


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param({"length": "four"}, id="a length that is no number"),
        pytest.param({"length": "-4"}, id="a negative length"),
        pytest.param({"offset": "-1"}, id="a negative offset"),
        pytest.param({"offset": "1000000000"}, id="an offset beyond the end"),
    ],
)
def test_weights_at_an_impossible_place_are_refused(
    external: Path, entries: dict[str, str]
) -> None:
    _set_external(external, **entries)
    assert str(external) in _refusal(external)


@pytest.mark.parametrize("location", ["", None, "../outside.bin", "sub/../../outside.bin"])
def test_weights_outside_the_models_directory_are_refused(
    external: Path, location: str | None
) -> None:
    weights = external.parent / "weights.bin"
    (external.parent.parent / "outside.bin").write_bytes(weights.read_bytes())
    _set_external(external, location=location)
    assert "outside the model's directory" in _refusal(external)


def test_weights_at_an_absolute_path_are_refused(external: Path) -> None:
    _set_external(external, location=str(external.parent.resolve() / "weights.bin"))
    assert "outside the model's directory" in _refusal(external)


def test_a_symbolic_link_to_weights_outside_is_refused(external: Path, tmp_path: Path) -> None:
    weights = external.parent / "weights.bin"
    weights.rename(tmp_path / "outside.bin")
    weights.symlink_to(tmp_path / "outside.bin")
    assert "outside the model's directory" in _refusal(external)


def test_a_symbolic_link_to_a_directory_outside_is_refused(external: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (external.parent / "weights.bin").rename(outside / "weights.bin")
    (external.parent / "link").symlink_to(outside)
    _set_external(external, location="link/weights.bin")
    assert "outside the model's directory" in _refusal(external)


def test_a_location_that_no_file_can_have_is_refused(external: Path) -> None:
    _set_external(external, location="weights\x00.bin")
    assert str(external) in _refusal(external)


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname", "nothing.bin"])
def test_a_constant_node_cannot_read_outside_either(external: Path, location: str) -> None:
    """Weights may be stored in ``Constant`` nodes, too, in the same way."""
    (external.parent.parent / "outside.bin").write_bytes(b"\x00" * 10_000)
    proto = onnx.load(external, load_external_data=False)
    weight = next(w for w in proto.graph.initializer if w.name == "classifier.weight")
    for entry in weight.external_data:
        entry.value = {"location": location, "offset": "0"}.get(entry.key, entry.value)
    node = helper.make_node("Constant", [], [weight.name], name="constant")
    attribute = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    attribute.t.CopyFrom(weight)
    proto.graph.initializer.remove(weight)
    proto.graph.node.insert(0, node)
    external.write_bytes(proto.SerializeToString())
    assert str(external) in _refusal(external)


def test_a_weight_that_two_layers_read_becomes_one_for_each(
    onnx_models: dict[str, OnnxModel], tmp_path: Path
) -> None:
    """Else smoothing one of them would change the other."""
    proto = onnx.load(onnx_models["single"].path)
    weights = {weight.name for weight in proto.graph.initializer if len(weight.dims) == 2}
    square = [n for n in proto.graph.node if n.op_type == "MatMul" and n.input[1] in weights][:2]
    square[1].input[1] = square[0].input[1]
    onnx.save(proto, tmp_path / "shared.onnx")
    products = find_products(open_graph(tmp_path / "shared.onnx"))
    found = [product.weight for product in products if product.kind == "linear"]
    assert len(set(found)) == len(found) == 14
