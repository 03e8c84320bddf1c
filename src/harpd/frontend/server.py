"""The front of harpd: listens, speaks TLS, checks who calls, and passes calls on to the warden.

It never runs a procedure and holds no kept call's life. What is slow or may block lives elsewhere: password checks in
threads, calls in the warden's processes, each connection in a task of its own with a deadline for every phase.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from harp_daemon.memory_quota import Allowance
from harp_daemon.sockets import prepare
from harpd.config.loaded import Generation, Options, configure_log, make_generation, warden_settings
from harpd.config.settings import ConfigError
from harpd.control.launcher import STOP_MARGIN, Keeper
from harpd.control.lifecycle import Program, end
from harpd.control.runtime_directory import Part, runtime_directory
from harpd.control.supervisor_client import Wardens
from harpd.frontend.connection import Connection
from harpd.frontend.listeners import listen
from harpd.frontend.thread_pool import Crashed, Threads
from harpd.frontend.tls_stream import boottime, peer_name

__all__ = ["run"]

log = logging.getLogger("harpd.frontend")

#: Connections over the limit that are taken just to be told so; those beyond are closed.
_SURPLUS = 32
#: The share of the limit below which the next crowd is worth a line in the log.
_CALM = 0.9
#: Seconds to wait when the system has no descriptor or memory for another connection.
_ACCEPT_PAUSE = 0.1
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
#: Seconds between two signs that the program runs, and was not halted.
_BEAT = 0.5
#: Seconds for a reload's blocking part and for its warden.
_RELOAD = 60.0
#: Seconds for what clients still have to be told at the end.
_LAST_WORDS = 5.0
#: Descriptors of the program itself, beside those of its connections.
_OWN_DESCRIPTORS = 64


async def run(options: Options, generation: Generation, serving: Callable[[], None], alone: bool) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads.

    Args:
        options: the command line.
        generation: what `make_generation` made of it.
        serving: called once the daemon takes calls.
        alone: whether another program keeps the wardens; else this one does, and its end is the end of all calls.

    Raises:
        ConfigError: it can't listen, or the runtime directory can't be used.
        WardenError: the warden did not start; its log says why.
    """
    program = Program()
    configuration = generation.configuration
    _raise_descriptor_limit(configuration.limits.connections)
    parts = (Part.GATE,) if alone else (Part.GATE, Part.KEEPER)
    configured = configuration.runtime_directory
    with runtime_directory(configured, options.config, *parts) as directory, Wardens(directory) as wardens:
        listeners = listen(configuration.network, options.config)
        settings = partial(warden_settings, options, runtime_directory=directory, outlive=configured is not None)
        await program.run(Gate(options, generation, wardens, settings, listeners, alone), serving)


