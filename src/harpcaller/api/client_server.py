"""The client API over TCP and Unix sockets: one request per connection, or more with keep-alive.

Spec: docs/protocol.md, Client and dispatcher, and Keep-alive.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from harp.protocol.ends import End, Failed
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
    Request,
    SubmitMany,
)
from harp_daemon.listeners import Listener, ListenError, listen_tcp, listen_unix
from harp_daemon.memory_quota import MemoryQuota, Reservation
from harp_daemon.settings import ConfigError
from harp_daemon.timer_wheel import TimerWheel
from harpcaller.api.connection import ClientDisconnected, Connection, close_acceptor, make_acceptor
from harpcaller.api.fast_decoder import decode_request
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
_LONG_REQUEST = 64 * 1024


@dataclass(slots=True)
class _Answer:
    """What is needed to answer a request.

    Attributes:
        connection: the connection of the client.
        received_at: time at which its line was complete, on the monotonic clock.
        keep_alive: whether the client asked to send another request.
    """

    connection: Connection
    received_at: float
    keep_alive: bool = False


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
        memory = MemoryQuota(dispatcher.config.request_memory)
        self._acceptor = make_acceptor(
            self,
            TimerWheel(),
            lambda: dispatcher.config.max_connections,
            encode_reply(refusal),
            lambda: Reservation(memory),
        )
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

    # Events of connections.

    def on_connected(self, connection: Connection) -> None:
        """See `Server`."""
        config = self._dispatcher.config
        connection.read_request(config.request_line, config.idle_timeout)

    def on_request(self, connection: Connection, line: bytes) -> None:
        """See `Server`."""
        answer = _Answer(connection, time.monotonic())
        if len(line) < _LONG_REQUEST:
            self._execute(answer, lambda: decode_request(line))
        else:
            decoding = asyncio.get_running_loop().run_in_executor(None, decode_request, line)
            decoding.add_done_callback(lambda decoded: self._execute(answer, decoded.result))

    def on_invalid_request(self, connection: Connection, error: ProtocolError) -> None:
        """See `Server`."""
        self._fail(connection, error)

    # Requests. Those of the usual path need no task.

    def _execute(self, answer: _Answer, decoded: Callable[[], tuple[Request, bool]]) -> None:
        """Answer a request; `decoded` returns it and whether the client requests keep-alive."""
        connection = answer.connection
        try:
            request, answer.keep_alive = decoded()
            if not isinstance(request, (Call, SubmitMany)):
                connection.release_memory()
            match request:
                case Call():
                    self._submit(answer, request)
                case GetResult(wait=True):
                    self._wait_for_result(answer, request)
                case FollowStream() | ReadStream():
                    self._send_records(answer, request)
                case _:
                    connection.run(self._send_reply(answer, request))
        except Exception as error:  # noqa: BLE001 - the client gets it
            self._fail(connection, error)

    def _submit(self, answer: _Answer, request: Call) -> None:
        def on_submitted(submitted: asyncio.Future[str]) -> None:
            if (error := submitted.exception()) is None:
                self._reply(answer, Submitted(submitted.result()))
            else:
                self._fail(answer.connection, error)

        submitted = self._dispatcher.submit(request, answer.connection.client, answer.received_at)
        submitted.add_done_callback(on_submitted)

    def _wait_for_result(self, answer: _Answer, request: GetResult) -> None:
        """Reply with the end of a job when it has ended. A client that disconnects gets an end that is there."""
        connection = answer.connection

        def on_end(waiting: asyncio.Future[End | None]) -> None:
            connection.on_disconnect = None
            if waiting.cancelled():
                connection.run(self._send_present_end(answer, request.job))
            elif (error := waiting.exception()) is not None:
                self._fail(connection, error)
            else:
                self._reply(answer, waiting.result() or NoResult())
                self._dispatcher.record_delivery(request.job, answer.received_at)

        waiting = self._dispatcher.result(request.job, wait=True)
        waiting.add_done_callback(on_end)
        connection.on_disconnect = waiting.cancel
        if connection.disconnected:
            waiting.cancel()

    async def _send_present_end(self, answer: _Answer, job: str) -> None:
        try:
            end = await self._dispatcher.result(job, wait=False)
        except Exception as error:  # noqa: BLE001 - the client gets it
            self._fail(answer.connection, error)
            return
        if end is None:
            raise ClientDisconnected
        self._reply(answer, end)

    def _reply(self, answer: _Answer, reply: Reply) -> None:
        """Send the only reply to a request, and wait for the next request if the client has asked for that."""
        connection, config = answer.connection, self._dispatcher.config
        keep_alive = answer.keep_alive and not connection.has_extra_input and not self._acceptor.near_capacity
        connection.write(encode_reply(reply, config.idle_timeout if keep_alive else None))
        if keep_alive:
            connection.read_request(config.request_line, config.idle_timeout)
        else:
            connection.close()

    def _fail(self, connection: Connection, error: BaseException) -> None:
        """Send the error of a failed request and close the connection."""
        client = connection.client
        match error:
            case ProtocolError():
                # Every invalid request has the type invalid_request; an exhausted limit keeps its own.
                kind = error.type if error.type == "too_many_connections" else "invalid_request"
                failure = Failed(kind, _shorten(error.message))
                log.info("request refused", extra={"client": client, "reason": failure.message})
            case UnknownJob():
                failure = Failed("invalid_jobid", _shorten(f"there is no job {error}"))
            case StorageError():
                log.error("request failed: storage error", extra={"client": client, "reason": str(error)})
                failure = Failed("storage_error", str(error))
            case _:
                log.error("request failed: internal error", extra={"client": client}, exc_info=error)
                failure = Failed("internal_error", "internal error of the dispatcher; see its log")
        connection.write(encode_reply(failure))
        connection.close()

    async def _send_reply(self, answer: _Answer, request: Request) -> None:
        connection, dispatcher = answer.connection, self._dispatcher
        reply: Reply
        try:
            match request:
                case SubmitMany(calls):
                    received = cast(Sequence[Call], calls)  # only a client encodes calls before
                    reply = SubmittedMany(await dispatcher.submit_many(received, connection.client))
                case Cancel(job, wait):
                    cancelled = await dispatcher.cancel(job, connection.client)
                    reply = WasCancelled(cancelled, await self._stop(job, connection) if wait else None)
                case GetResult(job):
                    reply = await dispatcher.result(job, wait=False) or NoResult()
                case GetStatus(job):
                    reply = _status(await dispatcher.get_job(job))
                case GetDetails(job):
                    reply = Details(await dispatcher.details(job))
        except ClientDisconnected:
            raise
        except Exception as error:  # noqa: BLE001 - the client gets it
            self._fail(connection, error)
        else:
            self._reply(answer, reply)

    async def _stop(self, job: str, connection: Connection) -> Envelope | None:
        """Return the state of a job's stop when it is final; None if the job was not stopped."""
        waiting = asyncio.ensure_future(self._dispatcher.wait_stopped(job))
        connection.on_disconnect = waiting.cancel
        if connection.disconnected:
            waiting.cancel()
        try:
            details = await waiting
        except UnknownJob:
            return None
        except asyncio.CancelledError as error:
            raise ClientDisconnected from error
        finally:
            connection.on_disconnect = None
        if details.job.stop is None:
            return None
        return Envelope(state=details.job.stop.value, stop_report=details.metadata.stop_report)

    def _send_records(self, answer: _Answer, request: FollowStream | ReadStream) -> None:
        """Send the records of a job as fast as the client reads them, then its end."""
        connection = answer.connection

        def send_more() -> None:
            try:
                while connection.is_sent and not connection.is_closing:
                    item = stream.take()
                    if item is None:
                        return
                    send(item)
            except Exception as error:  # noqa: BLE001 - the client gets it
                self._fail(connection, error)
            if connection.is_closing:
                connection.on_disconnect = None
                stream.close()
            else:
                connection.on_sent = send_more

        def send(item: RecordBatch | End | Continue) -> None:
            if isinstance(item, RecordBatch):
                connection.write(item.lines(request.timed))
            elif isinstance(item, Continue) and follow:
                connection.abort()  # the client disconnected before the end
            else:
                connection.write(encode_reply(item))
                connection.close()

        follow = isinstance(request, FollowStream)
        stream = self._dispatcher.stream(request.job, request.since, request.recent, follow, send_more)
        connection.on_disconnect = stream.stop_waiting
        if connection.disconnected:
            stream.stop_waiting()


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
