"""Engines on a machine: built once, found again, refused when they are not what was written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from edgebert_runtime import BundleError, Classifier, DeviceError, InputError, MissingExtraError
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.cli import main
from edgebert_runtime.device import choose
from edgebert_runtime.engine import (
    EngineKey,
    bundled_keys,
    difference,
    lean_runtimes,
    wanted_key,
)
from edgebert_runtime.engine_cache import EngineCache
from edgebert_runtime.engines import (
    EngineTiming,
    available_engines,
    build_engines,
    fastest,
    measure_and_remember,
    open_engine,
    preferred_variants,
    read_preference,
    remember_preference,
)
from edgebert_runtime.errors import ModelRefusedError
from edgebert_runtime.facts import DeviceFacts, GpuFacts, Jetson, TensorRTFacts
from edgebert_runtime.manifest import Profile
from edgebert_runtime.tensorrt_build import BuildOptions, needed_memory_bytes
from edgebert_runtime.testing import FakeDriver, FakeTensorRT
from edgebert_runtime.testing.fake_tensorrt import _OnnxParser as FakeParser
from edgebert_runtime.testing.fake_tensorrt import _ParserError

PROFILES = [
    {"max_batch": 1, "opt_batch": 1, "max_seq": 32, "opt_seq": 16},
    {"max_batch": 8, "opt_batch": 8, "max_seq": 32, "opt_seq": 16},
    {"max_batch": 8, "opt_batch": 8, "max_seq": 64, "opt_seq": 64},
]
ORIN = DeviceFacts(
    machine="aarch64",
    cpu_count=6,
    memory_bytes=8 * 2**30,
    onnxruntime=("onnxruntime 1.20.0",),
    providers=("CPUExecutionProvider",),
    gpu=GpuFacts(
        name="Orin",
        compute_capability=(8, 7),
        integrated=True,
        cuda=(12, 6),
        free_bytes=4 * 2**30,
        total_bytes=8 * 2**30,
    ),
    tensorrt={"tensorrt": TensorRTFacts(version="10.3.0.30")},
    jetson=Jetson(release="36.4.3", jetpack="6", power_mode="15W"),
)
DESKTOP = msgspec.structs.replace(
    ORIN,
    machine="x86_64",
    gpu=msgspec.structs.replace(ORIN.gpu, name="RTX 4090", compute_capability=(8, 9)),
    tensorrt={"rtx": TensorRTFacts(version="1.7.1.116")},
    jetson=None,
)


@pytest.fixture
def bundle(
    copy_bundle: Callable[..., Path],
    add_variant: Callable[..., None],
    edit_manifest: Callable[..., None],
    replace_file: Callable[..., None],
) -> Bundle:
    """A bundle with two variants for TensorRT, and shapes to build engines for."""
    path = copy_bundle()
    add_variant(path, "int8-gpu", ("tensorrt", "rtx"))
    add_variant(path, "fp16-gpu", ("tensorrt", "rtx"))

    model = onnx.load(path / "models" / "fp16-gpu.onnx")
    model.doc_string = "another model, that answers the same"
    replace_file(path, "models/fp16-gpu.onnx", model.SerializeToString())

    def change(manifest: dict[str, Any]) -> None:
        manifest["profiles"] = PROFILES

    edit_manifest(path, change)
    return Bundle.open(path)


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


@pytest.fixture
def trt() -> FakeTensorRT:
    return FakeTensorRT(FakeDriver())


SERVER = msgspec.structs.replace(
    ORIN,
    gpu=msgspec.structs.replace(ORIN.gpu, name="A100", compute_capability=(8, 0), integrated=False),
    jetson=None,
)
"""TensorRT on a GPU that is no Jetson."""
MAXN = msgspec.structs.replace(ORIN, jetson=msgspec.structs.replace(ORIN.jetson, power_mode="MAXN"))


def build(
    bundle: Bundle,
    cache: EngineCache,
    trt: FakeTensorRT,
    facts: DeviceFacts = ORIN,
    **options: Any,
) -> dict[str, EngineKey]:
    options.setdefault("available_bytes", lambda: None)
    built = build_engines(bundle, "tensorrt", facts, cache, trt=trt, **options)
    assert built.failures == {}
    return built.keys


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> Callable[..., None]:
    """Lets TensorRT refuse all models but those of some variants."""
    parse = FakeParser.parse

    def choose_some(*names: str) -> None:
        taken = [bundle.read(bundle.manifest.variant(name).model) for name in names]

        def refuse(self: FakeParser, model: bytes) -> bool:
            if model in taken:
                return parse(self, model)
            self._errors.append(_ParserError("no matching rules for dequantize"))
            return False

        monkeypatch.setattr(FakeParser, "parse", refuse)

    return choose_some


def test_engines_are_built_once_and_serve(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    said: list[str] = []
    steps: list[tuple[int, int]] = []
    keys = build(
        bundle,
        cache,
        trt,
        say=said.append,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert list(keys) == ["int8-gpu", "fp16-gpu"] and trt.builds == 2
    assert steps[-1][0] == steps[-1][1] > 0
    assert any("building for TensorRT 10.3.0.30 on linux-aarch64" in line for line in said)
    assert build(bundle, cache, trt, say=said.append) == keys and trt.builds == 2
    assert "there is an engine" in said[-1]
    assert build(bundle, cache, trt, force=True) == keys and trt.builds == 4
    entry = cache.entries()[0]
    assert entry.gpu == "Orin" and entry.power_mode == "15W"

    choice = choose(bundle.manifest, ORIN, engines=available_engines(bundle, cache))
    assert (choice.device, choice.variant.name) == ("tensorrt", "int8-gpu")
    assert choice.engine == keys["int8-gpu"] and not choice.engine_missing
    session = open_engine(bundle, choice.engine, cache, trt=trt, driver=trt.driver)
    assert session.input_names == {spec.name for spec in bundle.manifest.inputs}
    session.close()


def test_timings_of_kernels_are_kept_for_the_next_build(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    key = build(bundle, cache, trt)["int8-gpu"]
    assert cache.read_timings(key, "Orin", "15W") == b"Fake GPU measured"
    assert (trt.builds, trt.measurements) == (2, 1)
    cache.write_timings(key, "Orin", "15W", b"another GPU measured")
    cache.directory.joinpath(f"{key.digest}.engine").unlink()
    build(bundle, cache, trt)  # TensorRT refuses those, and measures anew
    assert cache.read_timings(key, "Orin", "15W") == b"Fake GPU measured"


def test_timings_hold_for_one_gpu_in_one_power_mode(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    key = build(bundle, cache, trt)["int8-gpu"]
    assert trt.measurements == 1
    for path in cache.directory.glob("*.engine"):
        path.unlink()
    build(bundle, cache, trt)
    assert (trt.builds, trt.measurements) == (4, 1)
    build(bundle, cache, trt, MAXN, force=True)
    assert (trt.builds, trt.measurements) == (6, 3)
    other = msgspec.structs.replace(ORIN, gpu=msgspec.structs.replace(ORIN.gpu, name="Orin NX"))
    for path in cache.directory.glob("*.engine"):
        path.unlink()
    build(bundle, cache, trt, other)
    assert trt.measurements == 4
    for gpu, mode in (("Orin", "15W"), ("Orin", "MAXN"), ("Orin NX", "15W")):
        assert cache.read_timings(key, gpu, mode) is not None
    assert cache.read_timings(key, "Orin NX", "MAXN") is None


def test_by_force_kernels_are_measured_anew_and_their_times_kept(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    key = build(bundle, cache, trt)["int8-gpu"]
    # What jetson_clocks changes can't be read, so that --force may rely on nothing that was kept.
    cache.write_timings(key, "Orin", "15W", b"Fake GPU measured at another clock")
    build(bundle, cache, trt, force=True)
    assert trt.measurements == 3
    assert cache.read_timings(key, "Orin", "15W") == b"Fake GPU measured"


def test_an_engine_from_another_power_mode_is_told(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    said: list[str] = []
    build(bundle, cache, trt)
    build(bundle, cache, trt, say=said.append)
    assert not any("power mode" in line for line in said)
    build(bundle, cache, trt, MAXN, say=said.append)
    assert "its kernels were chosen in power mode 15W, this is MAXN: --force chooses anew" in said


def test_timings_that_are_not_what_was_written_do_not_reach_tensorrt(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    key = build(bundle, cache, trt)["int8-gpu"]
    (path,) = cache.directory.glob("timing-*.cache")
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.read_timings(key, "Orin", "15W") is None
    cache.directory.joinpath(f"{key.digest}.engine").unlink()
    build(bundle, cache, trt)
    assert cache.read_timings(key, "Orin", "15W") == b"Fake GPU measured"


def test_too_little_memory_is_said_before_the_build(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    with pytest.raises(DeviceError) as caught:
        build(bundle, cache, trt, available_bytes=lambda: 100 * 2**20)
    said = (
        r"needs about (\d+) MiB of free memory \(1700 for TensorRT's own library\), found 100 MiB"
    )
    (needed, _) = re.findall(said, str(caught.value))
    assert int(needed) > 1700 + 512 and trt.builds == 0 and cache.entries() == []


def test_the_builder_library_needs_memory_where_the_gpu_has_none_of_its_own(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    between = 1500 * 2**20  # enough for the model and the workspace, not for the library besides
    with pytest.raises(DeviceError, match="for TensorRT's own library"):
        build(bundle, cache, trt, available_bytes=lambda: between)
    assert len(build(bundle, cache, trt, SERVER, available_bytes=lambda: between)) == 2
    rtx = FakeTensorRT(trt.driver, "rtx", "1.7.1.116")
    shared = msgspec.structs.replace(
        DESKTOP,
        gpu=msgspec.structs.replace(DESKTOP.gpu, compute_capability=(12, 1), integrated=True),
    )
    # Nothing of an engine for RTX is built on the GPU.
    build_engines(bundle, "rtx", shared, cache, trt=rtx, available_bytes=lambda: between)
    model = 500 * 2**20
    alone = needed_memory_bytes(model, BuildOptions())
    assert alone == needed_memory_bytes(model, BuildOptions(), integrated=False)
    assert needed_memory_bytes(model, BuildOptions(), integrated=True) - alone == 1700 * 2**20


def test_a_gpu_with_memory_of_its_own_must_have_enough_of_it(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    own = msgspec.structs.replace(ORIN.gpu, integrated=False, free_bytes=100 * 2**20)
    full = msgspec.structs.replace(ORIN, gpu=own)
    with pytest.raises(DeviceError, match=r"MiB of free GPU memory, found 100 MiB"):
        build_engines(bundle, "tensorrt", full, cache, trt=trt, available_bytes=lambda: None)
    shared = msgspec.structs.replace(ORIN, gpu=msgspec.structs.replace(own, integrated=True))
    build_engines(bundle, "tensorrt", shared, cache, trt=trt, available_bytes=lambda: None)
    assert trt.builds == 2


def test_a_build_that_fails_leaves_nothing_and_does_not_block_the_next(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "edgebert_runtime.testing.fake_tensorrt._OnnxParser.parse", lambda s, m: False
        )
        with pytest.raises(ModelRefusedError, match="TensorRT does not take the model"):
            build(bundle, cache, trt)
    assert cache.entries() == []
    assert len(build(bundle, cache, trt)) == 2


@pytest.mark.parametrize("name", ["int8-gpu", "fp16-gpu"])
def test_a_variant_that_cannot_be_built_does_not_keep_the_other_from_it(
    bundle: Bundle,
    cache: EngineCache,
    trt: FakeTensorRT,
    only: Callable[..., None],
    name: str,
) -> None:
    only(name)
    built = build_engines(bundle, "tensorrt", ORIN, cache, trt=trt, available_bytes=lambda: None)
    ((other, failure),) = built.failures.items()
    assert list(built.keys) == [name] and {name, other} == {"int8-gpu", "fp16-gpu"}
    assert failure.startswith("TensorRT does not take the model: no matching rules")
    engines = available_engines(bundle, cache)
    assert engines == [built.keys[name]]
    choice = choose(bundle.manifest, ORIN, engines=engines)
    assert (choice.device, choice.variant.name) == ("tensorrt", name)


def test_if_no_engine_can_be_built_all_reasons_are_told(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = iter([ModelRefusedError("no rules for it"), DeviceError("no tactic for it")])

    def fail(*args: Any, **options: Any) -> Any:
        raise next(reasons)

    monkeypatch.setattr("edgebert_runtime.engines.build_engine", fail)
    with pytest.raises(
        DeviceError,
        match="no engine could be built: int8-gpu: no rules for it; fp16-gpu: no tactic for it",
    ) as caught:
        build(bundle, cache, trt)
    assert type(caught.value) is DeviceError


def test_an_interrupt_ends_the_builds_of_all_variants(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def interrupt(*args: Any, **options: Any) -> Any:
        begun.append("a build")
        raise KeyboardInterrupt

    monkeypatch.setattr("edgebert_runtime.engines.build_engine", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, cache, trt)
    assert begun == ["a build"]


def test_what_holds_for_all_engines_ends_the_first_build(
    bundle: Bundle, tmp_path: Path, trt: FakeTensorRT
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeviceError, match=r"^engines cannot be kept in"):
        build(bundle, EngineCache(tmp_path / "file" / "engines"), trt)
    assert trt.builds == 0


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (ORIN, "no engines for other GPUs on a Jetson, found Orin: leave out --hardware-compat"),
        # In a container, where nothing else tells of the Jetson.
        (msgspec.structs.replace(ORIN, jetson=None), "on a Jetson, found Orin"),
        (
            msgspec.structs.replace(
                SERVER,
                gpu=msgspec.structs.replace(SERVER.gpu, name="T4", compute_capability=(7, 5)),
            ),
            r"from Ampere on \(compute capability 8.0\) are built on one of those, found T4",
        ),
    ],
)
def test_an_engine_for_other_gpus_is_refused_where_tensorrt_builds_none(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT, facts: DeviceFacts, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        build(bundle, cache, trt, facts, options=BuildOptions(hardware_compatible=True))
    assert trt.builds == 0 and not cache.directory.exists()


def test_options_are_part_of_the_key(bundle: Bundle, cache: EngineCache, trt: FakeTensorRT) -> None:
    plain = build(bundle, cache, trt, SERVER)["int8-gpu"]
    options = BuildOptions(version_compatible=True, hardware_compatible=True, workspace_mib=64)
    other = build(bundle, cache, trt, SERVER, options=options)["int8-gpu"]
    assert plain.digest != other.digest and trt.builds == 4
    head = cache.read(other)
    assert b'"flags": ["EXCLUDE_LEAN_RUNTIME", "VERSION_COMPATIBLE"]' in head
    assert b'"level": "AMPERE_PLUS"' in head and b'"workspace": 67108864' in head


def test_a_version_compatible_engine_is_run_by_the_lean_runtime_of_its_release(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    key = build(bundle, cache, trt, options=BuildOptions(version_compatible=True))["int8-gpu"]
    updated = FakeTensorRT(trt.driver, version="10.7.0.23")
    newer = msgspec.structs.replace(ORIN, tensorrt={"tensorrt": TensorRTFacts(version="10.7.0.23")})
    choice = choose(bundle.manifest, newer, engines=available_engines(bundle, cache))
    assert choice.engine == key
    missing = (
        r"the lean runtime of the TensorRT that built the engine is not installed \(tried "
        r"libnvinfer_lean.so.10.3.0, libnvinfer_lean.so.10\): install it, or build the engine anew"
    )
    own, major = "libnvinfer_lean.so.10.3.0", "libnvinfer_lean.so.10"
    for installed in ({}, {major: "10.7.0.23"}):  # the update's own does not run the engine
        updated.lean_runtimes = installed
        with pytest.raises(DeviceError, match=missing):
            open_engine(bundle, key, cache, trt=updated, driver=trt.driver)
    for installed in ({own: "10.3.0.30", major: "10.7.0.23"}, {major: "10.3.0.30"}):
        updated.lean_runtimes = installed
        open_engine(bundle, key, cache, trt=updated, driver=trt.driver).close()
    open_engine(bundle, key, cache, trt=trt, driver=trt.driver).close()
    assert not +trt.driver.live


@pytest.mark.parametrize("version", ["10.3.0", "10.3.0.30", "10.3.0.post1"])
def test_a_lean_runtime_is_looked_for_under_the_names_that_there_are(version: str) -> None:
    key = msgspec.structs.replace(key_of(1), version=version)
    names = ("libnvinfer_lean.so.10.3.0", "libnvinfer_lean.so.10")
    assert lean_runtimes(key, "10.7.0.23") == lean_runtimes(key, "10.7.0") == names
    assert lean_runtimes(key, "10.3.0") == lean_runtimes(key, "10.3.0.30") == ()
    on_windows = msgspec.structs.replace(key, platform="win32-AMD64")
    assert lean_runtimes(on_windows, "10.7.0.23") == ("nvinfer_lean_10.dll",)


@pytest.mark.parametrize("option", ["version_compatible", "hardware_compatible"])
def test_options_that_rtx_does_not_have_are_refused(
    bundle: Bundle, cache: EngineCache, option: str
) -> None:
    with pytest.raises(InputError, match="leave out --version-compatible"):
        build_engines(bundle, "rtx", DESKTOP, cache, options=BuildOptions(**{option: True}))


@pytest.mark.parametrize("fault", ["cut", "one byte", "another's", "no entry"])
def test_an_engine_that_is_not_what_was_written_is_refused_and_removed(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT, fault: str
) -> None:
    keys = build(bundle, cache, trt)
    key, place = keys["int8-gpu"], cache.directory / f"{keys['int8-gpu'].digest}.engine"
    stored, data = place.read_bytes(), cache.read(key)
    if fault == "cut":
        place.write_bytes(stored[: len(stored) // 2])
    elif fault == "one byte":
        place.write_bytes(stored[:-1] + bytes([stored[-1] ^ 1]))
    elif fault == "another's":
        other = cache.directory / f"{keys['fp16-gpu'].digest}.engine"
        place.write_bytes(other.read_bytes())
    else:
        place.write_bytes(b"{\n" + data)

    class Untouched:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError("the engine reached TensorRT")

    with pytest.raises(DeviceError, match=r"was altered: .* removed; build it again"):
        open_engine(bundle, key, cache, trt=Untouched(), driver=trt.driver)
    assert not place.exists()
    assert build(bundle, cache, trt)["int8-gpu"] == key
    assert cache.read(key) == data


def test_entries_that_cannot_be_read_are_no_entries_and_are_built_again(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    keys = build(bundle, cache, trt)
    path = cache.directory / f"{keys['int8-gpu'].digest}.engine"
    for text in (b"", b"{", b"[]", b'{"key": 1}', b"\xff", path.read_bytes()[:-1]):
        path.write_bytes(text)
        assert [found.key for found in cache.entries()] == [keys["fp16-gpu"]]
        build(bundle, cache, trt)
        assert cache.has(keys["int8-gpu"]) and cache.read(keys["int8-gpu"])
    path.unlink()
    with pytest.raises(DeviceError, match="no engine for TensorRT"):
        cache.read(keys["int8-gpu"])


def test_an_altered_engine_stays_while_another_process_may_replace_it(cache: EngineCache) -> None:
    path = cache.directory / f"{key_of(1).digest}.engine"
    with cache.building(key_of(1)):
        path.write_bytes(b"not what was written")
        with pytest.raises(DeviceError, match="was altered"):
            cache.read(key_of(1))
        assert path.exists()
    with pytest.raises(DeviceError, match="was altered"):
        cache.read(key_of(1))
    assert not path.exists()


def key_of(number: int, **other: Any) -> EngineKey:
    return EngineKey(
        flavour="tensorrt",
        version="10.3.0.30",
        platform="linux-aarch64",
        compute_capability="8.7",
        model_sha256=f"{number:064x}",
        profiles=(),
        options=BuildOptions(),
        **other,
    )


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, limit_mib=3)
    for number in range(3):
        cache.write(key_of(number), bytes(900_000))
        time.sleep(0.01)
    cache.read(key_of(0))
    cache.write(key_of(3), bytes(900_000))
    kept = {int(entry.key.model_sha256, 16) for entry in cache.entries()}
    assert kept == {0, 2, 3}
    cache.write(key_of(4), bytes(5_000_000))  # larger than the limit: it stays, alone
    assert [int(entry.key.model_sha256, 16) for entry in cache.entries()] == [4]


def test_two_processes_build_an_engine_once(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from edgebert_runtime.engine import EngineKey\n"
        "from edgebert_runtime.engine_cache import EngineCache\n"
        "import msgspec\n"
        "cache = EngineCache(Path(sys.argv[1]))\n"
        "key = msgspec.json.decode(sys.argv[2].encode(), type=EngineKey)\n"
        "with cache.building(key) as needed:\n"
        "    if needed:\n"
        "        time.sleep(0.5)\n"
        "        cache.write(key, b'engine')\n"
        "    print(needed)\n"
    )
    key = msgspec.json.encode(key_of(1)).decode()
    command = [sys.executable, "-c", code, str(tmp_path), key]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(process.communicate(timeout=60)[0].strip() for process in running) == [
        "False",
        "False",
        "True",
    ]


def test_what_a_process_left_that_was_ended_is_removed_by_the_next_build(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    left = [tmp_path / f"{key_of(number).digest}.engine.x.part" for number in (1, 2)]
    for part in left:
        part.write_bytes(b"half")
    assert cache.entries() == []
    with cache.building(key_of(1)) as needed:
        assert needed and not any(part.exists() for part in left)


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EngineCache(tmp_path)
    cache.write(key_of(1), b"first")

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(DeviceError, match=r"No space left on device; make room, or set"):
            cache.write(key_of(1), b"second")
    assert cache.read(key_of(1)) == b"first" and len(list(tmp_path.iterdir())) == 1


def test_another_process_that_evicts_at_the_same_time_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EngineCache(tmp_path, limit_mib=0)
    cache.write(key_of(1), b"engine")

    def gone(self: Path, **options: Any) -> None:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "unlink", gone)
    cache.write(key_of(2), b"engine")
    assert cache.read(key_of(2)) == b"engine"


def test_without_a_home_nothing_is_found_and_keeping_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("edgebert_runtime.engine_cache.cache_dir", homeless)
    cache = EngineCache()
    assert cache.entries() == [] and not cache.has(key_of(1))
    with pytest.raises(DeviceError, match="EDGEBERT_CACHE_DIR"), cache.building(key_of(1)):
        raise AssertionError


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEBERT_ENGINE_CACHE_MIB", "8G")
    with pytest.raises(InputError, match=r"EDGEBERT_ENGINE_CACHE_MIB is '8G'; it must be"):
        EngineCache()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = EngineCache(tmp_path / "file" / "engines")
    with pytest.raises(DeviceError, match="EDGEBERT_CACHE_DIR"), cache.building(key_of(1)):
        raise AssertionError
    with pytest.raises(DeviceError, match="EDGEBERT_CACHE_DIR"):
        cache.write(key_of(1), b"engine")


def test_threads_wait_for_each_other(tmp_path: Path) -> None:
    cache, order = EngineCache(tmp_path), []
    said: list[str] = []

    def run(number: int) -> None:
        with cache.building(key_of(1), said.append) as needed:
            order.append((number, needed))
            while needed and len(said) < 2:  # until both others wait
                time.sleep(0.001)
            if needed:
                cache.write(key_of(1), b"engine")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [needed for _, needed in order] == [True, False, False]
    assert said == ["waiting for another process, which builds an engine"] * 2


def timings_of(**p50_ms: float) -> list[EngineTiming]:
    profile = Profile(**PROFILES[0])
    return [
        EngineTiming(variant=name.replace("_", "-"), profile=profile, p50_ms=ms, p99_ms=2 * ms)
        for name, ms in p50_ms.items()
    ]


def test_every_engine_is_timed_for_every_shape(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgebert_runtime.engines.import_tensorrt", lambda flavour: trt)
    monkeypatch.setattr("edgebert_runtime.cuda.import_driver", lambda: trt.driver)
    monkeypatch.setattr("edgebert_runtime.engines._ROUNDS", 2)
    keys = build(bundle, cache, trt)
    preference = measure_and_remember(bundle, keys, ORIN, cache)
    assert {(t.variant, t.profile.max_batch, t.profile.max_seq) for t in preference.timings} == {
        (name, p["max_batch"], p["max_seq"]) for name in keys for p in PROFILES
    }
    assert all(0 < t.p50_ms <= t.p99_ms for t in preference.timings)
    assert preference.variant == fastest(preference.timings)
    assert read_preference(bundle, "tensorrt", ORIN, cache) == preference
    assert not +trt.driver.live


def test_rtx_is_timed_with_the_kernels_of_the_shape_and_serves_without_waiting_for_them(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = FakeTensorRT(FakeDriver(compute_capability=(8, 9)), "rtx", "1.7.1.116")
    monkeypatch.setattr("edgebert_runtime.engines.import_tensorrt", lambda flavour: trt)
    monkeypatch.setattr("edgebert_runtime.cuda.import_driver", lambda: trt.driver)
    monkeypatch.setattr("edgebert_runtime.engines._ROUNDS", 1)
    built = build_engines(bundle, "rtx", DESKTOP, cache, available_bytes=lambda: None)
    measure_and_remember(bundle, built.keys, DESKTOP, cache)
    assert trt.kernels == {"EAGER"}
    # What was compiled for it is kept for who serves.
    assert cache.kernels(built.keys["int8-gpu"]).read_bytes() == b"kernels of the fake"
    trt.kernels.clear()
    session = open_engine(bundle, built.keys["int8-gpu"], cache)
    session.run({name: np.ones((1, 8), dtype=np.int64) for name in session.input_names})
    session.close()
    assert trt.kernels == {"LAZY"}


def test_the_fastest_variant_is_preferred_where_it_was_measured(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    keys = build(bundle, cache, trt)
    timings = timings_of(int8_gpu=2.0, fp16_gpu=1.0)
    assert fastest(timings) == "fp16-gpu"
    assert preferred_variants(bundle, cache, ORIN) == {}
    assert remember_preference(bundle, cache, keys, timings, ORIN).power_mode == "15W"
    preferred = preferred_variants(bundle, cache, ORIN)
    assert preferred == {"tensorrt": "fp16-gpu"}
    engines = available_engines(bundle, cache)
    choice = choose(bundle.manifest, ORIN, engines=engines, preferred=preferred)
    assert choice.variant.name == "fp16-gpu"
    # What was measured of one flavour says nothing of the other.
    of_rtx = choose(bundle.manifest, ORIN, engines=engines, preferred={"rtx": "fp16-gpu"})
    assert of_rtx.variant.name == "int8-gpu"
    # Another TensorRT has not been measured, nor another GPU or power mode; without a GPU, nothing.
    newer = msgspec.structs.replace(ORIN, tensorrt={"tensorrt": TensorRTFacts(version="10.7.0")})
    assert ORIN.gpu is not None
    other = msgspec.structs.replace(ORIN, gpu=msgspec.structs.replace(ORIN.gpu, name="Orin NX"))
    for elsewhere in (newer, other, MAXN, msgspec.structs.replace(ORIN, gpu=None)):
        assert preferred_variants(bundle, cache, elsewhere) == {}


def test_the_exact_engine_comes_before_a_compatible_one(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT
) -> None:
    exact = build(bundle, cache, trt, SERVER)["int8-gpu"]
    options = BuildOptions(version_compatible=True, hardware_compatible=True)
    compatible = build(bundle, cache, trt, SERVER, options=options)["int8-gpu"]
    for engines in ([exact, compatible], [compatible, exact]):
        assert choose(bundle.manifest, SERVER, engines=engines).engine == exact
    assert choose(bundle.manifest, SERVER, engines=[compatible]).engine == compatible


def test_without_an_engine_auto_runs_on_the_cpu_and_says_how_to_build(bundle: Bundle) -> None:
    choice = choose(bundle.manifest, ORIN)
    assert choice.device == "cpu" and choice.variant.name == "fp32"
    assert choice.faults == [
        "tensorrt: no engine was built for this device yet; build one with: edgebert-rt engine "
        "BUNDLE --flavour tensorrt"
    ]
    asked = choose(bundle.manifest, ORIN, build_engine=True)
    assert asked.engine_missing and asked.engine is not None
    with pytest.raises(DeviceError, match="no engine was built for this device yet"):
        choose(bundle.manifest, ORIN, "tensorrt")


def test_an_engine_for_something_else_is_refused_with_both_sides(bundle: Bundle) -> None:
    variant = bundle.manifest.variant("int8-gpu")
    key = wanted_key(bundle.manifest, variant, "tensorrt", ORIN)
    others = {
        "engine built for TensorRT 10.13.0 on linux-aarch64, compute capability 8.7, found "
        "TensorRT 10.3.0.30 on linux-aarch64, compute capability 8.7": {"version": "10.13.0"},
        "compute capability 11.0, found": {"compute_capability": "11.0"},
        "other shapes": {"profiles": ()},
    }
    for said, change in others.items():
        other = msgspec.structs.replace(key, **change)
        choice = choose(bundle.manifest, ORIN, engines=[other])
        assert choice.device == "cpu"
        assert said in choice.faults[0] and "build one with" in choice.faults[0]
    another_model = msgspec.structs.replace(key, model_sha256="0" * 64)
    assert difference(another_model, key) == "engine built from another model"
    assert choose(bundle.manifest, ORIN, engines=[another_model]).device == "cpu"


@pytest.mark.parametrize(
    ("facts", "built", "options", "serves"),
    [
        (ORIN, {"version": "10.0.1"}, {"version_compatible": True}, True),
        (ORIN, {"version": "10.3.0"}, {"version_compatible": True}, True),  # as some packages say
        (ORIN, {"version": "10.9.0"}, {"version_compatible": True}, False),  # newer than here
        (ORIN, {"version": "9.3.0"}, {"version_compatible": True}, False),
        (SERVER, {"compute_capability": "9.0"}, {"hardware_compatible": True}, True),
        (SERVER, {"compute_capability": "9.0"}, {}, False),
        (SERVER, {"platform": "linux-x86_64"}, {"hardware_compatible": True}, False),
        (ORIN, {"compute_capability": "8.0"}, {"hardware_compatible": True}, False),
    ],
)
def test_engines_built_to_be_compatible_serve_more_machines(
    bundle: Bundle,
    facts: DeviceFacts,
    built: dict[str, str],
    options: dict[str, bool],
    serves: bool,
) -> None:
    variant = bundle.manifest.variant("int8-gpu")
    wanted = wanted_key(bundle.manifest, variant, "tensorrt", facts)
    found = msgspec.structs.replace(wanted, options=BuildOptions(**options), **built)
    assert (difference(found, wanted) is None) == serves


def test_a_classifier_builds_its_engine_if_it_may(
    bundle: Bundle,
    cache: EngineCache,
    trt: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    classifiers: dict[str, Classifier],
) -> None:
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(cache.directory.parent))
    monkeypatch.setattr("edgebert_runtime.classifier.gather_facts", lambda device: ORIN)
    monkeypatch.setattr("edgebert_runtime.engines.import_tensorrt", lambda flavour: trt)
    monkeypatch.setattr("edgebert_runtime.cuda.import_driver", lambda: trt.driver)
    texts = ["a great film", "dull", "so long that it could be cut, but it is not that long"] * 5
    with Classifier.load(bundle.path) as clf:
        assert clf.choice is not None and clf.choice.device == "cpu"
    assert "build one with: edgebert-rt engine" in caplog.text and trt.builds == 0
    with Classifier.load(bundle.path, build_engine=True) as clf:
        assert clf.choice is not None and clf.choice.device == "tensorrt"
        expected = classifiers["single"].scores(texts)
        assert abs(clf.scores(texts) - expected).max() < 1e-5
    assert trt.builds == 1
    with Classifier.load(bundle.path, device="tensorrt") as clf:
        assert clf.choice is not None and clf.choice.variant.name == "int8-gpu"
    assert trt.builds == 1 and not +trt.driver.live


@pytest.mark.parametrize("device", ["auto", "tensorrt"])
def test_a_classifier_builds_the_other_variant_if_the_first_cannot_be_built(
    bundle: Bundle,
    cache: EngineCache,
    trt: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    only: Callable[..., None],
    device: str,
) -> None:
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(cache.directory.parent))
    monkeypatch.setattr("edgebert_runtime.classifier.gather_facts", lambda device: ORIN)
    monkeypatch.setattr("edgebert_runtime.engines.import_tensorrt", lambda flavour: trt)
    monkeypatch.setattr("edgebert_runtime.engines._available", lambda: None)
    monkeypatch.setattr("edgebert_runtime.cuda.import_driver", lambda: trt.driver)
    only("fp16-gpu")
    with Classifier.load(bundle.path, device=device, build_engine=True) as clf:
        assert clf.choice is not None and clf.choice.device == "tensorrt"
        assert clf.choice.variant.name == "fp16-gpu"
        assert len(clf.predict(["a great film"])) == 1
    assert "int8-gpu: not built: TensorRT does not take the model" in caplog.text
    # Asked for by name, it is that one or none.
    with pytest.raises(ModelRefusedError, match=r"^TensorRT does not take"):
        Classifier.load(bundle.path, device="tensorrt", variant="int8-gpu", build_engine=True)
    assert trt.builds == 1 and not +trt.driver.live


def test_no_engine_is_built_for_a_bundle_whose_tokenizer_is_at_fault(
    bundle: Bundle,
    cache: EngineCache,
    trt: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
    replace_file: Callable[..., None],
) -> None:
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(cache.directory.parent))
    monkeypatch.setattr("edgebert_runtime.classifier.gather_facts", lambda device: ORIN)
    monkeypatch.setattr("edgebert_runtime.engines.import_tensorrt", lambda flavour: trt)
    monkeypatch.setattr("edgebert_runtime.cuda.import_driver", lambda: trt.driver)
    replace_file(bundle.path, "tokenizer.json", b"no tokenizer")
    with pytest.raises(BundleError, match="the tokenizer cannot be read"):
        Classifier.load(bundle.path, build_engine=True)
    assert trt.builds == 0 and not +trt.driver.live


def test_a_model_that_this_tensorrt_does_not_take_is_served_from_the_cpu_and_said(
    bundle: Bundle,
    cache: EngineCache,
    trt: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(cache.directory.parent))
    monkeypatch.setattr("edgebert_runtime.classifier.gather_facts", lambda device: ORIN)
    monkeypatch.setattr("edgebert_runtime.engines.import_tensorrt", lambda flavour: trt)
    monkeypatch.setattr(
        "edgebert_runtime.testing.fake_tensorrt._OnnxParser.parse", lambda s, m: False
    )
    with Classifier.load(bundle.path, build_engine=True) as clf:
        assert clf.choice is not None and clf.choice.device == "cpu"
        assert len(clf.predict(["a great film"])) == 1
    assert "falling back to cpu" in caplog.text
    assert "TensorRT does not take the model" in caplog.text
    with pytest.raises(ModelRefusedError):
        Classifier.load(bundle.path, device="tensorrt", build_engine=True)


def test_an_engine_that_fails_where_nothing_else_runs_is_told_with_the_rest(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle, cache, trt)
    alone = msgspec.structs.replace(
        ORIN, onnxruntime=(), providers=(), onnxruntime_fault="ONNX Runtime is not installed"
    )
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(cache.directory.parent))
    monkeypatch.setattr("edgebert_runtime.classifier.gather_facts", lambda device: alone)
    monkeypatch.setattr("edgebert_runtime.engines.import_tensorrt", lambda flavour: trt)
    monkeypatch.setattr("edgebert_runtime.cuda.import_driver", lambda: trt.driver)
    trt.driver.fail("cuMemAlloc")
    with pytest.raises(
        MissingExtraError, match=r"not installed; tensorrt: cuMemAlloc failed: .*OUT_OF_MEMORY"
    ):
        Classifier.load(bundle.path, variant="int8-gpu")
    trt.driver.fail("cuMemAlloc")
    with pytest.raises(DeviceError, match="cuMemAlloc failed"):
        Classifier.load(bundle.path, device="tensorrt")
    assert not +trt.driver.live


@pytest.fixture
def command(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs ``edgebert-rt engine`` on the Orin."""
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(cache.directory.parent))
    monkeypatch.setattr("edgebert_runtime.cli.gather_facts", lambda device: ORIN)
    monkeypatch.setattr("edgebert_runtime.engines.import_tensorrt", lambda flavour: trt)
    monkeypatch.setattr("edgebert_runtime.engines._available", lambda: None)
    monkeypatch.setattr("edgebert_runtime.cuda.import_driver", lambda: trt.driver)
    monkeypatch.setattr("edgebert_runtime.engines._ROUNDS", 1)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["engine", str(bundle.path), *arguments])

    return run


