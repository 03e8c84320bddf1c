"""The synchronous client of a dispatcher: `HarpCaller` and its hosts, procedures and jobs.

Threads may share these objects: each request has its own connection. Inspection of an object (repr, copy, pickle,
hasattr) sends no request: names that begin with an underscore are neither hosts nor procedures. The methods are those
of `harp._core.operations`, which has their docstrings.
"""

from __future__ import annotations

from harp._core.lists import HostSummary, JobSummary, QueueSummary
from harp._core.operations import CallerBase, JobBase, ProcedureBase, ServerBase, list_request
from harp._core.streams import StreamReader
from harp._net.sockets import dispatcher_context
from harp._net.sync import JSONConnection, ListIterator, Stream, SyncPeer, method
from harp.protocol.dispatcher import ListHosts, ListJobs, ListQueues

__all__ = ["HarpCaller", "RemoteCall", "RemoteProcedure", "RemoteServer"]


class RemoteCall(JobBase["RemoteCall.StreamIterator"]):
    """A job of a `HarpCaller`: its status, its records, its end. Its final values are requested once.

    Methods that send a request raise `CommunicationError` if there was no valid reply, `RequestRefused` if the
    dispatcher refused, and `RemoteError` if the job does not exist (``invalid_jobid``); `result` returns all of them.
    Spec: docs/client-api.md, RemoteCall.
    """

    class StreamIterator(Stream):
        """The records of a job, from a connection on which ``follow_stream`` or ``read_stream`` was sent.

        With `numbered`, items are pairs of a record's number and the record. Only iterators from `RemoteCall.follow`
        continue after an interruption. `close`, or the end of ``with``, closes the connection. Iterating raises
        `CommunicationError` if the stream was interrupted, contains invalid data or was refused, and `RemoteError` if
        the job does not exist. Spec: docs/client-api.md, RemoteCall.StreamIterator.
        """

        def __init__(self, remote_call: RemoteCall, conn: JSONConnection, numbered: bool = False) -> None:
            super().__init__(conn, remote_call._sent_reader(numbered))

    result = method(JobBase._result)
    get = method(JobBase._get)
    cancel = method(JobBase._cancel)
    details = method(JobBase._details)
    why = method(JobBase._why)
    host = method(JobBase._host)
    procedure = method(JobBase._procedure)
    args = method(JobBase._args)
    info = method(JobBase._info)
    submit_time = method(JobBase._submit_time)
    start_time = method(JobBase._start_time)
    end_time = method(JobBase._end_time)

    def _stream(self, reader: StreamReader) -> RemoteCall.StreamIterator:
        iterator = self.StreamIterator(self, self._dispatcher.connect())
        iterator._reader = reader
        iterator.send_request()
        return iterator


class RemoteProcedure(ProcedureBase[RemoteCall]):
    """A procedure on a host; calling it submits a job. Spec: docs/client-api.md, RemoteProcedure."""

    __call__ = method(ProcedureBase._submit)


class RemoteServer(ServerBase[RemoteProcedure]):
    """A host and the options of further jobs; any attribute is a procedure. Spec: docs/client-api.md, RemoteServer."""

    _procedure_class = RemoteProcedure


class HarpCaller(SyncPeer, CallerBase[JSONConnection, RemoteServer, RemoteCall]):
    """A dispatcher, by its name or address and its port, or as ``unix:/PATH``.

    Any attribute is a host: ``rpc.web01`` is ``rpc.host("web01")``, and so is ``rpc("web01")``. For names that begin
    with an underscore, or that are methods of this class, use `host`. `reconnect` is how many seconds an interrupted
    reader (`RemoteCall.follow`, `result` and `get` with `wait`) tries to reach the dispatcher again; 0, None or False:
    it does not. `keep_alive` is whether connections stay open for further requests; None: if the dispatcher supports
    it. `request_timeout` is how many seconds a request may take that does not wait for a job; None: any time. `token`
    proves who the program is; it is sent over TLS, Unix sockets and to loopback addresses only, and no pickle has it.
    `ca_file`, a PEM file with authorities, turns on TLS, as do `certfile` and `keyfile`, the client's certificate; with
    `tls=True`, the system's authorities are used; `tls` may also be an `ssl.SSLContext`. No job is
    submitted twice; with the option `request_id`, the client can determine after a lost reply whether it was submitted.

    As a context manager it closes its waiting connections at the end, and can be used afterwards, too. Raises
    `HarpException` if an argument is invalid. Spec: docs/client-api.md, HarpCaller and Keep-alive connections.
    """

    _server_class = RemoteServer
    _job_class = RemoteCall

    submit_many = method(CallerBase._submit_many)
    request = method(CallerBase._send_plain)
    count_jobs = method(CallerBase._count_jobs)

    def jobs(
        self, filter: str = "", *, oldest_first: bool = False, limit: int | None = None, cursor: str | None = None
    ) -> ListIterator[JobSummary]:
        """Return an iterator over the jobs that match a filter, the newest first; ``""`` matches every job.

        `filter` is text in the search language, such as ``"state:bad host:web*"``. At most `limit` jobs are returned;
        None: all. Pages are requested as they are needed. `cursor`, that of an earlier iterator with the same filter
        and order, continues its list. The iterator has `all`, `close` and `cursor`.

        Raises `HarpException` if an argument is invalid. Iterating also does if the dispatcher rejects the filter or
        the cursor; `AccessDenied` if the client may not list jobs; `NotSupported` if the dispatcher is too old; and
        another `CommunicationError` if there was no valid reply. Spec: docs/client-api.md, Lists.
        """
        request = list_request(ListJobs, filter, limit, cursor, oldest_first=bool(oldest_first))
        return ListIterator(self, request, limit)

    def hosts(
        self, text: str = "", *, limit: int | None = None, cursor: str | None = None
    ) -> ListIterator[HostSummary]:
        """Return an iterator over the hosts with this text in their name; arguments and errors are as of `jobs`.

        Spec: docs/client-api.md, Lists.
        """
        return ListIterator(self, list_request(ListHosts, text, limit, cursor), limit)

    def queues(
        self, text: str = "", *, limit: int | None = None, cursor: str | None = None
    ) -> ListIterator[QueueSummary]:
        """Return an iterator over the queues with this text in their name; arguments and errors are as of `jobs`.

        Spec: docs/client-api.md, Lists.
        """
        return ListIterator(self, list_request(ListQueues, text, limit, cursor), limit)

    connect = method(CallerBase._connect)
    _make_context = staticmethod(dispatcher_context)

    def _connection(self) -> JSONConnection:
        return self._prepared(JSONConnection._unconnected(self._endpoint.host, self._endpoint.port))
