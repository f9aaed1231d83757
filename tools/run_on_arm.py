"""Runs the runtime on an emulated aarch64 and compares its answers with this machine's.

Usage: python tools/run_on_arm.py BUNDLE   (as root; ``make test-arm``)

For each board below: an arm64 Debian from Debian's own packages, in it the runtime's wheel with
``[cpu,tensorrt]``, then ``edgebert-rt doctor``, ``predict`` and ``verify``, then the raw outputs of
every variant for CPUs, text by text. Fails with one line at the first thing that is not as it must
be.

Packages are unpacked, and no script of theirs is run; nothing is mounted; qemu is called by name,
and binfmt_misc need not know it. So whatever ends this leaves nothing to tidy up. The Debians are
kept in the user's cache directory; what a run adds to them is removed by the next.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from packaging.requirements import Requirement

from edgebert_runtime.bundle import Bundle
from edgebert_runtime.cache import cache_dir
from edgebert_runtime.encoder import Text
from edgebert_runtime.errors import EdgebertError

ROOT = Path(__file__).resolve().parents[1]
TEXTS, MOST_CHARACTERS = 80, 120
MOST_SECONDS = 1200  # for one emulated command; none has taken a fifth of that

BOUNDS = {"fp32": (1e-5, 1e-5), "int8": (0.01, 0.05)}
"""Most that raw outputs may differ from this machine's, by precision: of half the texts, of all.

FP32 sums are the same numbers added in another order. INT8's integers are exact everywhere, but
activations are scaled by their own range and rounded: where an FP32 sum differs in its last bit,
one may fall on the other side of a half and become another integer. That happens in a text of six
(more, where a model has more layers) and moved a raw output by 0.013 at most (docs/jetson.md).
"""

_V8_2 = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop "
    "asimddp"
)


@dataclass(frozen=True)
class Board:
    """What is emulated, and what is installed there.

    Attributes:
        name: The board that it stands for.
        suite: The Debian.
        python: That Debian's Python.
        pins: The Python whose lines of ``constraints.txt`` hold.
        requirements: What else is installed, as docs/jetson.md has it; not pinned.
        emulated: The processor, as qemu calls it.
        part: The processor, as ``/proc/cpuinfo`` of the board has it.
        features: What it can do, as ``/proc/cpuinfo`` has it.
    """

    name: str
    suite: str
    python: str
    pins: str
    requirements: tuple[str, ...]
    emulated: str
    part: str
    features: str


# Debian has no Python 3.10, which JetPack 6 has; what is installed is what 3.10 would get. Orin's
# Cortex-A78AE has the same kernels as qemu's Cortex-A76. Thor's Neoverse V3AE has SVE2 of 128 bits,
# and 8-bit matrix products; no Jetson has SME, which qemu 7.2 computes wrongly.
BOARDS = (
    Board(
        name="Orin, JetPack 6",
        suite="bookworm",
        python="3.11",
        pins="3.10",
        requirements=("cuda-bindings<13",),
        emulated="cortex-a76",
        part="0xd42",
        features=_V8_2,
    ),
    Board(
        name="Orin, JetPack 7",
        suite="trixie",
        python="3.13",
        pins="3.13",
        requirements=(),
        emulated="cortex-a76",
        part="0xd42",
        features=_V8_2,
    ),
    Board(
        name="Thor, JetPack 7",
        suite="trixie",
        python="3.13",
        pins="3.13",
        requirements=(),
        emulated="max,sve-max-vq=1,sme=off,pauth=off",
        part="0xd83",
        features=f"{_V8_2} sve asimdfhm sve2 svei8mm svebf16 i8mm bf16",
    ),
)

# One text a call: what shares a call shares INT8's scales, and who does depends on the processor.
_ANSWERS = """
import json, sys
from importlib.metadata import version
from edgebert_runtime import Classifier
bundle, *variants = sys.argv[1:]
texts = [tuple(text) if isinstance(text, list) else text for text in json.load(sys.stdin)]
found = {}
for variant in variants:
    with Classifier.load(bundle, device="cpu", variant=variant) as classifier:
        rows = [classifier.logits([text])[0] for text in texts]
        labels = [classifier.predictions_of(row[None])[0].labels for row in rows]
    found[variant] = {"outputs": [row.tolist() for row in rows], "labels": labels}
