"""The reader in ``docs/bundle.md`` does what the page says, and answers as the runtime does."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgebert_runtime import BundleError, Classifier
from edgebert_runtime.bundle import MANIFEST, MANIFEST_HASH, Bundle
from edgebert_runtime.manifest import (
    EngineEntry,
    FileEntry,
    Manifest,
    Measured,
    Profile,
    Provenance,
    Task,
    TensorSpec,
    Tuning,
    Variant,
)

PAGE = Path(__file__).parents[2] / "docs" / "bundle.md"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's one Python block, as a file."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 1
    assert "edgebert" not in blocks[0].replace('"edgebert recipe_sha256', "")  # stands alone
    path = tmp_path_factory.mktemp("doc") / "reader.py"
    path.write_text(blocks[0], encoding="utf-8")
    return path


def read(reader: Path, bundle: Path, *texts: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, reader, bundle, *texts],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=60,
        env={"PYTHONUTF8": "1"},
    )


@pytest.mark.parametrize("kind", ["single", "multi", "pairs"])
def test_the_reader_answers_as_the_runtime_does(reader, tiny_bundles, texts_for, kind):
    long = " ".join(str(text) for text in texts_for["single"][:20])  # is cut to max_length
    texts = texts_for[kind][:2]
    texts.append((texts[0][0], long) if kind == "pairs" else long)
    with Classifier.load(tiny_bundles[kind], device="cpu") as classifier:
        scores = classifier.scores(texts)
        predictions = classifier.predict(texts)
        assert classifier.stats.truncated
    for text, prediction, row in zip(texts, predictions, scores, strict=True):
        done = read(reader, tiny_bundles[kind], *(text if kind == "pairs" else [text]))
        assert done.returncode == 0, done.stderr
        printed = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
        assert tuple(label for label, _ in printed) == prediction.labels
        for label, score in printed:
            expected = row[classifier.task.labels.index(label)]
            assert float(score) == pytest.approx(expected, abs=2e-4)


def _alter_model(bundle: Path) -> None:
    path = bundle / "models" / "fp32.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut_tokenizer(bundle: Path) -> None:
    path = bundle / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1])


def _link_model(bundle: Path) -> None:
    path = bundle / "models" / "fp32.onnx"
    path.rename(bundle.parent / "elsewhere.onnx")
    path.symlink_to(bundle.parent / "elsewhere.onnx")


def _change(edit: Callable[[Any], object]) -> Callable[[Path], None]:
    """Makes a fault that edits the manifest and then gives it the right hash."""

    def fault(bundle: Path) -> None:
        manifest = json.loads((bundle / MANIFEST).read_bytes())
        edit(manifest)
        data = json.dumps(manifest).encode()
        (bundle / MANIFEST).write_bytes(data)
        line = f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n"
        (bundle / MANIFEST_HASH).write_text(line)

    return fault


FAULTS: dict[str, Callable[[Path], object]] = {
    "altered model": _alter_model,
    "shorter tokenizer": _cut_tokenizer,
    "link": _link_model,
    "missing file": lambda bundle: (bundle / "tokenizer.json").unlink(),
    "extra file": lambda bundle: (bundle / "notes.txt").write_text("mine"),
    "extra hidden file": lambda bundle: (bundle / "models" / ".DS_Store").write_text("x"),
    "no hash": lambda bundle: (bundle / MANIFEST_HASH).unlink(),
    "manifest of other bytes": lambda bundle: (bundle / MANIFEST).write_bytes(
        (bundle / MANIFEST).read_bytes() + b" "
    ),
    "hash without line feed": lambda bundle: (bundle / MANIFEST_HASH).write_bytes(
        (bundle / MANIFEST_HASH).read_bytes().rstrip()
    ),
    "unknown version": _change(lambda m: m.update(format_version=3)),
    "unknown key": _change(lambda m: m.update(comment="")),
    "unknown key inside": _change(lambda m: m["variants"][0].update(opset=20)),
    "missing key": _change(lambda m: m["provenance"].pop("seed")),
    "path that climbs": _change(lambda m: m["files"][0].update(path="../tokenizer.json")),
    "file listed twice": _change(lambda m: m["files"].append(m["files"][0])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_reader_refuses_what_the_runtime_refuses(reader, tmp_path, tiny_bundles, fault):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundles["single"], bundle)
    FAULTS[fault](bundle)
    with pytest.raises(BundleError):
        Classifier.load(bundle, device="cpu")
    done = read(reader, bundle, "a text")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("refused: ")


def test_an_unaltered_copy_with_thresholds_left_out_is_read(reader, tmp_path, tiny_bundles):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundles["single"], bundle)
    _change(lambda m: m["task"].pop("thresholds", None))(bundle)
    Bundle.open(bundle)
    assert read(reader, bundle, "a text").returncode == 0


def test_the_page_describes_every_key_and_no_other():
    page = PAGE.read_text(encoding="utf-8")
    section = page.partition("## `manifest.json`")[2].partition("\n## ")[0]
    described = set(re.findall(r"^\| `(\w+)` \|", section, re.M))
    structs = (
        *(Manifest, Task, TensorSpec, Variant, Profile, EngineEntry),
        *(Tuning, Measured, FileEntry, Provenance),
    )
    assert described == {field for struct in structs for field in struct.__struct_fields__}


def test_the_size_of_the_hash_file_is_what_the_page_says(tiny_bundles):
    assert (tiny_bundles["single"] / MANIFEST_HASH).stat().st_size == 80
