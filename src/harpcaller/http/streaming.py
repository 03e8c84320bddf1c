"""Responses that last: records and events, as fast as the client reads them.

Theory of operation: a response pulls the next part from its `Source` when the last one was passed to the transport,
which takes no more while the client does not read. So a client that does not read needs the memory of its source, a
part and the transport's buffer; the server closes its connection after a while. A long part needs a share of the reply
memory. One timer serves all responses: for heartbeats, and to check again who the client is.

A task for each response waits for its transport, for memory and for its end. The usual case, a short part for a client
that reads, needs no task: when a job or a list has changed, one callback of the event loop writes what is ready to some
dozens of responses, so that an event costs little more than its system call.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from harpcaller.access import AuthError
from harpcaller.http.problems import Problem
from harpcaller.reply_memory import ReplyMemory, ReplyShare

if TYPE_CHECKING:
    from harpcaller.access.client import Client
    from harpcaller.config import HTTPSettings
    from harpcaller.http.server import HTTPConnection

log = logging.getLogger(__name__)

JSON_LINES, EVENTS, TEXT = "application/jsonl", "text/event-stream", "text/plain"  #: The media types.
RETRY = b"retry: 1000\n\n"  #: The start of server-sent events: milliseconds until a browser connects again.
HEARTBEAT = 15.0  #: Seconds without data after which a heartbeat is sent.
_CHECK_EVERY = 1.0  #: Seconds between two looks for responses that need a heartbeat.
_AUTHENTICATE_EVERY = 1.0  #: Seconds between two checks of each client.
_PIECE = 64 * 1024  #: Bytes that are passed to the transport at once.
_STEP = 50  #: Responses that one callback of the event loop serves.

STOPPING = "stopping"  #: Why a response is interrupted: the dispatcher stops.
ACCESS = "access"  #: The client has lost its rights.


class Source(Protocol):
    """What a response sends."""

    on_ready: Callable[[], object]  #: Is called when `next_part` may return another part.
    heartbeat: bytes  #: Is sent while there is nothing else to send.
    is_done: bool  #: Whether no part follows.

    def next_part(self) -> bytes | None:
        """Return the next part; None: `on_ready` will be called, or `is_done` is set."""

    def put_back(self) -> None:
        """Let `next_part` return its last part again."""

    def interrupt(self, reason: str) -> bytes:
        """Return the last part of a response that ends early."""

    def close(self) -> None:
        """Release what the source needs."""


class Streams:
    """All such responses of a server. `stopping` is set when the server closes."""

    def __init__(
        self, settings: Callable[[], HTTPSettings], reply_memory: Callable[[], int], stopping: asyncio.Event
    ) -> None:
        self.kinds: Counter[str] = Counter()  #: The number of responses of each kind.
        self.memory = ReplyMemory(reply_memory)
        self.heartbeat = HEARTBEAT
        self._settings = settings
        self._stopping = stopping
        self._owners: Counter[str] = Counter()
        self._open: dict[StreamResponse, None] = {}
        self._ready: deque[StreamResponse] = deque()
        self._checking: asyncio.Task[None] | None = None
        self._stop_waiter: asyncio.Task[None] | None = None

    def admit(self, client: Client, kind: str, is_long: bool = True) -> Admitted:
        """Count a response, unless it is a short one. Raises `Problem` if there are too many, or the server closes."""
        settings = self._settings()
        if self._stopping.is_set():
            raise Problem("stopping", "the dispatcher stops", retry_after=5)
        if not is_long:
            return Admitted(self, None, kind)
        if self.kinds.total() >= settings.streams:
            detail = f"{settings.streams} streams are open; the limit is http.streams"
            raise Problem("too_many_requests", detail, retry_after=5)
        if self._owners[client.owner] >= settings.streams_per_client:
            detail = f"you have {settings.streams_per_client} streams; the limit is http.streams_per_client"
            raise Problem("too_many_requests", detail, retry_after=5)
        return Admitted(self, client.owner, kind)

    def add(self, response: StreamResponse) -> None:
        """Serve a response until `remove`."""
        self._open[response] = None
        if self._checking is None:
            self._checking = asyncio.create_task(self._check_regularly())
            self._stop_waiter = asyncio.create_task(self._wait_stopping())

    def remove(self, response: StreamResponse) -> None:
        """Forget a response."""
        self._open.pop(response, None)
        if not self._open and self._checking is not None and self._stop_waiter is not None:
            self._checking.cancel()
            self._stop_waiter.cancel()
            self._checking = self._stop_waiter = None

    def write_soon(self, response: StreamResponse) -> None:
        """Let a response write what is ready, after those that were ready earlier."""
        self._ready.append(response)
        if len(self._ready) == 1:
            asyncio.get_running_loop().call_soon(self._write_ready)

    def _write_ready(self) -> None:
        for _ in range(min(len(self._ready), _STEP)):
            self._ready[0].write_ready()
            self._ready.popleft()  # after it, so that only one callback is waiting
        if self._ready:
            asyncio.get_running_loop().call_soon(self._write_ready)

    async def _wait_stopping(self) -> None:
        await self._stopping.wait()
        for response in list(self._open):
            response.interrupt(STOPPING)

    async def _check_regularly(self) -> None:
        loop = asyncio.get_running_loop()
        checked_at = loop.time()
        while True:
            await asyncio.sleep(min(_CHECK_EVERY, self.heartbeat))
            now = loop.time()
            for response in list(self._open):
                response.beat(now - self.heartbeat)
            if now - checked_at >= _AUTHENTICATE_EVERY:
                await self._authenticate_each()
                checked_at = loop.time()

    async def _authenticate_each(self) -> None:
        for response in list(self._open):
            try:
                if not await response.authenticate():
                    response.interrupt(ACCESS)
            except AuthError:
                response.interrupt(ACCESS)
            except Exception:
                log.exception("cannot check the client of a stream: internal error")
            await asyncio.sleep(0)


class Admitted:
    """A response that was admitted; it counts for its owner, if it has one."""

    def __init__(self, streams: Streams, owner: str | None, kind: str) -> None:
        self.streams = streams
        self._owner = owner
        self._kind = kind
        if owner is not None:
            streams.kinds[kind] += 1
            streams._owners[owner] += 1

    def release(self) -> None:
        """Count the response no longer."""
        owner, self._owner = self._owner, None
        if owner is not None:
            self.streams.kinds[self._kind] -= 1
            self.streams._owners[owner] -= 1
            if not self.streams._owners[owner]:
                del self.streams._owners[owner]


class StreamResponse(Response):
    """A response with the parts of a source, which it closes.

    `authenticate` returns whether the client is still who it was when the request came; it may raise `AuthError`.
    """

    def __init__(
        self,
        admitted: Admitted,
        source: Source,
        media_type: str,
        authenticate: Callable[[], Awaitable[bool]],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # nginx would collect the parts and send them late.
        super().__init__(None, 200, {"X-Accel-Buffering": "no", **(headers or {})}, media_type)
        del self.headers["content-length"]
        self.authenticate = authenticate
        self._admitted = admitted
        self._source = source
        self._share = ReplyShare(admitted.streams.memory)
        self._connection: HTTPConnection | None = None
        self._wake = asyncio.Event()
        self._is_idle = False  # whether the task waits for `_wake`, and the transport takes data
        self._is_ready = False  # whether `write_ready` will be called
        self._is_disconnected = self._is_beat_due = False
        self._unsent: bytes | None = None  # a part that only the task can send
        self._interruption: str | None = None
        self._error: Exception | None = None
        self._sent_at = asyncio.get_running_loop().time()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        streams = self._admitted.streams
        self._connection = scope["state"].get("connection")
        self._source.on_ready = self._on_ready
        streams.add(self)
        watching = asyncio.create_task(self._watch(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
            else:
                await self._send_parts(send)
        finally:
            watching.cancel()
            streams.remove(self)
            self._share.release()
            self._source.close()
            self._admitted.release()

    def interrupt(self, reason: str) -> None:
        """End the response early."""
        self._interruption = self._interruption or reason
        self._wake.set()

    def beat(self, sent_before: float) -> None:
        """Send a heartbeat if nothing was sent after a time."""
        if self._is_idle and self._sent_at <= sent_before:
            self._is_beat_due = True
            self._wake.set()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._is_disconnected = True
        self._wake.set()

    def _on_ready(self) -> None:
        if not self._is_idle or self._connection is None:
            self._wake.set()
        elif not self._is_ready:
            self._is_ready = True
            self._admitted.streams.write_soon(self)

    def write_ready(self) -> None:
        """Write the parts that are ready, as far as nothing has to be waited for; the task does the rest."""
        self._is_ready = False
        if not self._is_idle or self._wake.is_set() or self._share.is_waiting:
            return
        try:
            while not self._source.is_done and (part := self._source.next_part()) is not None:
                if len(part) > _PIECE or self._connection is None or not self._connection.write_part(part):
                    self._unsent = part
                    break
                self._sent_at = asyncio.get_running_loop().time()
        except Exception as error:  # noqa: BLE001 - of this response only: the task raises it
            self._error = error
        if self._unsent is not None or self._error is not None or self._source.is_done:
            self._wake.set()

    async def _send_parts(self, send: Send) -> None:
        source, share = self._source, self._share
        while not self._is_disconnected:
            if self._error is not None:
                raise self._error
            part, self._unsent = self._unsent, None
            if part is None:
                if source.is_done:
                    await send({"type": "http.response.body", "body": b""})
                    return
                if self._interruption is not None:
                    await send({"type": "http.response.body", "body": source.interrupt(self._interruption)})
                    return
                part = None if share.is_waiting else source.next_part()
            if part is None:
                if not self._is_beat_due:
                    await self._wait()
                    continue
                part = source.heartbeat
            elif not share.reserve(len(part), self._wake.set):
                source.put_back()
                continue
            self._is_beat_due = False
            if len(part) <= _PIECE:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            else:
                await self._send_long(part, send)
            self._sent_at = asyncio.get_running_loop().time()

    async def _wait(self) -> None:
        self._wake.clear()
        self._is_idle = True
        try:
            await self._wake.wait()
        finally:
            self._is_idle = False

    async def _send_long(self, part: bytes, send: Send) -> None:
        """Send a part in pieces, so that the transport's buffer stays short."""
        pieces = memoryview(part)
        for start in range(0, len(part), _PIECE):
            if self._is_disconnected:
                return
            await send({"type": "http.response.body", "body": pieces[start : start + _PIECE], "more_body": True})
            await asyncio.sleep(0)
        self._share.release()
