"""Bundles that a test may alter, and ways to alter them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgebert_runtime import Classifier
from edgebert_runtime.bundle import MANIFEST, MANIFEST_HASH, Bundle
from edgebert_runtime.encoder import TextEncoder

MODEL = "models/fp32.onnx"
KNOWN_ANSWERS = "known_answers.json"


@pytest.fixture
def copy_bundle(tiny_bundles: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copies the tiny bundle of a task to a place where a test may alter it."""

    def copy(name: str = "single", to: str = "copy") -> Path:
        return Path(shutil.copytree(tiny_bundles[name], tmp_path / to))

    return copy


@pytest.fixture(scope="session")
def sign_manifest() -> Callable[[Path], None]:
    """Writes the ``manifest.sha256`` that fits the ``manifest.json`` in a directory."""

    def sign(bundle: Path) -> None:
        digest = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
        (bundle / MANIFEST_HASH).write_text(f"{digest}  {MANIFEST}\n")

    return sign


@pytest.fixture(scope="session")
def edit_manifest(sign_manifest: Callable[[Path], None]) -> Callable[..., None]:
    """Changes the manifest of a bundle by a function on its JSON, and makes its hash fit again."""

    def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
        manifest = json.loads((bundle / MANIFEST).read_bytes())
        change(manifest)
        (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        sign_manifest(bundle)

    return edit


@pytest.fixture(scope="session")
def replace_file(edit_manifest: Callable[..., None]) -> Callable[..., None]:
    """Gives a listed file other bytes, with a manifest that says so: a bundle made that way."""

    def replace(bundle: Path, path: str, data: bytes) -> None:
        def change(manifest: dict[str, Any]) -> None:
            (entry,) = [entry for entry in manifest["files"] if entry["path"] == path]
            entry["size_bytes"] = len(data)
            entry["sha256"] = hashlib.sha256(data).hexdigest()

        (bundle / path).write_bytes(data)
        edit_manifest(bundle, change)

    return replace


@pytest.fixture(scope="session")
def edit_answers(replace_file: Callable[..., None]) -> Callable[..., None]:
    """Changes a bundle's known answers by a function on their JSON."""

    def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
        answers = json.loads((bundle / KNOWN_ANSWERS).read_bytes())
        change(answers)
        replace_file(bundle, KNOWN_ANSWERS, json.dumps(answers).encode())

    return edit


@pytest.fixture(scope="session")
def add_variant(
    edit_manifest: Callable[..., None], edit_answers: Callable[..., None]
) -> Callable[..., None]:
    """Adds a copy of the fp32 variant under another name, after those that are there."""

    def add(bundle: Path, name: str, devices: tuple[str, ...] = ("cpu",)) -> None:
        edit_answers(bundle, lambda a: a["expected"].update({name: a["expected"]["fp32"]}))
        path = f"models/{name}.onnx"
        shutil.copyfile(bundle / MODEL, bundle / path)

        def change(manifest: dict[str, Any]) -> None:
            (entry,) = [entry for entry in manifest["files"] if entry["path"] == MODEL]
            manifest["files"].append({**entry, "path": path})
            manifest["variants"].append(
                {**manifest["variants"][0], "name": name, "model": path, "devices": list(devices)}
            )

        edit_manifest(bundle, change)

    return add


@pytest.fixture
def rtx_bundle(copy_bundle, add_variant, edit_manifest) -> Path:
    """A bundle with a variant that TensorRT-RTX takes, in FP32, and shapes for its engine."""
    path: Path = copy_bundle(to="rtx-bundle")
    add_variant(path, "fp32-gpu", ("rtx",))
    profile = {"max_batch": 4, "opt_batch": 4, "max_seq": 64, "opt_seq": 16}
    edit_manifest(path, lambda manifest: manifest.update(profiles=[profile]))
    return path


@pytest.fixture(scope="session")
def runtime_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``edgebert-rt``; keyword arguments are added to the environment."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from edgebert_runtime.cli import main; main()"]
            + [str(argument) for argument in arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **environment},
        )

    return run


@pytest.fixture(scope="session")
def encoders(tiny_bundles: dict[str, Path]) -> dict[str, TextEncoder]:
    """The encoder of each tiny bundle, for classifiers over a session that a test brings."""
    found = {}
    for name, path in tiny_bundles.items():
        bundle = Bundle.open(path)
        found[name] = TextEncoder(
            bundle.read(bundle.manifest.tokenizer),
            input_names=[spec.name for spec in bundle.manifest.inputs],
            max_length=bundle.manifest.max_length,
            pad_token_id=bundle.manifest.pad_token_id,
            text_pair=bundle.manifest.task.text_pair,
        )
    return found


@pytest.fixture(scope="session")
def classifiers(tiny_bundles: dict[str, Path]) -> Iterator[dict[str, Classifier]]:
    """A loaded classifier for each tiny bundle; no test may close them."""
    loaded = {
        name: Classifier.load(path, device="cpu", intra_op_threads=1)
        for name, path in tiny_bundles.items()
    }
    yield loaded
    for classifier in loaded.values():
        classifier.close()
