"""The client for asyncio: `harp.client` and `harp.direct` with ``await`` and ``async for``, same names, same behaviour.

Methods that send no request are plain functions: `AsyncHarpCaller.host`, `AsyncRemoteCall.id`, and
`AsyncRemoteCall.follow`, whose iterator connects when its first item is requested. When a task is cancelled, its
connection is closed.

Spec: docs/client-api.md, asyncio.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import Any

from harp._core.harpd import DirectProcedureBase, DirectServerBase
from harp._core.lists import HostSummary, JobSummary, QueueSummary
from harp._core.operations import CallerBase, JobBase, ProcedureBase, ServerBase, list_request
from harp._core.streams import StreamReader
from harp._net.aio import (
    AsyncIteration,
    AsyncJSONConnection,
    AsyncJSONSSLConnection,
    AsyncListIterator,
    AsyncPeer,
    AsyncStream,
    method,
)
from harp._net.sockets import dispatcher_context
from harp.protocol.dispatcher import ListHosts, ListJobs, ListQueues

__all__ = [
    "AsyncHarpCaller",
    "AsyncHarpProcedure",
    "AsyncHarpServer",
    "AsyncHarpStreamIterator",
    "AsyncJSONConnection",
    "AsyncJSONSSLConnection",
    "AsyncRemoteCall",
    "AsyncRemoteProcedure",
    "AsyncRemoteServer",
]


class AsyncRemoteCall(JobBase["AsyncRemoteCall.StreamIterator"]):
    """See `harp.RemoteCall`."""

    class StreamIterator(AsyncStream):
        """See `harp.RemoteCall.StreamIterator`."""

        def __init__(self, remote_call: AsyncRemoteCall, conn: AsyncJSONConnection, numbered: bool = False) -> None:
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

    def _stream(self, reader: StreamReader) -> AsyncRemoteCall.StreamIterator:
        iterator = self.StreamIterator(self, self._dispatcher._connection())
        iterator._reader = reader
        return iterator


class AsyncRemoteProcedure(ProcedureBase[AsyncRemoteCall]):
    """See `harp.RemoteProcedure`."""

    __call__ = method(ProcedureBase._submit)


class AsyncRemoteServer(ServerBase[AsyncRemoteProcedure]):
    """See `harp.RemoteServer`."""

    _procedure_class = AsyncRemoteProcedure


class AsyncHarpCaller(AsyncPeer, CallerBase[AsyncJSONConnection, AsyncRemoteServer, AsyncRemoteCall]):
    """See `harp.HarpCaller`."""

    _server_class = AsyncRemoteServer
    _job_class = AsyncRemoteCall

    submit_many = method(CallerBase._submit_many)
    request = method(CallerBase._send_plain)
    count_jobs = method(CallerBase._count_jobs)

    def jobs(
        self, filter: str = "", *, oldest_first: bool = False, limit: int | None = None, cursor: str | None = None
    ) -> AsyncListIterator[JobSummary]:
        """See `harp.HarpCaller.jobs`."""
        request = list_request(ListJobs, filter, limit, cursor, oldest_first=bool(oldest_first))
        return AsyncListIterator(self, request, limit)

    def hosts(
        self, text: str = "", *, limit: int | None = None, cursor: str | None = None
    ) -> AsyncListIterator[HostSummary]:
        """See `harp.HarpCaller.hosts`."""
        return AsyncListIterator(self, list_request(ListHosts, text, limit, cursor), limit)

    def queues(
        self, text: str = "", *, limit: int | None = None, cursor: str | None = None
    ) -> AsyncListIterator[QueueSummary]:
        """See `harp.HarpCaller.queues`."""
        return AsyncListIterator(self, list_request(ListQueues, text, limit, cursor), limit)

    connect = method(CallerBase._connect)
    _make_context = staticmethod(dispatcher_context)

    def _connection(self) -> AsyncJSONConnection:
        return self._prepared(AsyncJSONConnection(self._endpoint.host, self._endpoint.port))


class AsyncHarpStreamIterator(AsyncIteration):
    """See `harp.HarpStreamIterator`; the original is an asynchronous iterable."""

    def __init__(self, orig_iterator: AsyncIterable[Any]) -> None:
        self._items = aiter(orig_iterator)

    async def __anext__(self) -> Any:
        return await anext(self._items)

    async def close(self) -> None:
        """End the iteration early, and close the original iterator if it has `close` or `aclose`."""
        close = getattr(self._items, "close", None) or getattr(self._items, "aclose", None)
        if close is not None:
            await close()


class AsyncHarpProcedure(DirectProcedureBase["AsyncHarpServer"]):
    """See `harp.HarpProcedure`; a streamed result is an `AsyncHarpStreamIterator`."""

    __call__ = method(DirectProcedureBase._call)

    def _iterator(self, *stream: Any) -> AsyncHarpStreamIterator:
        return AsyncHarpStreamIterator(AsyncStream(*stream))


class AsyncHarpServer(AsyncPeer, DirectServerBase[AsyncJSONConnection, AsyncHarpProcedure]):
    """See `harp.HarpServer`."""

    _procedure_class = AsyncHarpProcedure

    async def _open(self) -> AsyncJSONConnection:
        conn = AsyncJSONSSLConnection(self._endpoint.host, self._endpoint.port, self._ca_file, **self._tls)
        return await conn.__aenter__()
