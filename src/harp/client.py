"""The synchronous client of a dispatcher: `HarpCaller`, and what it gives out.

Thin shells over `harp._core.operations`: here is only the talking. Objects may be shared by threads; each request has a
connection to itself. Looking at an object (repr, copy, pickle, hasattr) never sends anything: names that begin with an
underscore are no hosts and no procedures.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from harp._core.keep_alive import Keeping
from harp._core.operations import (
    Answer,
    Call,
    Job,
    JobOptions,
    Options,
    Steps,
    answered,
    name_of,
    passes,
    plain_reply,
    plain_request,
    public,
    submit,
    submit_many,
    waits,
)
from harp._core.retry import Patience, seconds_to_reconnect
from harp._core.streams import StreamReader
from harp._net.connection import Endpoint, JSONConnection
from harp._net.iterators import Stream
from harp.errors import CommunicationError, HarpException
from harp.protocol.requests import FollowStream, ReadStream, Request, encode_request

__all__ = ["HarpCaller", "RemoteCall", "RemoteProcedure", "RemoteServer"]

T = TypeVar("T")


class HarpCaller:
    """A dispatcher.

    Any attribute is a host: ``rpc.web01`` is ``rpc.host("web01")``. So is a call: ``rpc("web01")``. Names that begin
    with an underscore, or that are methods of this class, go by `host` or the call.

    Args:
        host: name or address of the dispatcher.
        port: its port.
        reconnect: for how many seconds in a row a reader that was interrupted tries to reach the dispatcher again;
            0, None or False: it does not. Readers are `RemoteCall.follow`, `result` and `get` with `wait`.
        keep: whether connections are kept for further requests, which needs a dispatcher of ours. Each carries one
            at a time, and no job is ever submitted twice. As a context manager the object closes, at its end, those
            that wait; so does the end of the object. Requests are possible after it, too.

    Raises:
        HarpException: `host`, `port` or `reconnect` won't do.

    Spec: docs/client-api.md, HarpCaller.
    """

    def __init__(self, host: str, port: int = 3502, *, reconnect: float | None = 300.0, keep: bool = False) -> None:
        self._endpoint = Endpoint(host, port)
        self._reconnect = seconds_to_reconnect(reconnect)
        self._keeping = Keeping(bool(keep), JSONConnection.close)

    def __getattr__(self, host: str) -> RemoteServer:
        """The host of this name, without options."""
        return RemoteServer(self, public(host, self))

    def __call__(self, host: str, **kwargs: Unpack[JobOptions]) -> RemoteServer:
        """`host`, as a call: ``rpc("web01", timeout=5)``."""
        return self.host(host, **kwargs)

    def host(self, host: str, **kwargs: Unpack[JobOptions]) -> RemoteServer:
        """A host to call procedures on.

        Args:
            host: the host's name in the dispatcher's registry.
            **kwargs: options of the jobs, as for `RemoteServer.__call__`.

        Raises:
            HarpException: an option is unknown or its value won't do.

        Spec: docs/client-api.md, HarpCaller.
        """
        return RemoteServer(self, host)(**kwargs)

    def job(self, job_id: str) -> RemoteCall:
        """A job that was submitted earlier. Nothing is asked yet.

        Args:
            job_id: what `RemoteCall.id` gave.

        Spec: docs/client-api.md, HarpCaller.
        """
        return RemoteCall(self, job_id)

    def submit_many(self, calls: Iterable[Call]) -> list[RemoteCall]:
        """Submit jobs with one request, all or none: durable when this returns.

        Args:
            calls: what to call; their line of the protocol may be as long as the dispatcher's `request_line` allows.

        Returns:
            The jobs, in the order of the calls.

        Raises:
            HarpException: what was given are no calls; nothing was sent.
            RemoteError: the dispatcher refused; its message names the call at fault. No job was stored.
            CommunicationError: no reply came. Whether the jobs were submitted is then unknown; they are not sent again.

        Spec: docs/client-api.md, HarpCaller.
        """
        job_ids = self._run(submit_many(calls))
        return [RemoteCall(self, job_id) for job_id in job_ids]

    def connect(self) -> JSONConnection:
        """A new connection to the dispatcher, for one request. Raises `CommunicationError`.

        Spec: docs/client-api.md, HarpCaller.
        """
        return JSONConnection(self._endpoint.host, self._endpoint.port)

    def request(self, req: dict[str, Any]) -> dict[str, Any]:
        """Send a request of one's own and return the reply, its first line if there are several.

        Args:
            req: the request; ``"harpcaller": 1`` is added when it is absent.

        Returns:
            The reply as it came; an ``error`` in it is not raised.

        Raises:
            HarpException: the request has no form in JSON.
            CommunicationError: no reply came, or none that is an object.

        Spec: docs/client-api.md, HarpCaller.
        """
        line = plain_request(req)
        with self.connect() as conn:
            reply = conn.ask(line)
            with conn.endpoint.mapped("reply"):
                return plain_reply(reply)

    def _run(self, steps: Steps[T]) -> T:
        """Drive an operation: ask what it wants to know until it has its outcome."""
        try:
            request = next(steps)
            while True:
                try:
                    answer = self._ask(request)
                except HarpException as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(answer)
        except StopIteration as done:
            outcome: T = done.value
            return outcome

    def _ask(self, request: Request) -> Answer:
        patience = Patience(self._reconnect if waits(request) else 0.0)
        while True:
            try:
                return self._ask_once(request, patience)
            except HarpException as error:
                pause = patience.pause(error, time.monotonic())
            time.sleep(pause)

    def _ask_once(self, request: Request, patience: Patience) -> Answer:
        keeps = self._keeping.asks(request)
        encoded = encode_request(request, keeps)
        kept = self._keeping.take(time.monotonic()) if keeps else None
        conn = kept or self.connect()
        rests = False
        try:
            patience.connected(time.monotonic())
            try:
                line = conn.ask(encoded)
            except CommunicationError as error:
                if not keeps:
                    raise
                self._keeping.ask_anew(error, request, kept is not None)
                conn.connect()
                line = conn.ask(encoded)
            with conn.endpoint.mapped("reply"):
                answer = passes(answered(request, line), patience)
            rests = keeps and self._keeping.put(conn, line, time.monotonic())
        finally:
            if not rests:
                conn.close()
        return answer

    def __repr__(self) -> str:
        keep = ", keep=True" if self._keeping.keep else ""
        return f"HarpCaller({self._endpoint.host!r}, {self._endpoint.port}{keep})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for conn in self._keeping.drain():
            conn.close()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has connections of its own.
        return {**self.__dict__, "_keeping": Keeping(self._keeping.keep, JSONConnection.close)}


class RemoteServer:
    """A host, with the options of the jobs to come. Any attribute is a procedure on it.

    Args:
        dispatcher: the dispatcher.
        hostname: the host's name in the dispatcher's registry.

    Spec: docs/client-api.md, RemoteServer.
    """

    def __init__(self, dispatcher: HarpCaller, hostname: str) -> None:
        self._dispatcher = dispatcher
        self._hostname = name_of("host", hostname)
        self._options = Options()

    def __getattr__(self, procedure: str) -> RemoteProcedure:
        """The procedure of this name on the host."""
        name = public(procedure, self)  # first: a copy in the making has no attributes yet
        return RemoteProcedure(self._dispatcher, self, name)

    def __call__(self, /, **kwargs: Unpack[JobOptions]) -> Self:
        """Set options of the jobs to come; those not named stay as they are, None unsets one.

        Args:
            queue: name of the queue to wait in, a dict.
            concurrency: how many jobs of the queue may run at once, from 1; needs `queue`.
            timeout: seconds allowed between two messages of the job, above 0.
            max_exec_time: seconds the job may run, above 0.
            info: any JSON value, given back by `RemoteCall.info`.

        Returns:
            This object.

        Raises:
            HarpException: an option is unknown or its value won't do.

        Spec: docs/client-api.md, RemoteServer.
        """
        self._options = self._options.changed(kwargs)
        return self

    def __str__(self) -> str:
        return self._hostname

    def __repr__(self) -> str:
        return f"<RemoteServer {self._hostname} by {self._dispatcher!r}>"


class RemoteProcedure:
    """A procedure on a host; calling it submits a job.

    Args:
        dispatcher: the dispatcher.
        server: the host, with the job's options.
        procedure: name of the procedure; here it may begin with an underscore.

    Spec: docs/client-api.md, RemoteProcedure.
    """

    def __init__(self, dispatcher: HarpCaller, server: RemoteServer, procedure: str) -> None:
        self._dispatcher = dispatcher
        self._server = server
        self._procedure = name_of("procedure", procedure)

    def __call__(self, /, *args: Any, **kwargs: Any) -> RemoteCall:
        """Submit a job. It is durable when this returns; it may not have started.

        Args:
            *args: positional arguments, any JSON values.
            **kwargs: named arguments, instead of positional ones.

        Raises:
            HarpException: both kinds of arguments, one that JSON can't carry, or `concurrency` without `queue`;
                nothing was sent.
            RemoteError: the dispatcher refused the job.
            CommunicationError: no reply came. Whether the job was submitted is then unknown; it is not sent again.

        Spec: docs/client-api.md, RemoteProcedure.
        """
        steps = submit(str(self._server), self._procedure, args, kwargs, self._server._options)
        return RemoteCall(self._dispatcher, self._dispatcher._run(steps))

    def host(self) -> str:
        """Name of the host. Spec: docs/client-api.md, RemoteProcedure."""
        return str(self._server)

    def procedure(self) -> str:
        """Name of the procedure. Spec: docs/client-api.md, RemoteProcedure."""
        return self._procedure

    def __repr__(self) -> str:
        return f"<RemoteProcedure {self._procedure} on {self._server} by {self._dispatcher!r}>"


class RemoteCall:
    """A job: its status, its records, its end. What is final is asked for once.

    Args:
        dispatcher: the dispatcher.
        job_id: the job's identifier.

    Every method that asks the dispatcher raises, but for `result`, which returns them:

    Raises:
        CommunicationError: no reply came, or none of the protocol.
        RemoteError: the dispatcher refused, for example ``invalid_jobid``.

    Spec: docs/client-api.md, RemoteCall.
    """

    class StreamIterator(Stream):
        """The records of a job. Leaving early, by `close` or ``with``, closes the connection.

        Args:
            remote_call: the job.
            conn: a connection over which ``follow_stream`` or ``read_stream`` was asked.
            numbered: whether items are pairs of a record's number and the record.

        One that `RemoteCall.follow` gave connects again when it is interrupted; one made by hand does not.

        Iterating raises:
            CommunicationError: the stream broke off, or went wrong.
            RemoteError: the dispatcher refused the request.

        Spec: docs/client-api.md, RemoteCall.StreamIterator.
        """

        def __init__(self, remote_call: RemoteCall, conn: JSONConnection, numbered: bool = False) -> None:
            # Replies to read_stream are those to follow_stream and one more.
            asked = ReadStream(remote_call.id())
            super().__init__(conn, StreamReader(remote_call._job, asked, numbered, asked=True))

    def __init__(self, dispatcher: HarpCaller, job_id: str) -> None:
        self._dispatcher = dispatcher
        self._job = Job(job_id)

    def id(self) -> str:
        """The job's identifier, for `HarpCaller.job`. Spec: docs/client-api.md, RemoteCall."""
        return self._job.id

    def result(self, wait: bool = False) -> Any:
        """The job's end, however it ended; errors are returned, not raised.

        Args:
            wait: wait for the job to end, however long that takes.

        Returns:
            What the procedure returned, `CALL_NOT_FINISHED` (only without `wait`), `CALL_CANCELLED`, or an instance
            of `RemoteException`, `RemoteError` or `CommunicationError`. The last, and a refusal of the request, say
            nothing about the job: ask again later.

        Spec: docs/client-api.md, RemoteCall.
        """
        return self._dispatcher._run(self._job.result(wait))

    def get(self, wait: bool = True) -> Any:
        """What the procedure returned; every other end is raised.

        Args:
            wait: wait for the job to end, however long that takes.

        Returns:
            What the procedure returned, or `CALL_NOT_FINISHED` (only without `wait`).

        Raises:
            RemoteException: the procedure raised.
            RemoteError: the job could not be carried out, was cut short, or the request was refused.
            CancelledException: the job was cancelled.
            CommunicationError: the dispatcher gave no reply.

        Spec: docs/client-api.md, RemoteCall.
        """
        return self._dispatcher._run(self._job.get(wait))

    def cancel(self, *, wait: bool = False) -> bool:
        """Cancel the job.

        Args:
            wait: wait until its host has confirmed that the processes are gone, however long that takes.

        Returns:
            Whether it was running or waiting and is now stopped.

        Raises:
            RemoteError: with `wait`, ``stop_failed`` when processes survive, the message names them, or the host was
                given up; ``stop_unknown`` when the host's daemon can't confirm it. `data` is what the dispatcher told.

        Spec: docs/client-api.md, RemoteCall.
        """
        return self._dispatcher._run(self._job.cancel(wait))

    def details(self) -> dict[str, Any]:
        """All that is known of the job: what it waits for, its host and call, how it was stopped, how it ended.

        Spec: docs/client-api.md, Details.
        """
        return self._dispatcher._run(self._job.details())

    def why(self) -> str:
        """One sentence, with facts, that says why the job waits, runs or ended.

        Spec: docs/client-api.md, Details.
        """
        return self._dispatcher._run(self._job.why())

    def follow(
        self, since: int | None = None, recent: int | None = None, numbered: bool = False, *, timed: bool = False
    ) -> RemoteCall.StreamIterator:
        """The job's records, those to come too, until it ends; goes on where it was when it is interrupted.

        Args:
            since: number of the first record wanted, from 0.
            recent: how many of the newest records to begin with, instead of `since`; neither: 0.
            numbered: give pairs of a record's number and the record.
            timed: give a record's number, the time it was made (Unix seconds with fractions) and the record.

        Raises:
            HarpException: a number won't do, or both are given.

        Spec: docs/client-api.md, RemoteCall.
        """
        return self._stream(self._job.stream(True, since, recent, timed), numbered)

    def stream(
        self, since: int | None = None, recent: int | None = None, numbered: bool = False, *, timed: bool = False
    ) -> RemoteCall.StreamIterator:
        """The job's records collected so far; does not wait for the job.

        Args:
            since: number of the first record wanted, from 0; the default.
            recent: how many of the newest records to give, instead of `since`.
            numbered: give pairs of a record's number and the record.
            timed: give a record's number, the time it was made (Unix seconds with fractions) and the record.

        Raises:
            HarpException: a number won't do, or both are given.

        Spec: docs/client-api.md, RemoteCall.
        """
        return self._stream(self._job.stream(False, since, recent, timed), numbered)

    def _stream(self, request: FollowStream | ReadStream, numbered: bool) -> RemoteCall.StreamIterator:
        iterator = self.StreamIterator(self, self._dispatcher.connect(), numbered)
        iterator._reader = StreamReader(self._job, request, numbered, self._dispatcher._reconnect)
        iterator._begin()
        return iterator

    def host(self) -> str:
        """Name of the job's host. Spec: docs/client-api.md, RemoteCall."""
        return self._dispatcher._run(self._job.submitted()).host

    def procedure(self) -> str:
        """Name of the procedure called. Spec: docs/client-api.md, RemoteCall."""
        return self._dispatcher._run(self._job.submitted()).procedure

    def args(self) -> Any:
        """The procedure's arguments: a list, or a dict when they are named. Spec: docs/client-api.md, RemoteCall."""
        return self._dispatcher._run(self._job.submitted()).arguments

    def info(self) -> Any:
        """The option `info` of the job, None when it had none. Spec: docs/client-api.md, RemoteCall."""
        return self._dispatcher._run(self._job.submitted()).info

    def submit_time(self) -> int:
        """When the job was submitted, in Unix seconds. Spec: docs/client-api.md, RemoteCall."""
        return self._dispatcher._run(self._job.submitted()).submit

    def start_time(self) -> int | None:
        """When the job started, in Unix seconds; None: not yet, or it ended without having started.

        Spec: docs/client-api.md, RemoteCall.
        """
        return self._dispatcher._run(self._job.started()).start

    def end_time(self) -> int | None:
        """When the job ended, in Unix seconds; None: not yet. Spec: docs/client-api.md, RemoteCall."""
        return self._dispatcher._run(self._job.ended()).end

    def __repr__(self) -> str:
        return f"<RemoteCall {self._job.id} by {self._dispatcher!r}>"
