"""The client API over TCP and Unix sockets: one request per connection, or more with keep-alive.

Spec: docs/protocol.md, Client and dispatcher, and Keep-alive.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeAlias

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
    decode_request,
)
from harp_daemon.listeners import Listener, ListenError, listen_tcp, listen_unix
from harp_daemon.memory_quota import MemoryQuota, Reservation
from harp_daemon.settings import ConfigError
from harp_daemon.sliced_json import decode_slices
from harpcaller.api.connection import ClientDisconnected, Connection, close_acceptor, make_acceptor
from harpcaller.config import Config
from harpcaller.dispatcher import Dispatcher
from harpcaller.model.jobs import Job
from harpcaller.notifier import RecordBatch
from harpcaller.store import StorageError, UnknownJob

log = logging.getLogger(__name__)

#: Permissions of a Unix socket: its owner and its group may connect.
_UNIX_MODE = 0o660

#: Maximum length of an error message in characters: it may quote the client's data.
_MAX_MESSAGE = 1000

#: Length in bytes from which a request is decoded in a thread, so that other clients need not wait.
_LONG_REQUEST = 256 * 1024

#: The requests with a single reply.
_OneReply: TypeAlias = Call | SubmitMany | Cancel | GetResult | GetStatus | GetDetails


def listen(config: Config) -> list[Listener]:
    """Open the addresses of a configuration's `listen`, each once.

    Raises:
        ConfigError: an address cannot be listened on; then none is open.
    """
    opened: list[Listener] = []
    for entry in dict.fromkeys(config.listen):
        try:
            if entry.path is None:
                opened += listen_tcp(entry.host, entry.port)
            else:
                opened.append(listen_unix(entry.path, _UNIX_MODE))
        except ListenError as error:
            for listener in opened:
                listener.close()
            raise ConfigError(f"{config.file}: listen: cannot listen on {entry}: {error}") from error
    return opened


class ClientServer:
    """The server of the client API. The dispatcher executes the requests; its configuration sets their limits."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        refusal = Failed("too_many_connections", "more clients are connected than max_connections allows")
        self._acceptor = make_acceptor(self._answer, lambda: dispatcher.config.max_connections, encode_reply(refusal))
        self._memory = MemoryQuota(dispatcher.config.request_memory)
        self._loopback_logged = False

    async def aclose(self) -> None:
        """Stop accepting, end all waits, and give requests that are being answered some time."""
        await close_acceptor(self._acceptor)

    def serve(self, listeners: Sequence[Listener]) -> None:
        """Accept connections from the listeners."""
        self._acceptor.open(listeners)
        for listener in listeners:
            log.info("harpcallerd is serving", extra=listener.fields)
            self._log_exposure(listener)

    def _log_exposure(self, listener: Listener) -> None:
        """Log which users can call, because clients are not authenticated."""
        if listener.path is not None:
            return  # the owner and the group of its file
        address = ipaddress.ip_address(str(listener.fields["address"]).partition("%")[0])
        if not address.is_loopback:
            log.warning("listening address is not loopback", extra=listener.fields)
        elif not self._loopback_logged:
            self._loopback_logged = True
            log.info("every local user can call procedures")

    async def _answer(self, connection: Connection) -> None:
        """Answer requests until the connection ends or a request fails; send the error of a failed request."""
        client = connection.client
        try:
            while await self._answer_request(connection):
                pass
        except ClientDisconnected:
            raise
        except ProtocolError as error:
            # Every invalid request has the type invalid_request; an exhausted limit keeps its own.
            kind = error.type if error.type == "too_many_connections" else "invalid_request"
            failure = Failed(kind, _shorten(error.message))
            log.info("request refused", extra={"client": client, "reason": failure.message})
        except UnknownJob as error:
            failure = Failed("invalid_jobid", _shorten(f"there is no job {error}"))
        except StorageError as error:
            log.error("request failed: storage error", extra={"client": client, "reason": str(error)})
            failure = Failed("storage_error", str(error))
        except Exception:
            log.exception("request failed: internal error", extra={"client": client})
            failure = Failed("internal_error", "internal error of the dispatcher; see its log")
        else:
            return
        await connection.send(encode_reply(failure))

    async def _answer_request(self, connection: Connection) -> bool:
        """Answer one request; return whether another one may follow."""
        config = self._dispatcher.config
        with Reservation(self._memory) as reservation:
            line = await connection.read_request(config.request_line, config.idle_timeout, reservation)
            received_at = time.monotonic()
            if len(line) < _LONG_REQUEST:
                request, keep_alive = decode_request(line, decode_slices)
            else:
                request, keep_alive = await asyncio.to_thread(decode_request, line, decode_slices)
            del line
            if isinstance(request, (FollowStream, ReadStream)):
                reservation.release()
                async with aclosing(self._records(request, connection)) as stream:
                    async for lines in stream:
                        await connection.send(lines)
                return False
            reply = await self._reply(request, connection, reservation, received_at)
        keep_alive = keep_alive and not connection.has_extra_input and not self._acceptor.near_capacity
        await connection.send(encode_reply(reply, config.idle_timeout if keep_alive else None))
        if isinstance(request, GetResult):
            self._dispatcher.record_delivery(request.job, received_at)
        return keep_alive

    async def _reply(
        self, request: _OneReply, connection: Connection, reservation: Reservation, received_at: float
    ) -> Reply:
        """Return the reply to a request. A request that waits releases its memory first."""
        if not isinstance(request, (Call, SubmitMany)):
            reservation.release()
        dispatcher = self._dispatcher
        match request:
            case Call():
                return Submitted(await dispatcher.submit(request, connection.client, received_at))
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

    async def _result(self, job: str, wait: bool, connection: Connection) -> Reply:
        if wait:
            try:
                async with connection.cancel_on_disconnect():
                    end = await self._dispatcher.result(job, wait=True)
            except ClientDisconnected:
                # The client may still be reading: it gets an end that is available at once.
                end = await self._dispatcher.result(job, wait=False)
                if end is None:
                    raise
        else:
            end = await self._dispatcher.result(job, wait=False)
        return NoResult() if end is None else end

    async def _stop(self, job: str, connection: Connection) -> Envelope | None:
        """Return the state of a job's stop when it is final; None if the job was not stopped."""
        try:
            async with connection.cancel_on_disconnect():
                details = await self._dispatcher.wait_stopped(job)
        except UnknownJob:
            return None
        if details.job.stop is None:
            return None
        return Envelope(state=details.job.stop.value, stop_report=details.metadata.stop_report)

    async def _records(self, request: FollowStream | ReadStream, connection: Connection) -> AsyncGenerator[bytes, None]:
        """Yield the lines of the reply to a request for records."""
        since, recent = request.since, request.recent
        follow = isinstance(request, FollowStream)
        if follow:
            try:
                async with aclosing(self._dispatcher.follow(request.job, since, recent)) as items:
                    while True:
                        async with connection.cancel_on_disconnect():
                            item = await anext(items)
                        if not isinstance(item, RecordBatch):
                            yield encode_reply(item)
                            return
                        since, recent = item.next, None
                        lines = item.lines(request.timed)
                        del item  # free the memory while the client reads
                        yield lines
            except ClientDisconnected:
                # The client may still be reading: it gets the records that are stored.
                recent = 0 if since is None and recent is None else recent
        async with aclosing(self._dispatcher.read(request.job, since, recent)) as stored:
            async for part in stored:
                if follow and isinstance(part, Continue):
                    raise ClientDisconnected
                lines = part.lines(request.timed) if isinstance(part, RecordBatch) else encode_reply(part)
                del part
                yield lines


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


def _shorten(message: str) -> str:
    return message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."
