"""The client for asyncio: `harp.client` with ``await`` and ``async for``, same names, same semantics.

Thin shells over `harp._core.operations`, as their synchronous twins; a test compares the signatures. What asks
nothing of
the network stays a plain method: `AsyncHarpCaller.host`, `AsyncRemoteCall.id`, and `AsyncRemoteCall.follow`, whose
iterator connects when its first item is wanted. When a task is cancelled, its connection is closed.

Spec: docs/client-api.md, asyncio.
"""

from __future__ import annotations

import asyncio
import os
import time
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar, Unpack

from harp._core.connection_pool import Idle
from harp._core.keep_alive import Keeping
from harp._core.operations import (
    Answer,
    Call,
    Credentials,
    Job,
    JobOptions,
    Options,
    Steps,
    answered,
    direct_request,
    name_of,
    passes,
    plain_reply,
    plain_request,
    public,
    submit,
    submit_many,
    surely,
    waits,
)
from harp._core.retry import Patience, seconds_to_reconnect
from harp._core.streams import DirectReader, Reader, StreamReader
from harp._net.aio_connection import AsyncJSONConnection, AsyncJSONSSLConnection
from harp._net.connection import Endpoint
from harp.errors import CommunicationError, HarpException
from harp.protocol.requests import FollowStream, ReadStream, Request, encode_request

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

T = TypeVar("T")


class AsyncHarpCaller:
    """As `harp.HarpCaller`."""

    def __init__(self, host: str, port: int = 3502, *, reconnect: float | None = 300.0, keep: bool = False) -> None:
        self._endpoint = Endpoint(host, port)
        self._reconnect = seconds_to_reconnect(reconnect)
        self._keeping = Keeping(bool(keep), AsyncJSONConnection.abandon)

    def __getattr__(self, host: str) -> AsyncRemoteServer:
        """The host of this name, without options."""
        return AsyncRemoteServer(self, public(host, self))

    def __call__(self, host: str, **kwargs: Unpack[JobOptions]) -> AsyncRemoteServer:
        """As `harp.HarpCaller.__call__`."""
        return self.host(host, **kwargs)

    def host(self, host: str, **kwargs: Unpack[JobOptions]) -> AsyncRemoteServer:
        """As `harp.HarpCaller.host`."""
        return AsyncRemoteServer(self, host)(**kwargs)

    def job(self, job_id: str) -> AsyncRemoteCall:
        """As `harp.HarpCaller.job`."""
        return AsyncRemoteCall(self, job_id)

    async def submit_many(self, calls: Iterable[Call]) -> list[AsyncRemoteCall]:
        """As `harp.HarpCaller.submit_many`."""
        job_ids = await self._run(submit_many(calls))
        return [AsyncRemoteCall(self, job_id) for job_id in job_ids]

    async def connect(self) -> AsyncJSONConnection:
        """As `harp.HarpCaller.connect`."""
        conn = self._connection()
        await conn.connect()
        return conn

    def _connection(self) -> AsyncJSONConnection:
        return AsyncJSONConnection(self._endpoint.host, self._endpoint.port)

    async def request(self, req: dict[str, Any]) -> dict[str, Any]:
        """As `harp.HarpCaller.request`."""
        line = plain_request(req)
        async with self._connection() as conn:
            reply = await conn.ask(line)
            with conn.endpoint.mapped("reply"):
                return plain_reply(reply)

    async def _run(self, steps: Steps[T]) -> T:
        """Drive an operation: ask what it wants to know until it has its outcome."""
        try:
            request = next(steps)
            while True:
                try:
                    answer = await self._ask(request)
                except HarpException as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(answer)
        except StopIteration as done:
            outcome: T = done.value
            return outcome

    async def _ask(self, request: Request) -> Answer:
        patience = Patience(self._reconnect if waits(request) else 0.0)
        while True:
            try:
                return await self._ask_once(request, patience)
            except HarpException as error:
                pause = patience.pause(error, time.monotonic())
            await asyncio.sleep(pause)

    async def _ask_once(self, request: Request, patience: Patience) -> Answer:
        keeps = self._keeping.asks(request)
        encoded = encode_request(request, keeps)
        kept = self._keeping.take(time.monotonic()) if keeps else None
        conn = kept or self._connection()
        rests = False
        try:
            if kept is None:
                await conn.connect()
            patience.connected(time.monotonic())
            try:
                line = await conn.ask(encoded)
            except CommunicationError as error:
                if not keeps:
                    raise
                self._keeping.ask_anew(error, request, kept is not None)
                await conn.connect()
                line = await conn.ask(encoded)
            with conn.endpoint.mapped("reply"):
                answer = passes(answered(request, line), patience)
            rests = keeps and self._keeping.put(conn, line, time.monotonic())
        finally:
            if rests:
                conn.rest()
            else:
                await conn.close()
        return answer

    def __repr__(self) -> str:
        keep = ", keep=True" if self._keeping.keep else ""
        return f"AsyncHarpCaller({self._endpoint.host!r}, {self._endpoint.port}{keep})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _close_all(self._keeping.drain())

    def __getstate__(self) -> dict[str, Any]:
        # A copy has connections of its own.
        return {**self.__dict__, "_keeping": Keeping(self._keeping.keep, AsyncJSONConnection.abandon)}


