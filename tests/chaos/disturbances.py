"""Disturbances of files and clients: a hosts file that is rewritten in place, a crowd, a cleaned runtime directory."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
from pathlib import Path

from chaos.marks import now

#: Seconds between two connections of a member of a crowd.
_RETRY_DELAY = 0.5
#: The reply to a connection over the limit.
_REJECTION = b"too_many_connections"
#: The data that members of a crowd send: none, or the beginning of a request.
_BEGINNINGS = (b"", b'{"harpcaller": 1, "host":')
#: Maximum number of pieces before the last one.
_MAX_PIECES = 4


async def rewrite_in_pieces(file: Path, text: bytes, seconds: float, choice: float) -> list[tuple[float, float]]:
    """Truncate a file and write a text into it, in pieces. Each but the last ends in the middle of a line.

    Args:
        file: the file.
        text: several lines, in full.
        seconds: duration of all pauses together: with the empty file, and after each piece but the last.
        choice: selects the pieces.

    Returns:
        the periods (from, to) in which the file was incomplete and unchanged.
    """
    rng = random.Random(choice)
    inside = [at for at in range(1, len(text)) if b"\n" not in text[at - 1 : at + 1]]
    ends = sorted(rng.sample(inside, rng.randrange(1, _MAX_PIECES)))
    periods = []
    with file.open("r+b", buffering=0) as opened:
        opened.truncate(0)
        for begin, end in zip([0, *ends], [*ends, len(text)], strict=True):
            unchanged = now()
            await asyncio.sleep(seconds / (len(ends) + 1))
            periods.append((unchanged, now()))
            opened.write(text[begin:end])
    return periods


async def crowd(port: int, count: int, seconds: float) -> bool:
    """Keep so many connections to the dispatcher open for some seconds; return whether one was over the limit."""
    end = asyncio.get_running_loop().time() + seconds
    rejected = False

    async def member(number: int) -> None:
        nonlocal rejected
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(end):
                while True:
                    rejected |= _REJECTION in await _hold_connection(port, _BEGINNINGS[number % len(_BEGINNINGS)])
                    await asyncio.sleep(_RETRY_DELAY)

    await asyncio.gather(*map(member, range(count)))
    return rejected


async def _hold_connection(port: int, beginning: bytes) -> bytes:
    """Send the beginning of a request; return the data until the dispatcher closes the connection."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return b""
    try:
        writer.write(beginning)
        return await reader.read()
    except OSError:
        return b""
    finally:
        writer.close()


def clean(directory: Path, choice: float) -> None:
    """Remove a runtime directory, or all its files, or only the socket for new calls."""
    if choice < 1 / 3:
        shutil.rmtree(directory, ignore_errors=True)  # a supervisor may create a file at the same time
    elif choice < 2 / 3:
        for path in [*directory.rglob("*")]:
            with contextlib.suppress(OSError):
                path.unlink()
    else:
        (directory / "supervisor").unlink(missing_ok=True)
