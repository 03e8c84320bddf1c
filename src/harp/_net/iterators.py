"""The iterators of the synchronous client: what they share, and the one that reads from a connection.

The reader says what to ask, what a line gives, and how to go on after an interruption; here is only the talking and
the waiting.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn, Self

from harp._core.connection_pool import Idle
from harp._core.streams import Reader
from harp._net.connection import JSONConnection
from harp.errors import HarpException

__all__ = ["Iteration", "Stream"]


class Iteration(Iterator[Any]):
    """What the iterators share: all items at once, and a context manager that closes."""

    @abstractmethod
    def close(self) -> None:
        """End the iteration early and close its connection."""

    def all(self) -> list[Any]:
        """All items that are still to come, in one list. Spec: docs/client-api.md, RemoteCall.StreamIterator."""
        return list(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} can't be copied or pickled: it reads from a connection")


class Stream(Iteration):
    """Items read from a connection, which is closed after the last, at an error, and when nobody holds this.

    Args:
        conn: the connection; it is connected again when the reader has something to ask.
        reader: what reads its lines.
        idle: where the connection goes instead when the reader has come to an end after which the peer keeps it.
    """

    _closed = True

    def __init__(self, conn: JSONConnection, reader: Reader, idle: Idle[JSONConnection] | None = None) -> None:
        self._conn = conn
        self._reader = reader
        self._idle = idle
        self._ending = threading.Lock()  # is taken for good by who ends the iteration
        self._turn = threading.Lock()
        self._left = threading.Event()
        self._ready: deque[Any] = deque()  # items that came with one before
        self._closed = False

    def _begin(self) -> None:
        """Send what the reader asks first, over the connection that is there."""
        request = self._reader.request()
        assert request is not None
        try:
            self._reader.connected(time.monotonic())
            self._conn.send_line(request)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Any:
        with self._turn:
            while not self._closed:
                if self._ready:
                    return self._ready.popleft()
                try:
                    items = self._items()
                except BaseException:
                    self._finish()
                    raise
                if self._reader.finished:
                    self._finish()
                elif items:
                    self._ready += self._conn.take(self._reader.read_on)
                for item in items:
                    return item
            raise StopIteration

    def _items(self) -> tuple[Any, ...]:
        """The items of the next line; none after an interruption and the pause that follows it."""
        try:
            line = self._line()
            with self._conn.endpoint.mapped("reading"):
                return self._reader.read(line)
        except HarpException as error:
            if self._closed:  # by another thread, which wants no more
                return ()
            pause = self._reader.interrupted(error, time.monotonic())
        self._left.wait(pause)
        return ()

    def _line(self) -> bytes:
        request = self._reader.request()
        if request is None:
            return self._conn.receive_line()
        self._conn.connect()
        if self._closed:  # before there was a connection to be closed
            self._conn.close()
        self._reader.connected(time.monotonic())
        return self._conn.ask(request)

    def close(self) -> None:
        """End the iteration early and close its connection; nothing happens when it has ended.

        A thread that waits for an item, or for the dispatcher to come back, is woken: its iteration ends.
        """
        if self._end():
            self._conn.close()

    def _finish(self) -> None:
        """End the iteration after the last line or an error."""
        keep = self._reader.keep
        if self._idle is None or keep is None:
            self.close()
        elif self._end():
            self._idle.put(self._conn, keep, time.monotonic())

    def _end(self) -> bool:
        """End the iteration; whether this did it: the connection is then the caller's, and of no other thread."""
        if self._closed or not self._ending.acquire(blocking=False):
            return False
        self._closed = True
        self._left.set()
        return True

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()
