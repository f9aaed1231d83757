"""Bounds on paper: the arithmetic of the roofline, what it refuses, and that it says what it is."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from edgebert_export.checkpoint import Checkpoint
from edgebert_export.count import Precision, ProductCount, Work
from edgebert_export.graph import find_products, open_graph, write_graph
from edgebert_export.precision import to_half
from edgebert_export.qdq import insert_qdq
from edgebert_export.to_onnx import ExportConfig, OnnxModel, to_onnx
from edgebert_export.write_bundle import VariantSource, write_bundle
from edgebert_pipeline.cli import main
from edgebert_pipeline.estimate import DEVICES, NOTE, Bound, Device, bound, find_device
from edgebert_runtime.bundle import MANIFEST, MANIFEST_HASH, Bundle
from edgebert_runtime.manifest import Provenance, Task, encode_manifest

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
ROUND = Device(
    name="round",
    title="a device of round numbers",
    runs=("tensorrt",),
    int8_tops=4,
    fp16_tflops=2,
    fp32_tflops=0.5,
    tf32_tflops=1,
    bandwidth_gb_s=10,
    cache_mib=1,
    source="made up",
)


def _work(weights: int = 0, **macs: int) -> Work:
    names: dict[str, Precision] = {"int8": "int8", "fp16": "fp16", "fp32": "fp32"}
    products = tuple(
        ProductCount(name, "linear", names[name], number) for name, number in macs.items()
    )
    return Work(products, weights, 0, 0)


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, tiny_classifiers: dict[str, Checkpoint]
) -> Path:
    """A bundle with a variant for each kind of device; treat it as read-only."""
    root = tmp_path_factory.mktemp("estimate")
    task = Task(kind="single_label", labels=("negative", "positive"), text_pair=False)
    single = to_onnx(
        tiny_classifiers["single"], task, ExportConfig(max_length=64), root / "fp32.onnx"
    )
    graph = open_graph(single.path)
    products = [product for product in find_products(graph) if product.kind == "linear"]
    scales = {operand.value: 0.1 for product in products for operand in product.operands}
    write_graph(to_half(insert_qdq(graph, products, scales)), root / "int8.onnx")
    write_graph(to_half(graph), root / "fp16.onnx")
    gpu = ("tensorrt", "rtx")
    return write_bundle(
        root / "bundle",
        name="tiny",
        task=task,
        checkpoint=tiny_classifiers["single"],
        max_length=64,
        variants={
            "int8-gpu": VariantSource(OnnxModel(root / "int8.onnx", "int8"), gpu),
            "fp16-gpu": VariantSource(OnnxModel(root / "fp16.onnx", "fp16"), gpu),
            "fp32": VariantSource(single, ("cpu", "cuda")),
        },
        provenance=Provenance(
            edgebert="0.1.0",
            recipe_sha256="0" * 64,
            model_sha256="0" * 64,
            data_sha256="0" * 64,
            seed=None,
            versions={},
        ),
        texts=["a great film", "a dull, endless mess"],
    ).path


def _run(*args: object) -> Result:
    return CliRunner().invoke(main, ["estimate", *map(str, args)])


def _bounds(bundle: Path, device: str, **options: int) -> list[Bound]:
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = _run(bundle, "--device", device, "--json", *flags)
    assert done.exit_code == 0, done.output
    return [Bound(**item) for item in json.loads(done.stdout)["bounds"]]


def test_compute_is_two_operations_for_each_multiply_accumulate_at_its_own_rate() -> None:
    found = bound("x", _work(int8=2_000_000, fp16=1_000_000), ROUND, 1)
    assert found.compute_ms_lower_bound == pytest.approx(0.001 + 0.001)
    assert found.latency_bound_by == found.cold_latency_bound_by == "compute"
    assert found.texts_per_s_upper_bound == pytest.approx(1 / 0.002e-3)


def test_fp32_products_are_held_against_tf32_where_that_is_faster() -> None:
    found = bound("x", _work(fp32=1_000_000), ROUND, 1)
    assert found.compute_ms_lower_bound == pytest.approx(2e6 / 1e12 * 1e3)


def test_only_bytes_beyond_the_caches_are_read_again_and_all_of_them_when_cold() -> None:
    work = _work(weights=2**20 + 10_000_000, int8=1)
    found = bound("x", work, ROUND, 4)
    assert found.memory_ms_lower_bound == found.latency_ms_lower_bound == pytest.approx(1.0)
    assert found.cold_latency_ms_lower_bound == pytest.approx(1.1048576)
    assert found.latency_bound_by == found.cold_latency_bound_by == "memory"
    assert found.texts_per_s_upper_bound == pytest.approx(4000)
    small = bound("x", _work(weights=2**20, int8=1), ROUND, 1)
    assert small.memory_ms_lower_bound == 0
    assert small.latency_bound_by == "compute"
    assert small.cold_latency_bound_by == "memory"


@given(
    st.integers(1, 10**12),
    st.integers(0, 10**10),
    st.sampled_from(["int8_tops", "bandwidth_gb_s", "cache_mib"]),
    st.floats(1, 100),
)
def test_a_better_device_never_gets_a_worse_bound(
    macs: int, weights: int, peak: str, factor: float
) -> None:
    better = msgspec.structs.replace(ROUND, **{peak: getattr(ROUND, peak) * factor})
    work = _work(weights=weights, int8=macs)
    before, after = bound("x", work, ROUND, 1), bound("x", work, better, 1)
    for name in ("latency_ms_lower_bound", "cold_latency_ms_lower_bound"):
        assert getattr(after, name) <= getattr(before, name)
    assert after.texts_per_s_upper_bound >= before.texts_per_s_upper_bound  # type: ignore[operator]
    assert before.latency_ms_lower_bound <= before.cold_latency_ms_lower_bound  # type: ignore[operator]
    assert before.latency_ms_lower_bound == max(
        before.compute_ms_lower_bound or 0, before.memory_ms_lower_bound or 0
    )


def test_without_a_published_peak_there_is_no_bound() -> None:
    found = bound("x", _work(weights=10**9, int8=10**6, fp16=1), find_device("thor"), 1)
    assert find_device("thor").int8_tops is None
    assert found.latency_ms_lower_bound is found.texts_per_s_upper_bound is None
    assert found.macs_counted == {"int8": 10**6, "fp16": 1}


def test_without_a_bandwidth_compute_alone_is_the_bound() -> None:
    found = bound("x", _work(weights=10**12, int8=32 * 10**9), find_device("x86-avx2"), 1)
    assert found.latency_ms_lower_bound == pytest.approx(1000)  # 64 operations a cycle at 1 GHz
    assert found.memory_ms_lower_bound is found.cold_latency_ms_lower_bound is None


def test_the_devices_agree_with_themselves() -> None:
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    for device in DEVICES:
        assert device.source
        assert device.source.isprintable()
        assert set(device.runs) <= {"tensorrt", "rtx", "cuda", "cpu"}
        rates = [device.fp32_tflops, device.fp16_tflops, device.int8_tops]
        known = [rate for rate in rates if rate is not None]
        assert all(slow < fast for slow, fast in pairwise(known)), device.name
        assert (device.bandwidth_gb_s is None) == (device.cache_mib is None)
        if device.fp16_tflops and device.int8_tops:  # dense, both: twice, but for rounding
            assert 1.9 < device.int8_tops / device.fp16_tflops < 2.1


def test_every_device_and_figure_is_in_the_documentation() -> None:
    rows = re.findall(r"^\| `([\w-]+)` +\|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.M)
    written = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    expected = {}
    for device in DEVICES:
        figures = (
            device.int8_tops,
            device.fp16_tflops,
            device.fp32_tflops,
            device.tf32_tflops,
            device.bandwidth_gb_s,
            device.cache_mib,
        )
        expected[device.name] = ["-" if x is None else f"{x:g}" for x in figures]
    assert {name: cells[: len(expected[name])] for name, cells in written.items()} == expected
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert [device.name for device in DEVICES if device.source not in page] == []


def test_variants_that_run_on_the_device_are_bounded_and_no_others(bundle: Path) -> None:
    def names(device: str) -> list[str]:
        return [item.variant for item in _bounds(bundle, device)]

    assert names("orin-nano") == ["int8-gpu", "fp16-gpu"]
    assert names("t4") == ["int8-gpu", "fp16-gpu", "fp32"]
    assert names("raspberry-pi-5") == ["fp32"]


def test_int8_is_bounded_lower_than_fp16_and_fp16_than_fp32(bundle: Path) -> None:
    int8, fp16, fp32 = _bounds(bundle, "a100")
    assert int8.macs_counted.keys() == {"int8", "fp16"}
    assert sum(int8.macs_counted.values()) == fp16.macs_counted["fp16"]
    for name in ("latency_ms_lower_bound", "cold_latency_ms_lower_bound"):
        assert getattr(int8, name) < getattr(fp16, name) < getattr(fp32, name)


def test_larger_batches_and_longer_texts_take_longer(bundle: Path) -> None:
    small, batch, tokens = (
        _bounds(bundle, "orin-nano", batch=size, tokens=length)[0]
        for size, length in ((1, 16), (8, 16), (1, 64))
    )
    assert small.compute_ms_lower_bound is not None
    assert batch.compute_ms_lower_bound == pytest.approx(8 * small.compute_ms_lower_bound)
    assert (tokens.compute_ms_lower_bound or 0) > 3 * small.compute_ms_lower_bound
    assert batch.weight_bytes_counted == small.weight_bytes_counted
    assert batch.texts_per_s_upper_bound == pytest.approx(small.texts_per_s_upper_bound)


@pytest.mark.parametrize("device", [device.name for device in DEVICES])
def test_what_is_printed_fits_the_terminal_and_says_that_it_is_a_bound(
    bundle: Path, device: str
) -> None:
    done = _run(bundle, "--device", device)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == f"{NOTE}."
    assert max(map(len, lines)) <= 100
    first = [line for line in lines if re.match(r"\| (int8|fp16|fp32)", line)]
    bounds, counted = first[: len(first) // 2], first[len(first) // 2 :]
    assert len(bounds) == len(counted) > 0
    for line in bounds:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for cell in (cells[1], cells[3]):
            assert cell == "unknown" or cell.startswith(">= ")
        assert cells[5] == "unknown" or cells[5].startswith("<= ")
    assert "measured" not in done.stdout


def test_every_figure_of_the_json_is_a_bound_a_count_or_an_input(bundle: Path) -> None:
    done = _run(bundle, "--device", "l4", "--json", "--variant", "fp16-gpu", "--batch", 2)
    found = json.loads(done.stdout)
    assert found.pop("note") == NOTE
    assert found.pop("device")["name"] == "l4"
    (item,) = found.pop("bounds")
    assert found == {"batch": 2, "tokens": 32}
    assert item.pop("variant") == "fp16-gpu"
    assert all(re.search(r"_(lower_bound|upper_bound|bound_by|counted)$", key) for key in item)
    numbers = [value for value in item.values() if isinstance(value, float)]
    assert all(math.isfinite(number) for number in numbers)


def test_an_unknown_device_is_one_line_that_names_the_known_ones(bundle: Path) -> None:
    done = _run(bundle, "--device", "jetson")
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no peak rates are known of the device 'jetson'")
    assert all(device.name in line for device in DEVICES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "t4", "--tokens", "65"], "up to 64 tokens, not 65"),
        (["--device", "t4", "--tokens", "0"], "'--tokens'"),
        (["--device", "t4", "--batch", "0"], "'--batch'"),
        (["--device", "t4", "--variant", "int4"], "no variant 'int4'; it has: int8-gpu, fp16-gpu"),
        (["--device", "orin-nano", "--variant", "fp32"], r"here is only: fp32 \(cpu, cuda\)"),
        ([], "'--device'"),
    ],
)
def test_wrong_use_is_refused_with_one_line(
    bundle: Path, arguments: list[str], message: str
) -> None:
    done = _run(bundle, *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.search(message, line)


def test_the_most_tokens_that_a_bundle_takes_are_counted(bundle: Path) -> None:
    assert len(_bounds(bundle, "t4", tokens=64)) == 3


@pytest.mark.parametrize("file", ["models/fp32.onnx", "tokenizer.json"])
def test_an_altered_bundle_is_refused_before_it_is_parsed(
    bundle: Path, tmp_path: Path, file: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    data = bytearray((copy / file).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / file).write_bytes(data)
    done = _run(copy, "--device", "t4", "--variant", "int8-gpu")
    assert done.exit_code == 2
    assert f"{file} was altered" in done.stderr


def test_a_model_that_is_no_onnx_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    manifest = Bundle.open(bundle).manifest
    data = b"no model"
    (copy / "models/fp32.onnx").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    files = [
        msgspec.structs.replace(entry, size_bytes=len(data), sha256=digest)
        if entry.path == "models/fp32.onnx"
        else entry
        for entry in manifest.files
    ]
    written = encode_manifest(msgspec.structs.replace(manifest, files=tuple(files)))
    (copy / MANIFEST).write_bytes(written)
    (copy / MANIFEST_HASH).write_text(f"{hashlib.sha256(written).hexdigest()}  {MANIFEST}\n")
    done = _run(copy, "--device", "t4", "--variant", "fp32")
    assert done.exit_code == 2
    assert "models/fp32.onnx is not an ONNX model" in done.stderr
    assert len(done.stderr.splitlines()) == 1
