"""Labels lines of standard input on a device, and takes up a new bundle without a stop."""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import select
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from edgebert_runtime import Classifier, EdgebertError, InputError
from edgebert_runtime.bundle import MANIFEST_HASH
from edgebert_runtime.device import DEVICES

_BATCH_LINES, _QUEUE_LINES, _LINE_BYTES = 32, 256, 1024 * 1024  # the most of each
_log = logging.getLogger("device_app")


def fingerprint(bundle: Path) -> list[object]:
    """Returns what differs once ``bundle``, a directory or a .tar, has been written to."""
    try:
        inside = sorted(bundle.rglob("*")) if bundle.is_dir() else []
        stats = [path.lstat() for path in (bundle, *inside)]
        found = [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
        # The text as well: two writes can fall into one tick of the file system's clock.
        return [bundle, inside, found, (bundle / MANIFEST_HASH).read_bytes() if inside else b""]
    except OSError as exc:
        return [str(exc)]


def load(bundle: Path, device: str) -> Classifier:
    """Loads a bundle and has it answer once; raises ``EdgebertError``."""
    classifier = Classifier.load(bundle, device=device)
    try:
        # The first answer of a session is slow, and shows a model that cannot answer.
        classifier.predict([("a", "b") if classifier.task.text_pair else "a"])
    except BaseException:
        classifier.close()
        raise
    return classifier


def to_text(line: bytes, pair: bool) -> str | tuple[str, ...]:
    """Decodes a line; for a task on pairs, a tab parts the two. Raises ``InputError``."""
    if len(line) > _LINE_BYTES:
        raise InputError(f"the line has more than {_LINE_BYTES} bytes")
    try:
        text = line.decode().removesuffix("\r")
    except UnicodeDecodeError as exc:
        raise InputError(f"the line is not UTF-8: {exc}") from exc
    return tuple(text.split("\t", 1)) if pair else text


def label(classifier: Classifier, lines: list[bytes]) -> list[dict[str, Any]]:
    """Answers each line, in order; one that cannot be labelled gets an error for an answer."""
    try:
        texts: Any = [to_text(line, classifier.task.text_pair) for line in lines]
        return [msgspec.to_builtins(prediction) for prediction in classifier.predict(texts)]
    except InputError as exc:
        if len(lines) == 1:
            return [{"error": str(exc)}]
        return [answer for line in lines for answer in label(classifier, [line])]


def short(classifier: Classifier) -> str:
    """Returns the start of the digest of the bundle that a classifier was loaded from."""
    return str(classifier.digest)[:12]


class DeviceApp:
    """Three threads: one reads lines, one answers them, the main one watches the bundle."""

    def __init__(self, bundle: str, device: str, poll_seconds: float) -> None:
        self._bundle, self._device, self._poll_seconds = bundle, device, poll_seconds
        self._lines: queue.Queue[bytes | None] = queue.Queue(_QUEUE_LINES)  # full: stdin waits
        # The one kind of queue that a signal handler may use, whatever it interrupts.
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stop_seen, self._stop_given = os.pipe()
        self._turn = threading.Condition()  # held to answer a batch, and to swap
        self._served: Classifier | None = None
        self._seen: list[object] = []
        self._complaint = ""
        self._any_read = False
        self._exit_code = 1

    def run(self, *, fail_fast: bool) -> int:
        """Answers until the input ends or a signal stops it; returns the exit code."""
        signal.signal(signal.SIGHUP, lambda *_: self._events.put("look"))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        self._look()
        if self._served is None and fail_fast:
            return 2
        for work in (self._read, self._answer):
            threading.Thread(target=work, daemon=True).start()
        while True:
            try:
                event = self._events.get(timeout=self._poll_seconds)
            except queue.Empty:
                event = "look"
            if event == "look":
                self._look()
            elif event == "done":
                return self._exit_code
            elif self._served is None:  # stopped, and no bundle has come
                return int(self._any_read)

    def _stop(self) -> None:
        os.write(self._stop_given, b"!")
        self._events.put("stop")

    def _look(self) -> None:
        """Takes up the bundle if it has changed; keeps the one in use if that fails."""
        path = Path(os.path.realpath(self._bundle))  # a link that moves on cannot mix two
        seen, old = fingerprint(path), self._served
        if seen == self._seen:
            return
        self._seen = seen
        try:
            new = load(path, self._device)
        except Exception as exc:  # whatever is wrong with it, the one in use must go on
            complaint = str(exc) if isinstance(exc, EdgebertError) else repr(exc)
            if complaint != self._complaint:
                state = f"keeping bundle {short(old)}" if old else "waiting for a bundle"
                _log.warning("%s: %s", state, " ".join(complaint.split()))
            self._complaint = complaint
            return
        self._complaint = ""
        with self._turn:  # between batches: nobody uses the old one from here on
            self._served = new
            self._turn.notify()
        if old:
            old.close()
        _log.info("serving bundle %s", short(new))

    def _read(self) -> None:
        """Puts lines into the queue, and None after the last."""
        stdin, pending = sys.stdin.fileno(), b""
        try:
            while self._stop_seen not in select.select([stdin, self._stop_seen], [], [])[0]:
                chunk = os.read(stdin, 65536)
                *lines, pending = (pending + chunk).split(b"\n")
                for line in [pending] if pending and not chunk else lines:
                    self._any_read = True
                    self._lines.put(line)
                if not chunk:
                    return
                pending = pending[: _LINE_BYTES + 1]  # enough to refuse it
            if pending:
                _log.warning("stopped within a line: dropped %d bytes of it", len(pending))
        finally:
            self._lines.put(None)

    def _answer(self) -> None:
        """Answers what waits, a batch at a time, until the last line."""
        number, ended = 0, False
        try:
            while not ended:
                taken = [self._lines.get()]
                while taken[-1] is not None and len(taken) < _BATCH_LINES and self._lines.qsize():
                    taken.append(self._lines.get())
                lines = [line for line in taken if line is not None]
                ended = len(lines) < len(taken)
                if lines:
                    with self._turn:
                        self._turn.wait_for(lambda: self._served)
                        assert self._served is not None
                        digest = short(self._served)
                        answers = label(self._served, lines)
                    for answer in answers:
                        number += 1
                        row = {"line": number, **answer, "bundle": digest}
                        sys.stdout.buffer.write(json.dumps(row).encode() + b"\n")
                    sys.stdout.buffer.flush()
            self._exit_code = 0
        except BrokenPipeError:
            _log.error("nobody reads the answers any more")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except EdgebertError as exc:
            _log.error("%s", exc)
        finally:
            self._events.put("done")


def main() -> int:
    """Runs what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="a bundle: a directory, a .tar, or a link to one")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--poll-seconds", type=float, default=2.0, help="how often to look")
    parser.add_argument("--fail-fast", action="store_true", help="exit 2 without a good bundle")
    options = parser.parse_args()
    if not options.poll_seconds > 0:
        parser.error("--poll-seconds must be above 0")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    app = DeviceApp(options.bundle, options.device, options.poll_seconds)
    return app.run(fail_fast=options.fail_fast)


if __name__ == "__main__":
    sys.exit(main())
