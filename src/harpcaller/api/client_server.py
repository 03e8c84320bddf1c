"""Door 1: the client protocol, over TCP and Unix sockets. One request a connection, unless the client keeps it.

Spec: docs/protocol.md, Client and dispatcher, and Kept connections.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypeAlias

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.json_text import Envelope
from harp.protocol.replies import (
    Continue,
    Details,
    NoResult,
    Reply,
    Status,
    Submitted,
    SubmittedMany,
    WasCancelled,
    encode_reply,
)
from harp.protocol.requests import (
    Call,
    Cancel,
    FollowStream,
    GetDetails,
    GetResult,
    GetStatus,
    ReadStream,
    SubmitMany,
    decode_request_line,
)
from harp_daemon.memory_quota import MemoryQuota, Reservation
from harp_daemon.sliced_json import decode_slices
from harp_daemon.sockets import ResolveError
from harpcaller.api.acceptor import Door
from harpcaller.api.connection import ClientLeft, Connection
from harpcaller.api.listeners import Listener, listen_tcp, listen_unix, reason
from harpcaller.config import Config, ConfigError
from harpcaller.dispatcher import Dispatcher
from harpcaller.model.jobs import Job
from harpcaller.notifier import RecordBatch
from harpcaller.store import StorageError, UnknownJob

__all__ = ["Service", "close", "listen"]

log = logging.getLogger(__name__)

#: Who may connect to a Unix socket is the matter of its file: owner and group may.
_UNIX_MODE = 0o660

#: A message quotes what the client sent; it need not give all of it back.
_LONGEST_MESSAGE = 1000

#: Bytes from which on a request is read in a thread, so that nobody waits meanwhile.
_LONG_REQUEST = 256 * 1024

#: The requests that have one reply.
_OneReply: TypeAlias = Call | SubmitMany | Cancel | GetResult | GetStatus | GetDetails


async def listen(config: Config) -> list[Listener]:
    """Open the addresses of a configuration's `listen`, each once.

    Raises:
        ConfigError: an address cannot be listened on; then none was opened.
    """
    opened: list[Listener] = []
    for entry in dict.fromkeys(config.listen):
        try:
            opened += await listen_tcp(entry) if entry.path is None else [listen_unix(entry.path, _UNIX_MODE)]
        except BaseException as error:
            close(opened)
            if isinstance(error, (OSError, ResolveError)):
                raise ConfigError(f"{config.file}: listen: can't listen on {entry}: {reason(error)}") from error
            raise
    return opened


def close(listeners: Iterable[Listener]) -> None:
    """Close listeners that nothing accepts from."""
    for listener in listeners:
        listener.close()


class Service:
    """The door that clients come through; an asynchronous context manager that closes it.

    Args:
        dispatcher: carries requests out; the limits of requests are those of its configuration.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        refusal = Failed("too_many_connections", "more clients are connected than the setting connections allows")
        self._door = Door(self._answer, lambda: dispatcher.config.connections, encode_reply(refusal))
        self._memory = MemoryQuota(dispatcher.config.request_memory)
        self._local_told = False

    async def __aenter__(self) -> Self:
        await self._door.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._door.__aexit__(kind, error, traceback)

    def serve(self, listeners: Iterable[Listener]) -> None:
        """Accept connections from the listeners."""
        for listener in listeners:
            self._door.open(listener)
            log.info("harpcallerd is serving", extra=listener.fields)
            self._report_reach(listener)

    def _report_reach(self, listener: Listener) -> None:
        """Say who can call: there is no authentication of clients."""
        if listener.path is not None:
            return  # its file's owner and group
        address = ipaddress.ip_address(str(listener.fields["address"]).partition("%")[0])
        if not address.is_loopback:
            log.warning("not a loopback address: whoever reaches it can call", extra=listener.fields)
        elif not self._local_told:
            self._local_told = True
            log.info("every local user can call; a Unix socket with file permissions can be listened on instead")

    async def _answer(self, connection: Connection) -> None:
        failure = await self._carry_out(connection)
        if failure is not None:
            await connection.send(encode_reply(failure))

    async def _carry_out(self, connection: Connection) -> Failed | None:
        """Read requests and answer them; return what is left to say when one fails, at once or in the middle."""
        client = connection.client
        try:
            while await self._carry_out_one(connection):
                pass
        except ClientLeft:
            raise
        except ProtocolError as error:
            # The dispatcher has one type for all faults of a request; being too much at once is none.
            kind = error.type if error.type == "too_many_connections" else "invalid_request"
            failure = Failed(kind, _shortened(error.message))
            log.info("request refused", extra={"client": client, "reason": failure.message})
        except UnknownJob as error:
            failure = Failed("invalid_jobid", _shortened(f"there is no job {error}"))
        except StorageError as error:
            log.error("request not carried out", extra={"client": client, "reason": str(error)})
            failure = Failed("storage_error", str(error))
        except Exception:
            log.exception("request failed by a fault of the dispatcher", extra={"client": client})
            failure = Failed("internal_error", "the dispatcher failed; its log says more")
        else:
            return None
        return failure

    async def _carry_out_one(self, connection: Connection) -> bool:
        """Read a request and answer it; whether another one may come."""
        config = self._dispatcher.config
        with Reservation(self._memory) as share:
            line = await connection.request_line(config.request_line, config.idle_timeout, share)
            came = time.monotonic()
            if len(line) < _LONG_REQUEST:
                request, keeps = decode_request_line(line, decode_slices)
            else:
                request, keeps = await asyncio.to_thread(decode_request_line, line, decode_slices)
            del line
            if isinstance(request, (FollowStream, ReadStream)):
                share.release()
                async with aclosing(self._stream(request, connection)) as stream:
                    async for lines in stream:
                        await connection.send(lines)
                return False
            reply = await self._reply(request, connection, share, came)
        keeps = keeps and not connection.said_more and not self._door.crowded
        await connection.send(encode_reply(reply, config.idle_timeout if keeps else None))
        if isinstance(request, GetResult):
            self._dispatcher.record_delivery(request.job, came)
        return keeps

    async def _reply(self, request: _OneReply, connection: Connection, share: Reservation, came: float) -> Reply:
        """Carry out a request that has one reply. Whatever waits gives its share of memory back."""
        if not isinstance(request, (Call, SubmitMany)):
            share.release()
        dispatcher = self._dispatcher
        match request:
            case Call():
                return Submitted(await dispatcher.submit(request, connection.client, came))
            case SubmitMany(calls):
                return SubmittedMany(await dispatcher.submit_many(calls, connection.client))
            case Cancel(job, wait):
                cancelled = await dispatcher.cancel(job, connection.client)
                return WasCancelled(cancelled, await self._stop(job, connection) if wait else None)
            case GetResult(job, wait):
                return await self._result(job, wait, connection)
            case GetStatus(job):
                return _status(await dispatcher.get_job(job))
            case GetDetails(job):
                return Details(await dispatcher.details(job))

    def _stream(self, request: FollowStream | ReadStream, connection: Connection) -> AsyncGenerator[bytes, None]:
        """The lines that answer a request for records."""
        return self._follow(request, connection) if isinstance(request, FollowStream) else self._read(request)

    async def _read(self, request: ReadStream) -> AsyncGenerator[bytes, None]:
        items = self._dispatcher.read(request.job, request.since, request.recent)
        async with aclosing(items):
            async for item in items:
                lines = _lines(item, request.timed)
                del item  # not kept as well while the client reads
                yield lines

    async def _result(self, job: str, wait: bool, connection: Connection) -> Reply:
        if wait:
            try:
                async with connection.waiting():
                    end = await self._dispatcher.result(job, wait=True)
            except ClientLeft:
                # It sends no more, but may still read: it is told what needs no waiting.
                end = await self._dispatcher.result(job, wait=False)
                if end is None:
                    raise
        else:
            end = await self._dispatcher.result(job, wait=False)
        return NoResult() if end is None else end

    async def _stop(self, job: str, connection: Connection) -> Envelope | None:
        """How the stop of a job turned out, once it has; None: there is none."""
        try:
            async with connection.waiting():
                details = await self._dispatcher.wait_stopped(job)
        except UnknownJob:
            return None
        if details.job.stop is None:
            return None
        return Envelope(state=details.job.stop.value, receipt=details.metadata.stop_report)

    async def _follow(self, request: FollowStream, connection: Connection) -> AsyncGenerator[bytes, None]:
        since, recent = request.since, request.recent
        try:
            async with aclosing(self._dispatcher.follow(request.job, since, recent)) as items:
                while True:
                    async with connection.waiting():
                        item = await anext(items)
                    if not isinstance(item, RecordBatch):
                        yield encode_reply(item)
                        return
                    since, recent = item.next, None
                    lines = _lines(item, request.timed)
                    del item  # not kept as well while the client reads
                    yield lines
        except ClientLeft:
            pass
        # As for a result: what needs no waiting.
        recent = 0 if since is None and recent is None else recent
        async with aclosing(self._dispatcher.read(request.job, since, recent)) as rest:
            async for part in rest:
                if isinstance(part, Continue):
                    raise ClientLeft
                lines = _lines(part, request.timed)
                del part
                yield lines


def _lines(item: RecordBatch | Reply, timed: bool) -> bytes:
    return item.lines(timed) if isinstance(item, RecordBatch) else encode_reply(item)


def _status(job: Job) -> Status:
    return Status(
        host=job.host,
        procedure=job.procedure,
        arguments=job.arguments,
        submit=int(job.submitted),
        start=None if job.started is None else int(job.started),
        end=None if job.ended is None else int(job.ended),
        info=job.info,
    )


def _shortened(message: str) -> str:
    return message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."
