"""Checks user names and passwords by the configured authentication module, which is not part of harpd and may block.

Blocking code runs in a bounded number of threads. A thread that hangs cannot be stopped. It occupies its slot, so that
at most `limit` threads hang. As a daemon thread it does not prevent the exit of the program. Wrong passwords delay the
next attempts: see `Authenticator`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from harp_daemon.acceptor import network
from harpd.config.loaded import LoadedConfig

log = logging.getLogger("harpd.frontend")

T = TypeVar("T")

_FREE_FAILURES = 3  #: Wrong passwords for a user from an address without a delay of the next check.
_FREE_FAILURES_OF_PEER = 20  #: Wrong passwords for all users from an address without a delay of the next check.
_FIRST_DELAY = 0.25  #: The first delay in seconds.
_RECENT = 3600.0  #: Seconds after which earlier attempts do not count.
_MAX_ATTEMPTS = 10_000  #: Maximum number of remembered pairs of address and user.


class TaskFailed(Exception):
    """The function raised an exception, which is the `__cause__` of this exception."""


class PasswordNotChecked(Exception):
    """The password was not checked within the time limit: it may be right or wrong."""


class _FairSlots:
    """A number of slots, for which users wait in turns: each address in turn, and of an address each user in turn.

    So a peer that sends many requests delays others by one check at most.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: dict[str, dict[str, deque[asyncio.Future[None]]]] = {}  # by address and user

    async def acquire(self, address: str, user: str) -> None:
        """Wait for a slot."""
        if self._free and not self._waiting:
            self._free -= 1
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(address, {}).setdefault(user, deque()).append(granted)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.release()
            else:
                self._remove(granted, address, user)
            raise

    def _remove(self, granted: asyncio.Future[None], address: str, user: str) -> None:
        users = self._waiting.get(address, {})
        if granted in users.get(user, ()):  # `release` may have removed it
            users[user].remove(granted)
            if not users[user]:
                del users[user]
            if not users:
                del self._waiting[address]

    def release(self) -> None:
        """Release a slot: give it to the next waiting user."""
        self._free += 1
        while self._free and self._waiting:
            address, users = next(iter(self._waiting.items()))
            user, waiting = next(iter(users.items()))
            granted = waiting.popleft()
            # The address and the user go behind all others.
            del self._waiting[address], users[user]
            if waiting:
                users[user] = waiting
            if users:
                self._waiting[address] = users
            if granted.cancelled():  # and not removed yet
                continue
            self._free -= 1
            granted.set_result(None)


class BoundedThreadPool:
    """A bounded number of threads for one event loop: `limit` functions run at the same time."""

    def __init__(self, limit: int) -> None:
        self._slots = _FairSlots(limit)

    async def run(self, function: Callable[[], T], deadline: float | None, address: str = "", user: str = "") -> T:
        """Run a function in its own thread, on behalf of a user; return its value.

        Raises TimeoutError after `deadline` seconds, with the wait for a slot; the thread continues, as after a
        cancellation. Raises `TaskFailed` if the function raised any exception, including SystemExit, or if no thread
        can be started.
        """
        loop = asyncio.get_running_loop()
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        outcome.set_running_or_notify_cancel()  # from now on, only the thread sets it

        def work() -> None:
            try:
                outcome.set_result(function())
            except BaseException as error:  # noqa: BLE001 - passed to the waiting task
                failure = TaskFailed(type(error).__name__)
                failure.__cause__ = error
                outcome.set_exception(failure)
            with contextlib.suppress(RuntimeError):  # the loop is closed: the program exits
                loop.call_soon_threadsafe(self._slots.release)

        async with asyncio.timeout(deadline):
            await self._slots.acquire(address, user)
            try:
                threading.Thread(target=work, daemon=True).start()
            except RuntimeError as error:
                self._slots.release()
                raise TaskFailed("RuntimeError") from error
            return await asyncio.wrap_future(outcome)