def test_the_command_measures_once_and_again_by_force(
    command: Callable[..., Any], trt: FakeTensorRT, bundle: Bundle, cache: EngineCache
) -> None:
    first = command()
    assert first.exit_code == 0 and "preferred: " in first.stdout
    before = cache.preference(bundle.digest, "tensorrt").stat().st_mtime_ns
    launched = trt.driver.calls["cuGraphLaunch"]
    again = command()
    assert again.stdout == first.stdout and trt.driver.calls["cuGraphLaunch"] == launched
    # One engine is no comparison: what was found out stays.
    one = command("--variant", "int8-gpu", "--force")
    assert "not measured: that compares an engine of each variant" in one.stderr
    assert cache.preference(bundle.digest, "tensorrt").stat().st_mtime_ns == before
    forced = command("--force", "--json")
    assert forced.exit_code == 0 and trt.driver.calls["cuGraphLaunch"] > launched
    document = json.loads(forced.stdout)
    assert document["preference"]["power_mode"] == "15W" and document["failures"] == {}


def test_the_command_goes_on_with_the_engines_that_can_be_built(
    command: Callable[..., Any],
    only: Callable[..., None],
    trt: FakeTensorRT,
    bundle: Bundle,
    cache: EngineCache,
) -> None:
    only("fp16-gpu")
    done = command()
    failed = "int8-gpu: not built: TensorRT does not take the model"
    assert done.exit_code == 0 and failed in done.stderr and "int8-gpu" not in done.stdout
    assert "preferred: fp16-gpu" in done.stdout
    assert preferred_variants(bundle, cache, ORIN) == {"tensorrt": "fp16-gpu"}
    document = json.loads(command("--json").stdout)
    assert list(document["engines"]) == ["fp16-gpu"] == [document["preference"]["variant"]]
    assert document["failures"]["int8-gpu"].startswith("TensorRT does not take the model")
    # What was asked for by name is missing, though the other one is there.
    named = command("--variant", "int8-gpu", "--variant", "fp16-gpu", "--json")
    assert named.exit_code == 1 and list(json.loads(named.stdout)["engines"]) == ["fp16-gpu"]
    alone = command("--variant", "int8-gpu")
    assert alone.exit_code == 1 and "error: TensorRT does not take" in alone.stderr
    assert trt.builds == 1


