"""Looks up the names of hosts in separate threads: `getaddrinfo` has no time limit and cannot be cancelled.

A slow name service delays only the jobs of its names. Each name has at most one lookup at a time. The number of threads
for names with a slow last lookup is limited, so that other names never wait for them.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeAlias

_MAX_THREADS = 256  #: Maximum number of lookups at the same time.
_MAX_SLOW_THREADS = 64  #: Maximum number of these for names with a last lookup that was too slow.

AddressInfo: TypeAlias = tuple[int, int, int, str, tuple[Any, ...]]  #: One result of `getaddrinfo`.


class _Lookup:
    """The lookup of a name and a port, for all callers that wait for it."""

    def __init__(self, name: str, port: int, slow: bool) -> None:
        self.key = name, port
        self.slow = slow  # whether the name's last lookup was too slow
        self.waiting = 0  # the number of callers that wait
        self.result: asyncio.Future[Sequence[AddressInfo]] = asyncio.get_running_loop().create_future()


class Resolver:
    """The lookups of one event loop."""

    def __init__(self) -> None:
        self._lookups: dict[tuple[str, int], _Lookup] = {}  # the running and queued lookups
        self._queued: deque[_Lookup] = deque()
        self._running = self._slow_running = 0
        self._slow_names: set[str] = set()

    async def resolve(self, name: str, port: int, seconds: float) -> Sequence[AddressInfo]:
        """Return the results for a name, at least one. Raises OSError or UnicodeError.

        After `seconds` it raises `EAI_AGAIN`.
        """
        lookup = self._lookups.get((name, port))
        if lookup is None:
            lookup = self._lookups[name, port] = _Lookup(name, port, name in self._slow_names)
            self._queued.append(lookup)
            self._start_queued()
        lookup.waiting += 1
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(lookup.result)
        except TimeoutError:
            self._slow_names.add(name)
            text = f"the name service has not answered within {seconds:g} s"
            raise socket.gaierror(socket.EAI_AGAIN, text) from None
        finally:
            lookup.waiting -= 1
            if not lookup.waiting and lookup in self._queued:
                self._queued.remove(lookup)
                del self._lookups[lookup.key]

    def _start_queued(self) -> None:
        """Start the queued lookups in their order, within the limits."""
        for lookup in list(self._queued):
            if self._running >= _MAX_THREADS:
                return
            if lookup.slow and self._slow_running >= _MAX_SLOW_THREADS:
                continue
            self._queued.remove(lookup)
            self._running += 1
            self._slow_running += lookup.slow
            # A daemon thread: a stopping daemon does not wait for it.
            loop = asyncio.get_running_loop()
            thread = threading.Thread(
                target=self._look_up, args=(lookup, loop), name="harpcaller resolver", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # no memory, or too many threads: the name can be looked up later
                loop.call_soon(self._on_resolved, lookup, (), OSError(errno.ENOMEM, str(error)))

    def _look_up(self, lookup: _Lookup, loop: asyncio.AbstractEventLoop) -> None:
        """Look up the name; runs in the thread."""
        results: Sequence[AddressInfo] = ()
        error: Exception | None = None
        try:
            results = socket.getaddrinfo(*lookup.key, type=socket.SOCK_STREAM)
        except Exception as caught:  # noqa: BLE001 - raised by `resolve`
            error = caught
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._on_resolved, lookup, results, error)

    def _on_resolved(self, lookup: _Lookup, results: Sequence[AddressInfo], error: Exception | None) -> None:
        del self._lookups[lookup.key]
        self._running -= 1
        self._slow_running -= lookup.slow
        if lookup.waiting:  # it was fast enough
            self._slow_names.discard(lookup.key[0])
        if error is None:
            lookup.result.set_result(results)
        else:
            lookup.result.set_exception(error)
            lookup.result.exception()  # marks it as retrieved, in case no caller waits
        self._start_queued()
