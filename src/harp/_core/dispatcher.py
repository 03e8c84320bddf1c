"""Base classes of both shells' dispatcher classes: everything except the public methods that send requests.

Legacy dispatchers close the connection without a reply when a request contains the keep-alive key. A request that waits
would take this for an interruption and try again for minutes. So it contains the key only after the dispatcher has
granted keep-alive to another request.
"""

from __future__ import annotations

from typing import Any, Generic, Self, TypeVar, Unpack

from harp._core.calls import JobOptions, Options, check_name, job_request, plain_request
from harp._core.connection_pool import ConnectionPool
from harp._core.endpoint import Endpoint
from harp._core.operations import (
    Job,
    Operation,
    ParsedReply,
    is_waiting,
    parse_plain_reply,
    parse_reply,
    raise_if_transient,
    submit,
)
from harp._core.retry import ReconnectPolicy, closed_without_reply, parse_reconnect, unsupported_by_peer
from harp._core.steps import Connection, PooledPeer, Steps, mark_ambiguous
from harp.errors import CommunicationError, HarpException
from harp.protocol.replies import parse_keep_alive
from harp.protocol.requests import Call, Cancel, Request, SubmitMany, encode_request

C = TypeVar("C", bound=Connection)
D = TypeVar("D")
S = TypeVar("S", bound="ServerBase[Any]")
T = TypeVar("T")


class CallerBase(PooledPeer[C]):
    """A dispatcher."""

    def __init__(
        self, host: str, port: int = 3502, *, reconnect: float | None = 300.0, keep_alive: bool = False
    ) -> None:
        self._endpoint = Endpoint(host, port)
        self._reconnect = parse_reconnect(reconnect)
        self._pool = ConnectionPool[C](bool(keep_alive))

    def __repr__(self) -> str:
        keep_alive = ", keep_alive=True" if self._pool.enabled else ""
        return f"{type(self).__name__}({self._endpoint.host!r}, {self._endpoint.port}{keep_alive})"

    def _perform(self, operation: Operation[T]) -> Steps[T]:
        """Send the requests of an operation until it returns its outcome."""
        try:
            request = next(operation)
            while True:
                try:
                    parsed = yield from self._send(request)
                except HarpException as error:
                    request = operation.throw(error)
                else:
                    request = operation.send(parsed)
        except StopIteration as end:
            outcome: T = end.value
            return outcome

    def _send(self, request: Request) -> Steps[ParsedReply]:
        if is_waiting(request):
            return self._send_repeatedly(request, ReconnectPolicy(self._reconnect))
        return self._send_once(request, ReconnectPolicy(0.0))

    def _send_repeatedly(self, request: Request, policy: ReconnectPolicy) -> Steps[ParsedReply]:
        while True:
            try:
                return (yield from self._send_once(request, policy))
            except HarpException as error:
                pause = policy.next_pause(error, self._clock.now())
            yield self._clock.sleep(pause)

    def _send_once(self, request: Request, policy: ReconnectPolicy) -> Steps[ParsedReply]:
        keep_alive = self._pool.enabled and (self._pool.granted or not is_waiting(request))
        encoded = encode_request(request, keep_alive)
        pooled = self._pool.get(self._clock.now()) if keep_alive else None
        conn = pooled or (yield self._open())
        returned = False
        try:
            policy.connected(self._clock.now())
            try:
                line = yield conn.exchange(encoded)
            except CommunicationError as error:
                if not keep_alive:
                    raise
                self._raise_unless_repeatable(error, request, reused=pooled is not None)
                yield conn.connect()
                line = yield conn.exchange(encoded)
            with conn.map_errors("reply"):
                parsed = raise_if_transient(parse_reply(request, line), policy)
            returned = keep_alive and self._pool.put(conn, parse_keep_alive(line), self._clock.now())
        finally:
            if not returned:
                yield conn.close()
        return parsed

    def _raise_unless_repeatable(self, error: CommunicationError, request: Request, reused: bool) -> None:
        """Raise the error of a keep-alive request that got no reply, unless it may be sent on a new connection."""
        if reused and not isinstance(request, (Call, SubmitMany, Cancel)):
            return
        if not reused and not self._pool.granted and closed_without_reply(error):
            raise unsupported_by_peer(error, "keep_alive=True") from error.__cause__
        with mark_ambiguous(reused):
            raise error

    def _send_plain(self, req: dict[str, Any]) -> Steps[dict[str, Any]]:
        """Send a request that the caller composed and return its first reply."""
        line = plain_request(req)
        conn = yield self._open()
        try:
            reply = yield conn.exchange(line)
            with conn.map_errors("reply"):
                return parse_plain_reply(reply)
        finally:
            yield conn.close()


class ServerBase(Generic[D]):
    """A host of a dispatcher, with the options of further jobs."""

    def __init__(self, dispatcher: D, hostname: str) -> None:
        self._dispatcher = dispatcher
        self._hostname = check_name("host", hostname)
        self._options = Options()

    def __call__(self, /, **kwargs: Unpack[JobOptions]) -> Self:
        """Set options of further jobs; the others stay as they are, None unsets one.

        Args:
            queue: name of the queue to wait in, a dict.
            concurrency: how many jobs of the queue may run at once, from 1; needs `queue`.
            timeout: seconds allowed between two messages of the job, above 0.
            max_exec_time: seconds the job may run, above 0.
            info: any JSON value, returned by `RemoteCall.info`.

        Returns:
            This object.

        Raises:
            HarpException: an option is unknown or invalid.

        Spec: docs/client-api.md, RemoteServer.
        """
        self._options = self._options.updated(kwargs)
        return self

    def __str__(self) -> str:
        return self._hostname

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._hostname} by {self._dispatcher!r}>"


class ProcedureBase(Generic[D, S]):
    """A procedure on a host."""

    def __init__(self, dispatcher: D, server: S, procedure: str) -> None:
        self._dispatcher = dispatcher
        self._server = server
        self._procedure = check_name("procedure", procedure)

    def _submit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation[str]:
        request = job_request(str(self._server), self._procedure, args, kwargs, self._server._options)
        return submit(request)

    def host(self) -> str:
        """Return the name of the host. Spec: docs/client-api.md, RemoteProcedure."""
        return str(self._server)

    def procedure(self) -> str:
        """Return the name of the procedure. Spec: docs/client-api.md, RemoteProcedure."""
        return self._procedure

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._procedure} on {self._server} by {self._dispatcher!r}>"


class JobBase(Generic[D]):
    """A job of a dispatcher."""

    def __init__(self, dispatcher: D, job_id: str) -> None:
        self._dispatcher = dispatcher
        self._job = Job(job_id)

    def id(self) -> str:
        """Return the job's identifier, for `HarpCaller.job`. Spec: docs/client-api.md, RemoteCall."""
        return self._job.id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._job.id} by {self._dispatcher!r}>"