class AsyncRemoteServer:
    """As `harp.RemoteServer`."""

    def __init__(self, dispatcher: AsyncHarpCaller, hostname: str) -> None:
        self._dispatcher = dispatcher
        self._hostname = name_of("host", hostname)
        self._options = Options()

    def __getattr__(self, procedure: str) -> AsyncRemoteProcedure:
        """The procedure of this name on the host."""
        name = public(procedure, self)  # first: a copy in the making has no attributes yet
        return AsyncRemoteProcedure(self._dispatcher, self, name)

    def __call__(self, /, **kwargs: Unpack[JobOptions]) -> Self:
        """As `harp.RemoteServer.__call__`."""
        self._options = self._options.changed(kwargs)
        return self

    def __str__(self) -> str:
        return self._hostname

    def __repr__(self) -> str:
        return f"<AsyncRemoteServer {self._hostname} by {self._dispatcher!r}>"


class AsyncRemoteProcedure:
    """As `harp.RemoteProcedure`."""

    def __init__(self, dispatcher: AsyncHarpCaller, server: AsyncRemoteServer, procedure: str) -> None:
        self._dispatcher = dispatcher
        self._server = server
        self._procedure = name_of("procedure", procedure)

    async def __call__(self, /, *args: Any, **kwargs: Any) -> AsyncRemoteCall:
        """As `harp.RemoteProcedure.__call__`."""
        steps = submit(str(self._server), self._procedure, args, kwargs, self._server._options)
        return AsyncRemoteCall(self._dispatcher, await self._dispatcher._run(steps))

    def host(self) -> str:
        """As `harp.RemoteProcedure.host`."""
        return str(self._server)

    def procedure(self) -> str:
        """As `harp.RemoteProcedure.procedure`."""
        return self._procedure

    def __repr__(self) -> str:
        return f"<AsyncRemoteProcedure {self._procedure} on {self._server} by {self._dispatcher!r}>"


class _Iteration(AsyncIterator[Any]):
    """What the iterators share: all items at once, and a context manager that closes."""

    @abstractmethod
    async def close(self) -> None:
        """End the iteration early and close its connection."""

    async def all(self) -> list[Any]:
        """As `harp.RemoteCall.StreamIterator.all`."""
        return [item async for item in self]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} can't be copied or pickled: it reads from a connection")


