"""A bundle opens when it is whole, and is refused when anything about it is not as listed."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebert_runtime import BundleError, Classifier, DeviceError, UsageError
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.onnx_session import OnnxSession

MODEL = "models/fp32.onnx"
LISTED = ("tokenizer.json", "known_answers.json", MODEL)
FILES = ("manifest.json", "manifest.sha256", *LISTED)


def check(path: Path) -> Bundle:
    """What every user of a bundle does first: open it and check all of it."""
    bundle = Bundle.open(path)
    bundle.verify()
    return bundle


def refusal(path: Path) -> str:
    """The message with which a bundle is refused, by the reader and by the classifier alike."""
    with pytest.raises(BundleError) as loading:
        Classifier.load(path, device="cpu")
    with pytest.raises(BundleError) as opening:
        check(path)
    assert str(path) in str(opening.value)
    assert str(path) in str(loading.value)
    return str(opening.value)


def pack(bundle: Path, tar: Path, prefix: str = "", mode: str = "w") -> Path:
    """Packs the files of a bundle, as ``tar cf`` would."""
    with tarfile.open(tar, mode) as archive:
        archive.add(bundle, arcname=prefix or ".")
    return tar


# Whole bundles


def test_a_whole_bundle_opens_from_a_directory(tiny_bundles: dict[str, Path]) -> None:
    bundle = check(tiny_bundles["single"])
    assert bundle.manifest.name == "tiny-single"
    assert bundle.manifest.task.labels == ("negative", "positive")
    for entry in bundle.manifest.files:
        on_disk = (tiny_bundles["single"] / entry.path).read_bytes()
        assert bundle.read(entry.path) == on_disk


def test_a_path_may_be_a_string_or_a_link_to_the_bundle(
    tiny_bundles: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "current").symlink_to(tiny_bundles["single"])
    assert Bundle.open(str(tmp_path / "current")).digest == check(tiny_bundles["single"]).digest


@pytest.mark.parametrize("prefix", ["", "tiny", "./tiny", "tiny-1.0_b"])
def test_a_tar_gives_the_same_bundle_with_and_without_a_top_directory(
    tiny_bundles: dict[str, Path], tmp_path: Path, prefix: str
) -> None:
    tar = pack(tiny_bundles["single"], tmp_path / "bundle.tar", prefix)
    packed, unpacked = check(tar), check(tiny_bundles["single"])
    assert packed.digest == unpacked.digest
    for path in LISTED:
        assert packed.read(path) == unpacked.read(path)


def test_a_tar_without_directory_members_opens(
    tiny_bundles: dict[str, Path], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "bundle.tar", "w") as archive:
        for path in FILES:
            archive.add(tiny_bundles["single"] / path, arcname=path)
    check(tmp_path / "bundle.tar")


def test_the_answers_from_a_tar_are_those_from_the_directory(
    tiny_bundles: dict[str, Path], tmp_path: Path
) -> None:
    tar = pack(tiny_bundles["single"], tmp_path / "bundle.tar")
    texts = ["a great film", "never again"]
    with Classifier.load(tar) as packed, Classifier.load(tiny_bundles["single"]) as unpacked:
        assert packed.predict(texts) == unpacked.predict(texts)


def test_the_digest_names_the_content_and_not_the_place(
    copy_bundle: Callable[..., Path], edit_manifest: Callable[..., None]
) -> None:
    one, same, other = copy_bundle(to="one"), copy_bundle(to="same"), copy_bundle(to="other")
    edit_manifest(other, lambda manifest: manifest.update(name="renamed"))
    assert check(one).digest == check(same).digest != check(other).digest


# Damage


@pytest.mark.parametrize("where", ["start", "middle", "end"])
@pytest.mark.parametrize("path", FILES)
def test_one_altered_byte_is_refused(
    copy_bundle: Callable[..., Path], path: str, where: str
) -> None:
    bundle = copy_bundle()
    data = bytearray((bundle / path).read_bytes())
    data[{"start": 0, "middle": len(data) // 2, "end": -1}[where]] ^= 1
    (bundle / path).write_bytes(data)
    assert path in refusal(bundle)


@pytest.mark.parametrize("path", FILES)
def test_one_byte_cut_off_is_refused(copy_bundle: Callable[..., Path], path: str) -> None:
    bundle = copy_bundle()
    (bundle / path).write_bytes((bundle / path).read_bytes()[:-1])
    assert path in refusal(bundle)


@pytest.mark.parametrize("path", FILES)
def test_one_byte_added_is_refused(copy_bundle: Callable[..., Path], path: str) -> None:
    bundle = copy_bundle()
    (bundle / path).write_bytes((bundle / path).read_bytes() + b"\n")
    assert path in refusal(bundle)


@pytest.mark.parametrize("path", FILES)
def test_an_emptied_file_is_refused(copy_bundle: Callable[..., Path], path: str) -> None:
    bundle = copy_bundle()
    (bundle / path).write_bytes(b"")
    assert path in refusal(bundle)


@pytest.mark.parametrize("path", FILES)
def test_a_missing_file_is_refused(copy_bundle: Callable[..., Path], path: str) -> None:
    bundle = copy_bundle()
    (bundle / path).unlink()
    message = refusal(bundle)
    assert path in message and "missing" in message


@pytest.mark.parametrize(
    "path", ["notes.txt", ".DS_Store", "models/fp32.onnx.bak", "models/.cache", "more/deep/x"]
)
def test_a_file_that_is_not_listed_is_refused(copy_bundle: Callable[..., Path], path: str) -> None:
    bundle = copy_bundle()
    (bundle / path).parent.mkdir(parents=True, exist_ok=True)
    (bundle / path).write_text("mine")
    message = refusal(bundle)
    assert path in message and "not listed" in message


def test_a_file_in_the_place_of_another_is_refused(copy_bundle: Callable[..., Path]) -> None:
    bundle = copy_bundle()
    (bundle / MODEL).unlink()
    (bundle / MODEL).mkdir()
    assert MODEL in refusal(bundle)


def test_load_refuses_a_bundle_in_which_only_a_file_that_it_does_not_use_was_altered(
    copy_bundle: Callable[..., Path], add_variant: Callable[..., None]
) -> None:
    bundle = copy_bundle()
    add_variant(bundle, "second")
    with Classifier.load(bundle, variant="fp32") as classifier:
        assert classifier.predict(["fine so far"])
    data = bytearray((bundle / "models/second.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "models/second.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"models/second\.onnx was altered"):
        Classifier.load(bundle, variant="fp32")


@pytest.fixture(scope="module")
def damaged(tiny_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that a test damages and mends again, many times."""
    return Path(shutil.copytree(tiny_bundles["single"], tmp_path_factory.mktemp("d") / "bundle"))


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), path=st.sampled_from(FILES), mask=st.integers(1, 255))
def test_any_flipped_byte_in_any_file_is_refused(
    damaged: Path, data: st.DataObject, path: str, mask: int
) -> None:
    whole = (damaged / path).read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    broken = bytearray(whole)
    broken[position] ^= mask
    try:
        (damaged / path).write_bytes(broken)
        with pytest.raises(BundleError, match=path):
            check(damaged)
        with pytest.raises(BundleError, match=path):
            Classifier.load(damaged)
    finally:
        (damaged / path).write_bytes(whole)


