"""The operations on a dispatcher and its jobs: base classes of both shells' classes.

An operation is a generator of steps; each shell has a method of the same name without the underscore, which runs it
and has its docstring. Streams are read by `harp._core.streams`. A job's end is stored as the line that reported it,
and each caller gets new values, so threads share no mutable data.

Legacy dispatchers close the connection without a reply when a request contains the keep-alive key, or submits many
jobs. So both are sent only to a dispatcher that has replied to a question, a `SubmitMany` without jobs, before the
second request and before the first `SubmitMany`. With ``keep_alive=True`` no question is sent. But a request that waits
would treat the close as an interruption, so it has the key only after a grant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Self, TypeVar, Unpack

from harp._core import values
from harp._core.connections import (
    CAFile,
    Connection,
    ConnectionPool,
    Deadline,
    DispatcherTLS,
    Endpoint,
    Peer,
    Steps,
    TLSContext,
    earlier,
    mark_ambiguous,
    parse_tls,
)
from harp._core.lists import JobCounts, explain_refusal, parse_counts, parse_items
from harp._core.retry import ReconnectPolicy, closed_without_reply, parse_reconnect, unsupported_by_peer
from harp._core.streams import StreamReader, StreamRequest
from harp._core.values import Call, JobOptions, Secret, refusal_of
from harp.errors import CancelledException, CommunicationError, HarpException, RemoteError, RequestRefused
from harp.protocol import dispatcher as protocol
from harp.protocol.dispatcher import (
    ACCESS_REFUSALS,
    Cancel,
    FollowStream,
    GetResult,
    ListRequest,
    ReadStream,
    Refused,
    Request,
    SubmitMany,
)
from harp.protocol.ends import End
from harp.protocol.json_text import MAX_LINE_DEPTH, loads
from harp.protocol.schema import check, is_count, is_seconds

C = TypeVar("C", bound=Connection)
S = TypeVar("S", bound="ServerBase[Any]")
P = TypeVar("P", bound="ProcedureBase[Any]")
J = TypeVar("J", bound="JobBase[Any]")
R = TypeVar("R")
T = TypeVar("T")

#: Seconds until a dispatcher that has not granted keep-alive is asked again.
_ASK_AGAIN = 300.0
#: Seconds after which a submission with a request id is not repeated any more.
_REPEAT_SECONDS = 3600.0
#: Refusals that do not end the repetitions: an earlier request may have been stored.
_TEMPORARY_REFUSALS = frozenset({"too_many_connections", "storage_error", "rate_limited"})


class CallerBase(Peer[C], Generic[C, S, J]):
    """A dispatcher. Its shell has the classes of its hosts and jobs."""

    _server_class: type[S]
    _job_class: type[J]
    #: Returns a new connection, which is not connected.
    _connection: Callable[[], C]
    #: Returns the context for TLS to the dispatcher, the same one until its files change.
    _make_context: Callable[[DispatcherTLS], Any]

    def __init__(
        self,
        host: str,
        port: int = 3502,
        *,
        reconnect: float | None = 300.0,
        keep_alive: bool | None = None,
        request_timeout: float | None = 30.0,
        token: str | None = None,
        ca_file: CAFile = None,
        certfile: CAFile = None,
        keyfile: CAFile = None,
        tls: TLSContext | bool | None = None,
    ) -> None:
        self._endpoint = Endpoint(host, port)
        self._tls = parse_tls(tls, ca_file, certfile, keyfile)
        if self._tls is not None and self._endpoint.path is not None:
            raise HarpException("tls: a Unix socket has no TLS, and needs none")
        self._token = None if token is None else Secret(values.check_token(token))
        self._reconnect = parse_reconnect(reconnect)
        if request_timeout is not None and not is_seconds(request_timeout):
            raise HarpException(f"request_timeout: expected a positive number of seconds, got {request_timeout!r}")
        self._request_timeout = request_timeout
        self._keep_alive = None if keep_alive is None else bool(keep_alive)
        self._pool = ConnectionPool[C](self._keep_alive is not False)
        #: Whether the dispatcher has replied to the question, so that it supports requests for many jobs.
        self._supports_many = False
        #: When the dispatcher may be asked, on the monotonic clock; None: after the first request.
        self._ask_at: float | None = None

    def __repr__(self) -> str:
        options = "" if self._keep_alive is None else f", keep_alive={self._keep_alive}"
        options += "" if self._token is None else ", token='***'"
        options += "" if self._tls is None else ", tls=True"
        return f"{type(self).__name__}({self._endpoint.host!r}, {self._endpoint.port}{options})"

    def _on_outage(self, error: HarpException) -> None:
        """Ignore the error that begins an outage, in which a reader tries to reach the dispatcher again."""

    def __getattr__(self, host: str) -> S:
        """Return the host of this name, without options."""
        if host.startswith("_"):
            raise values.missing_attribute(host, self)
        return self._server_class(self, host)

    def __call__(self, host: str, **kwargs: Unpack[JobOptions]) -> S:
        """Return a host, like `host`: ``rpc("web01", timeout=5)``."""
        return self.host(host, **kwargs)

    def host(self, host: str, **kwargs: Unpack[JobOptions]) -> S:
        """Return the host of this name, with options as for `RemoteServer`. Spec: docs/client-api.md, HarpCaller."""
        server = self._server_class(self, host)
        server(**kwargs)
        return server

    def job(self, job_id: str) -> J:
        """Return the job with this id; sends no request. Spec: docs/client-api.md, HarpCaller."""
        return self._job_class(self, job_id)

    def _submit_many(self, calls: Iterable[Call]) -> Steps[list[J]]:
        """Submit jobs with one request, all or none; return them in the order of the calls. They are on stable storage.

        Over 10,000 calls or 16 MiB are sent as several requests; to a legacy dispatcher, one for each call. Then each
        request is all or none; a note of the exception has the number of calls that were submitted before it. If all
        calls have a `request_id`, a request is sent again after a lost reply. Raises `HarpException` if an item is not
        a `Call` (no request was sent), and `RequestRefused` if the dispatcher refused (the message names the invalid
        call). Any other `CommunicationError` means that there was no reply: the jobs may have been submitted. Spec:
        docs/client-api.md, HarpCaller and Request ids.
        """
        found: list[protocol.Call] = []
        for call in calls:
            if not isinstance(call, Call):
                raise HarpException(f"calls[{len(found)}]: expected a harp.Call, got {call!r}")
            found.append(call._request)
        with_id = sum(call.request_id is not None for call in found)
        if any(call.secrets for call in found):
            yield from self._ask_for_secrets()
        if not (with_id or self._keep_alive or self._supports_many):
            yield from self._ask()
        in_parts = with_id or self._keep_alive or self._supports_many
        job_ids: list[str] = []
        try:
            for request in protocol.submit_in_parts(found) if in_parts else found:
                if with_id and with_id == len(found):
                    reply = yield from self._request_repeatedly(request)
                else:
                    reply = yield from self._request(request, "request_id" if with_id else None)
                job_ids += reply.job_ids if in_parts else [reply.job_id]
        except HarpException as error:
            if job_ids:
                error.add_note(f"calls[0] to calls[{len(job_ids) - 1}] were submitted, as {job_ids[0]} and later jobs")
            raise
        return [self.job(job_id) for job_id in job_ids]

    def _count_jobs(
        self, filter: str = "", by: str | Sequence[str] = "state", *, most: int = protocol.MAX_COUNTED
    ) -> Steps[JobCounts]:
        """Return the numbers of jobs that match a filter, by ``state``, ``host`` or other keys, at most `most` each.

        Raises `HarpException` if an argument is invalid, `AccessDenied` if the client may not list jobs, and
        `NotSupported` if the dispatcher is too old. Spec: docs/client-api.md, Lists.
        """
        request = _valid(lambda: protocol.CountJobs(filter, (by,) if isinstance(by, str) else tuple(by), most))
        try:
            counts: JobCounts = yield from self._request(request, "counts of jobs")
        except HarpException as error:
            raise explain_refusal(error, "counts of jobs") from error.__cause__
        return counts

    def _send_plain(self, req: dict[str, Any]) -> Steps[dict[str, Any]]:
        """Send a request that you compose yourself and return the reply; the first line if there are several.

        ``"harpcaller": 1`` is added to the request when it is absent. An ``error`` in the reply is not raised; but a
        request without a form in JSON raises `HarpException`, and a reply that is missing or not an object
        `CommunicationError`. Spec: docs/client-api.md, HarpCaller.
        """
        if not isinstance(req, dict):
            raise HarpException(f"request: expected a dict, got {req!r}")
        auth = {} if self._token is None else {"auth": {"token": self._token.value}}
        line = values.encode_line({"harpcaller": protocol.VERSION, **auth, **req}, "the request")
        conn = yield from self._open(self._deadline())
        if _waits_for_end(req):
            conn.deadline = None
        try:
            reply: dict[str, Any] = loads((yield from conn.exchange(line)), MAX_LINE_DEPTH)
            check(isinstance(reply, dict), "expected an object")
        except ValueError as error:
            raise conn.error("reply", error) from error
        finally:
            yield conn.close()
        return reply

    def _connect(self) -> Steps[C]:
        """Return a new connection, for one request. Spec: docs/client-api.md, HarpCaller."""
        conn = yield from self._open(self._deadline())
        conn.deadline = None
        return conn

    def _prepared(self, conn: C) -> C:
        """Return a new connection, prepared for TLS and a token."""
        if self._tls is not None:
            conn.make_context = partial(self._make_context, self._tls)  # not this object: the pool must not refer to it
        if self._token is not None:
            conn.confidential = "token"
        return conn

    def _open(self, deadline: Deadline | None, confidential: str | None = None) -> Steps[C]:
        conn = self._connection()
        conn.deadline = deadline
        conn.confidential = conn.confidential or confidential
        yield conn.connect()
        return conn

    def _deadline(self) -> Deadline | None:
        """Return until when a request that begins now must be answered."""
        seconds = self._request_timeout
        return None if seconds is None else Deadline.after(seconds, self._now())

    def _request(self, request: Request, feature: str | None = None) -> Steps[Any]:
        """Send a request and return its reply, which is of the kind that `MAY_FOLLOW` lists; raise a refusal.

        If legacy dispatchers lack a feature, its name is in the error for a close without a reply.
        """
        if getattr(request, "start_within", None) is not None:
            feature = "start_within"
        elif feature is None and self._token is not None and not self._pool.granted:
            feature = "tokens"
        try:
            reply, _ = yield from self._send(request)
        except CommunicationError as error:
            if feature is None or not closed_without_reply(error):
                raise
            raise unsupported_by_peer(error, feature) from error
        if isinstance(reply, Refused):
            raise refusal_of(reply)
        return reply

    def _request_repeatedly(self, request: Request) -> Steps[Any]:
        """Send a request, again after each interruption, and return its reply. All its calls have request ids.

        It is sent again only to a dispatcher that has answered the question: a legacy dispatcher has no request ids.
        After an hour it is not sent again: dispatchers delete request ids.
        """
        policy = ReconnectPolicy(self._reconnect, self._on_outage)
        deadline = self._now() + _REPEAT_SECONDS
        supports_many, must_ask = self._supports_many, False
        has_secrets = bool(getattr(request, "secrets", None))
        while True:
            try:
                if must_ask and has_secrets:
                    yield from self._ask_for_secrets(policy)
                    must_ask = False
                elif must_ask:
                    yield from self._send_question(policy)
                    supports_many, must_ask = True, False
                reply, _ = yield from self._send(request, policy)
            except CommunicationError as interruption:
                if isinstance(interruption, RequestRefused) and interruption.type not in _TEMPORARY_REFUSALS:
                    raise  # the refusal of the question
                if closed_without_reply(interruption) and not supports_many and (must_ask or not policy):
                    raise unsupported_by_peer(interruption, "request_id") from interruption
                error: HarpException = interruption
            else:
                if not isinstance(reply, Refused):
                    return reply
                error = refusal_of(reply)
                if policy.attempts and reply.type in ACCESS_REFUSALS:
                    error.add_note("the submission was repeated: an earlier request may have become a job")
                if not policy.attempts or reply.type not in _TEMPORARY_REFUSALS:
                    raise error
            if self._now() >= deadline:
                raise error
            yield self._sleep(policy.next_pause(error, self._now()))
            must_ask = has_secrets or not self._supports_many

    def _send(
        self,
        request: Request,
        policy: ReconnectPolicy | None = None,
        *,
        is_question: bool = False,
        until: Deadline | None = None,
    ) -> Steps[tuple[Any, bytes]]:
        """Send a request once and return the reply and its line. If the request waits for a result, it has a policy.

        `until` is an earlier deadline than `request_timeout` sets, and the only one for the reply to a request that
        waits.
        """
        pool = self._pool
        to_connect = earlier(self._deadline(), until)
        to_reply = until if getattr(request, "wait", False) else to_connect
        if self._keep_alive is None and not pool.granted and not is_question:
            if self._ask_at is not None:
                yield from self._ask(to_connect, policy)
            else:
                self._ask_at = self._now()
        keep_alive = pool.granted or (self._keep_alive is True and policy is None) or (is_question and pool.enabled)
        confidential = "secret value" if getattr(request, "secrets", None) else None
        pooled = pool.get(self._now()) if keep_alive else None
        if pooled is not None and confidential and not pooled.is_private():
            pooled.close_threadsafe()
            raise pooled.not_private(confidential)
        conn = pooled or (yield from self._open(to_connect, confidential))
        granted = None
        try:
            conn.deadline = to_reply
            if policy is not None:
                policy.connected(self._now())
            try:
                line = yield from conn.exchange(self._encode(request, keep_alive, is_first=pooled is None))
            except CommunicationError as error:
                is_late = to_reply is not None and self._now() >= to_reply.at
                if is_late or not keep_alive or (is_question and pooled is None):
                    raise
                if not is_question:
                    self._raise_unless_repeatable(error, request, reused=pooled is not None)
                conn.deadline = to_connect
                yield conn.connect()
                conn.deadline = to_reply
                line = yield from conn.exchange(self._encode(request, keep_alive, is_first=True))
            try:
                reply = _parse_reply(request, line)
                if pooled is not None and _refuses_connection(reply):
                    conn.deadline = to_connect
                    yield conn.connect()
                    conn.deadline = to_reply
                    line = yield from conn.exchange(self._encode(request, keep_alive, is_first=True))
                    reply = _parse_reply(request, line)
            except ValueError as error:
                raise conn.error("reply", error) from error
            if keep_alive:
                granted = protocol.parse_keep_alive(line)
        finally:
            if not pool.put(conn, granted, self._now()):
                yield conn.close()
        return reply, line

    def _encode(self, request: Request, keep_alive: bool, is_first: bool) -> bytes:
        """Return the line of a request; the first one of a connection has the token."""
        token = self._token.value if is_first and self._token is not None else None
        return protocol.encode_request(request, keep_alive, token)

    def _ask(self, until: Deadline | None = None, policy: ReconnectPolicy | None = None) -> Steps[None]:
        """Ask whether the dispatcher is a legacy one, if it is time to. The connection then waits in the pool."""
        now = self._now()
        if self._ask_at is None or now >= self._ask_at:
            self._ask_at = now + _ASK_AGAIN
            try:
                yield from self._send_question(policy, until)
            except CommunicationError:  # usually, the request will fail in the same way
                if until is not None and self._now() >= until.at:
                    raise

    def _send_question(self, policy: ReconnectPolicy | None = None, until: Deadline | None = None) -> Steps[None]:
        yield from self._send(SubmitMany(()), policy, is_question=True, until=until)
        self._supports_many = True

    def _ask_for_secrets(self, policy: ReconnectPolicy | None = None) -> Steps[None]:
        """Raise `CommunicationError` unless the dispatcher can encrypt secret values; the question has none.

        It is asked before each request with secret values: the dispatcher may have been replaced, or lost its keys.
        """
        try:
            reply, _ = yield from self._send(SubmitMany((), True), policy, is_question=True)
        except CommunicationError as error:
            if self._supports_many or not closed_without_reply(error):
                raise
            raise unsupported_by_peer(error, "secret values, so none was sent") from error
        if isinstance(reply, Refused):
            raise refusal_of(replace(reply, message=f"{reply.message}; no secret value was sent"))
        self._supports_many = True

    def _raise_unless_repeatable(self, error: CommunicationError, request: Request, reused: bool) -> None:
        """Raise the error of a keep-alive request that got no reply, unless it may be sent on a new connection."""
        if reused and not isinstance(request, (protocol.Call, SubmitMany, Cancel)):
            return
        if not reused and closed_without_reply(error):
            if not self._pool.granted:
                raise unsupported_by_peer(error, "keep_alive=True") from error.__cause__
            self._pool.granted = self._supports_many = False  # it may have been replaced by a legacy one
        raise mark_ambiguous(error, reused) from error.__cause__


def _refuses_connection(reply: protocol.Reply) -> bool:
    """Return whether a request was refused only because of its connection: nothing was done."""
    return isinstance(reply, Refused) and reply.type == "auth_error" and reply.retry_after == 0


def _waits_for_end(req: Mapping[str, Any]) -> bool:
    """Return whether a dispatcher replies to a request when a job has ended, or its processes have."""
    waits = req.get("wait", "get_result" in req) is not False
    return "follow_stream" in req or (waits and ("get_result" in req or "cancel" in req))


def _parse_reply(request: Request, line: bytes) -> Any:
    """Return the reply to a request. Raise `ProtocolError` for a line that does not answer it."""
    reply = protocol.decode_reply(line, request)
    match reply:
        case protocol.NoResult():
            check(not getattr(request, "wait", False), "no result, although the request waits for one")
        case protocol.Details(details):
            check(isinstance(details.get("why"), str), "details.why: expected a string")
        case protocol.WasCancelled(_, dict(stop)):
            check(isinstance(stop.get("state"), str), "stop.state: expected a string")
        case protocol.JobsListed() | protocol.HostsListed() | protocol.QueuesListed():
            return parse_items(reply)
        case protocol.JobsCounted():
            return parse_counts(reply)
    return reply


def list_request(
    kind: Callable[..., ListRequest], text: str, limit: int | None, cursor: str | None, **options: bool
) -> ListRequest:
    """Return the first request of a list. Raise `HarpException` if an argument is invalid."""
    if limit is not None and not is_count(limit):
        raise HarpException(f"limit: expected an integer of at least 0, got {limit!r}")
    return _valid(lambda: kind(text, cursor=cursor, **options))


def _valid(make: Callable[[], T]) -> T:
    """Return a request. Raise `HarpException` if one of its values is invalid."""
    try:
        return make()
    except ValueError as error:
        raise HarpException(str(error)) from error


class ServerBase(Generic[P]):
    """A host of a dispatcher, with the options of further jobs."""

    _procedure_class: type[P]

    def __init__(self, dispatcher: CallerBase[Any, Any, Any], hostname: str) -> None:
        self._dispatcher = dispatcher
        self._hostname = values.check_name("host", hostname)
        self._options: Mapping[str, Any] = {}

    def __getattr__(self, procedure: str) -> P:
        """Return the procedure of this name on the host."""
        if procedure.startswith("_"):
            raise values.missing_attribute(procedure, self)
        return self._procedure_class(self._dispatcher, self, procedure)

    def __call__(self, /, **kwargs: Unpack[JobOptions]) -> Self:
        """Set options of further jobs and return this object; the others stay as they are, None unsets one.

        `queue` is the name of the queue to wait in, a dict; `concurrency`, which needs it, how many of its jobs may run
        at once, from 1; `timeout` the seconds above 0 between two messages of the job, `max_exec_time` those that it
        may run; `start_within` the seconds, from 0, for which a start that certainly did not happen is tried again;
        `info` any JSON value, which `RemoteCall.info` returns; `request_id` a text of up to 200 characters, for one
        job: a submission with the same one is the same job. Raises `HarpException` if an option is unknown or invalid.
        Spec: docs/client-api.md, RemoteServer and Request ids.
        """
        self._options = {**self._options, **values.check_options(kwargs)}
        return self

    def __str__(self) -> str:
        return self._hostname

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._hostname} by {self._dispatcher!r}>"


class ProcedureBase(Generic[J]):
    """A procedure on a host."""

    def __init__(self, dispatcher: CallerBase[Any, Any, J], server: ServerBase[Any], procedure: str) -> None:
        self._dispatcher = dispatcher
        self._server = server
        self._procedure = values.check_name("procedure", procedure)

    def _submit(self, /, *args: Any, **kwargs: Any) -> Steps[J]:
        """Submit a job with positional or named arguments, any JSON values. It is on stable storage when this returns.

        Raises `HarpException` for both kinds of arguments, for arguments that JSON cannot represent, and for
        `concurrency` without `queue`; `RequestRefused` if the dispatcher refused; another `CommunicationError` if there
        was no reply: it is unknown whether the job was submitted. With the option `request_id`, the request is sent
        again first. Spec: docs/client-api.md, RemoteProcedure and Request ids.
        """
        dispatcher, server, arguments = self._dispatcher, self._server, values.encode_arguments(args, kwargs)
        request = values.job_request(server._hostname, self._procedure, arguments, server._options)
        if request.secrets:
            yield from dispatcher._ask_for_secrets()
        submit = dispatcher._request if request.request_id is None else dispatcher._request_repeatedly
        reply: protocol.Submitted = yield from submit(request)
        return dispatcher._job_class(dispatcher, reply.job_id)

    def host(self) -> str:
        """Return the name of the host. Spec: docs/client-api.md, RemoteProcedure."""
        return self._server._hostname

    def procedure(self) -> str:
        """Return the name of the procedure. Spec: docs/client-api.md, RemoteProcedure."""
        return self._procedure

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._procedure} on {self._server} by {self._dispatcher!r}>"


class JobBase(Generic[R]):
    """A job of a dispatcher, and its final facts."""

    #: Returns the iterator over the items of a reader.
    _stream: Callable[[StreamReader], R]

    def __init__(self, dispatcher: CallerBase[Any, Any, Any], job_id: str) -> None:
        self._dispatcher = dispatcher
        self._id = values.check_name("job_id", job_id)
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
        """Return the job's stored and future records until it ends; continues after an interruption.

        The first record is number `since`, counted from 0, or begins the newest `recent`; default: ``recent=0``.
        Items are records; with `numbered`, pairs of number and record; with `timed`, number, time of creation (Unix
        seconds with fractions) and record. Raises `HarpException` if a number is invalid, or both are given. Spec:
        docs/client-api.md, RemoteCall.
        """
        return self._stream(self._reader(FollowStream, since, recent, numbered, timed))

    def stream(
        self, since: int | None = None, recent: int | None = None, numbered: bool = False, *, timed: bool = False
    ) -> R:
        """Return the stored records, by default all; arguments as of `follow`. Spec: docs/client-api.md, RemoteCall."""
        return self._stream(self._reader(ReadStream, since, recent, numbered, timed))

    def _reader(
        self, kind: type[StreamRequest], since: int | None, recent: int | None, numbered: bool, timed: bool
    ) -> StreamReader:
        try:
            request = kind(self._id, since, recent, bool(timed))
        except ValueError as error:
            raise HarpException(str(error)) from error
        dispatcher = self._dispatcher
        reader = StreamReader(request, numbered, dispatcher._reconnect, self._store_end, dispatcher._on_outage)
        reader.deadline = dispatcher._deadline
        reader.token = None if dispatcher._token is None else dispatcher._token.value
        return reader

    def _sent_reader(self, numbered: bool) -> StreamReader:
        """Return the reader of records that the caller has requested."""
        # Its replies include all replies to follow_stream.
        reader = self._reader(ReadStream, None, None, numbered, False)
        reader.has_request = False
        reader.waits = True
        return reader

    def _store_end(self, reply: protocol.Reply, line: bytes) -> None:
        """Store the end that a reply reports."""
        if isinstance(reply, End):
            self._end_line = line

    def _result(self, wait: bool = False, *, timeout: float | None = None) -> Steps[Any]:
        """Return how the job ended; errors are returned, not raised. With `wait`, wait for it, without a time limit.

        With `timeout`, wait for at most that many seconds, from 0; then the value is `CALL_NOT_FINISHED`. `wait` has no
        meaning then. Raises `HarpException` if `timeout` is invalid.

        The value is the procedure's result, `CALL_NOT_FINISHED` (not with `wait` alone), `CALL_CANCELLED`, or an
        instance of `RemoteException`, `RemoteError` or `CommunicationError`. The last, which includes `RequestRefused`,
        does not describe the job: try again later. Spec: docs/client-api.md, RemoteCall.
        """
        dispatcher, until = self._dispatcher, None
        if timeout is not None:
            if not (timeout == 0 or is_seconds(timeout)):
                raise HarpException(f"timeout: expected seconds of at least 0, got {timeout!r}")
            wait = timeout > 0
            until = Deadline.after(timeout, dispatcher._now()) if wait else None
        request = GetResult(self._id, bool(wait))
        policy = ReconnectPolicy(dispatcher._reconnect if wait else 0.0, dispatcher._on_outage)
        reply = None if self._end_line is None else _parse_reply(request, self._end_line)
        try:
            while reply is None:
                try:
                    reply, line = yield from dispatcher._send(request, policy if wait else None, until=until)
                    if isinstance(reply, Refused):
                        raise refusal_of(reply)
                    self._store_end(reply, line)
                except (CommunicationError, RemoteError) as error:
                    reply, now = None, dispatcher._now()
                    if until is not None and now >= until.at and policy.is_interruption(error):
                        return values.CALL_NOT_FINISHED
                    pause = policy.next_pause(error, now)
                    if until is not None and now + pause >= until.at:
                        yield dispatcher._sleep(until.at - now)
                        return values.CALL_NOT_FINISHED
                    yield dispatcher._sleep(pause)
        except (CommunicationError, RemoteError) as error:
            return error.with_traceback(None)
        return values.CALL_NOT_FINISHED if isinstance(reply, protocol.NoResult) else values.outcome_of(reply)

    def _get(self, wait: bool = True, *, timeout: float | None = None) -> Steps[Any]:
        """Return the procedure's result, or `CALL_NOT_FINISHED` (not with `wait` alone); every other end is raised.

        With `timeout`, wait for at most that many seconds, from 0; then return `CALL_NOT_FINISHED`. `wait` has no
        meaning then. Raises `RemoteException` if the procedure raised an exception, `RemoteError` if the job failed,
        was stopped or does not exist, `CancelledException` if the job was cancelled, and `CommunicationError` if there
        was no valid reply. Spec: docs/client-api.md, RemoteCall.
        """
        outcome = yield from self._result(wait, timeout=timeout)
        if isinstance(outcome, HarpException):
            raise outcome
        if outcome is values.CALL_CANCELLED:
            raise CancelledException(f"job {self._id} was cancelled")
        return outcome

    def _cancel(self, *, wait: bool = False) -> Steps[bool]:
        """Cancel the job; return whether it was running or waiting and is now stopped.

        With `wait`, wait without a time limit until its host has confirmed that the processes have ended. Otherwise
        `RemoteError` is raised: ``stop_failed`` when processes survive (the message names them) or the host was
        declared lost; ``stop_unknown`` when the host's daemon cannot confirm the stop. Its `data` is the dispatcher's
        report. Spec: docs/client-api.md, RemoteCall.
        """
        feature = "cancel(wait=True)" if wait else None
        reply: protocol.WasCancelled = yield from self._dispatcher._request(Cancel(self._id, bool(wait)), feature)
        if reply.stop is not None and reply.stop["state"] != "confirmed":
            raise _stop_error(self._id, reply.stop)
        return reply.cancelled

    def _details(self) -> Steps[dict[str, Any]]:
        """Return the job's queue, host, call, stop report and end. Spec: docs/client-api.md, Details."""
        request = protocol.GetDetails(self._id)
        reply: protocol.Details = yield from self._dispatcher._request(request, "details() and why()")
        return dict(reply.details)

    def _why(self) -> Steps[str]:
        """Return one sentence that explains why the job waits, runs or ended. Spec: docs/client-api.md, Details."""
        details = yield from self._details()
        return str(details["why"])

    def _host(self) -> Steps[str]:
        """Return the name of the job's host. Spec: docs/client-api.md, RemoteCall."""
        return (yield from self._status()).host

    def _procedure(self) -> Steps[str]:
        """Return the name of the procedure. Spec: docs/client-api.md, RemoteCall."""
        return (yield from self._status()).procedure

    def _args(self) -> Steps[Any]:
        """Return the procedure's arguments: a list, or a dict by name. Spec: docs/client-api.md, RemoteCall."""
        return (yield from self._status()).arguments

    def _info(self) -> Steps[Any]:
        """Return the job's option `info`, None when it is not set. Spec: docs/client-api.md, RemoteCall."""
        return (yield from self._status()).info

    def _submit_time(self) -> Steps[int]:
        """Return when the job was submitted, in Unix seconds. Spec: docs/client-api.md, RemoteCall."""
        return (yield from self._status()).submit

    def _start_time(self) -> Steps[int | None]:
        """Return when the job started, in Unix seconds; None: it has not. Spec: docs/client-api.md, RemoteCall."""
        return (yield from self._status("start", "end")).start

    def _end_time(self) -> Steps[int | None]:
        """Return when the job ended, in Unix seconds; None: it has not ended. Spec: docs/client-api.md, RemoteCall."""
        return (yield from self._status("end")).end

    def _status(self, *times: str) -> Steps[protocol.Status]:
        """Return the job's status; a stored one if it has one of these times, or if none is named."""
        request, line = protocol.GetStatus(self._id), self._status_line
        if line is not None:
            status: protocol.Status = _parse_reply(request, line)
            if not times or any(getattr(status, time) is not None for time in times):
                return status
        reply, line = yield from self._dispatcher._send(request)
        if isinstance(reply, Refused):
            raise refusal_of(reply)
        self._status_line, status = line, reply
        return status


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
