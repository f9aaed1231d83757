"""What the real TensorRT-RTX makes of INT8 graphs, and logs that are not as they should be."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebert_export.audit import Audit
from edgebert_export.audit.log import Kernel, NotUnderstoodError, read_kernels
from edgebert_export.audit.model import read_asked
from edgebert_export.audit.verdict import audit
from edgebert_export.checkpoint import Checkpoint
from edgebert_export.engine import EngineBuild, build_rtx_engine, kernels_log, refusal
from edgebert_export.errors import ModelError
from edgebert_export.graph import open_graph, to_bytes
from edgebert_export.precision import to_half
from edgebert_export.to_onnx import ExportConfig, to_onnx
from edgebert_runtime.manifest import Profile, Task
from edgebert_runtime.tensorrt_api import is_installed

needs_rtx = pytest.mark.skipif(
    not is_installed("rtx"), reason="tensorrt-rtx has no wheel for this machine"
)
SHAPES = (
    Profile(max_batch=8, opt_batch=8, max_seq=32, opt_seq=16),
    Profile(max_batch=8, opt_batch=8, max_seq=64, opt_seq=64),
)
LOG = Path(__file__).parent / "kernels.log"
"""Of a tiny FP16 BERT of one layer, by TensorRT-RTX 1.7.1, as `build_rtx_engine` keeps it."""


class Made(NamedTuple):
    model: Path
    built: EngineBuild
    log: str
    engine: bytes

    @property
    def audit(self) -> Audit:
        assert self.built.audit is not None
        return self.built.audit

    def again(self, log: str | None = None, engine: bytes | None = None) -> Audit:
        """Audits it with another log or engine."""
        return audit(
            self.model,
            [self.log if log is None else log],
            self.engine if engine is None else engine,
            len(SHAPES),
        )


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, typed_models: dict[str, Path]
) -> dict[str, Made]:
    """Engines by the real compiler: of FP16, and of each form of INT8."""
    root = tmp_path_factory.mktemp("audit")
    found = {}
    for name, model in typed_models.items():
        engine = root / f"{name}.engine"
        built = build_rtx_engine(
            name, model, SHAPES, engine, version="1", platform="p", log=root / "log"
        )
        log = kernels_log(engine).read_text(encoding="utf-8")
        found[name] = Made(model, built, log, engine.read_bytes())
    return found


@needs_rtx
def test_weights_with_a_scale_for_each_channel_are_refused(made: dict[str, Made]) -> None:
    found = made["channels"].audit
    assert found.verdict == "refused" and len(found.products) == 19
    assert found.count(scale="after") == found.count(ran="int8") == 19
    assert found.fused == found.attentions == 3
    (said,) = found.breaches()
    assert said.startswith("19 of 19 INT8 products are scaled after they are stored as FP16")
    assert "/bert/encoder/layer.0/attention/self/query/MatMul" in said and "and 16 more" in said
    assert found.wrong_numbers() == found.breaches()
    for required in ("require", "report"):
        line = refusal(made["channels"].built, required)  # type: ignore[arg-type]
        assert line is not None and line.startswith("channels: ") and "\n" not in line


@needs_rtx
def test_a_power_of_two_for_the_whole_weight_passes(made: dict[str, Made]) -> None:
    found = made["tensor"].audit
    assert found.verdict == "fine" and found.breaches() == () == found.wrong_numbers()
    assert found.count(scale="inside") == found.count(ran="int8") == len(found.products) == 19
    assert {product.kind for product in found.products} == {"gemm"}
    assert refusal(made["tensor"].built, "require") is None


@needs_rtx
def test_fp16_has_nothing_to_scale_and_is_held_to_its_attentions(made: dict[str, Made]) -> None:
    found = made["fp16"].audit
    assert found.verdict == "fine" and found.products == () and found.fused == 3
    for profile in found.profiles:
        assert profile.kernels > 3 * 5 and profile.waits == 0
        assert profile.kernels_per_layer is not None and 5 < profile.kernels_per_layer < 15


@needs_rtx
def test_weights_that_are_dequantised_at_each_run_are_refused(made: dict[str, Made]) -> None:
    found = made["inputs"].audit
    assert found.verdict == "refused" and found.count(ran="dequantised") > 0
    assert found.count(ran="int8") == 0
    assert any("dequantised at each run" in said for said in found.breaches())


@needs_rtx
def test_attention_in_int8_is_one_kernel_that_scales_inside(made: dict[str, Made]) -> None:
    found = made["attention"].audit
    assert len(found.products) == 19 + 2 * 3 and found.wrong_numbers() == ()
    fused = [product for product in found.products if product.kind == "attention"]
    assert {product.ran for product in fused} == {"int8"} and len(fused) == 2 * found.fused > 0


@needs_rtx
def test_attention_that_is_not_fused_is_refused(
    tmp_path: Path, tiny_classifiers: dict[str, Checkpoint], tasks: dict[str, Task]
) -> None:
    """Heads of 8 numbers, in FP16: slower than need be, and right."""
    plain = to_onnx(
        tiny_classifiers["single"], tasks["single"], ExportConfig(max_length=64), tmp_path / "m"
    )
    model = tmp_path / "fp16.onnx"
    model.write_bytes(to_bytes(to_half(open_graph(plain.path))))
    built = build_rtx_engine(
        "fp16", model, SHAPES, tmp_path / "e", version="1", platform="p", log=tmp_path / "log"
    )
    assert built.audit is not None and built.audit.fused < built.audit.attentions == 2
    assert built.audit.wrong_numbers() == ()
    line = refusal(built, "require")
    assert line is not None and "of 2 attentions are fused" in line and "report" in line
    assert refusal(built, "report") is None


@needs_rtx
def test_a_scale_that_the_engine_does_not_hold_is_undecided(made: dict[str, Made]) -> None:
    for engine in (b"", made["channels"].engine):
        found = made["tensor"].again(engine=engine)
        assert found.verdict == "refused" and found.count(scale="undecided") == 19
        assert found.wrong_numbers()


@needs_rtx
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Layers:", "Kernels:"),
        ("I/O Tensors:", "Bindings:"),
        ("Name: ", "Layer: "),
        ("LayerType", "Type"),
        ("LayerType: gemm", "LayerType: matmul"),
        ("Inputs", "Ins"),
        ("Constants", "Weights"),
        ("Outputs", "Outs"),
        ("TacticName", "Tactic"),
        ("StreamId", "Stream"),
        ("Metadata", "Meta"),
        ("ONNX Layer", "Node"),
        ("Dimensions", "Shape"),
        ("Datatype", "Precision"),
        ("Datatype: Int8", "Datatype: I8"),
        ("Datatype: Half", "Datatype: FP16"),
        ("Datatype: Float", "Datatype: FP32"),
        ("_myl1_", "_other1_"),
        ("IOMode: Output", "IOMode: Result"),
        ("\x1f", " "),
        ("", "Layers:\n"),
    ],
)
def test_another_wording_is_not_understood(made: dict[str, Made], old: str, new: str) -> None:
    log = made["tensor"].log
    changed = log.replace(old, new) if old else new + log
    assert changed != log
    found = made["tensor"].again(changed)
    assert found.verdict == "not understood" and found.not_understood
    assert found.products == () and found.profiles == ()


@needs_rtx
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_log_that_is_damaged_is_never_fine(made: dict[str, Made], data: st.DataObject) -> None:
    log = made["tensor"].log
    end = re.search(r"(?s).*IOMode: Output[^\n]*", log)
    assert end is not None
    lines = end.group().split("\n")
    wanted = [index for index, line in enumerate(lines) if line]
    if data.draw(st.booleans(), label="cut"):
        changed = log[: data.draw(st.integers(0, end.end() - 1))]
    else:
        lost = set(data.draw(st.lists(st.sampled_from(wanted), min_size=1, max_size=3)))
        changed = "\n".join(line for index, line in enumerate(lines) if index not in lost)
    assert made["tensor"].again(changed).verdict == "not understood"


@needs_rtx
def test_what_does_not_belong_together_is_not_understood(made: dict[str, Made]) -> None:
    tensor, half = made["tensor"], made["fp16"]
    assert audit(tensor.model, [half.log], half.engine, 2).verdict != "fine"
    for profiles in (1, 3):
        assert (
            audit(tensor.model, [tensor.log], tensor.engine, profiles).verdict == "not understood"
        )
    for messages in ([], [""], [tensor.log, tensor.log]):
        assert audit(tensor.model, messages, tensor.engine, 2).verdict == "not understood"
    assert Audit().verdict == "not understood"


@needs_rtx
def test_what_is_not_understood_ships_only_if_the_recipe_says_so(made: dict[str, Made]) -> None:
    import msgspec

    built = msgspec.structs.replace(made["tensor"].built, audit=made["tensor"].again("nothing"))
    line = refusal(built, "require")
    assert line is not None and "not understood" in line and 'engine.audit = "report"' in line
    assert refusal(built, "report") is None


def test_nodes_without_names_of_their_own_are_not_understood(
    tmp_path: Path, onnx_models: dict[str, Any]
) -> None:
    model = onnx.load(onnx_models["single"].path)
    for change in ("", "twice"):
        for node in model.graph.node:
            if node.op_type == "Softmax":
                node.name = change
        onnx.save(model, tmp_path / "m.onnx")
        found = audit(tmp_path / "m.onnx", [LOG.read_text()], b"", 1)
        assert found.not_understood is not None and "name" in found.not_understood


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="is not an ONNX model"):
        read_asked(tmp_path / "m.onnx")


def test_a_log_is_read_without_the_compiler() -> None:
    (kernels,) = read_kernels([LOG.read_text(encoding="utf-8")], 1)
    assert all(isinstance(kernel, Kernel) for kernel in kernels)
    assert {kernel.kind for kernel in kernels} <= {"gemm", "kgen", "runtime_fusion"}
    first = kernels[0]
    assert first.inputs[0].dtype == "Int64" and first.inputs[0].shape == (-1, -1)
    softmax = [kernel for kernel in kernels if any("Softmax" in node for node in kernel.nodes)]
    assert len(softmax) == 1


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), times=st.integers(1, 4))
def test_a_character_that_changed_is_read_or_refused_and_never_a_crash(
    seed: int, times: int
) -> None:
    rng, text = random.Random(seed), list(LOG.read_text(encoding="utf-8"))
    for _ in range(times):
        text[rng.randrange(len(text))] = rng.choice("[]{}:, \n\x1f0aZ")
    try:
        read_kernels(["".join(text)], 1)
    except NotUnderstoodError as exc:
        assert "\n" not in str(exc)


def _int8_by(op: str) -> onnx.ModelProto:
    """An INT8 product that the audit does not know, or one in a function."""
    h, t = onnx.helper, onnx.TensorProto
    scale = onnx.numpy_helper.from_array(np.array(0.01, dtype=np.float16), "scale")
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), dtype=np.int8), "weight")
    nodes = [h.make_node("DequantizeLinear", ["weight", "scale"], ["w"], name="w")]
    if op == "Einsum":
        nodes += [
            h.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="q"),
            h.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="d"),
            h.make_node("Einsum", ["d", "w"], ["y"], name="p", equation="ij,jk->ik"),
        ]
    elif op == "weights alone":
        nodes.append(h.make_node("MatMul", ["x", "w"], ["y"], name="p"))
    else:
        nodes.append(h.make_node("Product", ["x", "w"], ["y"], name="p", domain="ours"))
    zero = onnx.numpy_helper.from_array(np.array(0, dtype=np.int8), "zero")
    graph = h.make_graph(
        nodes,
        "graph",
        [h.make_tensor_value_info("x", t.FLOAT16, ["batch", 64])],
        [h.make_tensor_value_info("y", t.FLOAT16, ["batch", 64])],
        [scale, weight, zero],
    )
    opsets = [h.make_opsetid("", 20), h.make_opsetid("ours", 1)]
    functions = []
    if op == "function":
        inside = [h.make_node("MatMul", ["a", "b"], ["c"], name="inside")]
        functions = [h.make_function("ours", "Product", ["a", "b"], ["c"], inside, opsets[:1])]
    return h.make_model(graph, opset_imports=opsets, functions=functions)


@pytest.mark.parametrize("op", ["Einsum", "weights alone", "function"])
def test_int8_where_the_audit_does_not_look_is_not_understood_and_never_fine(
    tmp_path: Path, op: str
) -> None:
    onnx.save(_int8_by(op), tmp_path / "model.onnx")
    found = audit(tmp_path / "model.onnx", [], b"", 1)
    assert found.verdict == "not understood"
    assert found.not_understood is not None
    assert "function" in found.not_understood or "dequantises" in found.not_understood