@settings(deadline=None, max_examples=80)
@given(data=st.data(), mask=st.integers(1, 255))
def test_a_flipped_byte_in_a_tar_never_changes_what_is_read(
    tiny_bundles: dict[str, Path], damaged: Path, data: st.DataObject, mask: int
) -> None:
    # A tar also has headers and padding; damage there may be harmless, but never goes unnoticed
    # in what the bundle gives out.
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(tiny_bundles["single"], arcname=".")
    broken = bytearray(stream.getvalue())
    broken[data.draw(st.integers(0, len(broken) - 1))] ^= mask
    tar = damaged.parent / "flipped.tar"
    tar.write_bytes(broken)
    try:
        bundle = check(tar)
    except BundleError:
        return
    assert bundle.digest == Bundle.open(tiny_bundles["single"]).digest
    for path in LISTED:
        assert bundle.read(path) == (tiny_bundles["single"] / path).read_bytes()


# Links and other things that are not plain files


@pytest.mark.parametrize("path", FILES)
def test_a_link_to_a_file_outside_is_refused(
    copy_bundle: Callable[..., Path], tmp_path: Path, path: str
) -> None:
    bundle = copy_bundle()
    shutil.move(bundle / path, tmp_path / "outside")
    (bundle / path).symlink_to(tmp_path / "outside")  # the content is still right
    message = refusal(bundle)
    assert path in message and "link" in message


