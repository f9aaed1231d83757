"""Writing bundles: reproducible bytes, everything listed, and the model's own answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebert_export.checkpoint import Checkpoint, checkpoint_encoder
from edgebert_export.dataset import Dataset
from edgebert_export.fidelity import Budget, Judge
from edgebert_export.quantise import QuantiseConfig
from edgebert_export.quantise_cpu import quantise_cpu
from edgebert_export.to_onnx import OnnxModel
from edgebert_export.write_bundle import VariantSource, write_bundle
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.classifier import Classifier
from edgebert_runtime.errors import BundleError
from edgebert_runtime.manifest import Provenance, Task
from edgebert_runtime.onnx_session import OnnxSession

PROVENANCE = Provenance(
    edgebert="0.1.0",
    recipe_sha256="1" * 64,
    model_sha256="2" * 64,
    data_sha256="3" * 64,
    seed=7,
    versions={"torch": "2.13.0", "onnx": "1.23.2"},
)


@pytest.fixture(scope="module")
def int8(
    tmp_path_factory: pytest.TempPathFactory,
    onnx_models: dict[str, OnnxModel],
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    datasets: dict[str, Dataset],
) -> OnnxModel:
    out = tmp_path_factory.mktemp("int8") / "model.onnx"
    encoder = checkpoint_encoder(tiny_classifiers["single"], max_length=64, text_pair=False)
    fp32 = onnx_models["single"]
    rows = datasets["single"].validation
    judge = Judge(fp32.path.read_bytes(), tasks["single"], encoder, rows)
    lenient = QuantiseConfig(budget=Budget(max_accuracy_drop=1.0, max_flip_rate=1.0))
    assert quantise_cpu(fp32, judge, lenient, out).fits
    return OnnxModel(out, "int8")


@pytest.fixture
def write(
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    onnx_models: dict[str, OnnxModel],
    texts_for: dict[str, list[Any]],
) -> Callable[..., Bundle]:
    def run(
        out: Path, name: str = "single", variants: dict[str, VariantSource] | None = None
    ) -> Bundle:
        return write_bundle(
            out,
            name=f"tiny-{name}",
            task=tasks[name],
            checkpoint=tiny_classifiers[name],
            max_length=64,
            variants=variants or {"fp32": VariantSource(onnx_models[name], ("cpu", "cuda"))},
            provenance=PROVENANCE,
            texts=texts_for[name][:20],
        )

    return run


def _files(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_the_same_inputs_give_the_same_bytes(
    write: Any, onnx_models: dict[str, OnnxModel], int8: OnnxModel, tmp_path: Path
) -> None:
    variants = {
        "int8-cpu": VariantSource(int8, ("cpu",)),
        "fp32": VariantSource(onnx_models["single"], ("cpu", "cuda")),
    }
    first = write(tmp_path / "first", variants=variants)
    second = write(tmp_path / "deeper" / "second", variants=variants)
    assert _files(first.path) == _files(second.path)
    assert first.digest == second.digest


@pytest.mark.parametrize("name", ["single", "multi", "pairs"])
def test_every_file_is_listed_with_its_size_and_hash(write: Any, tmp_path: Path, name: str) -> None:
    bundle = write(tmp_path / "bundle", name)
    files = _files(bundle.path)
    assert set(files) == {
        "known_answers.json",
        "manifest.json",
        "manifest.sha256",
        "models/fp32.onnx",
        "tokenizer.json",
    }
    listed = {e.path: (e.size_bytes, e.sha256) for e in bundle.manifest.files}
    assert listed == {
        path: (len(data), hashlib.sha256(data).hexdigest())
        for path, data in files.items()
        if not path.startswith("manifest.")
    }


@pytest.mark.parametrize("name", ["single", "multi", "pairs"])
def test_a_written_bundle_says_what_it_was_made_from(
    write: Any, tasks: dict[str, Task], tmp_path: Path, name: str
) -> None:
    write(tmp_path / "bundle", name)
    bundle = Bundle.open(tmp_path / "bundle")
    bundle.verify()
    manifest = bundle.manifest
    assert manifest.name == f"tiny-{name}"
    assert manifest.task == tasks[name]
    assert manifest.max_length == 64
    assert manifest.provenance == PROVENANCE
    assert [spec.name for spec in manifest.inputs] == [
        "input_ids",
        "attention_mask",
        "token_type_ids",
    ]
    assert manifest.outputs[0].shape == ("batch", len(tasks[name].labels))


@pytest.mark.parametrize("order", [["fp32", "int8-cpu"], ["int8-cpu", "fp32"]])
def test_variants_keep_their_order_which_is_the_order_of_preference(
    write: Any, onnx_models: dict[str, OnnxModel], int8: OnnxModel, tmp_path: Path, order: Any
) -> None:
    sources = {
        "fp32": VariantSource(onnx_models["single"], ("cpu", "cuda")),
        "int8-cpu": VariantSource(int8, ("cpu",)),
    }
    bundle = write(tmp_path / "bundle", variants={name: sources[name] for name in order})
    found = [(v.name, v.precision, v.devices) for v in bundle.manifest.variants]
    assert found == [(n, sources[n].model.precision, sources[n].devices) for n in order]
    with Classifier.load(bundle.path, device="cpu") as classifier:
        assert classifier.choice is not None
        assert classifier.choice.variant.name == order[0]


@pytest.mark.parametrize("name", ["single", "multi", "pairs"])
def test_a_bundle_answers_as_the_model_that_went_into_it(
    write: Any,
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    onnx_models: dict[str, OnnxModel],
    texts_for: dict[str, list[Any]],
    tmp_path: Path,
    name: str,
) -> None:
    bundle = write(tmp_path / "bundle", name)
    texts = texts_for[name][:48]
    encoder = checkpoint_encoder(
        tiny_classifiers[name], max_length=64, text_pair=tasks[name].text_pair
    )
    source = OnnxSession(onnx_models[name].path.read_bytes())
    with (
        Classifier.load(bundle.path, device="cpu") as shipped,
        Classifier(source, encoder, tasks[name]) as direct,
    ):
        np.testing.assert_array_equal(shipped.logits(texts), direct.logits(texts))
        assert shipped.predict(texts) == direct.predict(texts)


def test_a_directory_that_holds_something_else_is_not_turned_into_a_bundle(
    write: Any, tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"notes\.txt is not listed"):
        write(tmp_path / "bundle")
