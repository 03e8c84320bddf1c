"""Programs that a measurement starts: servers, workers, clients. Each ends with the block that it was started in.

Each program has a session of its own, so its children end with it; and it is killed when the harness dies.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bench.load import Figures, Missing
from harpd.processes.prctl import die_with_parent

#: The project's directory; the package `bench` is in it.
ROOT = Path(__file__).parents[1]

#: Seconds in which a program has to serve, and to end after the signal.
_START, _END = 30.0, 10.0
#: Lines of a log that an error quotes.
_LINES = 15


class Broken(Exception):
    """A contender failed; the message quotes its log."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def listens(port: int) -> bool:
    """Return whether a program accepts connections on this port of 127.0.0.1."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _log_end(log: Path) -> str:
    return "its log ends with:\n" + "\n".join(log.read_text("utf-8", "replace").splitlines()[-_LINES:])


@contextmanager
def program(
    command: Sequence[str],
    log: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    ready: Callable[[], object] | None = None,
    output: IO[bytes] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program while the block runs; raise Broken if it does not become ready.

    Args:
        command: command line.
        log: receives stderr, and stdout unless `output` does; the program works in its directory.
        settings: becomes the program's `bench.load.SETTINGS`.
        ready: called until it is true, before the block begins; None: the block begins at once.
        output: receives stdout.
    """
    harness = os.getpid()
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "BENCH_SETTINGS": json.dumps(settings or {})}
    with log.open("ab") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output or errors,
            stderr=errors,
            cwd=log.parent,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(harness),
        )
    try:
        until = time.monotonic() + _START
        while ready is not None and not ready():
            status = process.poll()
            if status is not None or time.monotonic() > until:
                what = "is not ready" if status is None else f"ended with status {status}"
                raise Broken(f"{command[0]} {what}; {_log_end(log)}")
            time.sleep(0.02)
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # children that it left, or the program itself
        process.wait()


def run_client(command: Sequence[str], directory: Path, settings: Mapping[str, Any], seconds: float) -> Figures:
    """Run a `bench.client` program to its end, in a directory for its files; return its figures.

    Raises:
        Missing: the contender cannot do this.
        Broken: it failed, or takes more than these seconds.
    """
    log = directory / "client.log"
    with (directory / "answer").open("w+b") as output:
        with program(command, log, settings=settings, output=output) as process:
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                raise Broken(f"no answer within {seconds:g} s; {_log_end(log)}") from None
        if status != 0:
            raise Broken(f"the client failed; {_log_end(log)}")
        output.seek(0)
        answer = json.loads(output.read())
    if "missing" in answer:
        raise Missing(answer["missing"])
    figures: Figures = answer["figures"]
    return figures
