"""Direct calls to a harpd: the reader of their replies, and base classes of both shells' classes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from harp._core.calls import encode_arguments, mixed_arguments, name_error
from harp._core.connections import Connection, ConnectionPool, Endpoint, Peer, Steps, mark_ambiguous
from harp._core.outcomes import Result, error_of, outcome_of
from harp._core.streams import Reader
from harp.errors import CommunicationError, HarpException
from harp.protocol import harpd as daemon
from harp.protocol.ends import Failed, Raised, Returned

C = TypeVar("C", bound=Connection)
S = TypeVar("S", bound="DirectServerBase[Any]")


class DirectReader(Reader):
    """The records and the end of a direct call to harpd."""

    def __init__(self) -> None:
        self._replies = daemon.ReplyReader()

    def read_acknowledgement(self, line: bytes) -> bool:
        """Read the first line and return whether the result is streamed.

        Raises:
            RemoteError: harpd refused the call.
            ProtocolError: the line is not valid here.
        """
        message = self._replies.read_message(line)
        if isinstance(message, Failed):
            raise error_of(message)
        assert isinstance(message, daemon.Acknowledgement)
        return message.stream_result

    def read(self, line: bytes) -> tuple[Any, ...]:
        """Return the record of a line; the end result as a `Result`.

        Raises:
            RemoteException: the procedure raised.
            RemoteError: the call was cut short.
            ProtocolError: the line is not valid here.
        """
        message = self._replies.read_message(line)
        if isinstance(message, daemon.Record):
            return (message.data,)
        self.finished, self.keep_alive = True, self._replies.keep_alive
        if isinstance(message, Returned):
            return (Result(message.result),)
        assert isinstance(message, (Raised, Failed))  # the reader rejects all others
        raise outcome_of(message)

    def read_batch(self, lines: Iterable[bytes]) -> list[Any]:
        """See `Reader`."""
        return self._replies.read_records(lines)


class DirectServerBase(Peer[C]):
    """A harpd that is called without a dispatcher."""

    def __init__(
        self,
        host: str,
        user: str,
        password: str,
        port: int = 4306,
        ca_file: str | os.PathLike[str] | None = None,
        *,
        keep_alive: bool = True,
    ) -> None:
        self._endpoint = Endpoint(host, port)
        for field, text in (("user", user), ("password", password)):
            if not isinstance(text, str):
                raise HarpException(f"{field}: expected a string, got {type(text).__name__}")
        self._user = user
        self._password = password
        self._ca_file = ca_file
        self._pool = ConnectionPool[C](bool(keep_alive))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._endpoint.host!r}, user={self._user!r}, password='***', "
            f"port={self._endpoint.port}, ca_file={self._ca_file!r}, keep_alive={self._pool.enabled})"
        )

    def _call(self, line: bytes) -> Steps[tuple[C, DirectReader, Result | None]]:
        """Send a call and read the acknowledgement; unless the result is streamed, wait for the result, too.

        Returns:
            The connection and the reader of the following lines, which are in use only if the result is streamed; and
            the result, None if it is streamed.
        """
        pool = self._pool
        pooled = pool.get(self._now())
        conn = pooled or (yield self._open())
        reader = DirectReader()
        is_stream, result = False, None
        try:
            try:
                reply = yield conn.exchange(line)
            except CommunicationError as error:
                raise mark_ambiguous(error, pooled is not None) from error.__cause__
            is_stream = reader.read_acknowledgement(reply)
            if not is_stream:
                (result,) = reader.read((yield conn.receive_line()))
        except ValueError as error:
            raise conn.error("reply", error) from error
        finally:
            if not is_stream and not pool.put(conn, reader.keep_alive, self._now()):
                yield conn.close()
        return conn, reader, result


class DirectProcedureBase(Generic[S]):
    """A procedure on a harpd."""

    def __init__(self, server: S, name: str) -> None:
        self._server = server
        if not isinstance(name, str) or not name:
            raise name_error("procedure", name)
        self._name = name

    def _request(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        if args and kwargs:
            raise mixed_arguments()
        server, arguments = self._server, encode_arguments(kwargs or args)
        request = daemon.Request(self._name, arguments, server._user, server._password, keep_alive=server._pool.enabled)
        return daemon.encode_request(request)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name} on {self._server!r}>"
