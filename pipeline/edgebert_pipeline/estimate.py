"""A bundle's roofline on paper: bounds for devices that are not here. Nothing is run or timed."""

from __future__ import annotations

import math
import textwrap
from typing import Literal

import msgspec
import onnx
import onnx_ir as ir

from edgebert_export.count import Precision, Work, count
from edgebert_export.errors import ModelError
from edgebert_pipeline.markdown import table
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.errors import InputError
from edgebert_runtime.manifest import Variant

__all__ = [
    "DEVICES",
    "NOTE",
    "Bound",
    "Device",
    "Estimate",
    "bound",
    "estimate",
    "find_device",
    "render_estimate",
]

NOTE = "Estimate, not a measurement: no device reaches these bounds"

_WIDTH = 100  # columns of a terminal
_PRECISIONS: tuple[Precision, ...] = ("int8", "fp16", "fp32")

Limit = Literal["compute", "memory"]


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """Peak rates of a device, as its vendor states them; ``None`` where no figure was found.

    Attributes:
        name: What the command calls it.
        title: What it is.
        runs: What the manifest calls what runs there: ``tensorrt``, ``rtx``, ``cuda``, ``cpu``.
        int8_tops: INT8 matrix products, dense, in 10^12 operations a second; a
            multiply-accumulate is two.
        fp16_tflops: FP16 matrix products, dense, with the faster kind of accumulation.
        fp32_tflops: FP32.
        tf32_tflops: FP32 matrix products on tensor cores, dense, as ONNX Runtime computes them.
        bandwidth_gb_s: Between memory and chip, in 10^9 bytes a second.
        cache_mib: Of the caches that outlast a run, all of them together, in 2^20 bytes.
        source: Where the figures are from.
    """

    name: str
    title: str
    runs: tuple[str, ...]
    int8_tops: float | None = None
    fp16_tflops: float | None = None
    fp32_tflops: float | None = None
    tf32_tflops: float | None = None
    bandwidth_gb_s: float | None = None
    cache_mib: float | None = None
    source: str

    def peak(self, precision: Precision) -> float | None:
        """Returns the highest rate for matrix products, in 10^12 operations a second."""
        if precision == "int8":
            return self.int8_tops
        if precision == "fp16":
            return self.fp16_tflops
        return max((rate for rate in (self.fp32_tflops, self.tf32_tflops) if rate), default=None)


_JETSON = ("tensorrt",)
_GPU = ("tensorrt", "rtx", "cuda")
_ORIN_CACHES = "caches: 4 MB L2 and 4 MB system cache, the family's largest"

