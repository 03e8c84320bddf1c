"""Runs `host_db_script` with a limit on time and output. Spec: docs/settings-dispatcher.md, Hosts registry.

The output is written to files in memory: it contains passwords, and a process that outlives the script cannot block a
reader. The output is complete when the script exits. Then all remaining processes of its process group are killed, and
all other processes that have the output open.
"""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, Process
from contextlib import suppress
from pathlib import Path
from typing import IO

MAX_OUTPUT = 64 * 1024 * 1024  #: Maximum bytes on stdout, and on stderr.
_STDERR_TAIL = 500  #: Number of bytes at the end of stderr that are quoted in an error.
_KILL_ROUNDS = 10  #: Maximum number of searches for remaining processes of the script.
_CHECK_INTERVAL = 0.05  #: Seconds between two checks of the output's size.


class ScriptFailed(Exception):
    """A script that failed. The message is the reason, with the end of stderr."""


async def run_script(script: Path, time_limit: float, max_output: int = MAX_OUTPUT) -> bytes:
    """Return the output of a program; kill its remaining processes. Raises `ScriptFailed` or OSError."""
    with _memory_file() as output, _memory_file() as errors:
        try:
            process = await asyncio.create_subprocess_exec(
                script, stdin=DEVNULL, stdout=output, stderr=errors, start_new_session=True
            )
        except OSError as error:
            raise ScriptFailed(f"{script} cannot be started: {error.strerror}") from error
        try:
            async with asyncio.timeout(time_limit):
                status = await _wait_exit(process, output, errors, max_output)
        except TimeoutError as error:
            raise ScriptFailed(f"{script} took more than {time_limit:g} s") from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            await asyncio.shield(asyncio.to_thread(_kill_writers, (output.fileno(), errors.fileno())))
        if status is None:
            raise ScriptFailed(f"{script} printed more than {max_output} bytes")
        if status != 0:
            reason = f"exited with status {status}" if status > 0 else f"was killed by {signal.Signals(-status).name}"
            tail = os.pread(errors.fileno(), _STDERR_TAIL, max(0, _size(errors) - _STDERR_TAIL))
            message = tail.decode("utf-8", "replace").strip()
            raise ScriptFailed(f"{script} {reason}{message and ': '}{message}")
        output.seek(0)
        return output.read()


async def _wait_exit(process: Process, output: IO[bytes], errors: IO[bytes], max_output: int) -> int | None:
    """Return the exit status; None if the process has written more than `max_output` bytes."""
    while max(_size(output), _size(errors)) <= max_output:
        if process.returncode is not None:
            return process.returncode
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _CHECK_INTERVAL)
    return None


def _kill_writers(files: tuple[int, int]) -> None:
    """Kill all other processes that have one of these files open."""
    opened = {(status.st_dev, status.st_ino) for status in map(os.fstat, files)}
    for _ in range(_KILL_ROUNDS):  # a process may have forked during the search
        has_writers = False
        for process in Path("/proc").glob("[0-9]*"):
            if int(process.name) != os.getpid() and _has_open(process, opened):
                has_writers = True
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(process.name), signal.SIGKILL)
        if not has_writers:
            return


def _has_open(process: Path, files: set[tuple[int, int]]) -> bool:
    with suppress(OSError):  # it has ended, or it belongs to another user, and so not to the script
        with os.scandir(process / "fd") as entries:
            for entry in entries:
                with suppress(OSError):
                    status = entry.stat()
                    if (status.st_dev, status.st_ino) in files:
                        return True
    return False


def _memory_file() -> IO[bytes]:
    return open(os.memfd_create("host_db_script"), "w+b")  # closes the descriptor


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size
