"""The front of harpd: listens, speaks TLS, checks who calls, and passes calls on to the warden.

It never runs a procedure and holds no call's life. What is slow or may block lives elsewhere: password checks in
threads, calls in the warden's processes, each connection in a task of its own with a deadline for every phase.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from harp.daemon.allowance import Allowance
from harp.daemon.process import notify
from harp.daemon.sockets import prepare
from harpd.config import ConfigError
from harpd.connection import Connection, peer_name
from harpd.generation import Generation, Options, configure_log, make_generation, warden_settings
from harpd.keeper import Keeper, WardenError
from harpd.listening import listen
from harpd.runtime import runtime_directory
from harpd.threads import Crashed, Threads

__all__ = ["run"]

log = logging.getLogger("harpd.gate")

#: Connections over the limit that are taken just to be told so; those beyond are closed.
_SURPLUS = 32
#: The share of the limit below which the next crowd is worth a line in the log.
_CALM = 0.9
#: Seconds to wait when the system has no descriptor or memory for another connection.
_ACCEPT_PAUSE = 0.1
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
#: Seconds for a reload's blocking part and for its warden.
_RELOAD = 60.0
#: Seconds, beyond the calls' two grace periods, for the warden's end; and for what clients still have to be told.
_STOP_MARGIN, _LAST_WORDS = 5.0, 5.0
#: Descriptors of the program itself, beside those of its connections.
_OWN_DESCRIPTORS = 64


async def run(options: Options, generation: Generation, serving: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads.

    Args:
        options: the command line.
        generation: what `make_generation` made of it.
        serving: called once the daemon takes calls.

    Raises:
        ConfigError: it can't listen, or the runtime directory can't be used.
        WardenError: the warden did not start; its log says why.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # it must not end a start; there is nothing to reload yet
    loop.set_exception_handler(_log_unexpected)
    configuration = generation.configuration
    _raise_descriptor_limit(configuration.limits.connections)
    with runtime_directory(configuration.runtime_directory, options.config) as directory:
        listeners = listen(configuration.network, options.config)
        try:
            gate = Gate(options, generation, directory, listeners)
        except OSError as error:
            raise ConfigError(f"{options.config}: runtime_directory: {directory}: {error.strerror}") from error
        loop.add_signal_handler(signal.SIGHUP, gate.reload)
        try:
            starting = asyncio.create_task(gate.start())
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                serving()
                await stopping
            log.info("harpd stops")
            notify("STOPPING=1")
            await _cancel([starting])
        finally:
            await gate.stop()
            # The loop's end brings back the signals' usual effect: a second one would now spoil the exit status.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


class Gate:
    """The running daemon.

    Args:
        options: the command line.
        generation: what connections are served with until a reload.
        directory: the runtime directory.
        listeners: sockets that listen.
    """

    def __init__(
        self, options: Options, generation: Generation, directory: Path, listeners: list[socket.socket]
    ) -> None:
        self._options = options
        self._directory = directory
        self._listeners = listeners
        self._keeper = Keeper(directory, options.background)
        self._loader = Threads(1)
        self._use(generation)
        self._accepting: list[asyncio.Task[None]] = []
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._surplus = 0
        self._crowded = False
        self._reloading: asyncio.Task[None] | None = None
        self._reload_again = False
        self._started = False

    async def start(self) -> None:
        """Start the warden, then accept connections. Raises `WardenError`."""
        await self._keeper.start(warden_settings(self._options, self._generation, self._directory))
        for listener in self._listeners:
            self._accepting.append(asyncio.create_task(self._accept(listener)))
            address, port = listener.getsockname()[:2]
            log.info("harpd is serving", extra={"address": address, "port": port})
        _warn_of_low_floor(self._generation)
        notify("READY=1")
        self._started = True
        if self._reload_again:
            self.reload()

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
        connection = Connection(accepted, peer, self._generation, self._threads, self._allowance, self._keeper)
        task = asyncio.create_task(connection.refuse() if over else connection.serve())
        self._connections[task] = connection
        self._surplus += over
        task.add_done_callback(partial(self._dismiss, over))

    def _dismiss(self, over: bool, task: asyncio.Task[None]) -> None:
        del self._connections[task]
        self._surplus -= over
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("connection failed", exc_info=error)

    def reload(self) -> None:
        """Begin to reload all that can be; it follows the start or the reload that is under way."""
        if not self._started or (self._reloading is not None and not self._reloading.done()):
            self._reload_again = True
            return
        self._reloading = asyncio.create_task(self._reload())

    async def _reload(self) -> None:
        again = True
        while again:
            self._reload_again = False
            try:
                await self._replace_generation()
            except (ConfigError, WardenError) as error:
                log.error("reload failed; nothing is changed", extra={"reason": str(error)})
            except Exception:
                log.exception("reload failed; nothing is changed")
            again = self._reload_again

    async def _replace_generation(self) -> None:
        """Put a new generation in the place of the old one, wholly or not at all."""
        old = self._generation
        try:
            new = await self._loader.run(partial(make_generation, self._options), _RELOAD)
        except TimeoutError as error:
            raise ConfigError(f"{self._options.config}: loading took longer than {_RELOAD:g} s") from error
        except Crashed as error:
            raise error.__cause__ or error from None
        try:
            configure_log(self._options, new)
            settings = warden_settings(self._options, new, self._directory)
            await self._keeper.control({"control": "reload", "settings": settings}, _RELOAD)
        except BaseException:
            configure_log(self._options, old)
            raise
        self._use(new)
        log.info("reloaded")
        for key in _needing_restart(old, new):
            log.warning("a changed setting needs a restart", extra={"key": key})
        _warn_of_low_floor(new)

    async def stop(self) -> None:
        """Stop accepting, end all calls with ``shutdown``, end the warden; within bounds whatever happens."""
        for listener in self._listeners:
            listener.close()
        await _cancel([*self._accepting, *([self._reloading] if self._reloading else [])])
        for task, connection in self._connections.items():
            connection.stopping = True
            if not connection.calling:
                task.cancel()
        await self._keeper.stop(2 * self._generation.configuration.limits.kill_grace + _STOP_MARGIN)
        if self._connections:
            await asyncio.wait(self._connections, timeout=_LAST_WORDS)
        await _cancel(list(self._connections))


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)


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


def _log_unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    log.error("unexpected error", exc_info=error, extra={"where": context.get("message")})