DEVICES = (
    Device(
        name="orin-nano",
        title="Jetson Orin Nano 8GB",
        runs=_JETSON,
        int8_tops=20,
        fp16_tflops=10,
        fp32_tflops=1.28,
        bandwidth_gb_s=68,
        cache_mib=8,
        source="NVIDIA, Jetson Orin Nano Series data sheet (20 dense INT8 TOPS; FP16: half of it; "
        f"FP32: 1024 cores x 2 x 0.625 GHz); {_ORIN_CACHES}",
    ),
    Device(
        name="orin-nano-super",
        title="Jetson Orin Nano 8GB, MAXN SUPER",
        runs=_JETSON,
        int8_tops=33.5,
        fp16_tflops=16.75,
        fp32_tflops=2.09,
        bandwidth_gb_s=102,
        cache_mib=8,
        source='NVIDIA blog, "NVIDIA Jetson Orin Nano Developer Kit Gets a Super Boost" (67 sparse '
        f"INT8 TOPS; FP16: a quarter of it; FP32: 1024 cores x 2 x 1.02 GHz); {_ORIN_CACHES}",
    ),
    Device(
        name="orin-nx",
        title="Jetson Orin NX 16GB, not in a Super mode",
        runs=_JETSON,
        int8_tops=30,
        fp16_tflops=15,
        fp32_tflops=1.88,
        bandwidth_gb_s=102.4,
        cache_mib=8,
        source="NVIDIA, Jetson Orin NX Series data sheet (the GPU alone, of 100 sparse INT8 TOPS "
        f"with both DLAs: the Orin Nano's, at 0.918 GHz); {_ORIN_CACHES}",
    ),
    Device(
        name="agx-orin",
        title="Jetson AGX Orin 64GB",
        runs=_JETSON,
        int8_tops=85,
        fp16_tflops=42.5,
        fp32_tflops=5.3,
        bandwidth_gb_s=204.8,
        cache_mib=8,
        source="NVIDIA, Jetson AGX Orin Series Technical Brief (the GPU alone: 170 sparse INT8 "
        f"TOPS, 5.3 FP32 TFLOPS; FP16: half of INT8); {_ORIN_CACHES}",
    ),
    Device(
        name="thor",
        title="Jetson AGX Thor T5000",
        runs=_JETSON,
        fp16_tflops=258.5,
        fp32_tflops=8.04,
        bandwidth_gb_s=273,
        cache_mib=32,
        source="NVIDIA, Jetson Thor Series Modules data sheet (2070 sparse FP4 TFLOPS, an eighth "
        "of it dense FP16; FP32: 2560 cores x 2 x 1.57 GHz; no INT8 figure found); L2: CUDA's "
        "device properties, NVIDIA forum, topic 356355",
    ),
    Device(
        name="t4",
        title="NVIDIA T4",
        runs=_GPU,
        int8_tops=130,
        fp16_tflops=65,
        fp32_tflops=8.1,
        bandwidth_gb_s=320,
        cache_mib=4,
        source="NVIDIA T4 data sheet; L2: NVIDIA Turing GPU Architecture whitepaper (TU104)",
    ),
    Device(
        name="l4",
        title="NVIDIA L4",
        runs=_GPU,
        int8_tops=242.5,
        fp16_tflops=121,
        fp32_tflops=30.3,
        tf32_tflops=60,
        bandwidth_gb_s=300,
        cache_mib=48,
        source="NVIDIA L4 data sheet (half of the sparse figures); L2: NVIDIA Ada GPU Architecture "
        "whitepaper (AD104)",
    ),
    Device(
        name="a100",
        title="NVIDIA A100 80GB SXM",
        runs=_GPU,
        int8_tops=624,
        fp16_tflops=312,
        fp32_tflops=19.5,
        tf32_tflops=156,
        bandwidth_gb_s=2039,
        cache_mib=40,
        source="NVIDIA A100 data sheet; L2: NVIDIA A100 Tensor Core GPU Architecture whitepaper",
    ),
    Device(
        name="rtx-4060",
        title="GeForce RTX 4060",
        runs=_GPU,
        int8_tops=121,
        fp16_tflops=60.5,
        fp32_tflops=15.1,
        tf32_tflops=15.1,
        bandwidth_gb_s=272,
        cache_mib=24,
        source="NVIDIA, GeForce RTX 4060 family page (242 sparse AI TOPS; FP16: a quarter of it; "
        "FP32: 3072 cores x 2 x 2.46 GHz); L2: NVIDIA Ada GPU Architecture whitepaper (AD107)",
    ),
    Device(
        name="rtx-4090",
        title="GeForce RTX 4090",
        runs=_GPU,
        int8_tops=660.6,
        fp16_tflops=330.3,
        fp32_tflops=82.6,
        tf32_tflops=82.6,
        bandwidth_gb_s=1008,
        cache_mib=72,
        source="NVIDIA Ada GPU Architecture whitepaper (FP16 with FP16 accumulation)",
    ),
    Device(
        name="rtx-5090",
        title="GeForce RTX 5090",
        runs=_GPU,
        int8_tops=838,
        fp16_tflops=419,
        fp32_tflops=104.8,
        tf32_tflops=104.8,
        bandwidth_gb_s=1792,
        cache_mib=96,
        source="NVIDIA RTX Blackwell GPU Architecture whitepaper (FP16 with FP16 accumulation)",
    ),
    Device(
        name="raspberry-pi-5",
        title="Raspberry Pi 5, all four cores",
        runs=("cpu",),
        int8_tops=0.6144,
        fp16_tflops=0.3072,
        fp32_tflops=0.1536,
        bandwidth_gb_s=17.1,
        cache_mib=4,
        source='Raspberry Pi, "Introducing: Raspberry Pi 5!" (4 Cortex-A76 at 2.4 GHz, 32-bit '
        "LPDDR4X-4267, 4 x 512 KB L2, 2 MB L3); Arm Cortex-A76 Software Optimization Guide (SDOT "
        "and FMLA: two of 128 bits a cycle)",
    ),
    Device(
        name="x86-avx2",
        title="one x86 core with AVX2 at 1 GHz: for more, divide times by cores x GHz",
        runs=("cpu",),
        int8_tops=0.064,
        fp32_tflops=0.032,
        source="Intel 64 and IA-32 Architectures Optimization Reference Manual (two VPMADDUBSW or "
        "two FMA of 256 bits a cycle); memory depends on the machine and is left out",
    ),
    Device(
        name="x86-avx512-vnni",
        title="one x86 core with AVX-512 VNNI at 1 GHz: for more, divide times by cores x GHz",
        runs=("cpu",),
        int8_tops=0.256,
        fp32_tflops=0.064,
        source='Intel, "Intel AVX-512 - New Vector Neural Network Instruction", and Optimization '
        "Reference Manual (two VPDPBUSD or two FMA of 512 bits a cycle, no AMX); memory depends on "
        "the machine and is left out",
    ),
)


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """What a device can do at most with a variant; ``None`` where a peak is not known.

    Attributes:
        variant: Its name.
        macs_counted: Multiply-accumulates of a batch, by precision.
        weight_bytes_counted: Weights, each read once.
        embedding_bytes_counted: Rows of tables that are looked up.
        activation_bytes_counted: The model's inputs and outputs.
        compute_ms_lower_bound: For the products alone.
        memory_ms_lower_bound: For what the caches cannot have kept from the batch before.
        cold_memory_ms_lower_bound: For all bytes, when the caches hold none of them.
        latency_ms_lower_bound: Of a batch that follows another one.
        latency_bound_by: Which of the two it is.
        cold_latency_ms_lower_bound: Of a batch that finds nothing in the caches.
        cold_latency_bound_by: Which of the two it is.
        texts_per_s_upper_bound: Of batches one after the other.
    """

    variant: str
    macs_counted: dict[Precision, int]
    weight_bytes_counted: int
    embedding_bytes_counted: int
    activation_bytes_counted: int
    compute_ms_lower_bound: float | None = None
    memory_ms_lower_bound: float | None = None
    cold_memory_ms_lower_bound: float | None = None
    latency_ms_lower_bound: float | None = None
    latency_bound_by: Limit | None = None
    cold_latency_ms_lower_bound: float | None = None
    cold_latency_bound_by: Limit | None = None
    texts_per_s_upper_bound: float | None = None


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on paper; ``note`` says so wherever it is printed.

    Attributes:
        note: What this is.
        device: Its peak rates.
        batch: Texts in a batch.
        tokens: Tokens of each text, padding included.
        bounds: One for each variant that runs on the device.
    """

    note: str
    device: Device
    batch: int
    tokens: int
    bounds: tuple[Bound, ...]


def find_device(name: str) -> Device:
    """Returns the device called ``name``.

    Raises:
        InputError: There is none.
    """
    for device in DEVICES:
        if device.name == name:
            return device
    known = ", ".join(device.name for device in DEVICES)
    raise InputError(f"no peak rates are known of the device {name!r}; known are: {known}")


def estimate(
    bundle: Bundle, device: Device, *, batch: int, tokens: int, variant: str | None = None
) -> Estimate:
    """Bounds what a device can do with each variant of a bundle that runs on it.

    Args:
        bundle: Each model is hashed before it is parsed.
        device: Its peak rates.
        batch: Texts in a batch.
        tokens: Tokens of each text, padding included.
        variant: The only one to look at.

    Raises:
        InputError: ``tokens`` is more than the bundle takes, or nothing of it runs on the device.
        BundleError: The bundle is damaged, or has no such variant.
        ModelError: A model is damaged, or holds what cannot be counted.
    """
    manifest = bundle.manifest
    if tokens > manifest.max_length:
        raise InputError(f"this bundle takes up to {manifest.max_length} tokens, not {tokens}")
    wanted = manifest.variants if variant is None else (manifest.variant(variant),)
    chosen = [item for item in wanted if set(item.devices) & set(device.runs)]
    if not chosen:
        found = "; ".join(f"{item.name} ({', '.join(item.devices)})" for item in wanted)
        raise InputError(
            f"{device.name} runs what is for {', '.join(device.runs)}, and here is only: {found}"
        )
    bounds = tuple(
        bound(item.name, _work(bundle, item, batch, tokens), device, batch) for item in chosen
    )
    return Estimate(note=NOTE, device=device, batch=batch, tokens=tokens, bounds=bounds)


def _work(bundle: Bundle, variant: Variant, batch: int, tokens: int) -> Work:
    data = bundle.read(variant.model)
    try:
        model: ir.Model = ir.from_proto(onnx.load_model_from_string(data))
    except Exception as exc:  # protobuf raises errors of its own
        raise ModelError(f"{bundle.path}: {variant.model} is not an ONNX model: {exc}") from exc
    return count(model, batch, tokens)


def bound(variant: str, work: Work, device: Device, batch: int) -> Bound:
    """Bounds a variant's speed by the roofline (Williams, Waterman, Patterson 2009, CACM 52-4).

    ``time >= max(compute, memory)``, over the batch in total and not product by product: memory
    can be read ahead for the next product while this one is computed, so that a sum of each
    product's own maximum could be undercut, and the maximum of the sums cannot.

    ``compute`` is the sum over precisions of operations / peak rate, since all are computed by
    the same units: tensor cores, or the vector units of a CPU. ``memory`` is bytes / bandwidth.
    What a cache can hold it may still hold from the batch before, so the bytes are only those
    beyond the caches' size; in a cold batch, all of them.
    """
    counted = Bound(
        variant=variant,
        macs_counted=work.macs,
        weight_bytes_counted=work.weight_bytes,
        embedding_bytes_counted=work.embedding_bytes,
        activation_bytes_counted=work.activation_bytes,
    )
    compute = 0.0
    for precision, macs in work.macs.items():
        peak = device.peak(precision)
        if peak is None:
            return counted
        compute += 2 * macs / (peak * 1e12) * 1e3
    memory = cold = None
    if device.bandwidth_gb_s is not None and device.cache_mib is not None:
        beyond = max(0.0, work.total_bytes - device.cache_mib * 2**20)
        memory = beyond / (device.bandwidth_gb_s * 1e9) * 1e3
        cold = work.total_bytes / (device.bandwidth_gb_s * 1e9) * 1e3
    latency, limit = _longer(compute, memory)
    cold_latency, cold_limit = _longer(compute, cold) if cold is not None else (None, None)
    return msgspec.structs.replace(
        counted,
        compute_ms_lower_bound=compute,
        memory_ms_lower_bound=memory,
        cold_memory_ms_lower_bound=cold,
        latency_ms_lower_bound=latency,
        latency_bound_by=limit,
        cold_latency_ms_lower_bound=cold_latency,
        cold_latency_bound_by=cold_limit,
        texts_per_s_upper_bound=batch / latency * 1e3,
    )


def _longer(compute: float, memory: float | None) -> tuple[float, Limit]:
    if memory is not None and memory > compute:
        return memory, "memory"
    return compute, "compute"


def render_estimate(found: Estimate) -> str:
    """Returns an estimate as text of at most 100 columns, unless a variant's name is long."""
    device = found.device
    lines = [
        f"{NOTE}.",
        f"On paper: batches of {found.batch}, {found.tokens} tokens a text; {device.title}.",
        f"Peaks: {_peaks(device)}.",
        f"From: {device.source}.",
    ]
    bounds = table(
        ("variant", "ms a batch", "limit", "ms, cold caches", "limit", "texts/s"),
        [
            (
                item.variant,
                _at_least(item.latency_ms_lower_bound),
                item.latency_bound_by or "unknown",
                _at_least(item.cold_latency_ms_lower_bound),
                item.cold_latency_bound_by or "unknown",
                "unknown"
                if item.texts_per_s_upper_bound is None
                else f"<= {math.ceil(item.texts_per_s_upper_bound):,}",
            )
            for item in found.bounds
        ],
    )
    counted = table(
        ("counted in a batch", "INT8 MMAC", "FP16 MMAC", "FP32 MMAC", "weights MB", "rows MB"),
        [
            (
                item.variant,
                *(f"{item.macs_counted.get(name, 0) / 1e6:.1f}" for name in _PRECISIONS),
                f"{item.weight_bytes_counted / 1e6:.2f}",
                f"{item.embedding_bytes_counted / 1e6:.2f}",
            )
            for item in found.bounds
        ],
    )
    text = "\n".join(textwrap.fill(line, _WIDTH, subsequent_indent="  ") for line in lines)
    return f"{text}\n\n{bounds}\n\n{counted}"


def _at_least(milliseconds: float | None) -> str:
    return "unknown" if milliseconds is None else f">= {milliseconds:.4g}"


def _peaks(device: Device) -> str:
    found = (
        ("INT8", device.int8_tops, "TOPS"),
        ("FP16", device.fp16_tflops, "TFLOPS"),
        ("FP32", device.fp32_tflops, "TFLOPS"),
        ("TF32", device.tf32_tflops, "TFLOPS"),
        ("memory", device.bandwidth_gb_s, "GB/s"),
        ("caches", device.cache_mib, "MiB"),
    )
    return ", ".join(f"{name} {rate:g} {unit}" for name, rate, unit in found if rate is not None)
