"""A stream that is closed while it connects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from harp._core.streams import StreamReader
from harp._net.sync import JSONConnection, Stream
from harp.errors import CommunicationError
from harp.protocol.dispatcher import FollowStream

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"


class Connection:
    """A connection that another thread closes with its stream just before it connects again."""

    def __init__(self) -> None:
        self.open = False
        self.before_connect: Callable[[], None] = lambda: None

    def connect(self) -> None:
        self.before_connect()
        self.open = True

    def close(self) -> None:
        self.open = False

    close_threadsafe = close

    def exchange(self, line: bytes) -> bytes:
        raise CommunicationError("the connection is closed" if not self.open else "the peer does not reply")

    def parse_buffered(self, parse: Callable[[Iterable[bytes]], list[Any]]) -> list[Any]:
        return parse([])


def test_stream_closed_before_it_connects_closes_connection() -> None:
    conn = Connection()
    reader = StreamReader(FollowStream(JOB, since=0), False, 0, lambda reply, line: None)
    stream = Stream(cast(JSONConnection, conn), reader)
    conn.before_connect = stream.close
    assert list(stream) == []
    assert not conn.open
