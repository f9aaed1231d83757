"""INT8 products are exact on every processor, and not slower than they need to be."""

from __future__ import annotations

import io

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebert_runtime import processor
from edgebert_runtime.onnx_session import OnnxSession
from edgebert_runtime.processor import has_vnni, int8_products_saturate

HEAD = "processor\t: 0\nvendor_id\t: GenuineIntel\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 avx512f avx512_vnni", True),
        ("fpu avx2 avx_vnni", True),
        ("fpu avx2 avx512f avx512bw", False),
        ("fpu avx_vnni_int8", False),
        ("", False),
    ],
)
def test_vnni_is_found_among_the_flags(flags: str, expected: bool) -> None:
    assert has_vnni(io.StringIO(f"{HEAD}flags\t\t: {flags}\nbugs\t\t:\n")) is expected


def test_a_list_without_flags_names_no_vnni() -> None:
    assert not has_vnni(io.StringIO(HEAD))


@pytest.mark.parametrize(("machine", "expected"), [("aarch64", False), ("AMD64", True)])
def test_only_x86_saturates_and_an_unknown_x86_is_taken_to(
    machine: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_file(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr("builtins.open", no_file)
    assert int8_products_saturate.__wrapped__() is expected


def test_the_largest_products_are_exact() -> None:
    """255 by 127, 64 times: in pairs in 16 bits, that saturates."""
    weights = numpy_helper.from_array(np.full((64, 16), 127, dtype=np.int8), "weights")
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["narrow"], to=TensorProto.UINT8),
        helper.make_node("MatMulInteger", ["narrow", "weights"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["logits"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 16])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    session = OnnxSession(model.SerializeToString())
    found = session.run({"input_ids": np.full((3, 64), 255, dtype=np.int64)})["logits"]
    np.testing.assert_array_equal(found, np.full((3, 16), 64 * 255 * 127, dtype=np.float32))
    session.close()