class Gate:
    """The running daemon. A `harpd.control.lifecycle.Service`.

    Args:
        options: the command line.
        generation: what connections are served with until a reload.
        wardens: the way to the wardens.
        settings: makes of a generation what wardens get to know.
        listeners: sockets that listen.
        alone: whether another program keeps the wardens.
    """

    def __init__(
        self,
        options: Options,
        generation: Generation,
        wardens: Wardens,
        settings: Callable[[Generation], dict[str, Any]],
        listeners: list[socket.socket],
        alone: bool,
    ) -> None:
        self._options = options
        self._wardens = wardens
        self._settings = settings
        self._listeners = listeners
        self._keeper = None if alone else Keeper(wardens, options.background, lambda: settings(self._generation))
        self._loader = Threads(1)
        self._at_start = generation
        self._use(generation)
        self._accepting: list[asyncio.Task[None]] = []
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._surplus = 0
        self._crowded = False
        self._beats = (boottime(),) * 2

    async def start(self) -> None:
        """Start the warden, if that is done here, then accept connections. Raises `WardenError`."""
        if self._keeper is not None:
            await self._keeper.start()
        self._beat()
        for listener in self._listeners:
            self._accepting.append(asyncio.create_task(self._accept(listener)))
            address, port = listener.getsockname()[:2]
            log.info("harpd is serving", extra={"address": address, "port": port})
        _warn_of_low_floor(self._generation)

    def _beat(self) -> None:
        """Note that this program runs. The beat before the last one is surely before anything that is read now."""
        self._beats = (self._beats[1], boottime())
        asyncio.get_running_loop().call_later(_BEAT, self._beat)

    def _use(self, generation: Generation) -> None:
        """Serve the connections to come by this generation; those under way keep what they have."""
        limits = generation.configuration.limits
        self._generation = generation
        self._threads = Threads(limits.authentication_threads)
        self._allowance = Allowance(limits.request_memory)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        exhausted = False
        while True:
            try:
                accepted, address = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    if not exhausted:
                        log.error("can't accept connections", extra={"reason": error.strerror})
                    exhausted = True
                    await asyncio.sleep(_ACCEPT_PAUSE)
                continue  # else it is one connection's fault, gone before it was accepted
            if exhausted:
                log.info("accepts connections again")
            exhausted = False
            self._admit(accepted, peer_name(address))

    def _admit(self, accepted: socket.socket, peer: str) -> None:
        limit, held = self._generation.configuration.limits.connections, len(self._connections) - self._surplus
        over = held >= limit
        if over and not self._crowded:
            log.warning("too many connections", extra={"connections": held})
        self._crowded = over or (self._crowded and held > _CALM * limit)
        if over and self._surplus >= _SURPLUS:
            accepted.close()
            return
        try:
            prepare(accepted)
        except OSError:  # it is closed already
            accepted.close()
            return
        connection = Connection(
            accepted, peer, self._generation, self._threads, self._allowance, self._wardens, lambda: self._beats[0]
        )
        task = asyncio.create_task(connection.refuse() if over else connection.serve())
        self._connections[task] = connection
        self._surplus += over
        task.add_done_callback(partial(self._dismiss, over))

    def _dismiss(self, over: bool, task: asyncio.Task[None]) -> None:
        del self._connections[task]
        self._surplus -= over
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("connection failed", exc_info=error)

    async def reload(self) -> None:
        """Put a new generation in the place of the old one. Raises `ConfigError` and `WardenError`."""
        old = self._generation
        try:
            new = await self._loader.run(partial(make_generation, self._options), _RELOAD)
        except TimeoutError as error:
            raise ConfigError(f"{self._options.config}: loading took longer than {_RELOAD:g} s") from error
        except Crashed as error:
            raise error.__cause__ or error from None
        try:
            configure_log(self._options, new)
            await self._wardens.ask({"control": "reload", "settings": self._settings(new)}, _RELOAD)
        except BaseException:
            configure_log(self._options, old)
            raise
        self._use(new)
        log.info("reloaded")
        for key in _needing_restart(self._at_start, new):
            log.warning("a changed setting needs a restart", extra={"key": key})
        _warn_of_low_floor(new)

    async def stop(self) -> None:
        """Stop accepting and end, within bounds whatever happens.

        Where the wardens are kept here, all calls are ended with ``shutdown``. Else only the tied ones are: a kept one
        loses its client for a while.
        """
        for listener in self._listeners:
            listener.close()
        await end(self._accepting)
        for task, connection in self._connections.items():
            connection.stop(task, wardens_end=self._keeper is not None)
        patience = 2 * self._generation.configuration.limits.kill_grace + STOP_MARGIN
        if self._keeper is not None:
            await self._keeper.stop(patience)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    for connection in list(self._connections.values()):
                        await connection.call_over()
        if self._connections:
            await asyncio.wait(self._connections, timeout=_LAST_WORDS)
        await end(self._connections)


def _raise_descriptor_limit(connections: int) -> None:
    """Allow a descriptor for each connection and one for each call, as far as the hard limit goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * (connections + _SURPLUS) + _OWN_DESCRIPTORS
    if soft < wanted and soft != resource.RLIM_INFINITY:
        reachable = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, hard))


def _needing_restart(old: Generation, new: Generation) -> list[str]:
    before, after = old.configuration, new.configuration
    pairs = {
        "network.address": (before.network.address, after.network.address),
        "network.port": (before.network.port, after.network.port),
        "runtime_directory": (before.runtime_directory, after.runtime_directory),
    }
    return [key for key, (was, is_) in pairs.items() if was != is_]


def _warn_of_low_floor(generation: Generation) -> None:
    floor = generation.configuration.network.tls_floor
    if floor in ("1.0", "1.1"):
        log.warning("TLS versions below 1.2 are allowed", extra={"tls_minimum": floor})
