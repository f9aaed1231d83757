"""What is read of a machine's state, from files as a Jetson and a server have them."""

from __future__ import annotations

from pathlib import Path

from edgebert_runtime.condition import (
    board_name,
    clock_governor,
    processor_name,
    resident_bytes,
    temperatures_c,
)


def system_of(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return root


def test_a_jetsons_zones_and_board(tmp_path: Path) -> None:
    zones = "sys/class/thermal/thermal_zone"
    root = system_of(
        tmp_path,
        {
            f"{zones}0/type": "cpu-thermal\n",
            f"{zones}0/temp": "48312\n",
            f"{zones}1/type": "gpu-thermal\n",
            f"{zones}1/temp": "47000\n",
            f"{zones}2/type": "cv0-thermal\n",  # switched off: its file cannot be read
            f"{zones}3/type": "soc0-thermal\n",
            f"{zones}3/temp": "-256000\n",
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "schedutil\n",
        },
    )
    assert temperatures_c(root) == {"cpu-thermal": 48.312, "gpu-thermal": 47.0}
    assert board_name(root) == "NVIDIA Jetson Orin Nano Developer Kit"
    assert clock_governor(root) == "schedutil"


def test_zones_of_one_name_are_both_told(tmp_path: Path) -> None:
    zones = "sys/class/thermal/thermal_zone"
    root = system_of(
        tmp_path,
        {
            f"{zones}{n}/{file}": text
            for n in (0, 1)
            for file, text in (("type", "acpitz"), ("temp", f"{30 + n}000"))
        },
    )
    assert sorted(temperatures_c(root).values()) == [30, 31]


def test_a_servers_files(tmp_path: Path) -> None:
    root = system_of(
        tmp_path,
        {
            "proc/cpuinfo": "processor : 0\nmodel name\t: Some CPU @ 2 GHz\n",
            "proc/self/status": "Name:\tpython\nVmRSS:\t  2048 kB\n",
            "sys/devices/virtual/dmi/id/product_name": "Box 9\n",
        },
    )
    assert processor_name(root).startswith("Some CPU @ 2 GHz (")
    assert resident_bytes(root) == 2 * 2**20
    assert board_name(root) == "Box 9"


def test_a_system_that_says_nothing_is_not_guessed_at(tmp_path: Path) -> None:
    assert temperatures_c(tmp_path) == {}
    assert resident_bytes(tmp_path) is board_name(tmp_path) is clock_governor(tmp_path) is None
    assert processor_name(tmp_path)
