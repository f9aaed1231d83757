"""What building TensorRT-RTX engines costs: time beside a bare script, size, memory. No GPU needed.

Usage: python benchmarks/engine_cost.py RECIPE [ROUNDS]

A BERT of bert-base's size with random weights is exported and quantised, as `int8_cost.py` does.
Its INT8 and FP16 models are built by edgebert and by a bare script that makes the same calls, each
in a process of its own, in turns. Prints medians, their ratio, and engine sizes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from int8_cost import BASE, alone, quantise, random_bert

from edgebert_export.engine import build_rtx_engine, engine_profiles, rtx_or_reason
from edgebert_runtime.manifest import Profile
from edgebert_runtime.profiles import profiles_of

BARE = """
import json, resource, sys, time
import tensorrt_rtx as trt
model, out, shapes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
data = open(model, "rb").read()
start = time.monotonic()
logger = trt.Logger(trt.Logger.INFO)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse(data)
config = builder.create_builder_config()
config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 512 << 20)
for low, best, high in shapes:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        profile.set_shape(network.get_input(index).name, low, best, high)
    config.add_optimization_profile(profile)
engine = builder.build_serialized_network(network, config)
open(out, "wb").write(engine)
seconds = time.monotonic() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "size": engine.nbytes}))
"""


def bare(model: Path, out: Path, profiles: tuple[Profile, ...]) -> dict[str, float]:
    """Builds with the library's own calls alone."""
    shapes = [
        [[1, 1], [p.opt_batch, p.opt_seq], [p.max_batch, p.max_seq]]
        for p in profiles_of("rtx", profiles)
    ]
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(model), str(out), json.dumps(shapes)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(recipe: Path, rounds: int) -> None:
    """Prints one line for each model, and the ratio of their sizes."""
    here = rtx_or_reason()
    if isinstance(here, str):
        raise SystemExit(here)
    version, platform = here
    profiles = engine_profiles([24] * 97 + [48] * 3, 128, (1, 32))
    print(f"TensorRT-RTX {version}; shapes {[(p.max_batch, p.max_seq) for p in profiles]}")
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        alone("", random_bert, recipe, work, BASE)
        alone("quantising", quantise, recipe, work, 64)
        sizes = {}
        for name in ("int8", "fp16"):
            ours, theirs, peaks = [], [], []
            for _ in range(rounds):
                built = build_rtx_engine(
                    name,
                    work / f"{name}.onnx",
                    profiles,
                    work / "ours.engine",
                    version=version,
                    platform=platform,
                    log=work / "log",
                )
                ours.append(built.seconds)
                peaks.append(built.peak_bytes)
                theirs.append(
                    bare(work / f"{name}.onnx", work / "bare.engine", profiles)["seconds"]
                )
            sizes[name] = built.size_bytes
            mine, other = statistics.median(ours), statistics.median(theirs)
            print(
                f"{name}: {mine:.1f} s, bare {other:.1f} s, ratio {mine / other:.2f}; peak "
                f"{max(peaks) / 1e6:.0f} MB; model {built.model_bytes / 1e6:.0f} MB, engine "
                f"{built.size_bytes / 1e6:.0f} MB",
                flush=True,
            )
        print(f"INT8 engine {sizes['int8'] / sizes['fp16']:.3f} times the FP16 engine")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
