"""What each step makes a CPU's INT8 faster by, on a finished build's model and test rows.

Usage: python benchmarks/cpu_gains.py RECIPE BUILD [MODEL]   (after edgebert export; MODEL:
``teacher`` or ``student``)

The plain export is quantised, then the same with one rewrite after the other; the last steps
change how it is run. All take turns on the test rows, in one process; medians, and each step's
ratio to the one before it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
from finished_build import FinishedModel

from edgebert_export.checkpoint import checkpoint_encoder
from edgebert_export.fidelity import Budget, Judge
from edgebert_export.quantise import QuantiseConfig
from edgebert_export.quantise_cpu import quantise_cpu
from edgebert_export.to_onnx import ExportConfig, to_onnx
from edgebert_pipeline.markdown import table
from edgebert_runtime.classifier import Classifier
from edgebert_runtime.encoder import TextEncoder
from edgebert_runtime.onnx_session import SLOWER_FUSED
from edgebert_runtime.processor import int8_products_saturate, usable_cores

ROUNDS, SINGLE = 9, 200
ANY = QuantiseConfig(budget=Budget(max_accuracy_drop=1.0, max_flip_rate=1.0))
REWRITES = {
    "plain": ExportConfig(first_token=False, fold_token_types=False),
    "first token": ExportConfig(fold_token_types=False),
    "folded": ExportConfig(),
}


class BareSession:
    """A session of ONNX Runtime with settings of its own."""

    def __init__(
        self, model: bytes, *, threads: int, fuse_norms: bool = False, widen: bool | None = None
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if int8_products_saturate() if widen is None else widen:
            options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = onnxruntime.InferenceSession(
            model,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=[] if fuse_norms else SLOWER_FUSED["cpu"],
        )

    def run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Computes one batch."""
        return {"logits": self._session.run(["logits"], dict(inputs))[0]}

    def close(self) -> None:
        """Frees nothing."""


def main(recipe: Path, build: Path, name: str | None) -> None:
    """Prints a Markdown table."""
    finished = FinishedModel.of(recipe, build, name)
    task, texts = finished.dataset.task, [row.text for row in finished.dataset.test]
    models: dict[str, bytes] = {}
    encoders: dict[str, TextEncoder] = {}
    with tempfile.TemporaryDirectory() as directory:
        for form, config in REWRITES.items():
            path = Path(directory) / form
            exported = to_onnx(finished.checkpoint, task, config, path.with_suffix(".onnx"))
            encoders[form] = checkpoint_encoder(
                finished.checkpoint,
                max_length=config.max_length,
                text_pair=task.text_pair,
                input_names=exported.input_names(),
            )
            few = finished.dataset.validation[:8]
            judge = Judge(exported.path.read_bytes(), task, encoders[form], few)
            quantise_cpu(exported, judge, ANY, path)
            models[form] = path.read_bytes()

    cores = usable_cores()

    def classifier(form: str, *, by_core: bool = False, **settings: Any) -> Classifier:
        model = models[form]
        return Classifier(
            BareSession(model, threads=cores, **settings),
            encoders[form],
            task,
            batch_tokens=512 if by_core else None,
            workers=cores if by_core else 1,
            start_worker_session=(lambda: BareSession(model, threads=1, **settings))
            if by_core
            else None,
        )

    steps = {
        "ONNX Runtime's dynamic INT8, batches of 32 by length": classifier(
            "plain", fuse_norms=True
        ),
        "last layer: first token only": classifier("first token", fuse_norms=True),
        "token types folded": classifier("folded", fuse_norms=True),
        "LayerNorm apart from the sum before it": classifier("folded"),
        "a batch of 512 tokens a core": classifier("folded", by_core=True),
    }
    widened = {"the last with products widened": classifier("folded", by_core=True, widen=True)}
    everyone = steps | ({} if int8_products_saturate() else widened)
    throughput: dict[str, list[float]] = {step: [] for step in everyone}
    single: dict[str, list[float]] = {step: [] for step in everyone}
    for round_ in range(ROUNDS + 1):
        for step, one in everyone.items():
            start = time.perf_counter()
            one.predict(texts)
            taken = time.perf_counter() - start
            singles = []
            for text in texts[:SINGLE]:
                start = time.perf_counter()
                one.predict([text])
                singles.append(1000 * (time.perf_counter() - start))
            if round_:  # the first is a warm-up
                throughput[step].append(len(texts) / taken)
                single[step].append(statistics.median(singles))
    lines, before = [], None
    for step in everyone:
        now = statistics.median(throughput[step])
        ratio = now / before if before else 1.0
        lines.append((step, f"{now:.0f}", f"{ratio:.2f}", f"{statistics.median(single[step]):.2f}"))
        before = now
    print(table(("step", "texts/s", "times the one before", "p50 ms, single text"), lines))
    print(f"\n{finished.name}, {len(texts)} texts, {ROUNDS} rounds, {cores} cores")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