def test_a_link_to_the_same_content_inside_is_refused(
    copy_bundle: Callable[..., Path], add_variant: Callable[..., None]
) -> None:
    bundle = copy_bundle()
    add_variant(bundle, "second")
    (bundle / "models/second.onnx").unlink()
    (bundle / "models/second.onnx").symlink_to("fp32.onnx")
    message = refusal(bundle)
    assert "models/second.onnx" in message and "link" in message


def test_a_dangling_link_is_refused(copy_bundle: Callable[..., Path]) -> None:
    bundle = copy_bundle()
    (bundle / "extra").symlink_to("/nowhere")
    assert "extra is a link" in refusal(bundle)


def test_a_linked_directory_is_refused(copy_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = copy_bundle()
    shutil.move(bundle / "models", tmp_path / "elsewhere")
    (bundle / "models").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert "models is a link" in refusal(bundle)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize("path", [MODEL, "extra"])
def test_a_named_pipe_is_refused_and_not_waited_for(
    copy_bundle: Callable[..., Path], path: str
) -> None:
    bundle = copy_bundle()
    (bundle / path).unlink(missing_ok=True)
    os.mkfifo(bundle / path)
    assert f"{path} is not a plain file" in refusal(bundle)


def test_a_file_that_becomes_a_link_after_opening_is_refused(
    copy_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    path = copy_bundle()
    bundle = Bundle.open(path)
    shutil.move(path / MODEL, tmp_path / "outside")
    (path / MODEL).symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match=MODEL):
        bundle.read(MODEL)
    with pytest.raises(BundleError, match=MODEL):
        bundle.verify()


def test_a_file_that_is_altered_after_opening_is_refused(copy_bundle: Callable[..., Path]) -> None:
    path = copy_bundle()
    bundle = Bundle.open(path)
    data = bytearray((path / MODEL).read_bytes())
    data[-1] ^= 1
    (path / MODEL).write_bytes(data)
    with pytest.raises(BundleError, match=f"{MODEL} was altered"):
        bundle.read(MODEL)


@pytest.mark.parametrize("path", ["manifest.json", "../single/tokenizer.json", "/etc/passwd", ""])
def test_only_listed_files_can_be_read(tiny_bundles: dict[str, Path], path: str) -> None:
    with pytest.raises(BundleError, match="not listed"):
        Bundle.open(tiny_bundles["single"]).read(path)


# What a manifest may say


@pytest.mark.parametrize(
    "path",
    [
        "../outside.onnx",
        "/etc/passwd",
        "models\\fp32.onnx",
        "models//fp32.onnx",
        "models/../models/fp32.onnx",
        "./models/fp32.onnx",
        "models/fp32.onnx/",
        "models/fp32.onnx\n",
        "models/fp32.onnx\x00",
        "C:/fp32.onnx",
        "models/.hidden",
        "..",
        ".",
        "",
    ],
)
def test_a_listed_path_that_is_not_plainly_inside_the_bundle_is_refused(
    copy_bundle: Callable[..., Path], edit_manifest: Callable[..., None], path: str
) -> None:
    bundle = copy_bundle()
    shutil.copyfile(bundle / MODEL, bundle.parent / "outside.onnx")  # the target is there

    def climb(manifest: dict[str, Any]) -> None:
        manifest["variants"][0]["model"] = path
        manifest["files"][1]["path"] = path

    edit_manifest(bundle, climb)
    message = refusal(bundle)
    assert "manifest.json" in message and repr(path) in message


def _set(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """``_set("task", "kind", 3)`` sets ``manifest["task"]["kind"]`` to 3."""
    *path, last, value = keys

    def change(manifest: dict[str, Any]) -> None:
        target: Any = manifest
        for key in path:
            target = target[key]
        target[last] = value

    return change


def _drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.pop(key)


def _twice(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest[key].append(manifest[key][0])


@pytest.mark.parametrize("version", [0, 1, 2, 3, 5, 99, -1, 10**30])
def test_an_unknown_format_version_is_refused_by_number(
    copy_bundle: Callable[..., Path], edit_manifest: Callable[..., None], version: int
) -> None:
    bundle = copy_bundle()
    edit_manifest(bundle, _set("format_version", version))
    assert f"format_version {version} is unknown" in refusal(bundle)


def test_a_newer_format_is_named_even_when_it_has_keys_that_we_do_not_know(
    copy_bundle: Callable[..., Path], edit_manifest: Callable[..., None]
) -> None:
    bundle = copy_bundle()

    def renew(manifest: dict[str, Any]) -> None:
        manifest.clear()
        manifest.update(format_version=5, everything="else")

    edit_manifest(bundle, renew)
    assert "format_version 5 is unknown" in refusal(bundle)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(_set("format_version", "1"), "format_version", id="version as a string"),
        pytest.param(_set("format_version", None), "format_version", id="version null"),
        pytest.param(_set("format_version", True), "format_version", id="version true"),
        pytest.param(_drop("format_version"), "format_version", id="no version"),
        pytest.param(_set("colour", "red"), "colour", id="unknown key at the top"),
        pytest.param(_set("task", "colour", 1), "colour", id="unknown key in the task"),
        pytest.param(_set("variants", 0, "colour", 1), "colour", id="unknown key in a variant"),
        pytest.param(_set("files", 0, "colour", 1), "colour", id="unknown key in a file"),
        pytest.param(_set("provenance", "colour", 1), "colour", id="unknown key in provenance"),
        pytest.param(_drop("task"), "task", id="no task"),
        pytest.param(_drop("provenance"), "provenance", id="no provenance"),
        pytest.param(_set("max_length", "64"), "max_length", id="wrong type"),
        pytest.param(_set("max_length", 64.5), "max_length", id="fraction"),
        pytest.param(_set("max_length", 2), "max_length", id="no room for text"),
        pytest.param(_set("max_length", -1), "max_length", id="negative length"),
        pytest.param(_set("files", 0, "size_bytes", -1), "size_bytes", id="negative size"),
        pytest.param(_set("files", 0, "sha256", "A" * 64), "sha256", id="capital hash"),
        pytest.param(_set("files", 0, "sha256", "a" * 63), "sha256", id="short hash"),
        pytest.param(_twice("files"), "twice", id="file listed twice"),
        pytest.param(_twice("variants"), "variants", id="variant listed twice"),
        pytest.param(_set("variants", []), "variants", id="no variants"),
        pytest.param(_set("variants", 0, "name", "a b"), "a b", id="variant name"),
        pytest.param(_set("variants", 0, "devices", []), "fp32", id="variant without devices"),
        pytest.param(_set("variants", 0, "devices", ["tpu"]), "tpu", id="unknown device"),
        pytest.param(_set("variants", 0, "precision", "int2"), "int2", id="unknown precision"),
        pytest.param(
            _set("variants", 0, "model", "models/gone.onnx"),
            "models/gone.onnx",
            id="unlisted model",
        ),
        pytest.param(_set("tokenizer", "vocab.txt"), "vocab.txt", id="unlisted tokenizer"),
        pytest.param(_set("inputs", []), "input_ids", id="no inputs"),
        pytest.param(_set("outputs", []), "logits", id="no outputs"),
        pytest.param(_set("task", "kind", "regression"), "regression", id="unknown kind"),
        pytest.param(_set("task", "labels", ["one"]), "labels", id="one label"),
        pytest.param(_set("task", "labels", ["a", "a"]), "labels", id="label twice"),
        pytest.param(_set("task", "thresholds", [0.5, 0.5]), "thresholds", id="thresholds"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_by_what_is_wrong(
    copy_bundle: Callable[..., Path],
    edit_manifest: Callable[..., None],
    change: Callable[[dict[str, Any]], None],
    named: str,
) -> None:
    bundle = copy_bundle()
    edit_manifest(bundle, change)
    message = refusal(bundle)
    assert "manifest.json" in message and named in message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"not json",
        b'{"format_version": 4, "name": "\xff"}',
        b'{"format_version": 4, "name": "\\ud800"}',
        pytest.param(
            b'{"format_version": 4, "name": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="deep"
        ),
    ],
)
def test_a_manifest_that_is_not_json_of_ours_is_refused(
    copy_bundle: Callable[..., Path], sign_manifest: Callable[[Path], None], data: bytes
) -> None:
    bundle = copy_bundle()
    (bundle / "manifest.json").write_bytes(data)
    sign_manifest(bundle)
    assert "manifest.json" in refusal(bundle)


@pytest.mark.parametrize("thresholds", [None, [0.5], [0.5, 0.5, 1.5], [0.5, 0.5, -0.1]])
def test_a_multi_label_bundle_needs_a_threshold_for_each_label(
    copy_bundle: Callable[..., Path], edit_manifest: Callable[..., None], thresholds: Any
) -> None:
    bundle = copy_bundle("multi")
    edit_manifest(bundle, _set("task", "thresholds", thresholds))
    assert "threshold" in refusal(bundle)


@pytest.mark.parametrize("of", ["", "/manifest.json"])
def test_what_may_not_be_read_is_not_called_missing(
    tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    path = str(tiny_bundles["single"])
    real = os.stat

    def denied(place: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if place == path + of:
            raise PermissionError(13, "Permission denied", place)
        return real(place, *args, **kwargs)

    monkeypatch.setattr("os.stat", denied)
    with pytest.raises(BundleError, match=r"cannot be read: .*Permission denied"):
        Bundle.open(path)


# Bundles that are as listed, and still cannot work


@pytest.mark.parametrize("path", LISTED)
def test_a_listed_file_that_is_not_what_it_should_be_is_refused_at_loading(
    copy_bundle: Callable[..., Path], replace_file: Callable[..., None], path: str
) -> None:
    bundle = copy_bundle()
    replace_file(bundle, path, b"neither a model nor a tokenizer")
    check(bundle)
    with pytest.raises(BundleError, match="model" if path == MODEL else path.partition(".")[0]):
        Classifier.load(bundle)


@pytest.mark.parametrize("path", LISTED)
def test_a_load_that_fails_leaves_no_thread_and_no_session(
    copy_bundle: Callable[..., Path],
    replace_file: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    # Model and tokenizer are read side by side; whichever is at fault, nothing waits for ever.
    bundle = copy_bundle()
    replace_file(bundle, path, b"neither a model nor a tokenizer")
    sessions: list[OnnxSession] = []

    def start(*args: Any, **settings: Any) -> OnnxSession:
        sessions.append(OnnxSession(*args, **settings))
        return sessions[-1]

    monkeypatch.setattr("edgebert_runtime.classifier.OnnxSession", start)
    before = set(threading.enumerate())
    with pytest.raises(BundleError):
        Classifier.load(bundle, device="cpu")
    # Those that hash the bundle may go on: nobody waits for them, not even a program that ends.
    assert not [t for t in set(threading.enumerate()) - before if not t.daemon]
    assert len(sessions) == (path != MODEL)
    for session in sessions:
        with pytest.raises(DeviceError, match="closed"):
            session.run({})


@pytest.mark.parametrize("labels", [["a", "b", "c"], ["a", "b", "c", "d"]])
def test_labels_that_do_not_fit_the_model_are_a_users_error_and_not_a_traceback(
    copy_bundle: Callable[..., Path], edit_manifest: Callable[..., None], labels: list[str]
) -> None:
    bundle = copy_bundle()  # its model answers two labels
    edit_manifest(bundle, _set("task", "labels", labels))
    with pytest.raises(BundleError), Classifier.load(bundle) as classifier:
        classifier.predict(["one", "two"])


def test_a_model_that_takes_other_inputs_than_listed_is_the_bundles_fault(
    copy_bundle: Callable[..., Path], edit_manifest: Callable[..., None]
) -> None:
    bundle = copy_bundle()
    edit_manifest(bundle, lambda manifest: manifest["inputs"].pop())
    with pytest.raises(BundleError), Classifier.load(bundle) as classifier:
        classifier.predict(["one"])


@pytest.mark.parametrize(
    "change", [_set("max_length", 10**30), _set("pad_token_id", 10**30), _set("pad_token_id", -1)]
)
def test_numbers_that_no_model_has_are_refused_and_do_not_overflow(
    copy_bundle: Callable[..., Path],
    edit_manifest: Callable[..., None],
    change: Callable[[dict[str, Any]], None],
) -> None:
    bundle = copy_bundle()
    edit_manifest(bundle, change)
    with pytest.raises(BundleError), Classifier.load(bundle) as classifier:
        classifier.predict(["short", "one that is longer"])


@pytest.mark.parametrize("write", ["in place", "another file"])
def test_a_model_that_is_written_to_while_it_is_loaded_is_refused(
    copy_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    # ONNX Runtime reads the file that was hashed a moment before.
    bundle = copy_bundle()
    model = bundle / MODEL

    def load(file: str, **settings: Any) -> OnnxSession:
        if write == "in place":
            with model.open("r+b") as stream:
                stream.write(model.read_bytes()[:1])
        else:
            other = model.with_suffix(".new")
            other.write_bytes(model.read_bytes())
            other.replace(model)
        return OnnxSession(file, **settings)

    monkeypatch.setattr("edgebert_runtime.classifier.OnnxSession", load)
    with pytest.raises(BundleError, match=f"{MODEL} was written to while it was loaded"):
        Classifier.load(bundle, device="cpu")


def test_weights_outside_the_bundle_are_never_loaded(
    copy_bundle: Callable[..., Path],
    replace_file: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # An ONNX model can name files that hold its weights; the manifest does not cover those.
    bundle = copy_bundle()
    outside = tmp_path / "outside"
    outside.mkdir()
    onnx.save_model(
        onnx.load(bundle / MODEL),
        outside / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=4096,
    )
    replace_file(bundle, MODEL, (outside / "model.onnx").read_bytes())
    monkeypatch.chdir(outside)
    with pytest.raises(BundleError):
        Classifier.load(bundle)


# Tars


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_tar_with_a_member_that_is_not_a_plain_file_is_refused(
    tiny_bundles: dict[str, Path], tmp_path: Path, kind: bytes
) -> None:
    tar = pack(tiny_bundles["single"], tmp_path / "bundle.tar")
    with tarfile.open(tar, "a") as archive:
        member = tarfile.TarInfo("./extra")
        member.type = kind
        member.linkname = "./tokenizer.json"
        archive.addfile(member)
    assert "extra is not a plain file" in refusal(tar)


@pytest.mark.parametrize("name", ["../evil", "./../evil", "/evil", "models/../../evil", "evil"])
def test_a_tar_with_a_member_that_is_not_listed_is_refused(
    tiny_bundles: dict[str, Path], tmp_path: Path, name: str
) -> None:
    tar = pack(tiny_bundles["single"], tmp_path / "bundle.tar")
    with tarfile.open(tar, "a") as archive:
        archive.addfile(tarfile.TarInfo(name))
    assert "evil" in refusal(tar)


@pytest.mark.parametrize("top", ["../", "/", "./../"])
def test_a_tar_whose_members_all_lie_outside_is_refused(
    tiny_bundles: dict[str, Path], tmp_path: Path, top: str
) -> None:
    tar = tmp_path / "bundle.tar"
    with tarfile.open(tar, "w") as archive:
        for path in FILES:
            data = (tiny_bundles["single"] / path).read_bytes()
            member = tarfile.TarInfo(top + path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    refusal(tar)


@pytest.mark.parametrize("name", ["tokenizer.json", "./tokenizer.json"])
def test_a_tar_with_a_file_twice_is_refused(
    tiny_bundles: dict[str, Path], tmp_path: Path, name: str
) -> None:
    tar = pack(tiny_bundles["single"], tmp_path / "bundle.tar")
    with tarfile.open(tar, "a") as archive:
        archive.add(tiny_bundles["single"] / "tokenizer.json", arcname=name)
    assert "tokenizer.json is in the archive twice" in refusal(tar)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused_with_the_reason(
    tiny_bundles: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    tar = pack(tiny_bundles["single"], tmp_path / f"bundle.tar.{kind}", mode=f"w:{kind}")
    assert "uncompressed" in refusal(tar)


@pytest.mark.parametrize("keep", [0, 100, 512, 0.1, 0.5, 0.9])
def test_a_truncated_tar_is_refused(
    tiny_bundles: dict[str, Path], tmp_path: Path, keep: float
) -> None:
    tar = pack(tiny_bundles["single"], tmp_path / "bundle.tar")
    data = tar.read_bytes()
    tar.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    refusal(tar)


@pytest.mark.parametrize("path", FILES)
def test_a_tar_without_one_of_the_files_is_refused(
    copy_bundle: Callable[..., Path], tmp_path: Path, path: str
) -> None:
    bundle = copy_bundle()
    (bundle / path).unlink()
    assert "missing" in refusal(pack(bundle, tmp_path / "bundle.tar"))


@pytest.mark.parametrize("path", FILES)
def test_a_tar_with_one_altered_byte_in_a_file_is_refused(
    copy_bundle: Callable[..., Path], tmp_path: Path, path: str
) -> None:
    bundle = copy_bundle()
    data = bytearray((bundle / path).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / path).write_bytes(data)
    assert path in refusal(pack(bundle, tmp_path / "bundle.tar"))


# No bundle at all


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert "there is no bundle there" in refusal(tmp_path / "nothing")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    assert "manifest.json is missing" in refusal(tmp_path)


@pytest.mark.parametrize("data", [b"", b"hello", b"\0" * 10240, b"PK\x03\x04" + b"x" * 2000])
def test_a_file_that_is_no_tar_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    refusal(tmp_path / "file")


def test_a_device_file_is_refused() -> None:
    assert "neither a directory nor a file" in refusal(Path("/dev/null"))


def test_every_refusal_is_the_users_error() -> None:
    assert issubclass(BundleError, UsageError)
    assert BundleError.exit_code == 2


def test_a_manifest_of_unreasonable_size_is_refused_without_parsing_it(
    copy_bundle: Callable[..., Path], sign_manifest: Callable[[Path], None]
) -> None:
    bundle = copy_bundle()
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    padding = b" " * (17 * 1024 * 1024)
    (bundle / "manifest.json").write_bytes(json.dumps(manifest).encode() + padding)
    sign_manifest(bundle)
    assert "more than any manifest needs" in refusal(bundle)


def test_a_bundle_that_was_whole_is_checked_again_once_a_file_was_written_to(
    copy_bundle, add_variant, tmp_path: Path
) -> None:
    bundle = copy_bundle("single")
    add_variant(bundle, "spare")
    Classifier.load(bundle, variant="fp32").close()
    spare = bundle / "models" / "spare.onnx"
    before = spare.stat()
    data = bytearray(spare.read_bytes())
    data[len(data) // 2] ^= 1
    spare.write_bytes(data)
    os.utime(spare, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match=r"models/spare\.onnx was altered"):
        Classifier.load(bundle, variant="fp32")


def test_a_bundle_loads_where_nothing_can_be_remembered(
    tiny_bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with Classifier.load(tiny_bundles["single"]) as classifier:
        assert len(classifier.predict(["a", "b"])) == 2