json.dump({"variants": found, "versions": {
    "Python": sys.version.split()[0],
    **{name: version(name) for name in ("onnxruntime", "cuda-bindings", "numpy", "tokenizers")},
}}, sys.stdout)
"""


def main() -> None:
    """Runs every board and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("bundle", type=Path)
    path: Path = parser.parse_args().bundle.resolve()
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if None in (qemu, *map(shutil.which, ("debootstrap", "dpkg-deb", "tar", "chroot"))):
        raise SystemExit(
            "test-arm needs Debian's packages: "
            "sudo apt install debootstrap qemu-user-static debian-archive-keyring"
        )
    if os.geteuid() != 0:
        raise SystemExit("test-arm needs root, for debootstrap and chroot: sudo make test-arm")
    manifest = Bundle.open(path).manifest
    variants = {item.name: item.precision for item in manifest.variants if "cpu" in item.devices}
    texts = short_texts(manifest.task.text_pair)
    directory = cache_dir() / "arm"
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "lock", timeout=0):
        for left in directory.glob("*.part"):  # by a run that was ended
            shutil.rmtree(left)
        expected = answers_here(path, list(variants), texts)
        versions = expected["versions"]
        print(f"beside: Python {versions['Python']}, ONNX Runtime {versions['onnxruntime']}")
        table = ["| as on | Python | ONNX Runtime | cuda-bindings | variant | half | all | took |",
                 "|---|---|---|---|---|---:|---:|---:|"]  # fmt: skip
        for board in BOARDS:
            began = time.monotonic()
            debian = make_debian(board.suite, directory)
            emulated = install(board, debian, str(qemu), path)
            found = use(emulated, variants, texts, expected)
            took = f"{time.monotonic() - began:.0f} s"
            for name, precision in variants.items():
                here, there = expected["variants"][name], found["variants"][name]
                half, most = differences(here["outputs"], there["outputs"])
                fault = fault_of(half, most, here["labels"], there["labels"], precision)
                if fault is not None:
                    raise SystemExit(f"{board.name}, {name}: {fault}")
                v = found["versions"]
                table.append(
                    f"| {board.name} | {v['Python']} | {v['onnxruntime']} | {v['cuda-bindings']} "
                    f"| `{name}` | {half:.1e} | {most:.1e} | {took} |"
                )
    print(*table, sep="\n")
    print(f"raw outputs of {len(texts)} texts beside this machine's; no label differs")


def short_texts(pairs: bool) -> list[Text]:
    """Returns texts, or pairs of texts, that take an emulated processor little time."""
    name, columns = (
        ("pairs.jsonl", ("premise", "hypothesis")) if pairs else ("sentences.jsonl", ("text",))
    )
    lines = (ROOT / "calibration_data" / name).read_text(encoding="utf-8").splitlines()
    rows = [[json.loads(line)[column] for column in columns] for line in lines]
    few = [row for row in rows if sum(map(len, row)) <= MOST_CHARACTERS][:TEXTS]
    return [(row[0], row[1]) if pairs else row[0] for row in few]


def answers_here(bundle: Path, variants: list[str], texts: list[Text]) -> Any:
    """Returns what this machine's own runtime says; ``_ANSWERS`` has its form."""
    command = [sys.executable, "-c", _ANSWERS, str(bundle), *variants]
    return json.loads(output_of(command, given=json.dumps(texts)))


def make_debian(suite: str, directory: Path) -> Path:
    """Unpacks a Debian's Python and what it needs; returns where. Does nothing if it is there."""
    debian = directory / suite
    if debian.is_dir():
        return debian
    print(f"unpacking Debian {suite} for arm64 into {debian}", file=sys.stderr, flush=True)
    part = directory / f"{suite}.part"
    root, packages = part / "root", part / "packages"
    for name in ("bin", "sbin", "lib"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    output_of(
        ["debootstrap", "--arch=arm64", "--download-only", "--force-check-gpg", "--variant=minbase",
         "--include=python3,libstdc++6", suite, str(packages)],
    )  # fmt: skip
    for package in sorted((packages / "var/cache/apt/archives").glob("*.deb")):
        files = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(package)], check=True, stdout=subprocess.PIPE
        ).stdout
        unpack = ["tar", "--extract", "--keep-directory-symlink", "--directory", str(root)]
        subprocess.run(unpack, check=True, input=files)
    null = root / "dev/null"
    os.mknod(null, stat.S_IFCHR, os.makedev(1, 3))
    null.chmod(0o666)
    root.rename(debian)
    shutil.rmtree(part)
    return debian


