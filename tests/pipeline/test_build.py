"""The build directory: what a run finds that was killed at the worst moments."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgebert_pipeline.build import BuildDirectory, stage_key
from edgebert_pipeline.progress import Reporter


def open_build(path: Path, *force: str) -> BuildDirectory:
    return BuildDirectory(path, Reporter(), force=force)


def produce(out: Path, _: object) -> None:
    (out / "a").write_text("whole")
    (out / "b").write_text("whole")


class Killed(BaseException):
    """Ends a run where it stands, as a signal would, but lets ``finally`` clauses run."""


def test_a_stage_that_fails_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    def fail(out: Path, progress: object) -> None:
        produce(out, progress)
        raise Killed

    with pytest.raises(Killed), open_build(tmp_path) as build:
        build.stage("onnx", "k1", "", fail)
    assert not list((tmp_path / ".stages").iterdir())


def test_a_directory_that_was_set_aside_comes_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "new").write_text("new")
    out = tmp_path / "out"
    with open_build(out):
        pass
    (out / ".stages" / "aside-bundle").mkdir()
    (out / ".stages" / "aside-bundle" / "old").write_text("old")
    with open_build(out) as build:
        assert (out / "bundle" / "old").read_text() == "old"
        build.publish(source, "bundle")
    assert [path.name for path in (out / "bundle").iterdir()] == ["new"]
    assert not list((out / ".stages").iterdir())


def test_publishing_that_fails_half_way_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    with open_build(out) as build:
        (out / "bundle").mkdir()
        (out / "bundle" / "old").write_text("old")

        def killed(self: Path, target: Path) -> None:
            raise Killed

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Path, "replace", killed)
            build.publish(source, "bundle")
        assert (out / "bundle" / "old").read_text() == "old"


@pytest.mark.parametrize("how", ["forced", "unused"])
def test_a_stage_is_never_seen_half_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with open_build(tmp_path) as build:
        finished = build.stage("onnx", "k1", "", produce)

    def killed(path: Path, **_: object) -> None:
        for child in Path(path).rglob("a"):
            child.unlink()
            raise Killed

    forced = ["onnx"] if how == "forced" else []
    with (
        monkeypatch.context() as patched,
        pytest.raises(Killed),
        open_build(tmp_path, *forced) as build,
    ):
        if how == "unused":
            build.stage("onnx", "k2", "", produce)
        patched.setattr("edgebert_pipeline.build.shutil.rmtree", killed)
        if how == "forced":
            build.stage("onnx", "k1", "", produce)
        else:
            build.remove_unused()
    with open_build(tmp_path) as build:
        again = build.stage("onnx", "k1", "", produce)
        assert again == finished
        assert {path.name for path in again.iterdir()} == {"a", "b", "stage.json"}
        assert not list((tmp_path / ".stages").glob("tmp-*"))


def test_what_a_stage_kept_between_runs_goes_once_it_is_finished(tmp_path: Path) -> None:
    with open_build(tmp_path) as build:
        build.stage("finetune", "k1", "", produce)
        build.work("finetune", "k1")  # as if killed after the stage was finished
    with open_build(tmp_path) as build:
        build.stage("finetune", "k1", "", produce)
    assert [path.name for path in (tmp_path / ".stages").iterdir()] == ["finetune-k1"]


def test_a_key_differs_with_code_inputs_and_name() -> None:
    modules = ["edgebert_export.quantise", "edgebert_export.to_onnx"]
    keys = {
        stage_key("a", modules[:1], "x"),
        stage_key("a", modules[1:], "x"),
        stage_key("a", modules, "x"),
        stage_key("a", modules[:1], "y"),
        stage_key("b", modules[:1], "x"),
    }
    assert len(keys) == 5
    assert stage_key("a", modules, "x") == stage_key("a", modules, "x")
