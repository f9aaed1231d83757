"""The state of a machine while it is measured: temperatures, its clock's governor, memory used.

Read from Linux's files. What a system does not offer is ``None`` or left out, never guessed.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

__all__ = [
    "board_name",
    "clock_governor",
    "processor_name",
    "resident_bytes",
    "temperatures_c",
]

_ROOT = Path("/")


def temperatures_c(root: Path = _ROOT) -> dict[str, float]:
    """Temperatures in degrees Celsius, by the name of the zone (``cpu-thermal``, say)."""
    found: dict[str, float] = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        degrees = _read(zone / "temp")
        # A Jetson's zones of what is switched off cannot be read, or say -256 degrees.
        if re.fullmatch(r"\d+", degrees):
            name = _read(zone / "type") or zone.name
            found[name if name not in found else f"{name} {zone.name}"] = int(degrees) / 1000
    return found


def clock_governor(root: Path = _ROOT) -> str | None:
    """What sets the processors' clocks, for instance ``performance`` or ``schedutil``."""
    files = root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    return ", ".join(sorted({_read(file) for file in files} - {""})) or None


def board_name(root: Path = _ROOT) -> str | None:
    """What the board or computer calls itself."""
    for file in ("proc/device-tree/model", "sys/devices/virtual/dmi/id/product_name"):
        name = _read(root / file)
        if name:
            return name
    return None


def processor_name(root: Path = _ROOT) -> str:
    """What the processor calls itself, and its architecture."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    machine = platform.machine()
    name = match[1].strip() if match else platform.processor()
    return f"{name} ({machine})" if name and name != machine else machine


def resident_bytes(root: Path = _ROOT) -> int | None:
    """Memory that this process occupies now."""
    match = re.search(r"VmRSS:\s+(\d+) kB", _read(root / "proc/self/status"))
    return int(match[1]) * 1024 if match else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return ""