def test_an_engine_that_could_not_be_compared_before_is_measured(
    command: Callable[..., Any],
    only: Callable[..., None],
    trt: FakeTensorRT,
) -> None:
    only("fp16-gpu")
    assert command().exit_code == 0
    only("fp16-gpu", "int8-gpu")
    assert command("--variant", "int8-gpu").exit_code == 0
    done = command("--json")
    measured = {timing["variant"] for timing in json.loads(done.stdout)["preference"]["timings"]}
    assert measured == {"int8-gpu", "fp16-gpu"} and trt.builds == 2


def wrong(bundle: Bundle, edit_answers: Callable[..., None], variant: str) -> Bundle:
    """The bundle, whose known answers of a variant are not what it computes."""

    def change(answers: dict[str, Any]) -> None:
        logits = answers["expected"][variant]["logits"]
        answers["expected"][variant]["logits"] = [[[-x for x in row] for row in b] for b in logits]

    edit_answers(bundle.path, change)
    return Bundle.open(bundle.path)


def test_an_engine_that_does_not_give_the_known_answers_is_neither_measured_nor_loaded(
    bundle: Bundle,
    cache: EngineCache,
    trt: FakeTensorRT,
    edit_answers: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = wrong(bundle, edit_answers, "int8-gpu")
    keys = build(bundle, cache, trt)
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(cache.directory.parent))
    monkeypatch.setattr("edgebert_runtime.classifier.gather_facts", lambda device: ORIN)
    monkeypatch.setattr("edgebert_runtime.engines.import_tensorrt", lambda flavour: trt)
    monkeypatch.setattr("edgebert_runtime.cuda.import_driver", lambda: trt.driver)
    said: list[str] = []
    preference = measure_and_remember(bundle, keys, ORIN, cache, said.append)
    assert {timing.variant for timing in preference.timings} == {"fp16-gpu"}
    assert len(said) == 1
    assert "int8-gpu: not measured: int8-gpu computes wrongly on tensorrt" in said[0]
    # Without a preference, INT8 comes first; it is passed over by name for FP16 on the same device.
    cache.preference(bundle.digest, "tensorrt").unlink()
    with Classifier.load(bundle.path) as clf:
        assert clf.choice is not None
        assert (clf.choice.device, clf.choice.variant.name) == ("tensorrt", "fp16-gpu")
        assert "int8-gpu computes wrongly" in clf.choice.passed_over[0]
    assert "int8-gpu computes wrongly on tensorrt" in caplog.text
    with pytest.raises(DeviceError, match=r"int8-gpu computes wrongly on tensorrt: .* off by"):
        Classifier.load(bundle.path, variant="int8-gpu", device="tensorrt")
    assert not +trt.driver.live


