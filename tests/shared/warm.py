"""``edgebert`` in a process of its own for each call, without loading PyTorch for each.

As a program, it loads what the command loads and then, for each request on the socket that is its
standard input, forks a process that goes on as ``edgebert ARGUMENTS...`` would: with its own
directory, environment and output, its own end, and a number under which it can be killed.
``WarmCommand`` is the other side. What differs from a fresh interpreter: all share one seed of
``hash``, and latencies are timed on fewer calls. A test that two runs give the same starts the real
command, too.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import loaded
import numpy as np

from edgebert_runtime import bench

__all__ = ["FEW_CALLS", "WarmCommand", "WarmProcess"]

FEW_CALLS = 10
"""Timed calls for each cell of the breakdown of latencies, which is about no machine in tests."""


class WarmProcess:
    """One call of the command: as much of ``subprocess.Popen`` as the tests use."""

    def __init__(self, status: socket.socket, stderr: IO[str] | None) -> None:
        self.stderr = stderr
        self.returncode: int | None = None
        # Without a buffer, which ``select`` would not look into.
        self._status = status.makefile("rb", buffering=0)
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        """Returns the exit code, minus the signal that ended it; ``None`` if it is running."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            return self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end and returns as ``poll`` does.

        Raises:
            TimeoutError: It is still running after ``timeout`` seconds; it is killed.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"edgebert was still running after {timeout} s")
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def kill(self) -> None:
        """Ends it as a crash would."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class WarmCommand:
    """Starts ``edgebert`` again and again, from one process that has loaded it."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__], stdin=theirs, stdout=subprocess.DEVNULL
            )

    def start(
        self,
        *arguments: object,
        cwd: Path,
        env: dict[str, str] | None = None,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
    ) -> WarmProcess:
        """Starts a call, with ``env`` on top of this process's environment.

        ``stdout`` and ``stderr`` are file descriptors, or what ``subprocess`` calls ``DEVNULL``;
        ``stderr`` may be its ``PIPE``.
        """
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "env": {**os.environ, **(env or {})},
        }
        status, theirs = socket.socketpair()
        reader, opened = None, [os.open(os.devnull, os.O_RDWR), theirs.detach()]
        nowhere = opened[0]
        if stderr == subprocess.PIPE:
            end, stderr = os.pipe()
            opened.append(stderr)
            reader = os.fdopen(end, encoding="utf-8")
        fds = [nowhere if fd == subprocess.DEVNULL else fd for fd in (stdout, stderr)]
        line = json.dumps(request).encode() + b"\n"
        # The descriptors travel with the first byte.
        socket.send_fds(self._requests, [line[:1]], [nowhere, *fds, opened[1]])
        self._requests.sendall(line[1:])
        for fd in opened:
            os.close(fd)
        with status:
            return WarmProcess(status, reader)

    def close(self) -> None:
        """Ends the process that has loaded it all."""
        self._requests.close()
        self._server.wait()


def _serve() -> list[str] | None:
    """Forks for each request; returns the arguments in each fork, ``None`` when all is done."""
    requests = socket.socket(fileno=os.dup(0))
    while True:
        first, fds, _, _ = socket.recv_fds(requests, 1, 4)
        if not first:
            return None
        with requests.makefile("rb", buffering=0) as file:
            request = json.loads(first + file.readline())
        *standard, status = fds
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pid = os.fork()
            if pid == 0:
                os.close(status)
                _become(request, standard)
                return list(request["arguments"])
            for fd in (0, 1, 2, *standard):  # a reader must see the end when the child ends
                os.close(fd)
            os.write(status, b"%d\n" % pid)
            _, ended = os.waitpid(pid, 0)
            os.write(status, b"%d\n" % os.waitstatus_to_exitcode(ended))
            os._exit(0)
        for fd in fds:
            os.close(fd)


def _become(request: dict[str, Any], standard: list[int]) -> None:
    """Gives this process the directory, environment and standard streams that were asked for."""
    for number, fd in enumerate(standard):
        os.dup2(fd, number)
        os.close(fd)
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)  # it remembers whether that was a file
        lines = 1 if number == 2 or os.isatty(number) else -1
        new = os.fdopen(number, "w", lines, encoding=old.encoding, errors=old.errors, closefd=False)
        setattr(sys, name, new)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    np.random.seed()  # as chance as in a process that has loaded it itself


def _run(arguments: list[str]) -> NoReturn:
    """Does what the command does, and ends as ``multiprocessing`` ends its forks.

    That is without taking apart what was loaded, which takes longer than most calls.
    """
    from edgebert_pipeline.cli import main

    sys.argv = [str(Path(sys.executable).parent / "edgebert"), *arguments]
    code: Any = 1
    try:
        main()
    except SystemExit as exc:
        code = exc.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    loaded.load()
    bench._CELL_CALLS = FEW_CALLS
    assert "onnxruntime" not in sys.modules  # its thread would be missing in the forks
    arguments = _serve()
    if arguments is not None:
        _run(arguments)
