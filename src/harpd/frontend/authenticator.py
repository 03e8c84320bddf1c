"""Checks user names and passwords by the configured authentication module, which is not part of harpd and may block.

Blocking code runs in a bounded number of threads, with a deadline. A thread that hangs cannot be stopped. It occupies
its slot, so that at most `limit` threads hang. As a daemon thread it does not prevent the exit of the program.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import logging
import threading
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from harpd.config.loaded import LoadedConfig

log = logging.getLogger("harpd.frontend")

T = TypeVar("T")


class TaskFailed(Exception):
    """The function raised an exception, which is the `__cause__` of this exception."""


class BoundedThreadPool:
    """A bounded number of threads for one event loop: `limit` functions run at the same time."""

    def __init__(self, limit: int) -> None:
        self._slots = asyncio.Semaphore(limit)

    async def run(self, function: Callable[[], T], deadline: float) -> T:
        """Run a function in its own thread; return its value.

        Raises TimeoutError after `deadline` seconds, with the wait for a slot; the thread continues. Raises
        `TaskFailed` if the function raised any exception, including SystemExit, or if no thread can be started.
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
            await self._slots.acquire()
            try:
                threading.Thread(target=work, daemon=True).start()
            except RuntimeError as error:
                self._slots.release()
                raise TaskFailed("RuntimeError") from error
            return await asyncio.wrap_future(outcome)


class Authenticator:
    """The users of a configuration."""

    def __init__(self, config: LoadedConfig) -> None:
        limits = config.configuration.limits
        self._users = config.users
        self._timeout = limits.authentication_timeout
        self._thread_pool = BoundedThreadPool(limits.authentication_threads)
        self._type_is_logged = False

    def is_cached(self, user: str, password: str) -> bool:
        """Return whether the module accepts the password without blocking, by its method `check_cached`."""
        check_cached = getattr(self._users, "check_cached", None)  # not every module derives from `AuthDB`
        try:
            return check_cached is not None and check_cached(user, password) is True
        except Exception:  # noqa: BLE001 - `authenticate` is called next, and its error is logged
            return False

    async def authenticate(self, user: str, password: str, log_fields: Mapping[str, object]) -> bool:
        """Return whether the module accepts the password. It is called in a thread, with a deadline."""
        check = partial(_call_module, self._users.authenticate, user, password)
        try:
            accepted, returned = await self._thread_pool.run(check, self._timeout)
        except TimeoutError:
            log.error("authentication timed out", extra=dict(log_fields))
            return False
        except TaskFailed as error:
            # Neither the text of the exception nor a traceback: they may contain the password.
            log.error("authentication module failed", extra={**log_fields, **_error_fields(error.__cause__)})
            return False
        if returned is not bool and not self._type_is_logged:  # once for each load of the configuration
            self._type_is_logged = True
            log.warning("authentication module returned no bool", extra={**log_fields, "type": returned.__name__})
        if not accepted:
            log.warning("authentication failed", extra=dict(log_fields))
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