class _Stream(_Iteration):
    """Items read from a connection, which is closed after the last, at an error, and when nobody holds this."""

    _closed = True

    def __init__(
        self, conn: AsyncJSONConnection, reader: Reader, idle: Idle[AsyncJSONConnection] | None = None
    ) -> None:
        self._conn = conn
        self._reader = reader
        self._idle = idle
        self._turn = asyncio.Lock()
        self._waiting: asyncio.Timeout | None = None
        self._ready: deque[Any] = deque()  # items that came with one before
        self._closed = False

    async def __anext__(self) -> Any:
        async with self._turn:
            while not self._closed:
                if self._ready:
                    return self._ready.popleft()
                try:
                    items = await self._items()
                except BaseException:
                    await self._finish()
                    raise
                if self._reader.finished:
                    await self._finish()
                elif items:
                    self._ready += self._conn.take(self._reader.read_on)
                for item in items:
                    return item
            raise StopAsyncIteration

    async def _items(self) -> tuple[Any, ...]:
        """The items of the next line; none after an interruption and the pause that follows it."""
        try:
            line = await self._line()
            with self._conn.endpoint.mapped("reading"):
                return self._reader.read(line)
        except HarpException as error:
            if self._closed:  # by another task, which wants no more
                return ()
            pause = self._reader.interrupted(error, time.monotonic())
        await self._until_closed(asyncio.sleep(pause))
        return ()

    async def _line(self) -> bytes:
        request = self._reader.request()
        if request is None:
            return await self._conn.receive_line()
        await self._until_closed(self._conn.connect())
        if self._closed:  # before there was a connection to be closed
            await self._conn.close()
        self._reader.connected(time.monotonic())
        return await self._conn.ask(request)

    async def _until_closed(self, waiting: Awaitable[None]) -> None:
        """Wait for something; `close`, by another task, ends that."""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(None) as self._waiting:
                    await waiting
        finally:
            self._waiting = None

    async def close(self) -> None:
        """End the iteration early and close its connection; nothing happens when it has ended.

        A task that waits for an item, or for the dispatcher to come back, is woken: its iteration ends.
        """
        if not self._closed:
            self._closed = True
            if self._waiting is not None:
                self._waiting.reschedule(asyncio.get_running_loop().time())
            await self._conn.close()

    async def _finish(self) -> None:
        """End the iteration after the last line or an error."""
        keep = self._reader.keep
        if self._idle is None or keep is None:
            await self.close()
        elif not self._closed:
            self._closed = True
            self._conn.rest()
            self._idle.put(self._conn, keep, time.monotonic())

    def __del__(self) -> None:
        if not self._closed:
            self._conn.abandon()


class AsyncRemoteCall:
    """As `harp.RemoteCall`."""

    class StreamIterator(_Stream):
        """As `harp.RemoteCall.StreamIterator`."""

        def __init__(self, remote_call: AsyncRemoteCall, conn: AsyncJSONConnection, numbered: bool = False) -> None:
            # Replies to read_stream are those to follow_stream and one more.
            asked = ReadStream(remote_call.id())
            super().__init__(conn, StreamReader(remote_call._job, asked, numbered, asked=True))

    def __init__(self, dispatcher: AsyncHarpCaller, job_id: str) -> None:
        self._dispatcher = dispatcher
        self._job = Job(job_id)

    def id(self) -> str:
        """As `harp.RemoteCall.id`."""
        return self._job.id

    async def result(self, wait: bool = False) -> Any:
        """As `harp.RemoteCall.result`."""
        return await self._dispatcher._run(self._job.result(wait))

    async def get(self, wait: bool = True) -> Any:
        """As `harp.RemoteCall.get`."""
        return await self._dispatcher._run(self._job.get(wait))

    async def cancel(self, *, wait: bool = False) -> bool:
        """As `harp.RemoteCall.cancel`."""
        return await self._dispatcher._run(self._job.cancel(wait))

    async def details(self) -> dict[str, Any]:
        """As `harp.RemoteCall.details`."""
        return await self._dispatcher._run(self._job.details())

    async def why(self) -> str:
        """As `harp.RemoteCall.why`."""
        return await self._dispatcher._run(self._job.why())

    def follow(
        self, since: int | None = None, recent: int | None = None, numbered: bool = False, *, timed: bool = False
    ) -> AsyncRemoteCall.StreamIterator:
        """As `harp.RemoteCall.follow`; asks when the first record is wanted."""
        return self._stream(self._job.stream(True, since, recent, timed), numbered)

    def stream(
        self, since: int | None = None, recent: int | None = None, numbered: bool = False, *, timed: bool = False
    ) -> AsyncRemoteCall.StreamIterator:
        """As `harp.RemoteCall.stream`; asks when the first record is wanted."""
        return self._stream(self._job.stream(False, since, recent, timed), numbered)

    def _stream(self, request: FollowStream | ReadStream, numbered: bool) -> AsyncRemoteCall.StreamIterator:
        iterator = self.StreamIterator(self, self._dispatcher._connection(), numbered)
        iterator._reader = StreamReader(self._job, request, numbered, self._dispatcher._reconnect)
        return iterator

    async def host(self) -> str:
        """As `harp.RemoteCall.host`."""
        return (await self._dispatcher._run(self._job.submitted())).host

    async def procedure(self) -> str:
        """As `harp.RemoteCall.procedure`."""
        return (await self._dispatcher._run(self._job.submitted())).procedure

    async def args(self) -> Any:
        """As `harp.RemoteCall.args`."""
        return (await self._dispatcher._run(self._job.submitted())).arguments

    async def info(self) -> Any:
        """As `harp.RemoteCall.info`."""
        return (await self._dispatcher._run(self._job.submitted())).info

    async def submit_time(self) -> int:
        """As `harp.RemoteCall.submit_time`."""
        return (await self._dispatcher._run(self._job.submitted())).submit

    async def start_time(self) -> int | None:
        """As `harp.RemoteCall.start_time`."""
        return (await self._dispatcher._run(self._job.started())).start

    async def end_time(self) -> int | None:
        """As `harp.RemoteCall.end_time`."""
        return (await self._dispatcher._run(self._job.ended())).end

    def __repr__(self) -> str:
        return f"<AsyncRemoteCall {self._job.id} by {self._dispatcher!r}>"


