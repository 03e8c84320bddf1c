"""The client for asyncio: `harp.client` and `harp.direct` with ``await`` and ``async for``, same names, same behaviour.

Methods that send nothing are plain: `AsyncHarpCaller.host`, `AsyncRemoteCall.id`, and `AsyncRemoteCall.follow`, whose
iterator connects when its first item is requested. When a task is cancelled, its connection is closed.

Spec: docs/client-api.md, asyncio.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from typing import Any, Unpack

from harp._core.calls import Call, JobOptions, missing_attribute
from harp._core.harpd import DirectProcedureBase, DirectServerBase
from harp._core.operations import CallerBase, JobBase, ProcedureBase, ServerBase
from harp._core.streams import StreamReader
from harp._net.aio import AsyncIteration, AsyncJSONConnection, AsyncJSONSSLConnection, AsyncPeer, AsyncStream, run
from harp.protocol.requests import ReadStream

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


class AsyncHarpCaller(AsyncPeer, CallerBase[AsyncJSONConnection]):
    """See `harp.HarpCaller`."""

    def __getattr__(self, host: str) -> AsyncRemoteServer:
        """Return the host of this name, without options."""
        if host.startswith("_"):
            raise missing_attribute(host, self)
        return AsyncRemoteServer(self, host)

    def __call__(self, host: str, **kwargs: Unpack[JobOptions]) -> AsyncRemoteServer:
        """See `harp.HarpCaller.__call__`."""
        return self.host(host, **kwargs)

    def host(self, host: str, **kwargs: Unpack[JobOptions]) -> AsyncRemoteServer:
        """See `harp.HarpCaller.host`."""
        return AsyncRemoteServer(self, host)(**kwargs)

    def job(self, job_id: str) -> AsyncRemoteCall:
        """See `harp.HarpCaller.job`."""
        return AsyncRemoteCall(self, job_id)

    async def submit_many(self, calls: Iterable[Call]) -> list[AsyncRemoteCall]:
        """See `harp.HarpCaller.submit_many`."""
        return [AsyncRemoteCall(self, job_id) for job_id in await run(self._submit_many(calls))]

    async def connect(self) -> AsyncJSONConnection:
        """See `harp.HarpCaller.connect`."""
        conn = self._connection()
        await conn.connect()
        return conn

    _open = connect

    def _connection(self) -> AsyncJSONConnection:
        return AsyncJSONConnection(self._endpoint.host, self._endpoint.port)

    async def request(self, req: dict[str, Any]) -> dict[str, Any]:
        """See `harp.HarpCaller.request`."""
        return await run(self._send_plain(req))


class AsyncRemoteServer(ServerBase[AsyncHarpCaller]):
    """See `harp.RemoteServer`."""

    def __getattr__(self, procedure: str) -> AsyncRemoteProcedure:
        """Return the procedure of this name on the host."""
        if procedure.startswith("_"):
            raise missing_attribute(procedure, self)
        return AsyncRemoteProcedure(self._dispatcher, self, procedure)


class AsyncRemoteProcedure(ProcedureBase[AsyncHarpCaller, AsyncRemoteServer]):
    """See `harp.RemoteProcedure`."""

    async def __call__(self, /, *args: Any, **kwargs: Any) -> AsyncRemoteCall:
        """See `harp.RemoteProcedure.__call__`."""
        return AsyncRemoteCall(self._dispatcher, (await run(self._submit(args, kwargs))).job_id)


class AsyncRemoteCall(JobBase[AsyncHarpCaller, "AsyncRemoteCall.StreamIterator"]):
    """See `harp.RemoteCall`."""

    class StreamIterator(AsyncStream):
        """See `harp.RemoteCall.StreamIterator`."""

        def __init__(self, remote_call: AsyncRemoteCall, conn: AsyncJSONConnection, numbered: bool = False) -> None:
            # The replies to read_stream include all replies to follow_stream.
            reader = remote_call._reader(ReadStream, None, None, numbered, False)
            reader.take_request()  # the caller has sent it
            super().__init__(conn, reader)

    async def result(self, wait: bool = False) -> Any:
        """See `harp.RemoteCall.result`."""
        return await run(self._result(wait))

    async def get(self, wait: bool = True) -> Any:
        """See `harp.RemoteCall.get`."""
        return await run(self._get(wait))

    async def cancel(self, *, wait: bool = False) -> bool:
        """See `harp.RemoteCall.cancel`."""
        return await run(self._cancel(wait))

    async def details(self) -> dict[str, Any]:
        """See `harp.RemoteCall.details`."""
        return await run(self._details())

    async def why(self) -> str:
        """See `harp.RemoteCall.why`."""
        return str((await run(self._details()))["why"])

    def _stream(self, reader: StreamReader) -> AsyncRemoteCall.StreamIterator:
        iterator = self.StreamIterator(self, self._dispatcher._connection())
        iterator._reader = reader
        return iterator

    async def host(self) -> str:
        """See `harp.RemoteCall.host`."""
        return (await run(self._status())).host

    async def procedure(self) -> str:
        """See `harp.RemoteCall.procedure`."""
        return (await run(self._status())).procedure

    async def args(self) -> Any:
        """See `harp.RemoteCall.args`."""
        return (await run(self._status())).arguments

    async def info(self) -> Any:
        """See `harp.RemoteCall.info`."""
        return (await run(self._status())).info

    async def submit_time(self) -> int:
        """See `harp.RemoteCall.submit_time`."""
        return (await run(self._status())).submit

    async def start_time(self) -> int | None:
        """See `harp.RemoteCall.start_time`."""
        return (await run(self._status("start", "end"))).start

    async def end_time(self) -> int | None:
        """See `harp.RemoteCall.end_time`."""
        return (await run(self._status("end"))).end


class AsyncHarpServer(AsyncPeer, DirectServerBase[AsyncJSONConnection]):
    """See `harp.HarpServer`."""

    def __getattr__(self, procedure: str) -> AsyncHarpProcedure:
        """Return the procedure of this name."""
        if procedure.startswith("_"):
            raise missing_attribute(procedure, self)
        return AsyncHarpProcedure(self, procedure)

    async def _open(self) -> AsyncJSONConnection:
        conn = AsyncJSONSSLConnection(self._endpoint.host, self._endpoint.port, self._ca_file)
        await conn.connect()
        return conn


class AsyncHarpProcedure(DirectProcedureBase[AsyncHarpServer]):
    """See `harp.HarpProcedure`."""

    async def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """See `harp.HarpProcedure.__call__`; a streamed result is an `AsyncHarpStreamIterator`."""
        conn, reader, result = await run(self._server._call(self._request(args, kwargs)))
        if result is not None:
            return result.value
        return AsyncHarpStreamIterator(AsyncStream(conn, reader, self._server._pool))


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