def test_an_engine_is_held_against_the_known_answers_once_for_each_engine_driver_and_gpu(
    bundle: Bundle, cache: EngineCache, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = [ORIN]
    build(bundle, cache, trt)
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(cache.directory.parent))
    monkeypatch.setattr("edgebert_runtime.classifier.gather_facts", lambda device: facts[0])
    monkeypatch.setattr("edgebert_runtime.engines.import_tensorrt", lambda flavour: trt)
    monkeypatch.setattr("edgebert_runtime.cuda.import_driver", lambda: trt.driver)
    ran: list[str] = []
    from edgebert_runtime import engines as engines_module

    real = engines_module.verify

    def watched(*args: Any, **how: Any) -> Any:
        ran.append(args[2])
        return real(*args, **how)

    monkeypatch.setattr(engines_module, "verify", watched)
    for expected in (1, 1):
        Classifier.load(bundle.path, device="tensorrt").close()
        assert len(ran) == expected
    facts[0] = msgspec.structs.replace(ORIN, driver="999.1")
    Classifier.load(bundle.path, device="tensorrt").close()
    assert len(ran) == 2


def test_an_engine_that_cannot_be_opened_does_not_keep_the_other_from_being_measured(
    command: Callable[..., Any], trt: FakeTensorRT, bundle: Bundle, cache: EngineCache
) -> None:
    command()
    cache.preference(bundle.digest, "tensorrt").unlink()
    trt.driver.fail("cuMemAlloc")  # for the first that is opened
    done = command()
    assert done.exit_code == 0 and "preferred: fp16-gpu" in done.stdout
    assert "int8-gpu: not measured: cuMemAlloc failed: " in done.stderr
    again = command("--json")  # memory is there again, and so is the comparison
    timings = json.loads(again.stdout)["preference"]["timings"]
    assert {timing["variant"] for timing in timings} == {"int8-gpu", "fp16-gpu"}
    cache.preference(bundle.digest, "tensorrt").unlink()
    trt.lean_runtimes, trt.__version__ = {}, "10.3.0.99"  # which loads neither
    neither = command()
    assert neither.exit_code == 1
    assert "error: no engine can be used: int8-gpu: TensorRT cannot load" in neither.stderr
    assert not +trt.driver.live


