"""Time that it takes to compare many reports, and to draw their history.

50 reports of builds, each of 20 variants on 10,000 test rows, with 1,000 flipped texts. Ends with
exit code 1 beyond 5 seconds for either command, start included, or 3 MB of a page.

    python benchmarks/compare.py [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from report import make

REPORTS = 50
MOST_SECONDS, MOST_BYTES = 5.0, 3_000_000


def write_reports(directory: Path) -> list[Path]:
    """Writes reports that differ in name, time, bundle and speed."""
    make(directory)
    made = directory / "report.json"
    report = msgspec.json.decode(made.read_bytes())
    made.unlink()
    paths = []
    for number in range(REPORTS):
        report["measured_at"] = f"2026-01-{number // 2 + 1:02}T{number % 2 * 12:02}:00:00+00:00"
        report["bundle_digest"] = f"{number:064x}"
        for variant in report["evaluation"]["variants"]:
            variant["timing"]["latency_p50_ms"] *= 1.01
        path = directory / f"run-{number:02}" / "report.json"
        path.parent.mkdir()
        path.write_bytes(msgspec.json.encode(report))
        paths.append(path)
    return paths


def timed(*arguments: object) -> float:
    """Returns seconds of a run of ``edgebert``, imports and all."""
    start = time.perf_counter()
    command = [sys.executable, "-c", "from edgebert_pipeline.cli import main; main()"]
    subprocess.run([*command, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    """Prints seconds and bytes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="Where to leave the pages; a new directory.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        paths = write_reports(directory)
        size = sum(path.stat().st_size for path in paths)
        print(f"{REPORTS} reports, {size / 1e6:.1f} MB")
        out = options.out or directory / "pages"
        out.mkdir()
        limits = ["--max-accuracy-drop", "0.5", "--max-latency-ratio", "2"]
        commands = {
            "compare": ["compare", *paths, *limits],
            "history": ["history", directory],
        }
        passed = True
        for command, arguments in commands.items():
            page = out / f"{command}.html"
            seconds = timed(*arguments, "--html", page)
            print(f"{command}: {seconds:.2f} s, page {page.stat().st_size / 1e6:.2f} MB")
            passed &= seconds <= MOST_SECONDS and page.stat().st_size <= MOST_BYTES
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
