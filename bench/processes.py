"""Programs that a measurement starts: services, workers, clients. Each ends with the block that it was started in.

A program has a session of its own, so that what it has started ends with it, and dies when the harness dies.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.clients import Missing
from harpd.processes.prctl import die_with_parent

__all__ = ["Broken", "Client", "as_user", "free_port", "listens", "program"]

#: Seconds in which a program has to begin to serve, and to end when it is told to.
_START, _END = 30.0, 10.0

#: Where the package `bench` is: the programs of the measurements are modules of it.
_ROOT = Path(__file__).parents[1]

#: Lines of a log that a fault quotes.
_LINES = 15


class Broken(Exception):
    """A contender does not work; the message says what its log says."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def as_user(user: int | None) -> dict[str, Any]:
    """What `subprocess` takes to run a program as a user and his group; None: as the harness's."""
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


def listens(port: int) -> bool:
    """Whether something accepts connections on this port of 127.0.0.1."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _log_end(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-_LINES:])


def _until(ready: Callable[[], object], process: subprocess.Popen[bytes], log: Path, seconds: float = _START) -> None:
    """Wait for a program to serve.

    Raises:
        Broken: it has ended, or takes too long.
    """
    last = time.monotonic() + seconds
    while not ready():
        status = process.poll()
        if status is not None or time.monotonic() > last:
            what = "does not serve" if status is None else f"ended with status {status}"
            raise Broken(f"{process.args!r} {what}; its log says:\n{_log_end(log)}")
        time.sleep(0.02)


@contextmanager
def program(
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    ready: Callable[[], object] | None = None,
    user: int | None = None,
    stop: signal.Signals = signal.SIGTERM,
    asked: bool = False,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for as long as the block runs.

    Args:
        command: its command line.
        log: takes its stderr, and its stdout unless `pipes` say otherwise.
        environment: entries on top of the harness's.
        ready: asked until it is true, before the block begins; None: at once.
        user: the user and group that it runs as; None: the harness's.
        stop: the signal that tells it to end.
        asked: whether its stdin and stdout are pipes.

    Raises:
        Broken: it did not come up.
    """
    harness = os.getpid()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if asked else subprocess.DEVNULL,
            stdout=subprocess.PIPE if asked else output,
            stderr=output,
            cwd=log.parent,
            env={**os.environ, "PYTHONPATH": str(_ROOT), **(environment or {})},
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(harness),
            **as_user(user),
        )
    try:
        if ready is not None:
            _until(ready, process, log)
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(stop)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has left behind, or itself
        process.wait()


class Client:
    """A client program that speaks as `bench.load.serve` does."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self._rest = b""

    @classmethod
    @contextmanager
    def running(cls, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[Client]:
        """Start one; wait until it listens to what it is asked for."""
        with program(command, log, environment=environment, asked=True) as process:
            client = cls(process, log)
            client._answer(_START)
            try:
                yield client
            finally:
                assert process.stdin is not None
                assert process.stdout is not None
                with suppress(BrokenPipeError):
                    process.stdin.close()
                process.stdout.close()

    @property
    def pid(self) -> int:
        """Its process id; the clients of a work are its children."""
        return self._process.pid

    def ask(self, work: str, deadline: float, **arguments: Any) -> dict[str, float]:
        """Have a piece of work done.

        Args:
            work: its name in the client program.
            deadline: seconds that it may take.
            **arguments: what it is given.

        Returns:
            Its figures.

        Raises:
            Missing: the contender can't do it.
            Broken: it failed, or takes too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"work": work, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Broken(f"the client has ended; its log says:\n{_log_end(self._log)}") from None
        answer = self._answer(deadline)
        if "missing" in answer:
            raise Missing(answer["missing"])
        if "error" in answer:
            raise Broken(answer["error"].strip())
        figures: dict[str, float] = answer["figures"]
        return figures

    def _answer(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        last = time.monotonic() + deadline
        while b"\n" not in self._rest:
            readable, _, _ = select.select([self._process.stdout], [], [], max(0.0, last - time.monotonic()))
            if not readable:
                raise Broken(f"no answer within {deadline:g} s; the client's log says:\n{_log_end(self._log)}")
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                raise Broken(f"the client has ended; its log says:\n{_log_end(self._log)}")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer
