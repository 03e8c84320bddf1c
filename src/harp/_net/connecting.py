"""Connecting to the first address of a peer that answers ("Happy Eyeballs", RFC 8305), for both shells.

An address that does not answer must not use up the time of the others: the next one is tried when an earlier one has
failed, or `ATTEMPT_DELAY` seconds after the latest attempt. The families alternate.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, TypeAlias

from harp._core.connections import Steps

#: Seconds after which the next address is tried, too.
ATTEMPT_DELAY = 0.25

#: A peer that has vanished is detected after about two minutes; a peer that is busy is not affected.
_KEEPALIVE = {
    getattr(socket, option): value
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
    if hasattr(socket, option)  # not every system has all of them
}

#: One result of `socket.getaddrinfo`.
AddressInfo: TypeAlias = tuple[int, int, int, str, tuple[Any, ...]]


def look_up(host: str, port: int, put: Callable[[Sequence[AddressInfo] | Exception], None]) -> None:
    """Call `put` with the addresses of a host or the error; from a thread, unless the host is an address.

    `getaddrinfo` has no time limit. The thread is not one of an executor: a program that ends does not wait for it, and
    other work of the program does not wait for slow lookups.
    """
    resolve = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)

    def work() -> None:
        try:
            outcome: Sequence[AddressInfo] | Exception = resolve()
        except Exception as error:  # noqa: BLE001 - for the caller
            outcome = error
        put(outcome)

    try:
        put(resolve(flags=socket.AI_NUMERICHOST))
    except (OSError, ValueError):
        try:
            threading.Thread(target=work, name="harp resolver", daemon=True).start()
        except RuntimeError:  # a limit of the system, or the interpreter ends
            work()


class CannotConnect(Exception):
    """Failed attempts, in their order: the addresses and their errors. It may be empty."""

    def __init__(self, failures: Sequence[tuple[str, OSError]]) -> None:
        super().__init__(failures)
        self.failures = failures


def connect_first(
    addresses: Iterable[AddressInfo], deadline: float, wait: Callable[[list[socket.socket], float], Any]
) -> Steps[socket.socket]:
    """Return a socket that is connected to the first address that answers; it does not block.

    `wait` is a step that waits until one of some sockets is connected or has failed, or until a time; it returns those.
    It may close sockets. `deadline` and that time are of the monotonic clock. Raises `CannotConnect`.
    """
    remaining = deque(_alternate_families(list(addresses)))
    attempts: dict[socket.socket, str] = {}
    failures: list[tuple[str, OSError]] = []
    try:
        while remaining or attempts:
            if remaining:
                info = remaining.popleft()
                name = str(info[4][0])
                try:
                    attempts[_begin_connecting(info)] = name
                except OSError as error:  # this machine lacks the family, a route, or a free descriptor
                    failures.append((name, error))
                    continue
            until = min(deadline, time.monotonic() + ATTEMPT_DELAY) if remaining else deadline
            ready: list[socket.socket] = yield wait(list(attempts), until)
            for sock in ready:
                name = attempts.pop(sock)
                number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not number:
                    return sock
                sock.close()
                failures.append((name, OSError(number, os.strerror(number))))
            if time.monotonic() >= deadline:
                failures += [(name, TimeoutError()) for name in attempts.values()]
                break
    finally:
        for sock in attempts:
            sock.close()
    raise CannotConnect(failures)


def find_connected(sockets: Iterable[socket.socket], seconds: float) -> list[socket.socket]:
    """Return the sockets that are connected or have failed; wait for one of them, at most some seconds."""
    poll, by_number = select.poll(), {}
    for sock in sockets:
        by_number[sock.fileno()] = sock
        poll.register(sock, select.POLLOUT)
    return [by_number[number] for number, _ in poll.poll(max(seconds, 0.0) * 1000)]


def _begin_connecting(info: AddressInfo) -> socket.socket:
    """Return a socket that is being connected. Raises OSError."""
    family, kind, protocol, _, address = info
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        number = sock.connect_ex(address)
        if number not in (0, errno.EINPROGRESS):
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    return sock


def _alternate_families(addresses: list[AddressInfo]) -> list[AddressInfo]:
    """Return the addresses so that the families alternate, beginning with that of the first one."""
    first = [info for info in addresses if info[0] == addresses[0][0]]
    others = [info for info in addresses if info[0] != addresses[0][0]]
    return [info for pair in zip_longest(first, others) for info in pair if info is not None]
