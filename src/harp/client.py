"""The synchronous client: `HarpCaller` for the dispatcher, `HarpServer` for harpd itself, and what they give out.

Thin shells over `harp.operations`: here is only the talking. Objects may be shared by threads; each request has its
own connection. Looking at an object (repr, copy, pickle, hasattr) never sends anything: names that begin with an
underscore are no hosts and no procedures.
"""

from __future__ import annotations

import os
import threading
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar, Unpack

from harp.connection import Endpoint, JSONConnection, JSONSSLConnection
from harp.errors import CommunicationError
from harp.operations import (
    Answer,
    Credentials,
    DirectReader,
    Job,
    JobOptions,
    Options,
    Reader,
    Steps,
    StreamReader,
    answered,
    direct_request,
    name_of,
    plain_reply,
    plain_request,
    public,
    submit,
)
from harp.protocol.dispatcher import FollowStream, ReadStream, Request, encode_request

__all__ = [
    "HarpCaller",
    "HarpProcedure",
    "HarpServer",
    "HarpStreamIterator",
    "RemoteCall",
    "RemoteProcedure",
    "RemoteServer",
]

T = TypeVar("T")


class HarpCaller:
    """A dispatcher.

    Any attribute is a host: ``rpc.web01`` is ``rpc.host("web01")``. So is a call: ``rpc("web01")``. Names that begin
    with an underscore, or that are methods of this class, go by `host` or the call.

    Args:
        host: name or address of the dispatcher.
        port: its port. Raises `HarpException` when one of them won't do.

    Spec: docs/client-api.md, HarpCaller.
    """

    def __init__(self, host: str, port: int = 3502) -> None:
        self._endpoint = Endpoint(host, port)

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
                except CommunicationError as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(answer)
        except StopIteration as done:
            outcome: T = done.value
            return outcome

    def _ask(self, request: Request) -> Answer:
        with self.connect() as conn:
            line = conn.ask(encode_request(request))
            with conn.endpoint.mapped("reply"):
                return answered(request, line)

    def __repr__(self) -> str:
        return f"HarpCaller({self._endpoint.host!r}, {self._endpoint.port})"


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


class _Iteration(Iterator[Any]):
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


class _Stream(_Iteration):
    """Items read from a connection, which is closed after the last, at an error, and when nobody holds this."""

    _closed = True

    def __init__(self, conn: JSONConnection, reader: Reader) -> None:
        self._conn = conn
        self._reader = reader
        self._turn = threading.Lock()
        self._closed = False

    def __next__(self) -> Any:
        with self._turn:
            while not self._closed:
                try:
                    line = self._conn.receive_line()
                    with self._conn.endpoint.mapped("reading"):
                        items = self._reader.read(line)
                except BaseException:
                    self.close()
                    raise
                if self._reader.finished:
                    self.close()
                for item in items:
                    return item
            raise StopIteration

    def close(self) -> None:
        """End the iteration early and close its connection; nothing happens when it has ended."""
        if not self._closed:
            self._closed = True
            self._conn.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


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

    class StreamIterator(_Stream):
        """The records of a job. Leaving early, by `close` or ``with``, closes the connection.

        Args:
            remote_call: the job.
            conn: a connection over which ``follow_stream`` or ``read_stream`` was asked.
            numbered: whether items are pairs of a record's number and the record.

        Iterating raises:
            CommunicationError: the stream broke off, or went wrong.
            RemoteError: the dispatcher refused the request.

        Spec: docs/client-api.md, RemoteCall.StreamIterator.
        """

        def __init__(self, remote_call: RemoteCall, conn: JSONConnection, numbered: bool = False) -> None:
            # Replies to read_stream are those to follow_stream and one more.
            super().__init__(conn, StreamReader(remote_call._job, ReadStream(remote_call.id()), numbered))

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

    def cancel(self) -> bool:
        """Cancel the job.

        Returns:
            Whether it was running or waiting and is now stopped.

        Spec: docs/client-api.md, RemoteCall.
        """
        return self._dispatcher._run(self._job.cancel())

    def follow(
        self, since: int | None = None, recent: int | None = None, numbered: bool = False
    ) -> RemoteCall.StreamIterator:
        """The job's records, those to come too, until it ends.

        Args:
            since: number of the first record wanted, from 0.
            recent: how many of the newest records to begin with, instead of `since`; neither: 0.
            numbered: give pairs of a record's number and the record.

        Raises:
            HarpException: a number won't do, or both are given.

        Spec: docs/client-api.md, RemoteCall.
        """
        return self._stream(self._job.stream(True, since, recent), numbered)

    def stream(
        self, since: int | None = None, recent: int | None = None, numbered: bool = False
    ) -> RemoteCall.StreamIterator:
        """The job's records collected so far; does not wait for the job.

        Args:
            since: number of the first record wanted, from 0; the default.
            recent: how many of the newest records to give, instead of `since`.
            numbered: give pairs of a record's number and the record.

        Raises:
            HarpException: a number won't do, or both are given.

        Spec: docs/client-api.md, RemoteCall.
        """
        return self._stream(self._job.stream(False, since, recent), numbered)

    def _stream(self, request: FollowStream | ReadStream, numbered: bool) -> RemoteCall.StreamIterator:
        conn = self._dispatcher.connect()
        iterator = self.StreamIterator(self, conn, numbered)
        iterator._reader = StreamReader(self._job, request, numbered)
        try:
            conn.send_line(encode_request(request))
        except BaseException:
            conn.close()
            raise
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


