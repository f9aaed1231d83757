"""Other quantisers beside ours: the same FP32 model, calibration texts and test rows for all.

Usage: python benchmarks/int8_peers.py RECIPE BUILD [MODEL]   (after edgebert export)

MODEL is ``teacher`` or ``student`` where the build has both. Every result is answered by ONNX
Runtime on a CPU and, where tensorrt-rtx is installed, shown to its parser. ModelOpt needs other
versions of everything, so it gets an environment of its own in the cache directory (some GB).
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from finished_build import FinishedModel

from edgebert_export.calibrate import CALIBRATORS
from edgebert_export.emulate import emulate
from edgebert_export.fidelity import Budget, Fidelity, Judge
from edgebert_export.quantise import QuantiseConfig
from edgebert_export.quantise_gpu import quantise_gpu
from edgebert_export.to_onnx import OnnxModel
from edgebert_pipeline.intervals import wilson
from edgebert_pipeline.markdown import cell, table
from edgebert_runtime.cache import cache_dir

TEXTS, PADDED_TO = 256, 64
MODELOPT = "nvidia-modelopt[onnx]==0.47.*"
MODELOPT_CODE = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize
model, data, out, method = sys.argv[1:]
quantize(model, "int8", dict(np.load(data)), method, calibration_eps=["cpu"],
         high_precision_dtype="fp32", output_path=out, log_level="ERROR")
"""


class Peers:
    """Ways to quantise one model; each writes an ONNX file and returns its path."""

    def __init__(self, fp32: Path, model: FinishedModel, work: Path) -> None:
        self.fp32, self.work = fp32, work
        self.checkpoint, self.dataset, self.encoder = model.checkpoint, model.dataset, model.encoder
        texts = [example.text for example in self.dataset.calibration[:TEXTS]]
        self.rows = self.encoder.encode(texts)

    def padded(self) -> dict[str, Any]:
        """All calibration texts, cut and padded to one length, as the peers' examples do it."""
        cut = [
            msgspec.structs.replace(
                row, ids=list(row.ids)[:PADDED_TO], type_ids=list(row.type_ids)[:PADDED_TO]
            )
            for row in self.rows
        ]
        inputs = self.encoder.collate(cut)
        missing = PADDED_TO - inputs["input_ids"].shape[1]
        return {name: np.pad(array, ((0, 0), (0, missing))) for name, array in inputs.items()}

    def optimum(self, method: str) -> Path:
        """Optimum's quantiser with its own settings for TensorRT."""
        import shutil

        from datasets import Dataset as Rows
        from optimum.onnxruntime import ORTQuantizer
        from optimum.onnxruntime.configuration import AutoCalibrationConfig, AutoQuantizationConfig

        source = self.work / "optimum"
        source.mkdir(exist_ok=True)
        shutil.copyfile(self.fp32, source / "model.onnx")
        shutil.copyfile(self.checkpoint.path / "config.json", source / "config.json")
        rows = Rows.from_dict({name: array.tolist() for name, array in self.padded().items()})
        how = {
            "minmax": lambda: AutoCalibrationConfig.minmax(rows),
            "entropy": lambda: AutoCalibrationConfig.entropy(rows),
            "percentile": lambda: AutoCalibrationConfig.percentiles(rows, percentile=99.99),
        }[method]()
        config = AutoQuantizationConfig.tensorrt(per_channel=True)
        quantizer = ORTQuantizer.from_pretrained(source, file_name="model.onnx")
        ranges = quantizer.fit(
            dataset=rows,
            calibration_config=how,
            operators_to_quantize=config.operators_to_quantize,
            onnx_augmented_model_name=str(self.work / "augmented.onnx"),
        )
        out = self.work / f"optimum-{method}"
        quantizer.quantize(
            save_dir=out, calibration_tensors_range=ranges, quantization_config=config
        )
        return next(out.glob("*.onnx"))

    def onnxruntime(self, method: str, everything: bool = False) -> Path:
        """ONNX Runtime's static quantiser, on texts of their own lengths."""
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        batches = iter([self.encoder.collate(self.rows[i : i + 8]) for i in range(0, TEXTS, 8)])

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> Any:
                return next(batches, None)

        every = ["MatMul", "Gemm", "Add", "Mul", "Div", "Softmax", "LayerNormalization", "Gather"]
        out = self.work / f"onnxruntime-{method}-{everything}.onnx"
        quantize_static(
            self.fp32,
            out,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=every if everything else ["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
            extra_options={
                "MatMulConstBOnly": not everything,
                "ActivationSymmetric": True,
                "QuantizeBias": False,
            },
        )
        return out

    def modelopt(self, method: str) -> Path:
        """NVIDIA's quantiser, in an environment of its own."""
        environment = cache_dir() / "benchmarks" / "modelopt"
        python = environment / "bin" / "python"
        if not (environment / "whole").exists():
            venv.create(environment, clear=True, with_pip=True)
            _run([python, "-m", "pip", "install", "--quiet", MODELOPT])
            (environment / "whole").touch()
        data, out = self.work / "texts.npz", self.work / f"modelopt-{method}.onnx"
        np.savez(data, **self.padded())
        _run([python, "-c", MODELOPT_CODE, self.fp32, data, out, method])
        return out

    def ours(self, **settings: Any) -> Path:
        """This project's; with ``auto``, all is decided on validation rows, as in an export."""
        validation = self.dataset.validation
        judge = Judge(self.fp32.read_bytes(), self.dataset.task, self.encoder, validation)
        budget = Budget() if not settings else Budget(max_accuracy_drop=1.0, max_flip_rate=1.0)
        out = self.work / f"ours-{'-'.join(map(str, settings.values()))}.onnx"
        log = quantise_gpu(
            OnnxModel(self.fp32, "fp32"),
            [example.text for example in self.dataset.calibration],
            [example.text for example in validation],
            self.encoder,
            judge,
            QuantiseConfig(**settings, calibration_texts=TEXTS, budget=budget),
            fp16=self.work / "ours-fp16.onnx",
            int8=out,
        )
        if log.refusal is not None:
            raise RuntimeError(log.refusal)
        return out

    def all(self) -> Iterator[tuple[str, Callable[[], Path]]]:
        """Yields every way, by name."""
        for method in ("minmax", "entropy", "percentile"):
            yield f"Optimum, tensorrt(), {method}", lambda m=method: self.optimum(m)
        yield (
            "ONNX Runtime, everything, min-max",
            lambda: self.onnxruntime("MinMax", everything=True),
        )
        for method in ("MinMax", "Entropy", "Percentile"):
            yield f"ONNX Runtime, linear, {method}", lambda m=method: self.onnxruntime(m)
        for method in ("max", "entropy"):
            yield f"ModelOpt, {method}", lambda m=method: self.modelopt(m)
        for calibrator in CALIBRATORS:
            yield (
                f"edgebert, {calibrator}",
                lambda c=calibrator: self.ours(calibrator=c, smoothing="never"),
            )
        yield "edgebert, auto (the default)", self.ours


def _run(command: list[object]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])


