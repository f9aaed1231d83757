"""Holds TensorRT's own Python types against what edgebert calls of it; no GPU, no TensorRT needed.

Usage: python tools/check_tensorrt_types.py

For each release below, the types are made from the library's own binding module, and mypy checks
that they satisfy the protocols in ``edgebert_runtime.tensorrt_api``. ``tensorrt-stubs`` brings the
types as they are. The wheels of ``tensorrt`` bring the module alone: it is loaded over empty
libraries that take the place of TensorRT's, and pybind11-stubgen reads the types off it.

Needs a C compiler, as ``cc``, and binutils; without them it fails, as not all was checked.
What is downloaded is kept in the user's cache directory.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from edgebert_runtime.cache import cache_dir

ROOT = Path(__file__).resolve().parents[1]
CHECK = ROOT / "tools" / "tensorrt_types_check.py"

# JetPack 6 has 10.3, 7.1 has 10.13, 7.2 has 10.16.2 (the nearest that can be had is 10.16.1), 7.2.2
# and data centres have 11.4.
RELEASES = (
    ("tensorrt", "tensorrt-cu12-bindings==10.3.0"),
    ("tensorrt", "tensorrt-stubs==10.13.0.35.1"),
    ("tensorrt", "tensorrt-cu13-bindings==10.16.1.11"),
    ("tensorrt", "tensorrt-cu13-bindings==11.4.0.106"),
    ("tensorrt_rtx", "tensorrt-rtx-cu13-bindings==1.7.1.116"),
)

# What the binding module asks the linker for when it is loaded; none of it is called.
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


def main() -> int:
    """Checks every release; returns how many do not fit, or could not be checked."""
    failed = 0
    missing = [tool for tool in ("cc", "nm", "readelf") if shutil.which(tool) is None]
    for module, requirement in RELEASES:
        if missing and "stubs" not in requirement:
            print(f"{requirement}: not checked, as there is no {' and no '.join(missing)} here")
            failed += 1
            continue
        types = cache_dir() / "tensorrt-types" / requirement.replace("==", "-")
        if not (types / f"{module}.pyi").exists():
            make_types(module, requirement, types)
        failed += not check(module, requirement, types)
    return failed


def check(module: str, requirement: str, types: Path) -> bool:
    """Runs mypy with a release's types; prints what does not fit."""
    with tempfile.TemporaryDirectory() as directory:
        source = CHECK.read_text(encoding="utf-8").replace(
            "import tensorrt\n", f"import {module} as tensorrt\n"
        )
        if module == "tensorrt":
            source = source.partition("# TensorRT for RTX alone.")[0]
        path = Path(directory) / "check.py"
        path.write_text(source, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent",
             "--no-warn-unused-ignores", "--config-file=", f"--cache-dir={types.parent}/mypy",
             str(path)],
            env={**os.environ, "MYPYPATH": f"{types}{os.pathsep}{ROOT / 'runtime'}"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    print(f"{requirement}: {'fits' if done.returncode == 0 else 'does not fit'}", flush=True)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    return done.returncode == 0


def make_types(module: str, requirement: str, out: Path) -> None:
    """Downloads a release's module, or its types, and writes ``module.pyi`` into ``out``."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        wheel = _download(requirement, work)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "wheel")
        (found,) = (work / "wheel").glob(f"*_bindings/{module}.*")
        text = (
            found.read_text("utf-8") if found.suffix == ".pyi" else _read_off(module, found, work)
        )
        initial = found.with_name("__init__.py" + "i" * (found.suffix == ".pyi"))
        if "__version__" not in initial.read_text("utf-8") + text:
            raise SystemExit(f"{requirement} does not tell its version")
        out.mkdir(parents=True, exist_ok=True)
        part = out / f"{module}.part"
        part.write_text(
            f"# mypy: ignore-errors\n{_mended(text)}\n__version__: str\n", encoding="utf-8"
        )
        part.rename(out / f"{module}.pyi")


def _download(requirement: str, out: Path) -> Path:
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(out),
            requirement,
        ]
    )
    (wheel,) = out.glob("*.whl")
    return wheel


def _read_off(module: str, binding: Path, work: Path) -> str:
    """Returns the types of a binding module, loaded over empty libraries."""
    symbols = _run(["nm", "--dynamic", "--undefined-only", str(binding)])
    names = [line.split()[-1] for line in symbols.splitlines() if " U " in line]
    wanted = [
        name for name in names if re.fullmatch(r"(create|get|init)\w*(Nv|Infer|Plugin)\w*", name)
    ]
    source = work / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in wanted))
    needed = re.findall(r"\[(lib\w+\.so[.\d]*)\]", _run(["readelf", "--dynamic", str(binding)]))
    for library in needed:
        if any(part in library for part in ("nvinfer", "nvonnxparser", "tensorrt")):
            _run(["cc", "-shared", "-fPIC", "-o", str(work / library), str(source)])
    (work / "module").mkdir()
    binding.rename(work / "module" / f"{module}.so")
    environment = {"PYTHONPATH": str(work / "module"), "LD_LIBRARY_PATH": str(work)}
    command = [sys.executable, "-m", "pybind11_stubgen", module, "--output-dir", str(work)]
    _run(command, {**os.environ, **environment})
    return (work / f"{module}.pyi").read_text(encoding="utf-8")


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr}")
    return done.stdout


def _mended(text: str) -> str:
    """Takes out what is no Python: arguments called ``in``, defaults before what has none.

    None of it is in a function that edgebert calls. ``bool`` is also the name of one of
    TensorRT's data types, which would hide the type of that name.
    """
    lines = ["" if line.startswith("bool: ") else line for line in text.split("\n")]
    while True:
        try:
            ast.parse("\n".join(lines))
            return "\n".join(lines)
        except SyntaxError as exc:
            assert exc.lineno is not None
            index = exc.lineno - 1
            mended = re.sub(r"(def \w+)\(.*\)( ->.*)?:", r"\1(*args, **kwargs)\2:", lines[index])
            if mended == lines[index]:
                raise
            lines[index] = mended


if __name__ == "__main__":
    sys.exit(main())