async def _close_all(waiting: Iterable[AsyncJSONConnection]) -> None:
    for conn in waiting:
        if conn.quiet():
            await conn.close()
        else:  # it may be of another event loop
            conn.abandon()


class AsyncHarpServer:
    """As `harp.HarpServer`."""

    def __init__(
        self,
        host: str,
        user: str,
        password: str,
        port: int = 4306,
        ca_file: str | os.PathLike[str] | None = None,
        *,
        keep: bool = False,
    ) -> None:
        self._endpoint = Endpoint(host, port)
        self._credentials = Credentials(user, password)
        self._ca_file = ca_file
        self._keep = bool(keep)
        self._idle = Idle(AsyncJSONConnection.abandon)

    def __getattr__(self, procedure: str) -> AsyncHarpProcedure:
        """The procedure of this name."""
        return AsyncHarpProcedure(self, public(procedure, self))

    def _connection(self) -> AsyncJSONConnection:
        return AsyncJSONSSLConnection(self._endpoint.host, self._endpoint.port, self._ca_file)

    def __repr__(self) -> str:
        where, who = self._endpoint, self._credentials
        file, keep = self._ca_file, self._keep
        return f"AsyncHarpServer({where.host!r}, {who!r}, port={where.port}, ca_file={file!r}, keep={keep})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _close_all(self._idle.drain())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_idle": Idle(AsyncJSONConnection.abandon)}  # a copy has connections of its own


class AsyncHarpProcedure:
    """As `harp.HarpProcedure`."""

    def __init__(self, server: AsyncHarpServer, name: str) -> None:
        self._server = server
        self._name = name_of("procedure", name)

    async def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """As `harp.HarpProcedure.__call__`; a streamed result is an `AsyncHarpStreamIterator`."""
        server = self._server
        line = direct_request(self._name, args, kwargs, server._credentials, server._keep)
        kept = server._idle.take(time.monotonic())
        conn = kept or server._connection()
        reader = DirectReader()
        try:
            if kept is None:
                await conn.connect()
            with surely(kept is not None):
                answer = await conn.ask(line)
            with conn.endpoint.mapped("reply"):
                streams = reader.streams(answer)
        except BaseException:
            await conn.close()
            raise
        stream = _Stream(conn, reader, server._idle if server._keep else None)
        return AsyncHarpStreamIterator(stream) if streams else (await anext(stream)).value

    def __repr__(self) -> str:
        return f"<AsyncHarpProcedure {self._name} on {self._server!r}>"


class AsyncHarpStreamIterator(_Iteration):
    """As `harp.HarpStreamIterator`, over what ``async for`` takes."""

    def __init__(self, orig_iterator: AsyncIterable[Any]) -> None:
        self._items = aiter(orig_iterator)

    async def __anext__(self) -> Any:
        return await anext(self._items)

    async def close(self) -> None:
        """End the iteration early; closes what it iterates over, if that can be closed."""
        close = getattr(self._items, "close", None) or getattr(self._items, "aclose", None)
        if close is not None:
            await close()
