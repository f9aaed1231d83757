"""What is found out about a machine, and how ``doctor`` tells it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgebert_runtime import DeviceError, MissingExtraError
from edgebert_runtime.cuda import Cuda
from edgebert_runtime.facts import gather_facts, gpu_facts, import_onnxruntime
from edgebert_runtime.tensorrt_api import import_tensorrt, is_installed
from edgebert_runtime.testing import FakeDriver

ORIN_RELEASE = (
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: x\n"
)
CONFIGURATION = "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=15W >\n"


def system_of(root: Path, **files: str) -> Path:
    for path, text in files.items():
        place = root / path.replace("__", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return root


def test_a_jetson_says_its_release_and_power_mode(tmp_path: Path) -> None:
    root = system_of(
        tmp_path,
        etc__nv_tegra_release=ORIN_RELEASE,
        var__lib__nvpmodel__status="pmode:0002\n",
        proc__meminfo="MemTotal:        7802096 kB\nMemAvailable:    1 kB\n",
    )
    (root / "etc" / "nvpmodel.conf").write_text(CONFIGURATION)
    facts = gather_facts("cpu", root=str(root))
    assert facts.jetson is not None
    assert (facts.jetson.release, facts.jetson.jetpack) == ("36.4.3", "6")
    assert facts.jetson.power_mode == "15W"
    assert facts.memory_bytes == 7802096 * 1024


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [("R38 (release), REVISION: 2.0,", "7"), ("R99 (release), REVISION: 1.0,", None)],
)
def test_a_jetson_without_power_modes(tmp_path: Path, release: str, jetpack: str | None) -> None:
    facts = gather_facts("cpu", root=str(system_of(tmp_path, etc__nv_tegra_release=f"# {release}")))
    assert facts.jetson is not None and facts.jetson.jetpack == jetpack
    assert facts.jetson.power_mode is None


def test_a_machine_that_is_no_jetson(tmp_path: Path) -> None:
    facts = gather_facts("cpu", root=str(tmp_path))
    assert facts.jetson is None and facts.driver is None and facts.memory_bytes is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar\n", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Rel\n", "540.4.0"),
    ],
)
def test_the_drivers_version_is_read_from_the_kernel(
    tmp_path: Path, text: str, version: str
) -> None:
    place = tmp_path / "proc" / "driver" / "nvidia"
    place.mkdir(parents=True)
    (place / "version").write_text(text)
    assert gather_facts("cpu", root=str(tmp_path)).driver == version


def test_what_is_installed_and_broken_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('initialization failed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(MissingExtraError, match="cannot be imported: initialization failed"):
        import_onnxruntime()


def test_a_gpu_is_described_as_its_driver_does() -> None:
    driver = FakeDriver(name="Orin", compute_capability=(8, 7), cuda=(12, 6))
    with Cuda(driver) as cuda:
        found = gpu_facts(cuda)
    assert (found.name, found.compute_capability, found.cuda) == ("Orin", (8, 7), (12, 6))
    assert found.integrated and found.free_bytes == found.total_bytes == 8 * 2**30
    assert not +driver.live


def test_a_driver_without_a_gpu_is_one_line() -> None:
    with pytest.raises(DeviceError, match="NO_DEVICE"):
        Cuda(FakeDriver(gpus=0))


def test_cuda_bindings_without_a_driver_is_one_line() -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(DeviceError, match="there is no NVIDIA driver here") as caught:
        Cuda()
    assert "\n" not in str(caught.value)


def test_without_cuda_bindings_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingExtraError, match="edgebert-runtime"):
        Cuda()


def test_a_flavour_that_is_not_installed_says_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="JetPack"):
        import_tensorrt("tensorrt")


def test_a_folder_of_that_name_is_no_tensorrt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tensorrt-stubs installs a folder of types: Python would import it, empty.
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert not is_installed("tensorrt")


# With TensorRT for RTX installed and no driver: what happens on a machine without a GPU.


@pytest.fixture
def rtx_without_driver() -> None:
    if not is_installed("rtx"):
        pytest.skip("tensorrt-rtx has no wheel for this machine")
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")


@pytest.mark.usefixtures("rtx_without_driver")
def test_the_facts_name_the_flavour_and_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(flavour: object) -> None:
        raise AssertionError("nothing would run: it need not be loaded")

    monkeypatch.setattr("edgebert_runtime.tensorrt_api.import_tensorrt", fail)
    facts = gather_facts()
    assert facts.tensorrt["rtx"].version is not None and facts.tensorrt["rtx"].cuda == 13
    assert facts.gpu is None and facts.gpu_fault is not None


@pytest.mark.usefixtures("rtx_without_driver")
def test_asking_for_rtx_without_a_driver_is_one_clear_line(runtime_command, rtx_bundle) -> None:
    done = runtime_command("predict", rtx_bundle, "a great film", "--device", "rtx")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no way to run this bundle here: rtx: ") and "driver" in line


@pytest.mark.usefixtures("rtx_without_driver")
def test_auto_without_a_driver_serves_from_the_cpu_and_says_so(runtime_command, rtx_bundle) -> None:
    done = runtime_command("predict", rtx_bundle, "a great film")
    assert done.returncode == 0 and done.stdout.endswith("\ta great film\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("running fp32 on cpu: rtx: ") and "driver" in line


@pytest.mark.usefixtures("rtx_without_driver")
def test_doctor_tells_what_is_there_and_why_not_more(runtime_command, rtx_bundle) -> None:
    done = runtime_command("doctor", rtx_bundle)
    assert done.returncode == 0
    for start in ("machine: ", "GPU: ", "TensorRT: ", "TensorRT-RTX: 1.", "ONNX"):
        assert any(line.startswith(start) for line in done.stdout.splitlines()), start
    assert "would run: fp32 on cpu" in done.stdout and "passed over: rtx: " in done.stdout
    document = json.loads(runtime_command("doctor", rtx_bundle, "--json").stdout)
    assert document["facts"]["gpu"] is None and document["choice"]["device"] == "cpu"


@pytest.mark.usefixtures("rtx_without_driver")
def test_a_device_without_a_gpu_builds_for_rtx_and_says_that_it_measured_nothing(
    runtime_command, rtx_bundle, tmp_path: Path
) -> None:
    options = ("engine", rtx_bundle, "--flavour", "rtx")
    done = runtime_command(*options, EDGEBERT_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "fp32-gpu: TensorRT-RTX 1." in done.stdout
    assert "not measured: " in done.stderr and "driver" in done.stderr
    log = tmp_path / "engines" / "build-rtx.log"
    assert "Engine generation completed" in log.read_text()
    again = runtime_command(*options, "--json", EDGEBERT_CACHE_DIR=str(tmp_path))
    assert "there is an engine" in again.stderr
    assert set(json.loads(again.stdout)["engines"]) == {"fp32-gpu"}
    # It is there, and still nothing runs it here.
    used = runtime_command(
        "predict", rtx_bundle, "x", "--device", "rtx", EDGEBERT_CACHE_DIR=str(tmp_path)
    )
    assert used.returncode == 1 and "driver" in used.stderr


@pytest.mark.usefixtures("rtx_without_driver")
def test_building_for_a_tensorrt_that_is_not_there_is_one_line(runtime_command, rtx_bundle) -> None:
    if is_installed("tensorrt"):
        pytest.skip("this machine has TensorRT")
    done = runtime_command("engine", rtx_bundle, "--flavour", "tensorrt")
    assert done.returncode == 1
    assert done.stderr == "error: tensorrt: tensorrt is not installed\n"
