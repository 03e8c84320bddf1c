"""Keeps a warden running, and is how the gate speaks with it.

The warden is ``python -m harpd.warden LISTENER LIFELINE``: the numbers of two descriptors that it inherits, the
listening socket that the gate made and the read end of a pipe whose write end only the gate holds. Its settings
come on its stdin as one JSON object. In the foreground it inherits stderr.

The gate keeps the listening socket open. So a connection that is made while there is no warden waits for the
next one; only the calls that a dead warden had are lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harp.protocol.jsontext import InvalidJSON, dumps, loads

__all__ = ["Keeper", "WardenError"]

log = logging.getLogger("harpd.gate")

#: Seconds that a warden has to load the procedures file and to answer.
_START = 60.0
#: Seconds that a call waits for a warden that is being started: less than what a dispatcher waits for harpd.
_WAIT = 5.0
#: Seconds for a control request that is answered at once.
_ANSWER = 10.0
#: Seconds between two starts of a warden that dies: the first pause, and the longest that it grows to.
_PAUSE_FIRST, _PAUSE_LONGEST = 0.1, 30.0
#: A warden that lived this many seconds was no failed start.
_LIVED = 10.0

#: What may wait unread, in bytes: an answer to a control request, which is one line; what a call says.
_ANSWER_BYTES, _CALL_BYTES = 16 * 1024 * 1024, 64 * 1024


class WardenError(Exception):
    """The warden is not there, or refused. The message says why."""


class Keeper:
    """Starts the warden, starts another when it dies, and opens connections to it.

    Args:
        directory: the runtime directory.
        background: the warden gets no stderr.
    """

    def __init__(self, directory: Path, background: bool) -> None:
        self._stderr = asyncio.subprocess.DEVNULL if background else None
        # By way of the descriptor, for a socket's address has no more than 107 bytes.
        self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._address = f"/proc/self/fd/{self._directory}/warden"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        (directory / "warden").unlink(missing_ok=True)
        self._listener.bind(self._address)
        (directory / "warden").chmod(0o600)
        self._listener.listen(4096)
        self._lifeline_end, self._lifeline = os.pipe()
        self._settings: Mapping[str, Any] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._started = 0.0
        self._ready = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    async def start(self, settings: Mapping[str, Any]) -> None:
        """Start the warden and return once it can take calls.

        Args:
            settings: what the warden needs to know; values that JSON can carry, no secret.

        Raises:
            WardenError: it ended or did not answer; its log says why.
        """
        self._settings = settings
        await self._spawn()
        self._keeping = asyncio.create_task(self._keep())

    async def _spawn(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        # -P: modules are not taken from the directory in which harpd was started.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "harpd.warden"),
            *(str(self._listener.fileno()), str(self._lifeline_end)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=self._stderr,
            pass_fds=(self._listener.fileno(), self._lifeline_end),
            start_new_session=True,  # ^C in a terminal is for the gate, which then ends the warden in order
            env=environment,
        )
        self._started = time.monotonic()
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(dumps(dict(self._settings)))
            await self._process.stdin.drain()
        self._process.stdin.close()
        await self._until_ready(self._process)
        self._ready.set()
        log.info("warden started", extra={"warden": self._process.pid})

    async def _until_ready(self, process: asyncio.subprocess.Process) -> None:
        answered = asyncio.create_task(self._ask({"control": "status"}, _START))
        ended = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({answered, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                raise WardenError(f"the warden ended before it was ready ({_ending(ended.result())})")
            try:
                answered.result()
            except WardenError:
                if process.returncode is None:
                    process.kill()
                raise
        finally:
            for task in (answered, ended):
                task.cancel()
            await asyncio.wait({answered, ended})

    async def _keep(self) -> None:
        """Wait for the warden's death and start another, ever again."""
        pause = 0.0
        while True:
            assert self._process is not None
            status = await self._process.wait()
            self._ready.clear()
            log.error("warden died", extra={"warden": self._process.pid, "status": _ending(status)})
            if time.monotonic() - self._started > _LIVED:
                pause = 0.0
            while not self._ready.is_set():
                await asyncio.sleep(pause)
                pause = min(max(2 * pause, _PAUSE_FIRST), _PAUSE_LONGEST)
                try:
                    await self._spawn()
                except (WardenError, OSError) as error:
                    log.error("warden did not start", extra={"reason": str(error), "again_in": pause})

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection for one call.

        Raises:
            WardenError: there is no warden and none comes up.
        """
        try:
            async with asyncio.timeout(_WAIT):
                await self._ready.wait()
                return await self._connect(_CALL_BYTES)
        except TimeoutError as error:
            raise WardenError("the warden of the calls does not run; it is being started again") from error

    async def _connect(self, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            # The loop's own connect takes a full backlog, EAGAIN here, for a connection under way.
            while True:
                try:
                    connection.connect(self._address)
                    break
                except BlockingIOError:
                    await asyncio.sleep(0.01)
                except BaseException:
                    connection.close()
                    raise
            return await asyncio.open_unix_connection(sock=connection, limit=limit)
        except OSError as error:
            raise WardenError(f"no connection to the warden of the calls: {error.strerror}") from error

    async def control(self, request: Mapping[str, Any], deadline: float = _ANSWER) -> dict[str, Any]:
        """Send a control request and return the answer.

        Args:
            request: the request, with the key ``control``.
            deadline: seconds for the answer.

        Raises:
            WardenError: no answer came, or it is an error.
        """
        answer = await self._ask(request, deadline)
        if request["control"] == "reload":
            self._settings = request["settings"]  # a later warden starts with them
        return answer

    async def _ask(self, request: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(deadline):
                reader, writer = await self._connect(_ANSWER_BYTES)
                try:
                    writer.write(dumps(dict(request)) + b"\n")
                    line = await reader.readline()
                finally:
                    writer.close()
            answer = loads(line)
        except TimeoutError as error:
            raise WardenError(f"the warden did not answer within {deadline:g} s") from error
        except (OSError, InvalidJSON, ValueError) as error:
            raise WardenError(f"the warden gave no answer: {error}") from error
        if not isinstance(answer, dict) or "error" in answer:
            raise WardenError(str(answer["error"] if isinstance(answer, dict) else answer))
        return answer

    async def stop(self, deadline: float) -> None:
        """End all calls with the error ``shutdown``, then the warden; by force when it takes longer than asked.

        Args:
            deadline: seconds for an orderly end.
        """
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
        process = self._process
        try:
            if process is not None and process.returncode is None:
                try:
                    async with asyncio.timeout(deadline):
                        await self._ask({"control": "shutdown"}, deadline)
                        await process.wait()
                except (WardenError, TimeoutError) as error:
                    log.error("warden did not end in order; killed", extra={"reason": str(error)})
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
        finally:
            self._close()

    def _close(self) -> None:
        self._ready.clear()
        with contextlib.suppress(OSError):
            os.unlink(self._address)
        self._listener.close()
        for descriptor in (self._lifeline, self._lifeline_end, self._directory):
            os.close(descriptor)


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