class HarpServer:
    """A harpd, called without a dispatcher. Any attribute is a procedure on it.

    Args:
        host: name or address of the host.
        user: name to authenticate as.
        password: the user's password. It is in a pickle of this object, never in its repr.
        port: harpd's port.
        ca_file: PEM file with the authorities that the server's certificate must come from, and it must be for
            `host`; None verifies neither.

    Raises:
        HarpException: `host`, `port`, `user` or `password` won't do.

    Spec: docs/client-api.md, HarpServer.
    """

    def __init__(
        self,
        host: str,
        user: str,
        password: str,
        port: int = 4306,
        ca_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self._endpoint = Endpoint(host, port)
        self._credentials = Credentials(user, password)
        self._ca_file = ca_file

    def __getattr__(self, procedure: str) -> HarpProcedure:
        """The procedure of this name."""
        return HarpProcedure(self, public(procedure, self))

    def _connect(self) -> JSONConnection:
        return JSONSSLConnection(self._endpoint.host, self._endpoint.port, self._ca_file)

    def __repr__(self) -> str:
        where, who = self._endpoint, self._credentials
        return f"HarpServer({where.host!r}, {who!r}, port={where.port}, ca_file={self._ca_file!r})"


class HarpProcedure:
    """A procedure on a harpd; calling it runs it.

    Args:
        server: the harpd.
        name: name of the procedure; here it may begin with an underscore.

    Spec: docs/client-api.md, HarpProcedure.
    """

    def __init__(self, server: HarpServer, name: str) -> None:
        self._server = server
        self._name = name_of("procedure", name)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the procedure and wait for its result, however long that takes.

        Args:
            *args: positional arguments, any JSON values.
            **kwargs: named arguments, instead of positional ones.

        Returns:
            The result; of a streaming procedure a `HarpStreamIterator`, as soon as it runs.

        Raises:
            HarpException: both kinds of arguments, or one that JSON can't carry; nothing was sent.
            RemoteException: the procedure raised.
            RemoteError: harpd refused the call or cut it short.
            CommunicationError: harpd can't be reached, is not who it should be, or broke off.

        Spec: docs/client-api.md, HarpProcedure.
        """
        line = direct_request(self._name, args, kwargs, self._server._credentials)
        conn = self._server._connect()
        reader = DirectReader()
        try:
            answer = conn.ask(line)
            with conn.endpoint.mapped("reply"):
                streams = reader.streams(answer)
        except BaseException:
            conn.close()
            raise
        stream = _Stream(conn, reader)
        return HarpStreamIterator(stream) if streams else next(stream).value

    def __repr__(self) -> str:
        return f"<HarpProcedure {self._name} on {self._server!r}>"


class HarpStreamIterator(_Iteration):
    """The records of a streaming procedure, then its end result as a `Result`.

    Leaving early, by `close` or ``with``, closes the connection, which cancels the call.

    Args:
        orig_iterator: what gives the items.

    Iterating raises:
        RemoteException: the procedure raised.
        RemoteError: the call was cut short.
        CommunicationError: harpd broke off.

    Spec: docs/client-api.md, HarpStreamIterator.
    """

    def __init__(self, orig_iterator: Iterable[Any]) -> None:
        self._items = iter(orig_iterator)

    def __next__(self) -> Any:
        return next(self._items)

    def close(self) -> None:
        """End the iteration early; closes what it iterates over, if that can be closed."""
        close = getattr(self._items, "close", None)
        if close is not None:
            close()
