"""INT8 for TensorRT and for CPUs, through a recipe: what is shipped, refused, and said."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgebert_pipeline.report import Report
from edgebert_pipeline.report_markdown import render_markdown
from edgebert_pipeline.run import export
from edgebert_pipeline.sections.quantisation import without_common_start
from edgebert_runtime import Classifier, InputError
from edgebert_runtime.bundle import Bundle

STRICT = "max_accuracy_drop = 1.0  # a tiny model is unsure of everything\nmax_flip_rate = 1.0"
"""What the tests' recipes say of the budget, for tests to replace."""


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path
) -> Callable[[Callable[..., Path]], tuple[Path, Report]]:
    """Returns a function that builds the pairs' recipe, once for all tests here."""
    out = tmp_path_factory.mktemp("quantised") / "out"
    found: list[Report] = []

    def build(write_recipe: Callable[..., Path]) -> tuple[Path, Report]:
        if not found:
            report = export(write_recipe("pairs", '[quantise]\nsensitivity = "always"'), out)
            assert report is not None
            found.append(report)
        return out, found[0]

    return build


def test_the_bundle_holds_the_sources_of_engines(built, write_recipe) -> None:
    out, report = built(write_recipe)
    variants = {v.name: v for v in Bundle.open(out / "bundle").manifest.variants}
    assert list(variants) == ["int8-cpu", "int8-gpu", "fp16-gpu", "fp32"]
    assert variants["int8-gpu"].precision == "int8"
    assert variants["fp16-gpu"].precision == "fp16"
    assert variants["int8-gpu"].devices == variants["fp16-gpu"].devices == ("tensorrt", "rtx")
    models = out / "bundle" / "models"
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(models / "int8-gpu.onnx")
    assert not {"QuantizeLinear", "DequantizeLinear"} & operators(models / "fp16-gpu.onnx")
    for name in ("int8-gpu", "fp16-gpu"):
        onnx.checker.check_model(str(models / f"{name}.onnx"), full_check=True)
    assert report.passed


def test_a_device_without_tensorrt_serves_what_is_for_it_and_refuses_the_rest(
    built, write_recipe, texts_for
) -> None:
    out, _ = built(write_recipe)
    with Classifier.load(out / "bundle") as classifier:
        assert classifier.choice is not None
        assert classifier.choice.variant.name == "int8-cpu"
        assert len(classifier.predict(texts_for["pairs"][:5])) == 5
    with pytest.raises(InputError, match="take one that runs there: int8-cpu, fp32"):
        Classifier.load(out / "bundle", device="cpu", variant="int8-gpu")


def test_every_variant_is_measured_and_only_the_cpu_s_are_timed(built, write_recipe) -> None:
    _, report = built(write_recipe)
    timed = {v.name: v.timing is not None for v in report.evaluation.variants}
    assert timed == {"int8-cpu": True, "int8-gpu": False, "fp16-gpu": False, "fp32": True}
    for variant in report.evaluation.variants:
        share = variant.flips / report.evaluation.rows
        assert variant.flip_rate_low <= share <= variant.flip_rate_high
    pairs = {(c.first, c.second) for c in report.evaluation.comparisons}
    assert {("int8-gpu", "fp16-gpu"), ("int8-gpu", "fp32"), ("fp16-gpu", "fp32")} <= pairs


