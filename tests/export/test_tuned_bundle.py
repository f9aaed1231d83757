"""A tuned bundle takes the place of the old one whole, or not at all."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from edgebert_export import tuned_bundle
from edgebert_export.errors import ExportError
from edgebert_export.tuned_bundle import Replacing, bring_back, write_tuned
from edgebert_runtime import BundleError, Classifier, InputError
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.manifest import Measured, Tuning, Variant


def tuning(variant: str = "fp32", processor: str = "some kind", cores: int = 2) -> Tuning:
    measured = Measured(
        bundle_sha256="0" * 64,
        before="fp32",
        rows=0,
        flips=0,
        lost=0,
        latency_ratio=1.0,
        throughput_ratio=1.0,
        onnxruntime="1.0",
    )
    return Tuning(
        processor=processor,
        cores=cores,
        variant=variant,
        batch_tokens=512,
        call_tokens=16,
        by_core=True,
        measured=measured,
    )


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundles: dict[str, Path]) -> Path:
    return Path(shutil.copytree(tiny_bundles["single"], tmp_path / "place" / "bundle"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def state(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def beside(bundle: Path) -> list[str]:
    """What lies where the bundle does, but for the lock, which stays."""
    names = (path.name for path in bundle.parent.iterdir())
    return [name for name in names if name != ".bundle.tuning-lock"]


def test_a_copy_holds_all_that_was_there_and_the_tuning(bundle: Path, out: Path) -> None:
    before = Bundle.open(bundle)
    found = write_tuned(before, out, tuning())
    assert found.manifest.tunings == (tuning(),)
    assert found.digest != before.digest
    assert found.manifest.variants == before.manifest.variants
    assert found.manifest.files == before.manifest.files
    assert found.manifest.provenance == before.manifest.provenance
    with Classifier.load(out, device="cpu") as new, Classifier.load(bundle) as old:
        assert new.predict(["a text"]) == old.predict(["a text"])


def test_a_new_variant_stands_after_those_that_others_run(bundle: Path, out: Path) -> None:
    model = (bundle / "models" / "fp32.onnx").read_bytes()
    variant = Variant(name="new", model="models/new.onnx", precision="int8", devices=("cpu",))
    found = write_tuned(Bundle.open(bundle), out, tuning("new"), (variant, model))
    assert [v.name for v in found.manifest.variants] == ["fp32", "new"]
    assert found.read("models/new.onnx") == model


def test_a_tuning_replaces_that_for_the_same_processor_and_cores(bundle: Path, out: Path) -> None:
    first = tuning()
    others = [tuning(processor="other"), tuning(cores=4)]
    found = Bundle.open(bundle)
    for number, one in enumerate([first, *others, tuning()]):
        (out / str(number)).mkdir()
        found = write_tuned(found, out / str(number), one)
    assert found.manifest.tunings == (*others, first)


def test_a_damaged_bundle_is_not_copied(bundle: Path, out: Path) -> None:
    opened = Bundle.open(bundle)
    data = bytearray((bundle / "tokenizer.json").read_bytes())
    data[100] ^= 1
    (bundle / "tokenizer.json").write_bytes(data)
    with pytest.raises(BundleError, match="was altered"):
        write_tuned(opened, out, tuning())


def replace(bundle: Path) -> None:
    with Replacing(bundle) as place:
        write_tuned(Bundle.open(bundle), place.directory, tuning())
        place.publish()


@pytest.mark.parametrize("at_once", [True, False])
def test_the_new_bundle_takes_the_place_and_leaves_nothing_beside_it(
    bundle: Path, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(tuned_bundle, "_exchange", lambda one, other: False)
    replace(bundle)
    assert Bundle.open(bundle).manifest.tunings
    assert beside(bundle) == ["bundle"]


def test_a_link_to_the_directory_stays_one(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundle)
    replace(link)
    assert link.is_symlink() and Bundle.open(link).manifest.tunings
    assert Bundle.open(bundle).manifest.tunings


@pytest.mark.parametrize("at_once", [True, False])
def test_a_fault_at_the_last_step_leaves_the_old_bundle(
    bundle: Path, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(bundle)
    rename = Path.rename

    def refuse(one: Path, other: Any) -> Path:
        if Path(other) == bundle and "aside" not in one.name:
            raise OSError(28, "No space left on device")
        return rename(one, other)

    def cannot(one: Path, other: Path) -> bool:
        if at_once:
            raise OSError(28, "No space left on device")
        return False

    monkeypatch.setattr(tuned_bundle, "_exchange", cannot)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ExportError, match="cannot be replaced: No space left"):
        replace(bundle)
    assert state(bundle) == before
    assert beside(bundle) == ["bundle"]


def test_an_error_while_it_is_held_leaves_the_old_bundle(bundle: Path) -> None:
    before = state(bundle)
    with pytest.raises(KeyboardInterrupt), Replacing(bundle) as place:
        (place.directory / "half").write_text("of it")
        raise KeyboardInterrupt
    assert state(bundle) == before
    assert beside(bundle) == ["bundle"]


def _die_while_writing(bundle: Path) -> None:
    import os

    with Replacing(bundle) as place:
        (place.directory / "half").write_text("of it")
        os._exit(9)


def _die_between_the_renames(bundle: Path) -> None:
    import os

    tuned_bundle._exchange = lambda one, other: False
    rename = Path.rename

    def once(one: Path, other: Any) -> Path:
        found = rename(one, other)
        os._exit(9 if found else 0)

    with Replacing(bundle) as place:
        write_tuned(Bundle.open(bundle), place.directory, tuning())
        Path.rename = once  # type: ignore[method-assign]
        place.publish()


@pytest.mark.parametrize("die", [_die_while_writing, _die_between_the_renames])
def test_what_a_killed_run_left_is_mended_by_the_next(bundle: Path, die: Any) -> None:
    before = state(bundle)
    process = multiprocessing.get_context("fork").Process(target=die, args=(bundle,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert beside(bundle) != ["bundle"]
    bring_back(bundle)
    assert state(bundle) == before
    replace(bundle)
    assert Bundle.open(bundle).manifest.tunings
    assert beside(bundle) == ["bundle"]


def test_two_runs_do_not_get_into_each_others_way(bundle: Path) -> None:
    with Replacing(bundle) as place:
        with pytest.raises(InputError, match="being tuned by another run"):
            replace(bundle)
        assert place.directory.is_dir()
    replace(bundle)
    assert beside(bundle) == ["bundle"]


def test_one_that_only_looks_does_not_undo_what_another_run_is_at(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned_bundle, "_exchange", lambda one, other: False)
    rename = Path.rename
    refused: list[Path] = []

    def look(one: Path, other: Any) -> Path:
        found = rename(one, other)
        if one == bundle:
            with pytest.raises(InputError, match="being tuned by another run"):
                bring_back(bundle)
            refused.append(one)
        return found

    monkeypatch.setattr(Path, "rename", look)
    replace(bundle)
    assert refused and Bundle.open(bundle).manifest.tunings


def test_the_lock_is_the_same_file_for_everyone(bundle: Path) -> None:
    lock = bundle.parent / ".bundle.tuning-lock"
    replace(bundle)
    first = lock.stat().st_ino
    replace(bundle)
    assert lock.stat().st_ino == first


def test_a_run_that_cannot_begin_leaves_nothing_and_is_in_nobodys_way(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", full)
        with pytest.raises(InputError, match="cannot be written: No space left") as kept:
            Replacing(bundle)
    assert beside(bundle) == ["bundle"]
    replace(bundle)  # while what was raised is still held, and with it the run that failed
    assert kept.value


@pytest.mark.skipif(sys.platform != "linux", reason="where files are is read from /proc")
@pytest.mark.parametrize("at_once", [True, False])
def test_the_new_bundle_is_on_the_disk_before_the_old_one_goes(
    bundle: Path, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    exchange, rmtree = tuned_bundle._exchange, shutil.rmtree

    def fsync(descriptor: int) -> None:
        events.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    def change_places(one: Path, other: Path) -> bool:
        events.append("exchange")
        return at_once and exchange(one, other)

    def remove(path: Path, **options: Any) -> None:
        events.append("remove")
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(tuned_bundle, "_exchange", change_places)
    monkeypatch.setattr(shutil, "rmtree", remove)
    with Replacing(bundle) as place:
        write_tuned(Bundle.open(bundle), place.directory, tuning())
        new = {str(path) for path in (place.directory, *place.directory.rglob("*"))}
        place.publish()
    assert set(events[: events.index("exchange")]) == new
    assert events[events.index("exchange") + 1] == str(bundle.parent)
    assert events[events.index("exchange") + 2] == "remove"


@pytest.mark.parametrize("place", ["file/inside", "/proc/no-bundle"])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written: .*; give another place with --out"):
        Replacing(tmp_path / place)
