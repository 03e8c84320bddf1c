"""The client API over TCP and Unix sockets: one request per connection, or more with keep-alive.

Spec: docs/protocol.md, Client and dispatcher, and Keep-alive.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from harp.protocol import dispatcher as protocol
from harp.protocol.ends import End
from harp.protocol.json_text import Envelope
from harp.protocol.lines import LongLine
from harp.protocol.schema import ProtocolError
from harp_daemon.event_loop import LONG_LINE, run_in_turn
from harp_daemon.outcome import Outcome
from harp_daemon.sockets import Listener
from harpcaller.access import AccessDenied, AuthError, RateLimited, Refusal
from harpcaller.access.attempts import peer_of
from harpcaller.access.client import Client
from harpcaller.access.identities import (
    CERTIFICATE_EXPIRED,
    CERTIFICATES_CHANGED,
    USER_CHANGED,
    Identities,
    anonymous,
    certified,
    find_expiry,
)
from harpcaller.access.tokens import Token, parse_token
from harpcaller.acting import ActingAs
from harpcaller.api import listing
from harpcaller.api.connection import UNSENT_BYTES, ClientDisconnected, Connection, Server
from harpcaller.api.fast_decoder import decode_request
from harpcaller.api.tls_connection import TLSConnection
from harpcaller.cursors import InvalidCursor
from harpcaller.dispatcher import Dispatcher
from harpcaller.model.job_filters import InvalidFilter
from harpcaller.model.jobs import Job
from harpcaller.notifier import RecordBatch
from harpcaller.store import RequestIDReused, StorageError, UnknownJob

log = logging.getLogger(__name__)

#: Seconds between two checks whether clients have lost their rights, and between two writes of tokens' last uses.
_CHECK_EVERY, _WRITE_USES_EVERY = 0.25, 60.0
_MAX_MESSAGE = 1000  #: Maximum length of an error message in characters: it may quote the client's data.


class ClientServer(Server):
    """The server of the client API. The dispatcher executes the requests; its configuration sets their limits.

    `identities` decide who a client is; a reload may replace them.
    """

    def __init__(self, dispatcher: Dispatcher, identities: Identities) -> None:
        refusal = protocol.Refused("too_many_connections", "too many clients are connected, in all or from here")
        super().__init__(
            max_connections=lambda: dispatcher.config.max_connections,
            rejection=protocol.encode_reply(refusal),
            request_memory=dispatcher.config.request_memory,
            reply_memory=lambda: dispatcher.config.reply_memory,
            max_per_peer=lambda: dispatcher.config.max_connections_per_peer,
        )
        self.identities = identities
        self._dispatcher = dispatcher
        self._tls = identities.tls
        # Each function returns why a proof of the client is void; None: it is not.
        self._proofs: dict[Connection, list[Callable[[], str | None]]] = {}
        self._uses_written_at = time.monotonic()
        self._writing: asyncio.Future[None] | None = None
        self._check = self.timers.call_later(_CHECK_EVERY, self._check_proofs)
        self._loopback_logged = False

    def serve(self, listeners: Sequence[Listener]) -> None:
        """Accept connections from the listeners, and log which users can call: clients are not authenticated."""
        super().serve(listeners)
        for listener in listeners:
            log.info("harpcallerd is serving", extra=listener.fields)
            if listener.path is not None:
                continue  # the owner and the group of its file
            if self._dispatcher.config.access_file is not None:
                continue  # its rules decide
            address = ipaddress.ip_address(str(listener.fields["address"]).partition("%")[0])
            if not address.is_loopback:
                log.warning("listening address is not loopback", extra=listener.fields)
            elif not self._loopback_logged:
                self._loopback_logged = True
                log.info("every local user can call procedures")

    def _identify(self, accepted: socket.socket, peer: str, listener: Listener) -> Client:
        return anonymous(peer, listener)

    def _connect(self, accepted: socket.socket, peer: str, listener: Listener) -> Connection:
        if not listener.is_tls:
            return super()._connect(accepted, peer, listener)
        self._tls = self.identities.tls or self._tls  # without a section now, a restart will not listen with TLS
        assert self._tls is not None
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        tls, context = self._tls, self._tls.context
        version, client = tls.version, anonymous(peer, listener)

        def identify(tls_object: ssl.SSLObject) -> Client:
            found, expires = certified(client, tls_object), find_expiry(tls_object)

            def find_error() -> str | None:
                if expires is not None and time.time() >= expires:
                    return CERTIFICATE_EXPIRED
                return None if self._tls is tls and tls.version == version else CERTIFICATES_CHANGED

            if found.authenticated:
                self._add_proof(connection, find_error)
            return found

        return (connection := TLSConnection(accepted, client, self, context, identify))

    def _serve(self, connection: Connection) -> asyncio.Future[None]:
        client = connection.client
        if not client.listener.startswith("unix:"):
            return super()._serve(connection)

        def admit(found: Client) -> None:
            connection.client = found
            self._add_proof(connection, lambda: self.identities.find_user_error(client, found.principals))

        found = self.identities.of_user(client)
        if found is not None:
            admit(found)
            return super()._serve(connection)

        async def look_up() -> None:
            admit(await self.identities.look_up_user(client))

        connection.run(connection.begin_later(look_up()))
        return connection.closed

    # Tokens, and proofs that become void.

    def _authenticate(self, connection: Connection, text: str | None) -> None:
        """Check the proofs of a request. Raises `AuthError`."""
        if text is not None and not connection.is_identified:
            connection.client, token = self.identities.of_token(connection.client, text)
            self._add_proof(connection, lambda: self._find_token_error(token))
            connection.token = parse_token(text)
        elif text is not None and (connection.token is None or parse_token(text) != connection.token):
            raise AuthError("the first request authenticates a connection; use another connection for another token")
        for find_error in self._proofs.get(connection, ()):
            if (error := find_error()) is not None:
                raise AuthError(error)

    def _find_token_error(self, token: Token) -> str | None:
        tokens = self.identities.tokens
        is_current = tokens is not None and tokens.is_current(token)
        return None if is_current else "the token was revoked, or has expired"

    def _add_proof(self, connection: Connection, find_error: Callable[[], str | None]) -> None:
        if connection not in self._proofs:
            self._proofs[connection] = []
            connection.closed.add_done_callback(lambda _: self._proofs.pop(connection, None))
        self._proofs[connection].append(find_error)

    def _check_proofs(self) -> None:
        """Close the connections of clients that have lost their rights."""
        self._check = self.timers.call_later(_CHECK_EVERY, self._check_proofs)
        self.identities.refresh()
        for connection, checks in list(self._proofs.items()):
            error = next(filter(None, (find_error() for find_error in checks)), None)
            if error is not None:
                connection.expel(protocol.encode_reply(_auth_refusal(error)))
        tokens = self.identities.tokens
        is_due = time.monotonic() - self._uses_written_at >= _WRITE_USES_EVERY
        if is_due and tokens is not None and (self._writing is None or self._writing.done()):
            self._uses_written_at = time.monotonic()
            self._writing = asyncio.ensure_future(asyncio.to_thread(tokens.write_uses))

    async def aclose(self) -> None:
        """See `Server`; also write the last uses of tokens."""
        self._check.cancel()
        await super().aclose()
        if self._writing is not None:
            await self._writing
        if self.identities.tokens is not None:
            await asyncio.to_thread(self.identities.tokens.write_uses)

    def _request_limits(self) -> tuple[int, float]:
        config = self._dispatcher.config
        return config.request_line, config.idle_timeout

    def _write_timeout(self) -> float:
        return self._dispatcher.config.write_timeout

    # Requests. The usual requests need no task.

    def _on_request(self, connection: Connection, line: bytes) -> None:
        if len(line) < LONG_LINE:
            self._execute(connection, partial(decode_request, line))
        else:
            self._on_long_request(connection, line)

    def _on_long_request(self, connection: Connection, line: bytes | LongLine) -> None:
        def on_decoded(decoded: asyncio.Future[protocol.Received]) -> None:
            connection.closed.remove_done_callback(on_closed)  # which refers to the request
            if not decoded.cancelled():
                self._execute(connection, decoded.result)

        def on_closed(_: asyncio.Future[None]) -> None:
            decoding.cancel()  # its memory is free for others now

        decoding = run_in_turn(decode_request, line, peer_of(connection.client))
        decoding.add_done_callback(on_decoded)
        connection.closed.add_done_callback(on_closed)

    def _execute(self, connection: Connection, decoded: Callable[[], protocol.Received]) -> None:
        """Execute the request that `decoded` returns."""
        try:
            request, connection.keep_alive, token = decoded()
            if self._dispatcher.metrics is not None:
                connection.request_name = _request_names[type(request)]
            if token is not None or self._proofs:
                self._authenticate(connection, token)
            if not connection.is_identified:
                connection.is_identified = True
                self.acceptor.confirm(connection)
            if not isinstance(request, (protocol.Call, protocol.SubmitMany)):
                connection.release_memory()
            match request:
                case protocol.Call():
                    self._submit(connection, request)
                case protocol.GetResult(wait=True):
                    self._wait_for_result(connection, request)
                case protocol.FollowStream() | protocol.ReadStream():
                    self._send_records(connection, request)
                case _:
                    connection.run(self._send_reply(connection, request))
        except Exception as error:  # noqa: BLE001 - the client gets it
            self._on_failed(connection, error)

    def _acting(self, connection: Connection) -> ActingAs:
        return ActingAs(self._dispatcher, connection.client)

    def _listing(self, connection: Connection) -> ActingAs:
        """Return the verbs for lists. Without an access file they need a built-in role, as over HTTP.

        Users who can open the control socket have all roles.
        """
        client = connection.client
        if self._dispatcher.config.access_file is None:
            is_trusted = client.listener.startswith("unix:") and client.peer in ("uid:0", f"uid:{os.geteuid()}")
            client = replace(client, needs_role=True, roles=(*client.roles, "admin") if is_trusted else client.roles)
        return ActingAs(self._dispatcher, client)

    def _submit(self, connection: Connection, request: protocol.Call) -> None:
        def on_submitted(submitted: Outcome[str]) -> None:
            if (error := submitted.exception()) is None:
                self._reply(connection, protocol.Submitted(submitted.result()))
            else:
                self._on_failed(connection, error)

        submitted = self._acting(connection).submit(request, connection.received_at)
        submitted.add_done_callback(on_submitted)

    def _wait_for_result(self, connection: Connection, request: protocol.GetResult) -> None:
        """Reply with the end of a job when it has ended; to a client that disconnects, only if it has ended now."""
        job, acting = request.job, self._acting(connection)

        def on_end(waiting: Outcome[End]) -> None:
            connection.remove_disconnect_handler()  # it would keep the end in memory
            if waiting.cancelled():
                connection.run(self._send_stored_end(connection, request))
            elif (error := waiting.exception()) is not None:
                self._on_failed(connection, error)
            else:
                if self._reply_if_room(connection, waiting.result(), request):
                    acting.record_delivery(job, connection.received_at)

        waiting = acting.result(job)
        waiting.add_done_callback(on_end)
        connection.on_disconnect(waiting.cancel)

    async def _send_stored_end(self, connection: Connection, request: protocol.GetResult) -> None:
        end = (await self._acting(connection).get_job(request.job)).end
        if end is None:
            raise ClientDisconnected
        self._reply_if_room(connection, end, request)

    async def _send_reply(self, connection: Connection, request: protocol.Request) -> None:
        acting = self._acting(connection)
        reply: protocol.Reply
        match request:
            case protocol.SubmitMany(calls, has_secrets):
                if has_secrets:
                    self._dispatcher.require_secret_keys()
                received = cast(Sequence[protocol.Call], calls)  # encoded calls occur only in clients
                reply = protocol.SubmittedMany(await acting.submit_many(received))
            case protocol.Cancel(job, wait):
                cancelled = await acting.cancel(job)
                reply = protocol.WasCancelled(cancelled, await self._wait_stopped(connection, job) if wait else None)
            case protocol.GetResult(job):
                reply = (await acting.get_job(job)).end or protocol.NoResult()
            case protocol.GetStatus(job):
                reply = _status(await acting.get_job(job))
            case protocol.GetDetails(job):
                reply = protocol.Details(await acting.details(job))
            case protocol.ListJobs():
                reply = await listing.list_jobs(self._listing(connection), request)
            case protocol.CountJobs():
                reply = await listing.count_jobs(self._listing(connection), request)
            case protocol.ListHosts():
                reply = await listing.list_hosts(self._listing(connection), request)
            case protocol.ListQueues():
                reply = await listing.list_queues(self._listing(connection), request)
        if isinstance(request, (protocol.SubmitMany, protocol.Cancel)):
            self._reply(connection, reply)
        else:
            self._reply_if_room(connection, reply, request)

    async def _wait_stopped(self, connection: Connection, job: str) -> Envelope | None:
        """Return the state of a job's stop when it is final; None if the job was not stopped."""
        waiting = asyncio.ensure_future(self._acting(connection).wait_stopped(job))
        connection.on_disconnect(waiting.cancel)
        try:
            details = await waiting
        except UnknownJob:
            return None
        except asyncio.CancelledError as error:
            raise ClientDisconnected from error
        if details.job.stop is None:
            return None
        return Envelope(state=details.job.stop.value, stop_report=details.metadata.stop_report)

    def _send_records(self, connection: Connection, request: protocol.FollowStream | protocol.ReadStream) -> None:
        """Send the records of a job as fast as the client reads them, then its end."""

        def send_more() -> None:
            if connection.is_waiting_for_memory:
                return
            try:
                while connection.is_sent and not connection.is_closing:
                    item = stream.next_item()
                    if item is None:
                        return
                    line = item.lines(request.timed) if isinstance(item, RecordBatch) else protocol.encode_reply(item)
                    if not connection.reserve(len(line), send_more):
                        stream.put_back(item)
                        return
                    send(item, line)
            except Exception as error:  # noqa: BLE001 - the client gets it
                self._on_failed(connection, error)
            if connection.is_closing:
                stream.close()
            else:
                connection.on_sent = send_more

        def send(item: RecordBatch | End | protocol.Continue, line: bytes) -> None:
            if isinstance(item, protocol.Continue) and follow:
                connection.abort()  # the client disconnected before the end
                return
            connection.write(line)
            if not isinstance(item, RecordBatch):
                self._count(connection, "ok")
                stream.close()
                connection.close()

        follow = isinstance(request, protocol.FollowStream)
        stream = self._acting(connection).stream(request.job, request.since, request.recent, follow, send_more)
        connection.on_disconnect(lambda: stream.close() if connection.is_closing else stream.stop_waiting())

    # Replies.

    def _reply_if_room(self, connection: Connection, reply: protocol.Reply, request: protocol.Request) -> bool:
        """Send the reply to a request without side effects; without memory for it, execute the request again later."""
        return self._reply(
            connection,
            reply,
            lambda: self._execute(connection, lambda: protocol.Received(request, connection.keep_alive, None)),
        )

    def _reply(self, connection: Connection, reply: protocol.Reply, retry: Callable[[], object] | None = None) -> bool:
        """Send the reply to a request, then wait for the next request or close, as the client has requested.

        With `retry`, return False if there is no memory for the reply; `retry` is called when there is memory.
        """
        keep_alive = connection.keep_alive and not connection.has_extra_input and not self.acceptor.near_capacity
        line = protocol.encode_reply(reply, self._dispatcher.config.idle_timeout if keep_alive else None)
        if retry is not None and not connection.reserve(len(line), retry):
            return False
        connection.write(line)
        if self._dispatcher.metrics is not None:
            self._count(connection, "ok")
        if keep_alive:
            connection.read_request()
        else:
            connection.close()
        return True

    def _on_failed(self, connection: Connection, error: BaseException) -> None:
        if isinstance(error, AuthError) and error.recorded is None:
            fields = {"reason": error.reason, "token": error.token or None}
            error.recorded = self._dispatcher.audit.record_denial(connection.client, "authenticate", **fields)
        if isinstance(error, Refusal) and error.recorded is not None and not error.recorded.done():
            error.recorded.add_done_callback(lambda _: self._on_failed(connection, error))
            return
        if isinstance(error, Refusal) and error.recorded is not None:
            error.recorded.exception()  # it is refused all the same
        client = connection.client.peer
        match error:
            case ProtocolError():
                # Every invalid request has the type invalid_request; an exhausted limit has a separate type.
                kind = error.type if error.type == "too_many_connections" else "invalid_request"
                failure = protocol.Refused(kind, _shorten(error.message))
                log.info("request refused", extra={"client": client, "reason": failure.message})
            case AuthError():
                reason, token = error.reason, error.token
                if self._dispatcher.metrics is not None:
                    self._dispatcher.metrics.auth_failures[("client",)] += 1
                log.info("client not authenticated", extra={"client": client, "reason": reason, "token": token})
                failure = _auth_refusal(str(error))
                if error.delay:
                    connection.on_disconnect(connection.abort)
                    self.timers.call_later(error.delay, lambda: self._refuse(connection, failure))
                    return
            case AccessDenied():
                failure = protocol.Refused(
                    "access_denied", _shorten(str(error)), refused=connection.client.authenticated
                )
            case RateLimited():
                retry_after = error.retry_after if (known := connection.client.authenticated) else None
                failure = protocol.Refused("rate_limited", _shorten(str(error)), retry_after=retry_after, refused=known)
            case UnknownJob():
                failure = protocol.Refused("invalid_jobid", _shorten(f"there is no job {error}"))
            case RequestIDReused():
                failure = protocol.Refused("request_id_reused", _shorten(str(error)))
                log.info("request refused", extra={"client": client, "reason": failure.message})
            case InvalidFilter():
                failure = protocol.Refused("invalid_filter", _shorten(str(error)))
            case InvalidCursor():
                failure = protocol.Refused("invalid_cursor", _shorten(str(error)))
            case StorageError():
                log.error("request failed: storage error", extra={"client": client, "reason": str(error)})
                failure = protocol.Refused("storage_error", str(error))
            case _:
                log.error("request failed: internal error", extra={"client": client}, exc_info=error)
                failure = protocol.Refused("internal_error", "internal error of the dispatcher; see its log")
        self._refuse(connection, failure)

    def _count(self, connection: Connection, outcome: str) -> None:
        if self._dispatcher.metrics is not None:
            self._dispatcher.metrics.count_request("client", connection.request_name, outcome)
            connection.request_name = "invalid"

    def _refuse(self, connection: Connection, refusal: protocol.Refused) -> None:
        self._count(connection, refusal.type)
        connection.write(protocol.encode_reply(refusal))
        connection.close()


class _RequestNames(dict[type, str]):
    """The names of kinds of requests in metrics, by class: ``get_result`` for `GetResult`."""

    def __missing__(self, kind: type) -> str:
        name = self[kind] = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
        return name


_request_names = _RequestNames()


def _auth_refusal(message: str) -> protocol.Refused:
    # A client whose certificate is still accepted can continue on a new connection.
    retry_after = 0.0 if message in (CERTIFICATES_CHANGED, USER_CHANGED) else None
    return protocol.Refused("auth_error", message, retry_after=retry_after, refused=True)


def _status(job: Job) -> protocol.Status:
    start, end = (None if time is None else int(time) for time in (job.started, job.ended))
    return protocol.Status(job.host, job.procedure, job.arguments, int(job.submitted), start, end, job.info)


def _shorten(message: str) -> str:
    return message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."
