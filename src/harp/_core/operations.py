"""The operations on a dispatcher and its jobs, as steps: base classes of both shells' classes.

Operations send their requests with `CallerBase._request`, which raises a refusal, or with `CallerBase._send`, which
returns it. An operation whose outcome is known sends nothing. Streams are read by `harp._core.streams`. The end of a
job is stored as the line that reported it, and each caller gets new values, so threads share no mutable data.

Legacy dispatchers close the connection without a reply when a request contains the keep-alive key. So the key is sent
only to a dispatcher that has granted keep-alive before. Whether it does is asked with a request that submits no job:
before the second request, because many programs send only one. With ``keep_alive=True`` nothing is asked; but a request
that waits, which would take the close for an interruption and try again for minutes, has the key only after a grant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Generic, Self, TypeVar, Unpack

from harp._core.calls import (
    Call,
    JobOptions,
    check_options,
    encode_arguments,
    job_request,
    mixed_arguments,
    name_error,
    plain_request,
)
from harp._core.connections import Connection, ConnectionPool, Endpoint, Peer, Steps, mark_ambiguous
from harp._core.outcomes import CALL_CANCELLED, CALL_NOT_FINISHED, error_of, outcome_of
from harp._core.retry import REFUSALS, ReconnectPolicy, closed_without_reply, parse_reconnect, unsupported_by_peer
from harp._core.streams import StreamReader
from harp.errors import CancelledException, CommunicationError, HarpException, RemoteError
from harp.protocol import replies, requests
from harp.protocol.ends import End, Failed
from harp.protocol.fields import check
from harp.protocol.json_text import loads
from harp.protocol.requests import Cancel, FollowStream, GetResult, ReadStream, Request, SubmitMany

C = TypeVar("C", bound=Connection)
D = TypeVar("D", bound="CallerBase[Any]")
R = TypeVar("R")
S = TypeVar("S", bound="ServerBase[Any]")

#: The request that asks for keep-alive. It submits no job.
_QUESTION = requests.encode_request(SubmitMany(()), keep_alive=True)

#: Seconds until a dispatcher that has not granted keep-alive is asked again.
_ASK_AGAIN = 300.0


class CallerBase(Peer[C]):
    """A dispatcher."""

    def __init__(
        self, host: str, port: int = 3502, *, reconnect: float | None = 300.0, keep_alive: bool | None = None
    ) -> None:
        self._endpoint = Endpoint(host, port)
        self._reconnect = parse_reconnect(reconnect)
        self._keep_alive = None if keep_alive is None else bool(keep_alive)
        self._pool = ConnectionPool[C](self._keep_alive is not False)
        #: When the dispatcher may be asked for keep-alive, on the monotonic clock; None: after the first request.
        self._ask_at: float | None = None

    def __repr__(self) -> str:
        keep_alive = "" if self._keep_alive is None else f", keep_alive={self._keep_alive}"
        return f"{type(self).__name__}({self._endpoint.host!r}, {self._endpoint.port}{keep_alive})"

    def _submit_many(self, calls: Iterable[Call]) -> Steps[list[str]]:
        found: list[requests.Call] = []
        for call in calls:
            if not isinstance(call, Call):
                raise HarpException(f"calls[{len(found)}]: expected a harp.Call, got {call!r}")
            found.append(call._request)
        job_ids: list[str] = []
        try:
            for part in requests.submit_in_parts(found):
                reply: replies.SubmittedMany = yield from self._request(part, "submit_many()")
                job_ids += reply.job_ids
        except HarpException as error:
            if job_ids:
                error.add_note(f"calls[0] to calls[{len(job_ids) - 1}] were submitted, as {job_ids[0]} and later jobs")
            raise
        return job_ids

    def _request(self, request: Request, feature: str | None = None) -> Steps[Any]:
        """Send a request and return its reply, which is of the kind that `MAY_FOLLOW` lists.

        Args:
            request: the request.
            feature: the name of the feature, if legacy dispatchers lack it.

        Raises:
            RemoteError: the dispatcher refused.
            CommunicationError: there was no reply. If the dispatcher may be too old, the message says so.
        """
        try:
            reply, _ = yield from self._send(request)
        except CommunicationError as error:
            if feature is None or not closed_without_reply(error):
                raise
            raise unsupported_by_peer(error, feature) from error
        if isinstance(reply, Failed):
            raise error_of(reply)
        return reply

    def _send_repeatedly(self, request: GetResult) -> Steps[tuple[Any, bytes]]:
        """Send a request that waits, again after an interruption; return the reply and its line."""
        policy = ReconnectPolicy(self._reconnect)
        while True:
            try:
                reply, line = yield from self._send(request, policy)
                if not (isinstance(reply, Failed) and policy.is_transient(error_of(reply))):
                    return reply, line
                pause = policy.next_pause(error_of(reply), self._now())
            except CommunicationError as error:
                pause = policy.next_pause(error, self._now())
            yield self._sleep(pause)

    def _send(self, request: Request, policy: ReconnectPolicy | None = None) -> Steps[tuple[Any, bytes]]:
        """Send a request once and return the reply and its line.

        Args:
            request: the request.
            policy: is notified of the connection; None: the request does not wait.
        """
        pool = self._pool
        if self._keep_alive is None and not pool.granted:
            yield from self._ask_for_keep_alive()
        keep_alive = pool.granted or (self._keep_alive is True and policy is None)
        encoded = requests.encode_request(request, keep_alive)
        pooled = pool.get(self._now()) if keep_alive else None
        conn = pooled or (yield self._open())
        returned = False
        try:
            if policy is not None:
                policy.connected(self._now())
            try:
                line = yield conn.exchange(encoded)
            except CommunicationError as error:
                if not keep_alive:
                    raise
                self._raise_unless_repeatable(error, request, reused=pooled is not None)
                yield conn.connect()
                line = yield conn.exchange(encoded)
            try:
                reply = _parse_reply(request, line)
            except ValueError as error:
                raise conn.error("reply", error) from error
            returned = keep_alive and pool.put(conn, replies.parse_keep_alive(line), self._now())
        finally:
            if not returned:
                yield conn.close()
        return reply, line

    def _ask_for_keep_alive(self) -> Steps[None]:
        """Ask whether the dispatcher grants keep-alive, if it is time to; the connection then waits in the pool."""
        now = self._now()
        if self._ask_at is None:
            self._ask_at = now
        if now > self._ask_at:
            self._ask_at = now + _ASK_AGAIN
            conn = yield self._open()
            returned = False
            try:
                line = yield conn.exchange(_QUESTION)
                returned = self._pool.put(conn, replies.parse_keep_alive(line), self._now())
            except CommunicationError:
                pass  # a legacy dispatcher; if it cannot be reached, the request itself will say so
            finally:
                if not returned:
                    yield conn.close()

    def _raise_unless_repeatable(self, error: CommunicationError, request: Request, reused: bool) -> None:
        """Raise the error of a keep-alive request that got no reply, unless it may be sent on a new connection."""
        if reused and not isinstance(request, (requests.Call, SubmitMany, Cancel)):
            return
        if not reused and closed_without_reply(error):
            if not self._pool.granted:
                raise unsupported_by_peer(error, "keep_alive=True") from error.__cause__
            self._pool.granted = False  # it may have been replaced by a legacy one
        raise mark_ambiguous(error, reused) from error.__cause__

    def _send_plain(self, req: dict[str, Any]) -> Steps[dict[str, Any]]:
        """Send a request that the caller composed and return its first reply."""
        line = plain_request(req)
        conn = yield self._open()
        try:
            reply = loads((yield conn.exchange(line)))
            check(isinstance(reply, dict), "expected an object")
        except ValueError as error:
            raise conn.error("reply", error) from error
        finally:
            yield conn.close()
        found: dict[str, Any] = reply
        return found


def _parse_reply(request: Request, line: bytes) -> Any:
    """Return the reply to a request. Raise `ProtocolError` for a line that does not answer it."""
    reply = replies.decode_reply(line, request)
    match reply:
        case replies.NoResult():
            check(not getattr(request, "wait", False), "no result, although the request waits for one")
        case replies.Details(details):
            check(isinstance(details.get("why"), str), "details.why: expected a string")
        case replies.WasCancelled(_, dict(stop)):
            check(isinstance(stop.get("state"), str), "stop.state: expected a string")
    return reply


class ServerBase(Generic[D]):
    """A host of a dispatcher, with the options of further jobs."""

    def __init__(self, dispatcher: D, hostname: str) -> None:
        self._dispatcher = dispatcher
        if not isinstance(hostname, str) or not hostname:
            raise name_error("host", hostname)
        self._hostname = hostname
        self._options: Mapping[str, Any] = {}

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
        self._options = {**self._options, **check_options(kwargs)}
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
        if not isinstance(procedure, str) or not procedure:
            raise name_error("procedure", procedure)
        self._procedure = procedure

    def _submit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Steps[replies.Submitted]:
        if args and kwargs:
            raise mixed_arguments()
        server, arguments = self._server, encode_arguments(kwargs or args)
        request = job_request(server._hostname, self._procedure, arguments, server._options)
        return self._dispatcher._request(request)

    def host(self) -> str:
        """Return the name of the host. Spec: docs/client-api.md, RemoteProcedure."""
        return self._server._hostname

    def procedure(self) -> str:
        """Return the name of the procedure. Spec: docs/client-api.md, RemoteProcedure."""
        return self._procedure

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._procedure} on {self._server} by {self._dispatcher!r}>"


class JobBase(ABC, Generic[D, R]):
    """A job of a dispatcher, and its final facts."""

    def __init__(self, dispatcher: D, job_id: str) -> None:
        self._dispatcher = dispatcher
        if not isinstance(job_id, str) or not job_id:
            raise name_error("job_id", job_id)
        self._id = job_id
        self._end_line: bytes | None = None
        self._status_line: bytes | None = None

    def id(self) -> str:
        """Return the job's identifier, for `HarpCaller.job`. Spec: docs/client-api.md, RemoteCall."""
        return self._id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._id} by {self._dispatcher!r}>"

    def follow(
        self, since: int | None = None, recent: int | None = None, numbered: bool = False, *, timed: bool = False
    ) -> R:
        """Return the job's records, also future ones, until it ends; continues after an interruption.

        Args:
            since: number of the first record, from 0.
            recent: how many of the newest records to begin with, instead of `since`; default: 0.
            numbered: return pairs of a record's number and the record.
            timed: return a record's number, the time of its creation (Unix seconds with fractions) and the record.

        Raises:
            HarpException: a number is invalid, or both are given.

        Spec: docs/client-api.md, RemoteCall.
        """
        return self._stream(self._reader(FollowStream, since, recent, numbered, timed))

    def stream(
        self, since: int | None = None, recent: int | None = None, numbered: bool = False, *, timed: bool = False
    ) -> R:
        """Return the job's records so far; does not wait for the job.

        Args:
            since: number of the first record, from 0; default: 0.
            recent: how many of the newest records to return, instead of `since`.
            numbered: return pairs of a record's number and the record.
            timed: return a record's number, the time of its creation (Unix seconds with fractions) and the record.

        Raises:
            HarpException: a number is invalid, or both are given.

        Spec: docs/client-api.md, RemoteCall.
        """
        return self._stream(self._reader(ReadStream, since, recent, numbered, timed))

    @abstractmethod
    def _stream(self, reader: StreamReader) -> R:
        """Return the iterator over the items of a reader."""

    def _store_end(self, reply: replies.Reply, line: bytes) -> None:
        """Store the end that a reply reports, unless it refuses the request."""
        if isinstance(reply, End) and not (isinstance(reply, Failed) and reply.type in REFUSALS):
            self._end_line = line

    def _result(self, wait: bool) -> Steps[Any]:
        """Return the job's end as a value; errors are returned, not raised."""
        request = GetResult(self._id, bool(wait))
        if self._end_line is not None:
            reply = _parse_reply(request, self._end_line)
        else:
            try:
                dispatcher = self._dispatcher
                reply, line = yield from (dispatcher._send_repeatedly if wait else dispatcher._send)(request)
            except (CommunicationError, RemoteError) as error:
                return error.with_traceback(None)
            self._store_end(reply, line)
        return CALL_NOT_FINISHED if isinstance(reply, replies.NoResult) else outcome_of(reply)

    def _get(self, wait: bool) -> Steps[Any]:
        """Return the job's end as a value; errors are raised."""
        outcome = yield from self._result(wait)
        if isinstance(outcome, HarpException):
            raise outcome
        if outcome is CALL_CANCELLED:
            raise CancelledException(f"job {self._id} was cancelled")
        return outcome

    def _cancel(self, wait: bool) -> Steps[bool]:
        """Cancel the job and return whether this stopped it; with `wait`, once its host has confirmed that."""
        request = Cancel(self._id, bool(wait))
        reply: replies.WasCancelled = yield from self._dispatcher._request(
            request, "cancel(wait=True)" if wait else None
        )
        if reply.stop is not None and reply.stop["state"] != "confirmed":
            raise _stop_error(self._id, reply.stop)
        return reply.cancelled

    def _details(self) -> Steps[dict[str, Any]]:
        reply: replies.Details = yield from self._dispatcher._request(
            requests.GetDetails(self._id), "details() and why()"
        )
        details: dict[str, Any] = reply.details
        return details

    def _status(self, *times: str) -> Steps[replies.Status]:
        """Return the job's status; a stored one if it has one of these times, or if none is named."""
        request, line = requests.GetStatus(self._id), self._status_line
        if line is not None:
            status: replies.Status = _parse_reply(request, line)
            if not times or any(getattr(status, time) is not None for time in times):
                return status
        reply, line = yield from self._dispatcher._send(request)
        if isinstance(reply, Failed):
            raise error_of(reply)
        self._status_line = line
        status = reply
        return status

    def _reader(
        self,
        kind: type[FollowStream] | type[ReadStream],
        since: int | None,
        recent: int | None,
        numbered: bool,
        timed: bool,
    ) -> StreamReader:
        """Return the reader of the job's records. Raise `HarpException` if a number is invalid, or both are given."""
        try:
            request = kind(self._id, since, recent, bool(timed))
        except ValueError as error:
            raise HarpException(str(error)) from error
        return StreamReader(request, numbered, self._dispatcher._reconnect, self._store_end)


def _stop_error(job_id: str, stop: Mapping[str, Any]) -> RemoteError:
    """Return the error of `cancel` for a stop that the host has not confirmed."""
    if stop["state"] != "failed":
        message = f"the processes of job {job_id} may still run: the host cannot report on them"
        return RemoteError("stop_unknown", message, stop)
    report = stop.get("stop_report")
    survivors = report.get("survivors") if isinstance(report, dict) else None
    if not isinstance(survivors, list) or not survivors:
        return RemoteError("stop_failed", f"the host has not confirmed that job {job_id} is stopped", stop)
    return RemoteError("stop_failed", f"processes of job {job_id} survive: {', '.join(map(_process, survivors))}", stop)


def _process(survivor: Any) -> str:
    if isinstance(survivor, dict) and "pid" in survivor:
        return f"{survivor['pid']} ({survivor.get('command')})"
    return str(survivor)