@dataclass(slots=True)
class _Attempts:
    """The wrong passwords of an address, for one user or for all."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one check at a time for one user
    users: int = 0  # the number of requests that use this object
    failures: int = 0
    failed_at: float = 0.0
    accepted_at: float | None = None

    def delay(self, free: int, longest: float, now: float) -> float:
        """Return how many seconds the next check has to wait; it is 0 after `free` wrong passwords."""
        if self.failures < free:
            return 0.0
        pause = min(longest, _FIRST_DELAY * 2.0 ** min(self.failures - free, 16))
        return max(0.0, self.failed_at + pause - now)


class _AttemptsTable:
    """The attempts by address and user; the oldest are forgotten when there are many."""

    def __init__(self) -> None:
        self._table: dict[tuple[str, str | None], _Attempts] = {}

    @contextlib.contextmanager
    def use(self, address: str, user: str | None) -> Iterator[_Attempts]:
        """Return the attempts of a user, or of an address as a whole."""
        key = address, user
        attempts = self._table.pop(key, None) or _Attempts()
        self._table[key] = attempts  # the newest
        attempts.users += 1
        try:
            yield attempts
        finally:
            attempts.users -= 1
            while len(self._table) > _MAX_ATTEMPTS:
                oldest = next(iter(self._table))
                if self._table[oldest].users:
                    break
                del self._table[oldest]


class Authenticator:
    """The users of a configuration.

    Wrong passwords make the next checks wait: for one user from one address after `_FREE_FAILURES`, each time twice as
    long, up to ``limits.authentication_delay``; for all users from one address after `_FREE_FAILURES_OF_PEER`. A user
    whose password was accepted from an address within the last hour does not wait for the failures of others there.
    """

    def __init__(self, config: LoadedConfig) -> None:
        limits = config.configuration.limits
        self._users = config.users
        self._timeout = limits.authentication_timeout
        self._longest_delay = limits.authentication_delay
        self._thread_pool = BoundedThreadPool(limits.authentication_threads)
        self._attempts = _AttemptsTable()
        self._type_is_logged = False

    def is_cached(self, user: str, password: str) -> bool:
        """Return whether the module accepts the password without blocking, by its method `check_cached`."""
        check_cached = getattr(self._users, "check_cached", None)  # not every module derives from `AuthDB`
        try:
            return check_cached is not None and check_cached(user, password) is True
        except Exception:  # noqa: BLE001 - `authenticate` is called next, and its error is logged
            return False

    async def authenticate(self, user: str, password: str, address: str, log_fields: Mapping[str, object]) -> bool:
        """Return whether the module accepts the password, which is sent from this address.

        It is called in a thread. Raises `PasswordNotChecked` after the time limit, with all waiting.
        """
        address = network(address)  # a peer has all IPv6 addresses of a network
        try:
            async with asyncio.timeout(self._timeout):
                with self._attempts.use(address, user) as own, self._attempts.use(address, None) as of_address:
                    async with own.lock:
                        return await self._check(user, password, address, log_fields, own, of_address)
        except TimeoutError as error:
            log.error("authentication timed out", extra=dict(log_fields))
            raise PasswordNotChecked from error

    async def _check(
        self,
        user: str,
        password: str,
        address: str,
        log_fields: Mapping[str, object],
        own: _Attempts,
        of_address: _Attempts,
    ) -> bool:
        if self.is_cached(user, password):  # since another request of this user
            return True
        now = time.monotonic()
        delay = own.delay(_FREE_FAILURES, self._longest_delay, now)
        if own.accepted_at is None or now - own.accepted_at > _RECENT:
            delay = max(delay, of_address.delay(_FREE_FAILURES_OF_PEER, self._longest_delay, now))
        await asyncio.sleep(delay)
        try:
            check = partial(_call_module, self._users.authenticate, user, password)
            accepted, returned = await self._thread_pool.run(check, None, address, user)
        except TaskFailed as error:
            # Neither the text of the exception nor a traceback: they may contain the password.
            log.error("authentication module failed", extra={**log_fields, **_error_fields(error.__cause__)})
            return False
        if returned is not bool and not self._type_is_logged:  # once for each load of the configuration
            self._type_is_logged = True
            log.warning("authentication module returned no bool", extra={**log_fields, "type": returned.__name__})
        now = time.monotonic()
        if accepted:
            own.failures, own.accepted_at = 0, now
        else:
            log.warning("authentication failed", extra=dict(log_fields))
            for attempts in (own, of_address):
                if now - attempts.failed_at > _RECENT:
                    attempts.failures = 0
                attempts.failures += 1
                attempts.failed_at = now
        return accepted


def _call_module(authenticate: Callable[[str, str], object], user: str, password: str) -> tuple[bool, type]:
    """Call the module; return whether it accepts the user, and the type of its answer. Raises its exceptions.

    A true answer accepts the user, as in the legacy harpd. Objects that are always true do not: a
    coroutine or generator that is not run, a function, NotImplemented. Their truth does not depend on the password.
    """
    answer = authenticate(user, password)
    undecided = inspect.isawaitable(answer) or inspect.isgenerator(answer) or callable(answer)
    if inspect.iscoroutine(answer):
        answer.close()  # otherwise Python warns that it was never awaited
    return not undecided and answer is not NotImplemented and bool(answer), type(answer)


def _error_fields(error: BaseException | None) -> dict[str, object]:
    """Return log fields of an exception that contain no secret: its type, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    location = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
    return {"error": type(error).__name__, "location": location}
