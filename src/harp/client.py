"""The synchronous client of a dispatcher: `HarpCaller` and its hosts, procedures and jobs.

Threads may share these objects: each request has a connection to itself. Looking at an object (repr, copy, pickle,
hasattr) sends nothing: names that begin with an underscore are neither hosts nor procedures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from harp._core.calls import Call, JobOptions, missing_attribute
from harp._core.operations import CallerBase, JobBase, ProcedureBase, ServerBase
from harp._core.streams import StreamReader
from harp._net.sync import JSONConnection, Stream, SyncPeer, run
from harp.protocol.requests import ReadStream

__all__ = ["HarpCaller", "RemoteCall", "RemoteProcedure", "RemoteServer"]


class HarpCaller(SyncPeer, CallerBase[JSONConnection]):
    """A dispatcher.

    Any attribute is a host: ``rpc.web01`` is ``rpc.host("web01")``, and so is ``rpc("web01")``. For names that begin
    with an underscore, or that are methods of this class, use `host`.

    Args:
        host: name or address of the dispatcher.
        port: its port.
        reconnect: how many seconds an interrupted reader tries to reach the dispatcher again; 0, None or False: it
            does not. Readers are `RemoteCall.follow`, and `result` and `get` with `wait`.
        keep_alive: whether connections stay open for further requests. None: if the dispatcher supports it, which it is
            asked before the second request. True: it does; legacy dispatchers do not. False: each request has a
            connection of its own. A connection carries one request at a time, and no job is ever submitted twice.

    As a context manager the object closes its waiting connections at the end; so does the end of the object. Requests
    are possible afterwards, too.

    Raises:
        HarpException: `host`, `port` or `reconnect` is invalid.

    Spec: docs/client-api.md, HarpCaller.
    """

    def __getattr__(self, host: str) -> RemoteServer:
        """Return the host of this name, without options."""
        if host.startswith("_"):
            raise missing_attribute(host, self)
        return RemoteServer(self, host)

    def __call__(self, host: str, **kwargs: Unpack[JobOptions]) -> RemoteServer:
        """Return a host, like `host`: ``rpc("web01", timeout=5)``."""
        return self.host(host, **kwargs)

    def host(self, host: str, **kwargs: Unpack[JobOptions]) -> RemoteServer:
        """Return a host to call procedures on.

        Args:
            host: the host's name in the dispatcher's registry.
            **kwargs: options of the jobs, as for `RemoteServer.__call__`.

        Raises:
            HarpException: an option is unknown or invalid.

        Spec: docs/client-api.md, HarpCaller.
        """
        return RemoteServer(self, host)(**kwargs)

    def job(self, job_id: str) -> RemoteCall:
        """Return a job that was submitted earlier. Sends nothing.

        Args:
            job_id: the value of `RemoteCall.id`.

        Spec: docs/client-api.md, HarpCaller.
        """
        return RemoteCall(self, job_id)

    def submit_many(self, calls: Iterable[Call]) -> list[RemoteCall]:
        """Submit jobs with one request, all or none. They are on stable storage when this returns.

        Over 10,000 calls or 16 MiB are sent as several requests, one after the other. Then only each request is all or
        none: if one fails, the calls before it are submitted, those in it and after it are not, and a note of the
        exception says how many.

        Args:
            calls: the calls.

        Returns:
            The jobs, in the order of the calls.

        Raises:
            HarpException: an item is not a `Call`; nothing was sent.
            RemoteError: the dispatcher refused; its message names the invalid call. No job was stored.
            CommunicationError: there was no reply. It is unknown whether the jobs were submitted; they are not sent
                again.

        Spec: docs/client-api.md, HarpCaller.
        """
        return [RemoteCall(self, job_id) for job_id in run(self._submit_many(calls))]

    def connect(self) -> JSONConnection:
        """Return a new connection to the dispatcher, for one request. Raise `CommunicationError`.

        Spec: docs/client-api.md, HarpCaller.
        """
        return JSONConnection(self._endpoint.host, self._endpoint.port)

    _open = connect

    def request(self, req: dict[str, Any]) -> dict[str, Any]:
        """Send a request that you compose yourself and return the reply; the first line if there are several.

        Args:
            req: the request; ``"harpcaller": 1`` is added when it is absent.

        Returns:
            The reply as a dict; an ``error`` in it is not raised.

        Raises:
            HarpException: the request has no form in JSON.
            CommunicationError: there was no reply, or it is not an object.

        Spec: docs/client-api.md, HarpCaller.
        """
        return run(self._send_plain(req))


class RemoteServer(ServerBase[HarpCaller]):
    """A host, with the options of further jobs. Any attribute is a procedure on it.

    Args:
        dispatcher: the dispatcher.
        hostname: the host's name in the dispatcher's registry.

    Spec: docs/client-api.md, RemoteServer.
    """

    def __getattr__(self, procedure: str) -> RemoteProcedure:
        """Return the procedure of this name on the host."""
        if procedure.startswith("_"):
            raise missing_attribute(procedure, self)
        return RemoteProcedure(self._dispatcher, self, procedure)


class RemoteProcedure(ProcedureBase[HarpCaller, RemoteServer]):
    """A procedure on a host; calling it submits a job.

    Args:
        dispatcher: the dispatcher.
        server: the host, with the job's options.
        procedure: name of the procedure; here it may begin with an underscore.

    Spec: docs/client-api.md, RemoteProcedure.
    """

    def __call__(self, /, *args: Any, **kwargs: Any) -> RemoteCall:
        """Submit a job. It is on stable storage when this returns; it may not have started.

        Args:
            *args: positional arguments, any JSON values.
            **kwargs: named arguments, instead of positional ones.

        Raises:
            HarpException: both kinds of arguments, one that JSON cannot represent, or `concurrency` without `queue`;
                nothing was sent.
            RemoteError: the dispatcher refused the job.
            CommunicationError: there was no reply. It is unknown whether the job was submitted; it is not sent again.

        Spec: docs/client-api.md, RemoteProcedure.
        """
        return RemoteCall(self._dispatcher, run(self._submit(args, kwargs)).job_id)


class RemoteCall(JobBase[HarpCaller, "RemoteCall.StreamIterator"]):
    """A job: its status, its records, its end. Final facts are requested once.

    Args:
        dispatcher: the dispatcher.
        job_id: the job's identifier.

    Every method that sends a request raises these errors, except `result`, which returns them:

    Raises:
        CommunicationError: there was no reply, or an invalid one.
        RemoteError: the dispatcher refused, for example ``invalid_jobid``.

    Spec: docs/client-api.md, RemoteCall.
    """

    class StreamIterator(Stream):
        """The records of a job. `close`, or the end of ``with``, closes the connection.

        Args:
            remote_call: the job.
            conn: a connection on which ``follow_stream`` or ``read_stream`` was sent.
            numbered: whether items are pairs of a record's number and the record.

        An iterator from `RemoteCall.follow` connects again after an interruption; one made by this constructor does
        not.

        Iterating raises:
            CommunicationError: the stream was interrupted, or contains invalid data.
            RemoteError: the dispatcher refused the request.

        Spec: docs/client-api.md, RemoteCall.StreamIterator.
        """

        def __init__(self, remote_call: RemoteCall, conn: JSONConnection, numbered: bool = False) -> None:
            # The replies to read_stream include all replies to follow_stream.
            reader = remote_call._reader(ReadStream, None, None, numbered, False)
            reader.take_request()  # the caller has sent it
            super().__init__(conn, reader)

    def result(self, wait: bool = False) -> Any:
        """Return how the job ended; errors are returned, not raised.

        Args:
            wait: wait for the job to end, without a time limit.

        Returns:
            The procedure's result, `CALL_NOT_FINISHED` (only without `wait`), `CALL_CANCELLED`, or an instance
            of `RemoteException`, `RemoteError` or `CommunicationError`. The last, and a refusal of the request, say
            nothing about the job: try again later.

        Spec: docs/client-api.md, RemoteCall.
        """
        return run(self._result(wait))

    def get(self, wait: bool = True) -> Any:
        """Return the procedure's result; every other end is raised.

        Args:
            wait: wait for the job to end, without a time limit.

        Returns:
            The procedure's result, or `CALL_NOT_FINISHED` (only without `wait`).

        Raises:
            RemoteException: the procedure raised an exception.
            RemoteError: the job failed or was stopped, or the request was refused.
            CancelledException: the job was cancelled.
            CommunicationError: there was no reply, or an invalid one.

        Spec: docs/client-api.md, RemoteCall.
        """
        return run(self._get(wait))

    def cancel(self, *, wait: bool = False) -> bool:
        """Cancel the job.

        Args:
            wait: wait until its host has confirmed that the processes have ended, without a time limit.

        Returns:
            Whether it was running or waiting and is now stopped.

        Raises:
            RemoteError: with `wait`, ``stop_failed`` when processes survive (the message names them) or the host was
                declared lost; ``stop_unknown`` when the host's daemon cannot confirm the stop. `data` is the
                dispatcher's report.

        Spec: docs/client-api.md, RemoteCall.
        """
        return run(self._cancel(wait))

    def details(self) -> dict[str, Any]:
        """Return all that is known about the job: queue, host, call, stop report, end.

        Spec: docs/client-api.md, Details.
        """
        return run(self._details())

    def why(self) -> str:
        """Return one sentence that explains why the job waits, runs or ended.

        Spec: docs/client-api.md, Details.
        """
        return str(run(self._details())["why"])

    def _stream(self, reader: StreamReader) -> RemoteCall.StreamIterator:
        iterator = self.StreamIterator(self, self._dispatcher.connect())
        iterator._reader = reader
        iterator.send_request()
        return iterator

    def host(self) -> str:
        """Return the name of the job's host. Spec: docs/client-api.md, RemoteCall."""
        return run(self._status()).host

    def procedure(self) -> str:
        """Return the name of the procedure. Spec: docs/client-api.md, RemoteCall."""
        return run(self._status()).procedure

    def args(self) -> Any:
        """Return the procedure's arguments: a list, or a dict of named ones. Spec: docs/client-api.md, RemoteCall."""
        return run(self._status()).arguments

    def info(self) -> Any:
        """Return the job's option `info`, None when it is not set. Spec: docs/client-api.md, RemoteCall."""
        return run(self._status()).info

    def submit_time(self) -> int:
        """Return when the job was submitted, in Unix seconds. Spec: docs/client-api.md, RemoteCall."""
        return run(self._status()).submit

    def start_time(self) -> int | None:
        """Return when the job started, in Unix seconds; None: not yet, or it ended before it could start.

        Spec: docs/client-api.md, RemoteCall.
        """
        return run(self._status("start", "end")).start

    def end_time(self) -> int | None:
        """Return when the job ended, in Unix seconds; None: not yet. Spec: docs/client-api.md, RemoteCall."""
        return run(self._status("end")).end
