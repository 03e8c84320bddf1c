"""Keeps a warden running: starts it, starts another when it dies, puts a new one in its place.

A warden is ``python -m harpd.supervisor.main LIFELINE``: the number of a descriptor that it inherits, one end of a
socket pair
whose other end its keeper holds. Its settings come on its stdin as one JSON object. In the foreground it inherits
stderr.

A warden makes its own sockets and may outlive its keeper. So a keeper that starts may find older wardens, and one that
puts another in its warden's place has one itself: they *retire*, which is to say that they start nothing more and end
with their last call. A full stop ends them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from harp.protocol.json_text import dumps
from harpd.control.supervisor_client import NoWarden, WardenError, Wardens

__all__ = ["STOP_MARGIN", "Keeper", "Settings"]

log = logging.getLogger("harpd.control")

#: What a warden needs to know; values that JSON can carry, no secret.
Settings: TypeAlias = Mapping[str, Any]

#: Seconds that a warden has to load the procedures file and to answer, and between two looks whether it does.
_START, _LOOK = 60.0, 0.02
#: Seconds for the answer of whoever takes new calls meanwhile; it may hang, and is asked again.
_ANSWER = 2.0
#: Seconds, beyond the calls' two grace periods, for the end of a warden.
STOP_MARGIN = 5.0
#: Seconds between two starts of a warden that dies: the first pause, and the longest that it grows to.
_PAUSE_FIRST, _PAUSE_LONGEST = 0.1, 30.0
#: A warden that lived this many seconds was no failed start.
_LIVED = 10.0


class Keeper:
    """Keeps the warden of a runtime directory.

    Args:
        wardens: the way to the wardens of the directory.
        background: wardens get no stderr.
        settings: gives what the next warden starts with.
    """

    def __init__(self, wardens: Wardens, background: bool, settings: Callable[[], Settings]) -> None:
        self._wardens = wardens
        self._stderr = subprocess.DEVNULL if background else None
        self._settings = settings
        self._warden: _Child | None = None
        self._children: set[_Child] = set()
        self._retired: set[_Child] = set()
        self._starting = asyncio.Lock()
        self._restarting: asyncio.Task[None] | None = None
        self._pause = 0.0

    async def start(self) -> None:
        """Start a warden and return once it takes the new calls; older ones retire.

        Raises:
            WardenError: it ended or did not answer; its log says why. An earlier one goes on as before.
        """
        async with self._starting:
            await self._wardens.remove_dead()
            child = _Child(self._settings(), self._stderr)
            self._children.add(child)
            child.ended.add_done_callback(partial(self._on_ended, child))
            try:
                incarnation = await self._until_ready(child)
            except BaseException:
                child.process.kill()
                raise
            if self._warden is not None:
                self._retired.add(self._warden)
            self._warden = child
            if child.ended.done():  # it was not yet ours when it died
                self._restart()
            log.info("warden started", extra={"warden": child.process.pid})
            await self._retire_others(incarnation)

    async def _until_ready(self, child: _Child) -> str:
        """Wait until the warden takes calls; return its incarnation."""
        try:
            async with asyncio.timeout(_START):
                while not child.ended.done():
                    with contextlib.suppress(WardenError):
                        status = await self._wardens.ask({"control": "status"}, _ANSWER)
                        if status["warden"] == child.process.pid:
                            return str(status["incarnation"])
                    await asyncio.wait({child.ended}, timeout=_LOOK)
        except TimeoutError as error:
            raise WardenError(f"the warden did not answer within {_START:g} s") from error
        raise WardenError(f"the warden ended before it was ready ({_ending(child.ended.result())})")

    async def _retire_others(self, incarnation: str) -> None:
        for name in self._wardens.names():
            if not name.endswith(incarnation):
                try:
                    await self._wardens.ask({"control": "retire"}, name=name)
                except NoWarden:
                    continue
                except WardenError as error:
                    log.error("an older warden did not retire", extra={"warden": name, "reason": str(error)})

    def _on_ended(self, child: _Child, ended: asyncio.Future[int]) -> None:
        self._children.discard(child)
        about = {"warden": child.process.pid, "status": _ending(ended.result())}
        if child is self._warden:
            log.error("warden died", extra=about)
            self._restart()
        elif child in self._retired:
            self._retired.discard(child)
            log.info("an older warden has ended", extra=about)

    def _restart(self) -> None:
        """Begin to start another warden, ever again until there is one."""
        assert self._warden is not None
        if time.monotonic() - self._warden.started > _LIVED:
            self._pause = 0.0
        self._warden = None
        if self._restarting is None or self._restarting.done():
            self._restarting = asyncio.create_task(self._start_again())

    async def _start_again(self) -> None:
        while self._warden is None:
            await asyncio.sleep(self._pause)
            self._pause = min(max(2 * self._pause, _PAUSE_FIRST), _PAUSE_LONGEST)
            try:
                await self.start()
            except (WardenError, OSError) as error:
                log.error("warden did not start", extra={"reason": str(error), "again_in": self._pause})

    async def leave(self) -> None:
        """Keep nothing any more: wardens may go on, calls do."""
        self._warden = None
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait({self._restarting})

    async def stop(self, deadline: float) -> None:
        """End all calls of all wardens with the error ``shutdown``, and the wardens; by force when it takes longer.

        Args:
            deadline: seconds for an orderly end.
        """
        await self.leave()
        names = self._wardens.names()
        await asyncio.gather(*(self._wardens.end(name, deadline) for name in names))
        children = [child.ended for child in self._children]
        for child in self._children:  # what is still starting, and has no name yet
            child.process.kill()
        if children:
            await asyncio.wait(children)
        await self._wardens.remove_dead()


class _Child:
    """A warden's process.

    Raises:
        OSError: no process can be made.
    """

    def __init__(self, settings: Settings, stderr: int | None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        self.started = time.monotonic()
        #: Its exit status, once it has ended.
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._lifeline, theirs = socket.socketpair()
        with theirs, os.fdopen(os.memfd_create("settings"), "w+b") as given:
            given.write(dumps(dict(settings)))
            given.seek(0)
            # -P: modules are not taken from the directory in which harpd was started.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "harpd.supervisor.main", str(theirs.fileno())],
                stdin=given,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # ^C in a terminal is for the keeper, which then ends the warden in order
                env=environment,
            )
        self._descriptor = os.pidfd_open(self.process.pid)
        asyncio.get_running_loop().add_reader(self._descriptor, self._on_ended)

    def _on_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._lifeline.close()
        self.ended.set_result(self.process.wait())


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
