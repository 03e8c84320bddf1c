"""Running `host_db_script`: bounded in time and output, and never left behind.

Spec: docs/settings-dispatcher.md, Hosts registry.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import FileIO
from pathlib import Path

__all__ = ["MOST_OUTPUT", "ScriptFailed", "run_script"]

#: The most that a script may print, in bytes.
MOST_OUTPUT = 64 * 1024 * 1024

#: How much of what it says on stderr is kept for the error's message, in bytes.
_STDERR_TAIL = 500

#: Seconds that a dead script's stderr is waited for.
_LAST_WORDS = 1.0

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
    async with _pipe() as (printed, output_end), _pipe() as (said, complaint_end):
        try:
            process = await asyncio.create_subprocess_exec(
                script,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output_end,
                stderr=complaint_end,
                start_new_session=True,
            )
        except OSError as error:
            raise ScriptFailed(f"{script} can't be started: {error.strerror}") from error
        output_end.close()
        complaint_end.close()
        complaint = asyncio.create_task(_tail(said))
        try:
            async with asyncio.timeout(seconds):
                output = await _read(printed, most_output)
                status = None if output is None else await process.wait()
        except TimeoutError as error:
            raise ScriptFailed(f"{script} took more than {seconds:g} s") from error
        finally:
            _kill_group(process.pid)
            await process.wait()
            # Whoever left the group may hold this pipe open for ever.
            await asyncio.wait([complaint], timeout=_LAST_WORDS)
            complaint.cancel()
    if output is None:
        raise ScriptFailed(f"{script} printed more than {most_output} bytes")
    if status != 0:
        assert status is not None
        how = f"exited with status {status}" if status > 0 else f"was ended by {signal.Signals(-status).name}"
        last_words = complaint.result() if complaint.done() else ""
        raise ScriptFailed(f"{script} {how}{last_words and ': '}{last_words}")
    return output


@asynccontextmanager
async def _pipe() -> AsyncIterator[tuple[asyncio.StreamReader, FileIO]]:
    """A pipe: its reading end as a stream, and its writing end, to be closed once it is handed on.

    The pipes of `asyncio.subprocess` are not used: its `wait` waits for their ends too.
    """
    reading, writing = os.pipe()
    with FileIO(writing, "wb") as writing_end:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, FileIO(reading))
        try:
            yield reader, writing_end
        finally:
            transport.close()


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
