"""The outcome of something that is in progress, for callbacks: it calls them immediately."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class Outcome(Generic[T]):
    """An outcome that comes later. It has the methods of `asyncio.Future`, and can be awaited.

    It calls its callbacks when it gets the result. A future has the event loop call each one in its next turn, which
    costs 10 us with the turn.
    """

    __slots__ = ("_callbacks", "_error", "_loop", "_result")
    _result: T

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._callbacks: list[Callable[[Any], object]] | None = []  # None: it is done
        self._error: BaseException | None = None

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Call a function with this outcome when it is done, or soon if it is done already."""
        if self._callbacks is None:
            self._loop.call_soon(callback, self)
        else:
            self._callbacks.append(callback)

    def set_result(self, result: T) -> None:
        """Set the result of an outcome that is not done, and call the callbacks."""
        callbacks, self._callbacks = self._callbacks, None
        if callbacks is None:
            raise asyncio.InvalidStateError("the outcome is done already")
        self._result = result
        for callback in callbacks:
            try:
                callback(self)
            except Exception as error:  # noqa: BLE001 - the loop logs it, as that of a future's callback
                self._loop.call_exception_handler({"message": "callback failed", "exception": error})

    def set_exception(self, error: BaseException) -> None:
        """Set the error of an outcome that is not done, and call the callbacks."""
        self._error = error
        self.set_result(cast(T, None))

    def cancel(self) -> bool:
        """Set `CancelledError` as its error; return False if it is done already."""
        if self._callbacks is None:
            return False
        self.set_exception(asyncio.CancelledError())
        return True

    def done(self) -> bool:
        """Return whether there is a result or an error."""
        return self._callbacks is None

    def cancelled(self) -> bool:
        """Return whether it was cancelled."""
        return isinstance(self._error, asyncio.CancelledError)

    def exception(self) -> BaseException | None:
        """Return the error; None if there is a result."""
        if self._callbacks is not None:
            raise asyncio.InvalidStateError("the outcome is not done")
        if isinstance(self._error, asyncio.CancelledError):
            raise self._error
        return self._error

    def result(self) -> T:
        """Return the result. Raises the error."""
        if self._callbacks is not None:
            raise asyncio.InvalidStateError("the outcome is not done")
        if self._error is not None:
            raise self._error
        return self._result

    def __await__(self) -> Generator[Any, None, T]:
        if self._callbacks is not None:
            waiter: asyncio.Future[None] = self._loop.create_future()

            def wake(_: object) -> None:
                if not waiter.done():
                    waiter.set_result(None)

            self._callbacks.append(wake)
            try:
                yield from waiter
            except asyncio.CancelledError:
                self.cancel()
                raise
        return self.result()


def when_done(awaitable: Awaitable[T], callback: Callable[[Any], object]) -> asyncio.Future[T] | Outcome[T]:
    """Call a function with an outcome or a future when it is done, or with the task of another awaitable; return it."""
    done = awaitable if isinstance(awaitable, Outcome) else asyncio.ensure_future(awaitable)
    done.add_done_callback(callback)
    return done