@dataclass(frozen=True)
class Emulated:
    """An arm64 Debian with the runtime in ``/opt/run/venv`` and a bundle at ``bundle``."""

    name: str
    command: tuple[str, ...]
    bundle: str

    def python(self, *arguments: str, given: str = "", expected: int = 0) -> str:
        """Runs its Python; returns its output, or the errors of one that should fail."""
        command = [*self.command, "/opt/run/venv/bin/python", *arguments]
        return output_of(command, given, of=self.name, expected=expected, clean=True)

    def edgebert(self, name: str, *options: str, given: str = "", expected: int = 0) -> str:
        """Runs a command of ``edgebert-rt`` on the bundle; returns what ``python`` returns."""
        script = "/opt/run/venv/bin/edgebert-rt"
        return self.python(script, name, self.bundle, *options, given=given, expected=expected)


def install(board: Board, debian: Path, qemu: str, bundle: Path) -> Emulated:
    """Makes a board of a Debian: its processor's description, the runtime, and a bundle."""
    print(f"{board.name}: installing the runtime", file=sys.stderr, flush=True)
    run = debian / "opt/run"
    shutil.rmtree(run, ignore_errors=True)
    (run / "wheels").mkdir(parents=True)
    describe_processor(debian, board, os.cpu_count() or 1)
    shutil.copy2(qemu, run / "qemu")
    (shutil.copytree if bundle.is_dir() else shutil.copy2)(bundle, run / bundle.name)

    pip = [sys.executable, "-m", "pip"]
    output_of([*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
               str(run / "wheels"), str(ROOT / "runtime")])  # fmt: skip
    (wheel,) = (run / "wheels").glob("edgebert_runtime-*.whl")
    # Up to the glibc of JetPack 6. pip takes the tags that it is given, and no older ones.
    tags = ["manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, 36))]
    with tempfile.TemporaryDirectory() as directory:
        pins = Path(directory) / "pins.txt"
        pins.write_text("\n".join(pins_for(board.pins, but=board.requirements)))
        output_of(
            [*pip, "download", "--quiet", "--dest", str(run / "wheels"), "--only-binary=:all:",
             f"--python-version={board.python}", *(f"--platform={tag}_aarch64" for tag in tags),
             f"--constraint={pins}", f"{wheel}[cpu,tensorrt]", *board.requirements, "pip"],
            of=board.name,
        )  # fmt: skip
    (installer,) = (run / "wheels").glob("pip-*.whl")

    chroot = ("chroot", str(debian), "/opt/run/qemu", "-cpu", board.emulated)
    output_of(
        [*chroot, "/usr/bin/python3", "-m", "venv", "--without-pip", "/opt/run/venv"],
        of=board.name,
        clean=True,
    )
    emulated = Emulated(board.name, chroot, f"/opt/run/{bundle.name}")
    emulated.python(
        f"/opt/run/wheels/{installer.name}/pip", "install", "--quiet", "--no-index", "--no-compile",
        "--find-links=/opt/run/wheels", f"/opt/run/wheels/{wheel.name}[cpu,tensorrt]",
        *board.requirements,
    )  # fmt: skip
    return emulated


def describe_processor(debian: Path, board: Board, cores: int) -> None:
    """Writes what Linux on that board would say of its processor: ONNX Runtime goes by that.

    As files, since this machine's kernel would tell of another processor, and ONNX Runtime would
    take kernels that the emulated one has not; told nothing, ONNX Runtime 1.23.2 aborts.
    """
    core = f"Features\t: {board.features}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    core += f"CPU variant\t: 0x1\nCPU part\t: {board.part}\nCPU revision\t: 1\n\n"
    text = "".join(f"processor\t: {index}\n{core}" for index in range(cores))
    (debian / "proc/cpuinfo").write_text(text)
    cpus = debian / "sys/devices/system/cpu"
    cpus.mkdir(parents=True, exist_ok=True)
    for name in ("possible", "present", "online"):
        (cpus / name).write_text(f"0-{cores - 1}\n" if cores > 1 else "0\n")


def pins_for(python: str, but: Sequence[str] = ()) -> list[str]:
    """Returns the lines of ``constraints.txt`` for a Python on aarch64, without their markers.

    Args:
        python: Major and minor.
        but: Requirements whose packages are not to be pinned.
    """
    environment = {"python_version": python, "python_full_version": f"{python}.0",
                   "platform_machine": "aarch64", "platform_system": "Linux", "os_name": "posix",
                   "sys_platform": "linux", "implementation_name": "cpython",
                   "platform_python_implementation": "CPython"}  # fmt: skip
    others = {Requirement(line).name for line in but}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [
        f"{item.name}{item.specifier}"
        for item in requirements
        if item.marker is None or item.marker.evaluate(environment)
        if item.name not in others
    ]


def use(emulated: Emulated, variants: Mapping[str, str], texts: list[Text], expected: Any) -> Any:
    """Runs the commands that a user would, checks what they say, and returns all answers.

    Args:
        emulated: Where.
        variants: Names of those for CPUs, and their precisions.
        texts: What to answer.
        expected: This machine's answers, in the form of ``_ANSWERS``.
    """
    print(f"{emulated.name}: doctor, predict, verify", file=sys.stderr, flush=True)
    machine, gpu, *rest = emulated.edgebert("doctor").splitlines()
    print(*(f"  {line}" for line in (machine, gpu, *rest)), sep="\n", file=sys.stderr, flush=True)
    # cuda-bindings were found, or it would say that they are missing.
    missing = "GPU: there is no NVIDIA driver here: libcuda cannot be loaded"
    if not machine.startswith("machine: linux-aarch64,") or gpu != missing:
        raise SystemExit(f"{emulated.name}: doctor does not say: {missing}")
    refused = emulated.edgebert("predict", "a text", "--device=tensorrt", expected=1).splitlines()
    if len(refused) != 1 or not refused[0].startswith("error: "):
        raise SystemExit(f"{emulated.name}: TensorRT is not refused in one line: {refused}")
    exact = [name for name, precision in variants.items() if precision == "fp32"]
    chosen = json.loads(emulated.edgebert("doctor", "--json"))["choice"]["variant"]["name"]
    lines = ["\t".join(text) if isinstance(text, tuple) else text for text in texts]
    # Alone, or in FP32: in a batch, INT8 answers a little otherwise, as its scales are the batch's.
    for name, given in [(chosen, lines[:1]), *((name, lines) for name in exact)]:
        said = emulated.edgebert("predict", "--json", f"--variant={name}", given="\n".join(given))
        labels = [prediction["labels"] for prediction in json.loads(said)]
        if labels != expected["variants"][name]["labels"][: len(given)]:
            raise SystemExit(f"{emulated.name}: predict's labels are not those of {name} here")
    emulated.edgebert("verify")
    print(f"{emulated.name}: {len(texts)} texts", file=sys.stderr, flush=True)
    arguments = ("-c", _ANSWERS, emulated.bundle, *variants)
    return json.loads(emulated.python(*arguments, given=json.dumps(texts)))


def differences(
    here: Sequence[Sequence[float]], there: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """Returns by how much raw outputs differ: at most in half of the rows, and in all."""
    by_row = np.abs(np.array(here) - np.array(there)).max(axis=1)
    return float(np.median(by_row)), float(by_row.max())


def fault_of(
    half: float, most: float, here: list[list[str]], there: list[list[str]], precision: str
) -> str | None:
    """Says in what the answers of another processor are not those of this one.

    Args:
        half: By how much raw outputs differ at most in half of the texts.
        most: The same in all texts. Either is NaN if an output is not a number.
        here: Labels of each text.
        there: The same from the other processor.
        precision: The variant's.
    """
    of_half, of_all = BOUNDS[precision]
    if not half <= of_half:  # so that NaN is a fault, too
        return f"half of the texts differ by {half:.1e} or more; the bound is {of_half:.0e}"
    if not most <= of_all:
        return f"a text's raw outputs differ by {most:.1e}; the bound is {of_all:.0e}"
    flipped = sum(mine != other for mine, other in zip(here, there, strict=True))
    return f"{flipped} of {len(here)} texts have other labels" if flipped else None


def output_of(
    command: list[str], given: str = "", *, of: str = "", expected: int = 0, clean: bool = False
) -> str:
    """Runs a command; returns its output, or the errors of one that should fail.

    Args:
        command: With its arguments.
        given: Its standard input.
        of: Begins the message if it ends otherwise than expected.
        expected: Its exit code.
        clean: Whether it sees nothing of this machine's environment variables.
    """
    environment = {"PATH": "/usr/sbin:/usr/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
    prefix = f"{of}: " if of else ""
    try:
        done = subprocess.run(command, input=given, env=environment if clean else None,
                              capture_output=True, encoding="utf-8", check=False,
                              timeout=MOST_SECONDS if clean else None)  # fmt: skip
    except subprocess.TimeoutExpired as exc:
        raise SystemExit(f"{prefix}no end after {MOST_SECONDS} s: {short(command)}") from exc
    if done.returncode != expected:
        last = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-1:]
        raise SystemExit(f"{prefix}{short(command)} ended with {done.returncode}: {''.join(last)}")
    return done.stderr if expected else done.stdout


def short(command: list[str]) -> str:
    """Returns a command in a line that can be read."""
    return " ".join(" ".join(part.split())[:40] for part in command)[:300]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except Timeout:
        sys.exit("another test-arm is running; wait for it")
    except (EdgebertError, OSError, subprocess.CalledProcessError) as fault:
        sys.exit(f"test-arm: {fault}")
