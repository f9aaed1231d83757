"""Which machines run TensorRT: a pure function over what is known of devices."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edgebert_runtime.engine import unusable
from edgebert_runtime.facts import DeviceFacts, GpuFacts, Jetson, TensorRTFacts

GIB = 2**30


def gpu(name: str, capability: tuple[int, int], cuda: tuple[int, int], gib: int = 8) -> GpuFacts:
    return GpuFacts(
        name=name,
        compute_capability=capability,
        integrated=capability in {(8, 7), (11, 0)},
        cuda=cuda,
        free_bytes=gib * GIB // 2,
        total_bytes=gib * GIB,
    )


def machine(
    device: GpuFacts | None,
    tensorrt: str | None = None,
    rtx: str | None = None,
    *,
    arm: bool = False,
    built_for: int | None = None,
    **other: Any,
) -> DeviceFacts:
    flavours = {"tensorrt": tensorrt, "rtx": rtx}
    return DeviceFacts(
        machine="aarch64" if arm else "x86_64",
        cpu_count=8,
        onnxruntime=("onnxruntime 1.20.0",),
        providers=("CPUExecutionProvider",),
        gpu=device,
        tensorrt={
            name: TensorRTFacts(version=version, cuda=built_for)
            for name, version in flavours.items()
            if version is not None
        },
        **other,
    )


def jetson(release: str, jetpack: str) -> Jetson:
    return Jetson(release=release, jetpack=jetpack, power_mode="15W")


JETPACK_6, JETPACK_7 = jetson("36.4.3", "6"), jetson("39.2.0", "7")
ORIN_NANO = gpu("Orin Nano", (8, 7), (12, 6))
ORIN_NX, ORIN_AGX = gpu("Orin NX", (8, 7), (12, 6), 16), gpu("AGX Orin", (8, 7), (13, 2), 64)
THOR = gpu("Thor", (11, 0), (13, 2), 128)
T4, L4 = gpu("Tesla T4", (7, 5), (13, 0), 16), gpu("L4", (8, 9), (13, 0), 24)
A100 = gpu("A100", (8, 0), (13, 0), 80)
V100 = gpu("Tesla V100", (7, 0), (12, 4), 32)
RTX_4090, RTX_5090 = gpu("RTX 4090", (8, 9), (13, 0), 24), gpu("RTX 5090", (12, 0), (13, 0), 32)
SPARK = gpu("NVIDIA GB10", (12, 1), (13, 0), 128)
H200 = gpu("NVIDIA H200", (9, 0), (13, 0), 140)
NEWER = gpu("newer than this edgebert", (13, 0), (14, 0), 32)
RTX_GPUS = "run on compute capabilities 8.0, 8.6, 8.9, 12.0, 12.1 and newer"
OLD_DRIVER = gpu("RTX 4090", (8, 9), (12, 4), 24)


@pytest.mark.parametrize(
    "facts",
    [
        machine(ORIN_NANO, "10.3.0.30", arm=True, jetson=JETPACK_6),
        machine(ORIN_NX, "10.3.0.30", arm=True, jetson=JETPACK_6),
        machine(ORIN_AGX, "11.4.1.5", arm=True, jetson=JETPACK_7),
        machine(THOR, "10.13.3.9", arm=True, jetson=jetson("38.2.0", "7")),
        machine(THOR, "11.4.1.5", arm=True, jetson=JETPACK_7),
        machine(T4, "11.4.0.106", built_for=13),
        machine(L4, "11.4.0.106", built_for=13),
        machine(A100, "10.16.1.11", built_for=12),
        machine(RTX_4090, "11.4.0.106"),
        machine(RTX_5090, "11.4.0.106"),
    ],
)
def test_tensorrt_runs_on(facts: DeviceFacts) -> None:
    assert unusable("tensorrt", facts) is None


@pytest.mark.parametrize("device", [A100, L4, RTX_4090, RTX_5090, SPARK, NEWER])
def test_tensorrt_rtx_runs_on(device: GpuFacts) -> None:
    found = machine(device, rtx="1.7.1.116", built_for=13, arm=device is SPARK)
    assert unusable("rtx", found) is None


@pytest.mark.parametrize(
    ("flavour", "facts", "said"),
    [
        ("tensorrt", machine(A100), "tensorrt is not installed"),
        ("rtx", machine(A100), "tensorrt_rtx is not installed"),
        (
            "tensorrt",
            machine(None, "11.4.0.106", gpu_fault="there is no NVIDIA driver here: dlopen"),
            "there is no NVIDIA driver here",
        ),
        (
            "rtx",
            machine(None, rtx="1.7.1.116", gpu_fault="the NVIDIA driver finds no GPU"),
            "the NVIDIA driver finds no GPU",
        ),
        (
            "tensorrt",
            machine(V100, "11.4.0.106"),
            "needs compute capability 7.5 or newer for TensorRT, found Tesla V100 with 7.0",
        ),
        (
            "rtx",
            machine(ORIN_AGX, rtx="1.7.1.116"),
            f"{RTX_GPUS}, found AGX Orin with 8.7",
        ),
        (
            "rtx",
            machine(T4, rtx="1.7.1.116", built_for=13),
            f"{RTX_GPUS}, found Tesla T4 with 7.5",
        ),
        (
            "rtx",
            machine(H200, rtx="1.7.1.116", built_for=13, driver="580.159.04"),
            f"{RTX_GPUS}, found NVIDIA H200 with 9.0",
        ),
        (
            "rtx",
            machine(ORIN_NANO, rtx="1.7.1.116", arm=True),
            f"{RTX_GPUS}, found Orin Nano with 8.7",
        ),
        (
            "rtx",
            msgspec.structs.replace(machine(SPARK, rtx="1.7.1.116", arm=True), system="win32"),
            "TensorRT-RTX 1.7.1.116 runs on Linux (x86-64, aarch64) and on Windows (x86-64), found "
            "win32-aarch64",
        ),
        (
            "rtx",
            machine(OLD_DRIVER, rtx="1.7.1.116", built_for=13, driver="550.54.15"),
            "tensorrt_rtx 1.7.1.116 was built for CUDA 13, the driver 550.54.15 supports up to "
            "12.4: update the driver, or install tensorrt_rtx for CUDA 12",
        ),
        (
            "tensorrt",
            machine(OLD_DRIVER, "11.4.0.106", built_for=13),
            "built for CUDA 13, the driver supports up to 12.4",
        ),
        (
            "tensorrt",
            machine(ORIN_NX, "8.5.2.2", arm=True, jetson=jetson("35.3.1", "5")),
            "edgebert needs TensorRT 10.3 or newer, found 8.5.2.2",
        ),
    ],
)
def test_tensorrt_does_not_run_on(flavour: Any, facts: DeviceFacts, said: str) -> None:
    reason = unusable(flavour, facts)
    assert reason is not None and said in reason


def test_a_library_that_cannot_be_loaded_says_why() -> None:
    facts = machine(A100, "11.4.0.106")
    facts.tensorrt["tensorrt"] = TensorRTFacts(fault="libnvinfer.so.11: cannot open")
    assert unusable("tensorrt", facts) == "libnvinfer.so.11: cannot open"


def test_building_for_rtx_needs_no_gpu_and_all_else_does() -> None:
    without = machine(None, "11.4.0.106", rtx="1.7.1.116", gpu_fault="no driver")
    assert unusable("rtx", without, building=True) is None
    assert unusable("tensorrt", without, building=True) == "no driver"
