"""How many cores there are, of which kind, and what their 8-bit kernels can be trusted with."""

from __future__ import annotations

import functools
import math
import os
import platform
from collections.abc import Iterable

__all__ = ["described", "has_vnni", "int8_products_saturate", "processor_kind", "usable_cores"]

_VNNI = {"avx512_vnni", "avx_vnni"}
_X86 = {"x86_64", "amd64", "i686", "x86"}
_FOR_KERNELS = (
    *("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx_vnni_int8"),
    *("avx512_bf16", "amx_int8", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
"""What a processor can do that ONNX Runtime has kernels of their own for, as Linux calls it."""


@functools.cache
def int8_products_saturate() -> bool:
    """Whether ONNX Runtime's products of 8-bit numbers saturate here: on x86 without VNNI.

    Where the system does not tell what the processor has, it is taken to have no VNNI: slower,
    and right.
    """
    if platform.machine().lower() not in _X86:
        return False
    try:
        # By lines, so that what a kernel says of a hundred more cores is not read.
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return not has_vnni(lines)
    except OSError:
        return True


def has_vnni(cpuinfo: Iterable[str]) -> bool:
    """Whether the first processor that ``/proc/cpuinfo`` tells of multiplies 8-bit numbers whole.

    Args:
        cpuinfo: Its lines.
    """
    for line in cpuinfo:
        if line.startswith("flags"):
            return not _VNNI.isdisjoint(line.partition(":")[2].split())
    return False


@functools.cache
def processor_kind() -> str:
    """Names the kind of processor: two with one name have the same kernels, alike in speed.

    Its architecture, who made it, its model, and those of its abilities that kernels use. Where
    the system does not tell them, what Python knows of the processor.
    """
    machine = platform.machine().lower()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return f"{machine} {described(lines, by_first=machine in _X86)}"
    except OSError:
        return " ".join([platform.system().lower(), machine, platform.processor()]).strip()


def described(cpuinfo: Iterable[str], *, by_first: bool) -> str:
    """Describes a processor by maker, model and abilities.

    Args:
        cpuinfo: Lines of ``/proc/cpuinfo``.
        by_first: Whether all cores are as the first, so that the lines on the others are not read.
    """
    makers: list[str] = []
    models: list[str] = []
    family = ""
    flags: set[str] = set()
    for line in cpuinfo:
        key, colon, value = (part.strip() for part in line.partition(":"))
        if not colon and by_first and flags:
            break
        if key in {"vendor_id", "CPU implementer"}:
            makers.append(value)
        elif key == "cpu family":
            family = f"{value}-"
        elif key in {"model", "CPU part"}:
            models.append(family + value)
        elif key in {"flags", "Features"}:
            flags |= set(value.split())
    names = [*sorted(set(makers)), *sorted(set(models))]  # some have fast cores and small ones
    return " ".join([*names, *(flag for flag in _FOR_KERNELS if flag in flags)])


def usable_cores() -> int:
    """How many logical cores this process may use: by its affinity, and its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # another system, or no quota: "max"
        return cores