def test_the_command_measures_anew_in_another_power_mode(
    command: Callable[..., Any], trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    command()
    monkeypatch.setattr("edgebert_runtime.cli.gather_facts", lambda device: MAXN)
    done = command("--json")
    assert json.loads(done.stdout)["preference"]["power_mode"] == "MAXN" and trt.builds == 2
    assert "--force chooses anew" in done.stderr


def test_on_a_jetson_the_command_refuses_engines_for_other_gpus(
    command: Callable[..., Any], trt: FakeTensorRT
) -> None:
    done = command("--hardware-compatible")
    assert done.exit_code == 2 and trt.builds == 0
    assert len(done.stderr.splitlines()) == 1 and "on a Jetson, found Orin" in done.stderr


def test_the_log_of_a_build_that_is_ended_is_there(
    command: Callable[..., Any], cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def end(self: Any, monitor: Any) -> bool:
        self._logger.log(3, "Local timing cache in use")
        written.append((cache.directory / "build-tensorrt.log").read_text())
        return False

    monkeypatch.setattr("edgebert_runtime.testing.fake_tensorrt._Builder._report", end)
    done = command("--variant", "int8-gpu")
    assert done.exit_code == 1 and written == ["info: Local timing cache in use\n"]
    assert "TensorRT's log: " in done.stderr and "The build was cancelled" in done.stderr


def test_a_bundle_brings_engines_of_its_own(
    bundle: Bundle, cache: EngineCache, edit_manifest: Callable[..., None]
) -> None:
    import hashlib

    desktop, trt = DESKTOP, FakeTensorRT(FakeDriver(compute_capability=(8, 9)), "rtx", "1.7.1.116")
    built = build_engines(bundle, "rtx", desktop, cache, trt=trt, available_bytes=lambda: None)
    keys = built.keys
    data = cache.read(keys["int8-gpu"])
    assert [p.max_batch for p in keys["int8-gpu"].profiles] == [8, 8]  # none for single rows
    path = Path(bundle.path)
    (path / "engines").mkdir()
    (path / "engines" / "int8-gpu-rtx.engine").write_bytes(data)

    def change(manifest: dict[str, Any]) -> None:
        name = "engines/int8-gpu-rtx.engine"
        manifest["engines"] = [
            {
                "path": name,
                "variant": "int8-gpu",
                "flavour": "rtx",
                "version": "1.7.1.116",
                "platform": "linux-x86_64",
            }
        ]
        sha256 = hashlib.sha256(data).hexdigest()
        manifest["files"].append({"path": name, "size_bytes": len(data), "sha256": sha256})

    edit_manifest(path, change)
    opened, empty = Bundle.open(path), EngineCache(cache.directory.parent / "empty")
    engines = available_engines(opened, empty)
    assert engines == list(bundled_keys(opened.manifest))
    choice = choose(opened.manifest, desktop, engines=engines)
    assert (choice.device, choice.variant.name) == ("rtx", "int8-gpu")
    assert choice.engine is not None
    # It is not built again, and it runs although nothing is in the cache.
    again = build_engines(opened, "rtx", desktop, empty, trt=trt)
    assert again.keys["int8-gpu"] == choice.engine
    assert not empty.has(choice.engine)
    session = open_engine(opened, choice.engine, empty, trt=trt, driver=trt.driver)
    batch = {name: np.ones((1, 8), dtype=np.int64) for name in session.input_names}
    session.run(batch)
    session.close()
    assert empty.kernels(choice.engine).read_bytes() == b"kernels of the fake"
    other = msgspec.structs.replace(desktop, tensorrt={"rtx": TensorRTFacts(version="1.8.0.1")})
    refused = choose(opened.manifest, other, engines=engines)
    assert refused.device == "cpu"
    assert (
        "engine built for TensorRT-RTX 1.7.1.116 on linux-x86_64, found TensorRT-RTX 1.8.0.1"
        in refused.faults[0]
    )
    (path / "engines" / "int8-gpu-rtx.engine").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="was altered"):
        open_engine(Bundle.open(path), choice.engine, empty, trt=trt, driver=trt.driver)
    # What was built here, by force, comes before what the bundle brings.
    empty.write(choice.engine, data)
    open_engine(Bundle.open(path), choice.engine, empty, trt=trt, driver=trt.driver).close()


def test_profiles_must_reach_the_longest_row(
    bundle: Bundle, edit_manifest: Callable[..., None]
) -> None:
    edit_manifest(Path(bundle.path), lambda manifest: manifest["profiles"].pop())
    with pytest.raises(BundleError, match="the longest profile must be as long as max_length"):
        Bundle.open(bundle.path)


def test_profile_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="1 <= opt <= max"):
        Profile(max_batch=1, opt_batch=2, max_seq=8, opt_seq=8)
    with pytest.raises(ValueError, match="1 <= opt <= max"):
        Profile(max_batch=1, opt_batch=1, max_seq=8, opt_seq=9)
