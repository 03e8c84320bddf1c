"""Running `host_db_script`: bounded in time and output, and never left behind.

Spec: docs/settings-dispatcher.md, Hosts registry.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

__all__ = ["MOST_OUTPUT", "ScriptFailed", "run_script"]

#: The most that a script may print, in bytes.
MOST_OUTPUT = 64 * 1024 * 1024

#: How much of what it says on stderr is kept for the error's message, in bytes.
_STDERR_TAIL = 500

_PIECE = 64 * 1024


class ScriptFailed(Exception):
    """The script gave no result. The message says why, with the end of what it said on stderr."""


async def run_script(script: Path, seconds: float, most_output: int = MOST_OUTPUT) -> bytes:
    """Run a program without arguments and return what it prints.

    It runs in a process group of its own. However this function ends, the whole group is dead then.

    Args:
        script: the program.
        seconds: how long it may take.
        most_output: how much it may print, in bytes.

    Raises:
        ScriptFailed: it can't be started, took too long, printed too much, or exited with a status other than 0.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            script,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise ScriptFailed(f"{script} can't be started: {error.strerror}") from error
    assert process.stdout is not None
    assert process.stderr is not None
    complaint = asyncio.create_task(_tail(process.stderr))
    try:
        async with asyncio.timeout(seconds):
            output = await _read(process.stdout, most_output)
            status = await process.wait()
    except TimeoutError as error:
        raise ScriptFailed(f"{script} took more than {seconds:g} s") from error
    finally:
        _kill_group(process.pid)
        await process.wait()
        said = await complaint
    if output is None:
        raise ScriptFailed(f"{script} printed more than {most_output} bytes")
    if status != 0:
        how = f"exited with status {status}" if status > 0 else f"was ended by {signal.Signals(-status).name}"
        raise ScriptFailed(f"{script} {how}{said and ': '}{said}")
    return output


async def _read(stream: asyncio.StreamReader, most: int) -> bytes | None:
    """All of it; None: it is more than `most`."""
    pieces: list[bytes] = []
    size = 0
    while piece := await stream.read(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            return None
    return b"".join(pieces)


async def _tail(stream: asyncio.StreamReader) -> str:
    tail = b""
    while piece := await stream.read(_PIECE):
        tail = (tail + piece)[-_STDERR_TAIL:]
    return tail.decode("utf-8", "replace").strip()


def _kill_group(group: int) -> None:
    # The group's number is not given to others while one of its processes lives.
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
