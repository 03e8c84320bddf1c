"""Direct calls to a harpd: the reader of their replies, and base classes of both shells' classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from harp._core.connections import CAFile, Connection, ConnectionPool, Endpoint, Peer, Steps, mark_ambiguous
from harp._core.streams import Reader
from harp._core.values import Result, check_name, encode_arguments, error_of, missing_attribute, outcome_of
from harp.errors import CommunicationError, HarpException
from harp.protocol import harpd as daemon
from harp.protocol.ends import Failed, Raised, Returned
from harp.protocol.schema import ProtocolError

C = TypeVar("C", bound=Connection)
P = TypeVar("P", bound="DirectProcedureBase[Any]")
S = TypeVar("S", bound="DirectServerBase[Any, Any]")


class DirectReader(Reader):
    """The records and the end of a direct call to harpd."""

    def __init__(self) -> None:
        self.replies = daemon.ReplyReader()

    def read(self, line: bytes) -> tuple[Any, ...]:
        """Return the record of a line; the end result as a `Result`. Raise any other end."""
        message = self.replies.read_message(line)
        if isinstance(message, daemon.Record):
            return (message.data,)
        self.finished, self.keep_alive = True, self.replies.keep_alive
        if isinstance(message, Returned):
            return (Result(message.result),)
        assert isinstance(message, (Raised, Failed))  # the reader rejects all others
        raise outcome_of(message)

    def read_batch(self, lines: Iterable[bytes]) -> list[Any]:
        """See `Reader`."""
        return self.replies.read_records(lines)


class DirectServerBase(Peer[C], Generic[C, P]):
    """A harpd that is called without a dispatcher."""

    _procedure_class: type[P]
    #: A step that returns a new connection, which is connected.
    _open: Callable[[], Any]

    def __init__(
        self,
        host: str,
        user: str,
        password: str,
        port: int = 4306,
        ca_file: CAFile = None,
        *,
        keep_alive: bool = True,
        tls_minimum: str = "1.2",
        verify_hostname: bool = True,
    ) -> None:
        self._endpoint = Endpoint(host, port)
        self._endpoint.check_tcp()
        for field, text in (("user", user), ("password", password)):
            if not isinstance(text, str):
                raise HarpException(f"{field}: expected a string, got {type(text).__name__}")
        self._user = user
        self._password = password
        self._ca_file = ca_file
        self._tls: dict[str, Any] = {"tls_minimum": tls_minimum, "verify_hostname": verify_hostname}
        self._pool = ConnectionPool[C](bool(keep_alive))

    def __getattr__(self, procedure: str) -> P:
        """Return the procedure of this name."""
        if procedure.startswith("_"):
            raise missing_attribute(procedure, self)
        return self._procedure_class(self, procedure)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._endpoint.host!r}, user={self._user!r}, password='***', "
            f"port={self._endpoint.port}, ca_file={self._ca_file!r}, keep_alive={self._pool.enabled})"
        )


class DirectProcedureBase(Generic[S]):
    """A procedure on a harpd."""

    #: Returns the iterator over a streamed result.
    _iterator: Callable[[Any, DirectReader, ConnectionPool[Any]], Any]

    def __init__(self, server: S, name: str) -> None:
        self._server = server
        self._name = check_name("procedure", name)

    def _call(self, /, *args: Any, **kwargs: Any) -> Steps[Any]:
        """Call the procedure with positional or named arguments, any JSON values, and wait without a time limit.

        Returns the result; of a streaming procedure a `HarpStreamIterator`, as soon as it runs. Raises `HarpException`
        for both kinds of arguments, and for arguments that JSON cannot represent (no request was sent);
        `RemoteException` if the procedure raised an exception; `RemoteError` if harpd refused or stopped the call;
        `CommunicationError` if harpd cannot be reached, its certificate is not accepted, or the connection broke. Spec:
        docs/client-api.md, HarpProcedure.
        """
        server, arguments = self._server, encode_arguments(args, kwargs).text
        pool = server._pool
        try:
            request = daemon.Request(self._name, arguments, server._user, server._password, keep_alive=pool.enabled)
        except ProtocolError as error:
            raise HarpException(str(error)) from error
        line = daemon.encode_request(request)
        pooled = pool.get(server._now())
        conn = pooled or (yield server._open())
        reader = DirectReader()
        is_stream = False
        try:
            try:
                reply = yield from conn.exchange(line)
            except CommunicationError as error:
                raise mark_ambiguous(error, pooled is not None) from error.__cause__
            message = reader.replies.read_message(reply)
            if isinstance(message, Failed):
                raise error_of(message)
            assert isinstance(message, daemon.Acknowledgement)
            is_stream = message.stream_result
            if not is_stream:
                (result,) = reader.read((yield conn.receive_line()))
        except ValueError as error:
            raise conn.error("reply", error) from error
        finally:
            if not is_stream and not pool.put(conn, reader.keep_alive, server._now()):
                yield conn.close()
        return self._iterator(conn, reader, pool) if is_stream else result.value

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name} on {self._server!r}>"