def test_the_report_says_how_it_was_quantised(built, write_recipe) -> None:
    _, report = built(write_recipe)
    log = report.quantisation["model"]
    assert log.gpu is not None and log.gpu.fit is not None and log.cpu is not None
    assert log.gpu.refusal is None
    assert len(log.gpu.trials) == 8
    assert log.gpu.chosen is not None
    best = log.gpu.trials[log.gpu.chosen].fidelity.distance
    assert best == min(trial.fidelity.distance for trial in log.gpu.trials)
    # Of a layer's 6, queries, keys and values are one; of the last layer's, keys and values.
    assert log.gpu.linear_int8 == log.gpu.linear_layers == 9
    assert (log.gpu.head_layers, log.cpu.layers) == (2, 14 + 3)
    assert len(log.gpu.fit.sensitivity) == 9
    assert len(log.gpu.ranges) == 9
    assert all(0 < product.share <= 0.5 for product in log.gpu.ranges)
    assert all(0 <= scale.clipped < 0.2 and scale.scale > 0 for scale in log.gpu.scales)
    text = render_markdown(report)
    assert "## Quantisation" in text
    assert "9 of 9 linear layers in INT8 (100%)" in text
    assert "2 more, of the head or with few channels, stay in FP16" in text
    assert "with every result that its graph types FP16 stored as FP16" in text
    assert "at most half of FP16's range" in text
    for product in log.gpu.ranges:
        assert f"{product.share:.2%}" in text
    assert "nothing here was run on a GPU" in text
    for calibrator in ("max", "percentile", "mse", "entropy"):
        assert f"| {calibrator} " in text
    assert len(re.findall(r"\| taken +\|", text)) == 1
    assert "each layer alone in INT8" in text


def test_a_second_build_makes_the_same_models(built, write_recipe, tmp_path: Path) -> None:
    _, report = built(write_recipe)
    again = export(write_recipe("pairs", '[quantise]\nsensitivity = "always"'), tmp_path / "again")
    assert again is not None
    assert again.bundle_digest == report.bundle_digest
    assert again.quantisation == report.quantisation


def test_layers_are_given_back_until_the_budget_fits(
    built, write_recipe, tmp_path: Path, capsys
) -> None:
    """A divergence halfway between the whole model's and FP16's: some layers must go back."""
    _, report = built(write_recipe)
    log = report.quantisation["model"]
    assert log.gpu is not None and log.gpu.fit is not None and log.gpu.fp16 is not None
    limit = (log.gpu.fit.first.distance * log.gpu.fp16.distance) ** 0.5
    budget = STRICT + f"\nmax_divergence = {limit:.3g}"
    tight = export(write_recipe("pairs", "", **{STRICT: budget}), tmp_path / "out")
    assert tight is not None
    found = tight.quantisation["model"].gpu
    assert found is not None and found.fit is not None and found.fit.fits
    given_back = {item.layer for item in found.fit.given_back}
    assert given_back and found.linear_int8 == 9 - len(given_back)
    assert not given_back & set(found.fit.quantised)
    assert found.fit.last.distance <= limit < found.fit.first.distance
    worst_first = [damage.layer for damage in found.fit.sensitivity]
    assert [item.layer for item in found.fit.given_back] == worst_first[: len(given_back)]
    assert "given back" in render_markdown(tight)
    assert "accuracy lost" in capsys.readouterr().err


def test_without_a_set_that_fits_fp16_is_shipped_and_it_is_said(
    built, write_recipe, tmp_path: Path, capsys
) -> None:
    """Of one layer, the most harmful that is one on a CPU, FP16's divergence is out of reach."""
    _, report = built(write_recipe)
    log = report.quantisation["model"].gpu
    assert log is not None and log.fp16 is not None and log.fit is not None
    layers = [damage.layer for damage in log.fit.sensitivity]
    worst = next(name for name in layers if "+" not in name)
    others = [*(name for name in layers if name != worst), "bert.pooler.dense", "classifier"]
    budget = STRICT + f"\nmax_divergence = {log.fp16.distance * 1.01:.6g}"
    extra = f"[quantise]\nembeddings = false\nexclude = {json.dumps(others)}"
    refused = export(write_recipe("pairs", extra, **{STRICT: budget}), tmp_path / "out")
    assert refused is not None
    names = [v.name for v in Bundle.open(tmp_path / "out" / "bundle").manifest.variants]
    assert names == ["fp16-gpu", "fp32"]
    text = render_markdown(refused)
    assert "There is no int8-gpu" in text
    assert "There is no int8-cpu**: the one layer that may be in INT8 misses the budget" in text
    said = capsys.readouterr().err
    assert "tried in INT8 fits the budget: FP16 it is" in said
    assert "int8-cpu: none of the sets of layers that were tried fits the budget" in said
    with Classifier.load(tmp_path / "out" / "bundle") as classifier:
        assert classifier.choice is not None
        assert classifier.choice.variant.name == "fp32"


