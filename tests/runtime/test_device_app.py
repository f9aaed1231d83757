"""The device example, run as a device runs it: a process, its pipes, its signals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgebert_runtime import Classifier
from edgebert_runtime.bundle import MANIFEST, MANIFEST_HASH, Bundle
from edgebert_runtime.manifest import Manifest, TensorSpec, encode_manifest

APP = Path(__file__).parents[2] / "examples" / "device_app" / "device_app.py"
DEADLINE_S = 30.0

HELD_OPEN = f"""
import os, runpy, sys, time
from edgebert_runtime.bundle import Bundle
really_open = Bundle.open
def held_open(path):
    bundle = really_open(path)
    if os.path.exists("hold"):
        open("held", "w").close()
        while os.path.exists("hold"):
            time.sleep(0.01)
    return bundle
Bundle.open = held_open
sys.argv[0] = {str(APP)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs the app; once it has opened a bundle, it goes on when no file ``hold`` is there."""


def until(condition: Callable[[], object], what: str) -> None:
    """Waits for ``condition`` and fails, naming ``what``, when it does not come."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)


class App:
    """A running app; what it writes is collected while it runs."""

    def __init__(
        self,
        bundle: Path,
        *options: str,
        poll_seconds: float = 0.05,
        program: tuple[str | Path, ...] = (APP,),
        cwd: Path | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *program, bundle, "--poll-seconds", str(poll_seconds), *options],
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.rows: list[dict[str, Any]] = []
        self.log: list[str] = []
        self._readers = [
            threading.Thread(target=self._collect, args=(self.process.stdout, self._add_row)),
            threading.Thread(target=self._collect, args=(self.process.stderr, self._add_log)),
        ]
        for reader in self._readers:
            reader.start()

    def _collect(self, stream: Any, add: Callable[[bytes], None]) -> None:
        for line in stream:
            add(line)

    def _add_row(self, line: bytes) -> None:
        self.rows.append(json.loads(line))

    def _add_log(self, line: bytes) -> None:
        self.log.append(line.decode().rstrip())

    def feed(self, data: bytes | str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data.encode() if isinstance(data, str) else data)
        self.process.stdin.flush()

    def end(self) -> int:
        """Closes the input; waits; returns the exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(DEADLINE_S)
        for reader in self._readers:
            reader.join()
        return code

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(BrokenPipeError):
                assert stream is not None
                stream.close()

    def until_logged(self, text: str) -> None:
        until(lambda: any(text in line for line in self.log), f"{text!r} in {self.log}")

    def until_answered(self, count: int) -> None:
        until(lambda: len(self.rows) >= count, f"{count} answers; {self.log}")


@pytest.fixture
def start() -> Iterator[Callable[..., App]]:
    apps: list[App] = []

    def make(bundle: Path, *options: str, **settings: Any) -> App:
        apps.append(App(bundle, *options, **settings))
        return apps[-1]

    yield make
    for app in apps:
        if app.process.poll() is None:
            app.process.kill()
        app.wait()
        app.close()


def renamed(source: Path, target: Path, **changes: Any) -> Path:
    """Copies a bundle and rewrites its manifest with ``changes``, and its hash."""
    shutil.copytree(source, target)
    manifest = msgspec.structs.replace(Bundle.open(source).manifest, **changes)
    write_manifest(target, manifest)
    return target


def write_manifest(bundle: Path, manifest: Manifest | bytes) -> None:
    data = manifest if isinstance(manifest, bytes) else encode_manifest(manifest)
    (bundle / MANIFEST).write_bytes(data)
    (bundle / MANIFEST_HASH).write_text(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n")


def damage(bundle: Path) -> None:
    """Alters one byte of the model."""
    model = bundle / Bundle.open(bundle).manifest.variants[0].model
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)


def digest(bundle: Path) -> str:
    return Bundle.open(bundle).digest[:12]


def point(link: Path, target: Path) -> None:
    """Deploys ``target`` as the README says: a link that is replaced in one step."""
    fresh = link.with_name(link.name + ".new")
    fresh.symlink_to(target, target_is_directory=True)
    fresh.replace(link)


@pytest.fixture(scope="module")
def old(tiny_bundles: dict[str, Path]) -> Path:
    return tiny_bundles["single"]


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory, old: Path) -> Path:
    """Another bundle, whose labels are swapped: an answer tells which of the two gave it."""
    task = Bundle.open(old).manifest.task
    task = msgspec.structs.replace(task, labels=task.labels[::-1])
    return renamed(old, tmp_path_factory.mktemp("new") / "bundle", name="new", task=task)


@pytest.fixture(scope="module")
def texts(texts_for: dict[str, list[Any]]) -> list[str]:
    return texts_for["single"]


def check_answers(rows: list[dict[str, Any]], texts: list[str], *bundles: Path) -> None:
    """Every text was answered once, in order, with what the bundle that is named says."""
    assert [row["line"] for row in rows] == list(range(1, len(texts) + 1))
    expected = {}
    for bundle in bundles:
        with Classifier.load(bundle, device="cpu") as classifier:
            expected[digest(bundle)] = classifier.predict(texts)
    for index, row in enumerate(rows):
        prediction = expected[row["bundle"]][index]
        assert row["label"] == prediction.label
        assert row["labels"] == list(prediction.labels)
        assert row["score"] == pytest.approx(prediction.score, abs=1e-4)


def test_answers_every_line_in_order_until_the_input_ends(start, old, texts):
    odd = ["", " ", "naïve – 日本語 🙂", "x" * 5000, "tab\tin a single text", "\u2028 separator"]
    wanted = [*texts, *odd, "with a carriage return", "without a newline"]
    app = start(old)
    app.feed("\n".join([*texts, *odd, "with a carriage return\r", "without a newline"]))
    assert app.end() == 0
    check_answers(app.rows, wanted, old)
    assert app.log == [f"INFO: serving bundle {digest(old)}"]


def test_answers_a_line_while_the_input_stays_open(start, old, texts):
    app = start(old)
    app.feed(texts[0] + "\n")
    app.until_answered(1)
    app.feed(texts[1] + "\n" + texts[2][:3])  # a line that is not whole is not answered yet
    app.until_answered(2)
    app.feed(texts[2][3:] + "\n")
    assert app.end() == 0
    check_answers(app.rows, texts[:3], old)


def test_a_new_bundle_takes_over_between_lines_and_none_is_lost(start, tmp_path, old, new, texts):
    link = tmp_path / "bundle"
    point(link, old)
    app = start(link)
    fed: list[str] = []
    swapped_after = None
    # Feeds without a pause until the new bundle has answered for a while.
    while swapped_after is None or len(fed) < swapped_after + 400:
        batch = [texts[(len(fed) + index) % len(texts)] for index in range(20)]
        app.feed("".join(f"{text}\n" for text in batch))
        fed += batch
        if len(app.rows) > 100 and link.resolve() == old.resolve():
            point(link, new)
        if swapped_after is None and any("serving" in line for line in app.log[1:]):
            swapped_after = len(fed)
        assert len(fed) < 500_000, "the new bundle never took over"
    assert app.end() == 0
    check_answers(app.rows, fed, old, new)
    digests = [row["bundle"] for row in app.rows]
    switch = digests.index(digest(new))
    assert switch > 100
    assert digests == [digest(old)] * switch + [digest(new)] * (len(fed) - switch)
    assert app.log == [f"INFO: serving bundle {digest(path)}" for path in (old, new)]


def test_a_bundle_replaced_while_it_loads_never_answers_under_the_wrong_digest(
    start, tmp_path, old, new, texts
):
    third = renamed(old, tmp_path / "third", name="third")
    place, hold, held = tmp_path / "bundle", tmp_path / "hold", tmp_path / "held"
    shutil.copytree(old, place)
    app = start(place, program=("-c", HELD_OPEN), cwd=tmp_path)
    app.feed(texts[0] + "\n")
    app.until_answered(1)
    hold.touch()
    place.rename(tmp_path / "was old")
    shutil.copytree(new, tmp_path / "copy").rename(place)
    until(held.exists, "the new bundle to be opened")
    place.rename(tmp_path / "was new")
    shutil.copytree(third, tmp_path / "copy").rename(place)
    app.feed(texts[1] + "\n")  # answered while the main thread is held up
    app.until_answered(2)
    hold.unlink()
    app.until_logged(f"serving bundle {digest(third)}")
    app.feed(texts[2] + "\n")
    assert app.end() == 0
    check_answers(app.rows, texts[:3], old, third)
    assert [row["bundle"] for row in app.rows] == [digest(old), digest(old), digest(third)]


def test_a_bad_bundle_is_passed_over_and_a_good_one_then_taken(start, tmp_path, old, new, texts):
    bad = renamed(old, tmp_path / "bad", name="bad")
    damage(bad)
    link = tmp_path / "bundle"
    point(link, old)
    app = start(link)
    app.feed(texts[0] + "\n")
    app.until_answered(1)
    point(link, bad)
    app.until_logged("keeping bundle")
    os.utime(bad / MANIFEST)  # looked at again, refused again, not told again
    time.sleep(0.3)  # several polls
    app.feed(texts[1] + "\n")
    app.until_answered(2)
    assert len(app.log) == 2
    assert digest(old) in app.log[1] and "was altered" in app.log[1]
    point(link, new)
    app.until_logged(f"serving bundle {digest(new)}")
    app.feed(texts[2] + "\n")
    assert app.end() == 0
    check_answers(app.rows, texts[:3], old, new)
    assert [row["bundle"] for row in app.rows] == [digest(old), digest(old), digest(new)]
    assert len(app.log) == 3


def test_a_bundle_copied_in_place_is_taken_once_it_is_whole(start, tmp_path, old, new, texts):
    place = tmp_path / "bundle"
    shutil.copytree(old, place)
    app = start(place)
    app.feed(texts[0] + "\n")
    app.until_answered(1)
    # The worst order: what names the bundle comes first, and the rest much later.
    (place / "tokenizer.json").unlink()
    for name in (MANIFEST, MANIFEST_HASH):
        shutil.copyfile(new / name, place / name)
    app.until_logged("tokenizer.json is missing")
    app.feed(texts[1] + "\n")
    app.until_answered(2)
    shutil.copyfile(new / "tokenizer.json", place / "tokenizer.json")
    app.until_logged(f"serving bundle {digest(new)}")
    app.feed(texts[2] + "\n")
    assert app.end() == 0
    check_answers(app.rows, texts[:3], old, new)
    assert [row["bundle"] for row in app.rows] == [digest(old), digest(old), digest(new)]


def test_a_model_that_does_not_fit_its_manifest_does_not_take_over(start, tmp_path, old, texts):
    task = msgspec.structs.replace(Bundle.open(old).manifest.task, labels=("a", "b", "c"))
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", 3))
    wrong = renamed(old, tmp_path / "wrong", name="wrong", task=task, outputs=(logits,))
    link = tmp_path / "bundle"
    point(link, old)
    app = start(link)
    app.until_logged("serving bundle")
    point(link, wrong)
    app.until_logged("keeping bundle")
    app.feed(texts[0] + "\n")
    assert app.end() == 0
    check_answers(app.rows, texts[:1], old)


def test_lines_wait_for_the_first_bundle_without_filling_memory(start, tmp_path, old, texts):
    place = tmp_path / "bundle"
    app = start(place)
    app.until_logged("waiting for a bundle")
    assert app.process.stdin is not None
    pipe = app.process.stdin.fileno()
    os.set_blocking(pipe, False)
    line = texts[0].ljust(999)
    data, sent, stalled = f"{line}\n".encode(), 0, 0
    while stalled < 20:  # a fifth of a second without room: the app has stopped reading
        try:
            sent += os.write(pipe, data[sent % len(data) :])
            stalled = 0
        except BlockingIOError:
            stalled += 1
            time.sleep(0.01)
        assert sent < 2_000_000, "the app reads on while it cannot answer"
    os.set_blocking(pipe, True)
    if sent % len(data):
        app.feed(data[sent % len(data) :])
    assert app.rows == [] and len(app.log) == 1
    shutil.copytree(old, tmp_path / "copy")
    (tmp_path / "copy").rename(place)
    app.until_answered(1)
    assert app.end() == 0
    check_answers(app.rows, [line] * -(-sent // len(data)), old)


@pytest.mark.parametrize("fault", ["missing", "damaged", "unknown version"])
def test_fail_fast_ends_with_2_when_the_first_bundle_is_bad(start, tmp_path, old, fault):
    place = tmp_path / "bundle"
    if fault != "missing":
        shutil.copytree(old, place)
    if fault == "damaged":
        damage(place)
    elif fault == "unknown version":
        manifest = json.loads((place / MANIFEST).read_bytes())
        manifest["format_version"] = 99
        write_manifest(place, json.dumps(manifest).encode())
    app = start(place, "--fail-fast")
    assert app.wait() == 2
    assert len(app.log) == 1 and "Traceback" not in app.log[0]
    assert {"missing": "no bundle there", "damaged": "altered"}.get(fault, "99") in app.log[0]


def test_a_line_that_cannot_be_labelled_is_answered_with_an_error(start, old, texts):
    app = start(old)
    good = [text.encode() for text in texts[:3]]
    lines = [good[0], b"\xff\xfe broken", good[1], b"y" * 1_500_000, b"\xed\xa0\x80", good[2]]
    app.feed(b"\n".join(lines) + b"\n")
    assert app.end() == 0
    assert [row["line"] for row in app.rows] == [1, 2, 3, 4, 5, 6]
    assert [sorted(row) for row in app.rows if "error" in row] == [["bundle", "error", "line"]] * 3
    assert "UTF-8" in app.rows[1]["error"] and "bytes" in app.rows[3]["error"]
    assert "UTF-8" in app.rows[4]["error"]
    answered = [row for row in app.rows if "error" not in row]
    with Classifier.load(old, device="cpu") as classifier:
        assert [row["label"] for row in answered] == [
            prediction.label for prediction in classifier.predict(texts[:3])
        ]


def test_pairs_are_parted_by_a_tab(start, tiny_bundles, texts_for):
    pairs = texts_for["pairs"][:5]
    app = start(tiny_bundles["pairs"])
    app.feed("".join(f"{first}\t{second}\n" for first, second in pairs))
    app.feed("only one text\n")
    assert app.end() == 0
    check_answers(app.rows[:5], pairs, tiny_bundles["pairs"])
    assert "pair" in app.rows[5]["error"]


def test_sigterm_finishes_what_has_been_read(start, old, texts):
    app = start(old)
    app.until_logged("serving")
    lines = [texts[index % len(texts)][:25] for index in range(110)]
    data = "".join(f"{line}\n" for line in lines).encode()
    assert len(data) <= 4096  # one write that the app reads as one piece
    app.feed(data)
    app.until_answered(1)
    app.process.send_signal(signal.SIGTERM)
    assert app.wait() == 0
    check_answers(app.rows, lines, old)


def test_sigterm_before_any_bundle(start, tmp_path):
    idle, holding = start(tmp_path / "none"), start(tmp_path / "none")
    holding.feed("a line\n")
    for app, code in ((idle, 0), (holding, 1)):  # 1: a line was read and not answered
        app.until_logged("waiting for a bundle")
        if app is holding:
            time.sleep(0.2)  # for the line to be read, which nothing shows
        app.process.send_signal(signal.SIGTERM)
        assert app.wait() == code
        assert app.rows == []


def test_sighup_looks_at_once_and_an_archive_is_a_bundle_too(start, tmp_path, old, new, texts):
    for name, source in (("first", old), ("second", new)):
        shutil.make_archive(str(tmp_path / name), "tar", source)
    place = tmp_path / "bundle.tar"
    (tmp_path / "first.tar").rename(place)
    app = start(place, poll_seconds=1000)
    app.feed(texts[0] + "\n")
    app.until_answered(1)
    (tmp_path / "second.tar").replace(place)
    app.process.send_signal(signal.SIGHUP)
    app.until_logged(f"serving bundle {digest(new)}")
    app.feed(texts[1] + "\n")
    assert app.end() == 0
    check_answers(app.rows, texts[:2], old, new)
    assert [row["bundle"] for row in app.rows] == [digest(old), digest(new)]


def test_input_that_ends_before_the_bundle_comes_is_still_answered(start, tmp_path, old, texts):
    place = tmp_path / "bundle"
    app = start(place)
    app.feed("\n".join(texts[:3]))
    assert app.process.stdin is not None
    app.process.stdin.close()
    app.until_logged("waiting for a bundle")
    point(place, old)
    assert app.wait() == 0
    check_answers(app.rows, texts[:3], old)


def test_a_reader_of_the_answers_that_goes_away_ends_the_app(old, texts):
    command = [sys.executable, APP, old]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write(f"{texts[0]}\n".encode())
        process.stdin.flush()
        log = process.stderr.read().decode()
        assert process.wait(DEADLINE_S) == 1
    assert "nobody reads" in log and "Traceback" not in log
