"""Launches the supervisor: starts it, restarts it when it dies, replaces it at a reload.

A supervisor is the process ``python -m harpd.supervisor.main LIFELINE``. LIFELINE is the number of an inherited
descriptor: one end of a socket pair whose other end the launcher holds. The supervisor reads its settings, one JSON
object, from stdin. In the foreground it inherits stderr.

A supervisor creates its own sockets and can outlive its launcher. At its start and at each reload, the launcher tells
older supervisors to *retire*: they accept no new calls and exit after their last one. A full stop ends all supervisors.
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
from harpd.control.supervisor_client import SupervisorClient, SupervisorError, SupervisorNotRunning

__all__ = ["STOP_MARGIN", "Settings", "SupervisorLauncher"]

log = logging.getLogger("harpd.control")

#: What a supervisor needs to know; values that JSON can carry, no secret.
Settings: TypeAlias = Mapping[str, Any]

#: Seconds that a supervisor has to load the procedures file and to answer, and between two looks whether it does.
_START_TIMEOUT, _POLL_INTERVAL = 60.0, 0.02
#: Seconds for the answer of whoever takes new calls meanwhile; it may hang, and is asked again.
_REPLY_TIMEOUT = 2.0
#: Seconds, beyond the calls' two grace periods, for the end of a supervisor.
STOP_MARGIN = 5.0
#: Seconds between two starts of a supervisor that dies: the first pause, and the longest that it grows to.
_MIN_BACKOFF, _MAX_BACKOFF = 0.1, 30.0
#: A supervisor that lived this many seconds was no failed start.
_STABLE_TIME = 10.0


class SupervisorLauncher:
    """Keeps the supervisor of a runtime directory.

    Args:
        wardens: the way to the supervisors of the directory.
        background: supervisors get no stderr.
        settings: gives what the next supervisor starts with.
    """

    def __init__(self, client: SupervisorClient, background: bool, settings: Callable[[], Settings]) -> None:
        self._client = client
        self._stderr = subprocess.DEVNULL if background else None
        self._settings = settings
        self._active: SupervisorProcess | None = None
        self._processes: set[SupervisorProcess] = set()
        self._retired: set[SupervisorProcess] = set()
        self._starting = asyncio.Lock()
        self._restarting: asyncio.Task[None] | None = None
        self._backoff = 0.0

    async def start(self) -> None:
        """Start a supervisor and return once it takes the new calls; older ones retire.

        Raises:
            SupervisorError: it ended or did not answer; its log says why. An earlier one goes on as before.
        """
        async with self._starting:
            await self._client.remove_dead_sockets()
            child = SupervisorProcess(self._settings(), self._stderr)
            self._processes.add(child)
            child.exit_status.add_done_callback(partial(self._on_exit, child))
            try:
                incarnation = await self._wait_until_ready(child)
            except BaseException:
                child.process.kill()
                raise
            if self._active is not None:
                self._retired.add(self._active)
            self._active = child
            if child.exit_status.done():  # it was not yet ours when it died
                self._begin_restart()
            log.info("supervisor started", extra={"supervisor": child.process.pid})
            await self._retire_others(incarnation)

    async def _wait_until_ready(self, child: SupervisorProcess) -> str:
        """Wait until the supervisor takes calls; return its incarnation."""
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                while not child.exit_status.done():
                    with contextlib.suppress(SupervisorError):
                        status = await self._client.request({"control": "status"}, _REPLY_TIMEOUT)
                        if status["supervisor"] == child.process.pid:
                            return str(status["instance"])
                    await asyncio.wait({child.exit_status}, timeout=_POLL_INTERVAL)
        except TimeoutError as error:
            raise SupervisorError(f"the supervisor did not answer within {_START_TIMEOUT:g} s") from error
        exited = _describe_status(child.exit_status.result())
        raise SupervisorError(f"the supervisor ended before it was ready ({exited})")

    async def _retire_others(self, incarnation: str) -> None:
        for name in self._client.socket_names():
            if not name.endswith(incarnation):
                try:
                    await self._client.request({"control": "retire"}, name=name)
                except SupervisorNotRunning:
                    continue
                except SupervisorError as error:
                    log.error("an older supervisor did not retire", extra={"supervisor": name, "reason": str(error)})

    def _on_exit(self, child: SupervisorProcess, ended: asyncio.Future[int]) -> None:
        self._processes.discard(child)
        about = {"supervisor": child.process.pid, "status": _describe_status(ended.result())}
        if child is self._active:
            log.error("supervisor died", extra=about)
            self._begin_restart()
        elif child in self._retired:
            self._retired.discard(child)
            log.info("an older supervisor has ended", extra=about)

    def _begin_restart(self) -> None:
        """Begin to start another supervisor, ever again until there is one."""
        assert self._active is not None
        if time.monotonic() - self._active.started > _STABLE_TIME:
            self._backoff = 0.0
        self._active = None
        if self._restarting is None or self._restarting.done():
            self._restarting = asyncio.create_task(self._restart_until_ready())

    async def _restart_until_ready(self) -> None:
        while self._active is None:
            await asyncio.sleep(self._backoff)
            self._backoff = min(max(2 * self._backoff, _MIN_BACKOFF), _MAX_BACKOFF)
            try:
                await self.start()
            except (SupervisorError, OSError) as error:
                log.error("supervisor did not start", extra={"reason": str(error), "again_in": self._backoff})

    async def detach(self) -> None:
        """Keep nothing any more: supervisors may go on, calls do."""
        self._active = None
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait({self._restarting})

    async def stop(self, deadline: float) -> None:
        """End all calls with the error ``shutdown``, then all supervisors; kill a supervisor that takes too long.

        Args:
            deadline: seconds for an orderly end.
        """
        await self.detach()
        names = self._client.socket_names()
        await asyncio.gather(*(self._client.shut_down(name, deadline) for name in names))
        children = [child.exit_status for child in self._processes]
        for child in self._processes:  # what is still starting, and has no name yet
            child.process.kill()
        if children:
            await asyncio.wait(children)
        await self._client.remove_dead_sockets()


class SupervisorProcess:
    """A supervisor's process.

    Raises:
        OSError: no process can be made.
    """

    def __init__(self, settings: Settings, stderr: int | None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        self.started = time.monotonic()
        #: Its exit status, once it has ended.
        self.exit_status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
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
                start_new_session=True,  # ^C in a terminal is for the keeper, which then ends the supervisor in order
                env=environment,
            )
        self._descriptor = os.pidfd_open(self.process.pid)
        asyncio.get_running_loop().add_reader(self._descriptor, self._on_ended)

    def _on_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._lifeline.close()
        self.exit_status.set_result(self.process.wait())


def _describe_status(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