def parses(path: Path) -> str:
    """What the parser of TensorRT for RTX says of a model."""
    try:
        import tensorrt_rtx as trt
    except ImportError:
        return "not tried"
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return "yes"
    return f"no: {cell(str(parser.get_error(0).desc()))[:70]}"


def main(recipe_path: Path, build: Path, which: str | None) -> None:
    """Prints a Markdown table."""
    logging.disable(logging.WARNING)
    model = FinishedModel.of(recipe_path, build, which)
    dataset = model.dataset
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        fp32 = model.export(work)
        peers = Peers(fp32, model, work)
        judge = Judge(fp32.read_bytes(), dataset.task, peers.encoder, dataset.test)
        lines = [_line("FP32", judge.judge(fp32.read_bytes()), "")]
        for label, make in peers.all():
            try:
                path = make()
                found = judge.judge(emulate(ir.load(path)))  # a graph in FP32 is computed as it is
                lines.append(_line(label, found, parses(path)))
            except Exception as exc:  # peers fail in ways of their own; the table says how
                lines.append((label, f"fails: {cell(str(exc))[:70]}", "", "", ""))
            print(" | ".join(lines[-1]), file=sys.stderr, flush=True)
    header = ("quantiser", "accuracy", "flips (95 % interval)", "divergence", "RTX parses it")
    print(f"{model.name}, {len(dataset.test)} test rows\n")
    print(table(header, lines))


def _line(label: str, found: Fidelity, parsed: str) -> tuple[str, ...]:
    low, high = wilson(found.flips, found.rows)
    return (
        label,
        f"{found.correct / found.rows:.4f}",
        f"{found.flips} ({found.flips / found.rows:.1%}, {low:.1%}-{high:.1%})",
        "not a number" if found.divergence is None else f"{found.divergence:.2g}",
        parsed,
    )


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) == 4 else None)
