"""How many cores there are to use, and what their 8-bit kernels can be trusted with."""

from __future__ import annotations

import functools
import math
import os
import platform
from collections.abc import Iterable

__all__ = ["has_vnni", "int8_products_saturate", "usable_cores"]

_VNNI = {"avx512_vnni", "avx_vnni"}


@functools.cache
def int8_products_saturate() -> bool:
    """Whether ONNX Runtime's products of 8-bit numbers saturate here: on x86 without VNNI.

    Where the system does not tell what the processor has, it is taken to have no VNNI: slower,
    and right.
    """
    if platform.machine().lower() not in {"x86_64", "amd64", "i686", "x86"}:
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