def test_a_budget_that_fp16_misses_leaves_fp32(write_recipe, tmp_path: Path) -> None:
    budget = STRICT + "\nmax_divergence = 1e-15"
    report = export(write_recipe("pairs", "", **{STRICT: budget}), tmp_path / "out")
    assert report is not None
    names = [v.name for v in Bundle.open(tmp_path / "out" / "bundle").manifest.variants]
    assert names == ["fp32"]
    assert "There is no model for TensorRT" in render_markdown(report)


def test_a_recipe_can_do_without_either(write_recipe, tmp_path: Path) -> None:
    report = export(write_recipe("pairs", "[quantise]\ncpu = false\ngpu = false"), tmp_path / "out")
    assert report is not None
    assert report.quantisation == {}
    names = [v.name for v in Bundle.open(tmp_path / "out" / "bundle").manifest.variants]
    assert names == ["fp32"]
    assert "## Quantisation" not in render_markdown(report)


def _rows(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


def _random_words(letters: str, count: int) -> list[str]:
    chooser = random.Random(3)
    return [
        " ".join("".join(chooser.choices(letters, k=6)) for _ in range(chooser.randint(3, 9)))
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], "none of the 1 calibration texts holds a word"),
        (["word " * 100] * 8, "all 8 calibration texts"),
        (_random_words("☃☂☁☀", 40), "nothing in common"),
    ],
)
def test_calibration_texts_of_no_use_are_refused_with_one_line(
    write_recipe, edgebert, fails_cleanly, tmp_path: Path, texts: list[str], message: str
) -> None:
    path = _rows(
        tmp_path / "texts.jsonl", [f"{text}{i}" if text else "" for i, text in enumerate(texts)]
    )
    extra = f"[data.calibration]\npath = {json.dumps(str(path))}"
    done = edgebert("export", write_recipe("single", extra), "--out", tmp_path / "out")
    assert message in fails_cleanly(done)


def test_calibration_texts_unlike_the_validation_texts_are_warned_of(
    write_recipe, edgebert, sentences: list[dict[str, Any]], tmp_path: Path
) -> None:
    short = [row["text"].split()[0] for row in sentences[:60]]
    path = _rows(tmp_path / "texts.jsonl", list(dict.fromkeys(short)))
    extra = f"[data.calibration]\npath = {json.dumps(str(path))}"
    done = edgebert("export", write_recipe("single", extra), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert re.search(r"warning: calibration texts are \d+ tokens long in the median", done.stderr)
    assert done.stderr.index("warning: ") < done.stderr.index("finetune: ")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["quantisation"]["model"]["gpu"]["texts"]["warnings"]


def test_a_pattern_that_excludes_nothing_is_refused(
    write_recipe, edgebert, fails_cleanly, tmp_path: Path
) -> None:
    recipe = write_recipe("single", '[quantise]\nexclude = ["*.pooller.*"]')
    done = edgebert("export", recipe, "--out", tmp_path / "out")
    assert "'*.pooller.*'" in fails_cleanly(done)
    recipe = write_recipe("single", '[quantise]\nexclude = ["bert.pooler.*", "*.layer.0.*"]')
    done = edgebert("export", recipe, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["quantisation"]["model"]["gpu"]["linear_int8"] == 9 - 4


def test_layers_in_the_sensitivity_chart_keep_names_of_their_own() -> None:
    layers = [
        f"distilbert.transformer.layer.{number}.{part}"
        for number in (0, 1)
        for part in ("attention.q_lin+k_lin+v_lin", "ffn.lin1")
    ]
    shown = without_common_start(layers)
    assert shown[0] == "0.attention.q_lin+k_lin+v_lin" and len(set(shown)) == len(layers)
    assert without_common_start(["bert.pooler.dense"]) == ["dense"]
    assert without_common_start(["classifier", "bert.pooler.dense"])[0] == "classifier"
