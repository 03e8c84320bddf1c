"""What is known of each host: its supervisor's instance id, and whether it supports resumable calls and keep-alive.

The first request to a host lists the calls that it holds for this dispatcher. The reply contains the instance id that
a start has to name, and shows orphaned calls. A legacy harpd rejects this request. The request is sent again
after 300 s, because the host may have been upgraded.

Spec: docs/protocol.md, Resumable calls.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import CallList, ListCalls, Message, Phase, encode_request
from harp_daemon.timer_wheel import TimerWheel
from harpcaller.config import Config
from harpcaller.hosts.connecting import HostUnreachable
from harpcaller.hosts.connection import MessageQueue, open_connection
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.tls import HostTLS
from harpcaller.model.jobs import Identity

log = logging.getLogger(__name__)

#: Seconds after which a legacy harpd is queried again.
_LEGACY_RETRY_SECONDS = 300.0
#: Errors that do not show a legacy harpd.
_TEMPORARY_ERRORS = frozenset(
    {"auth_error", "too_many_connections", "shutdown", "procedure_loading_error", "system_error", "call_died"}
)

#: Maximum length of a list of calls in bytes: about 200,000 calls.
_MAX_LIST_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class HostSupport:
    """What a host supports.

    Attributes:
        instance: the supervisor's instance id, which a start has to name; None: a legacy harpd.
        keep_alive: whether the host supports keep-alive.
    """

    instance: str | None = None
    keep_alive: bool = False


#: The support of a legacy harpd.
LEGACY = HostSupport()


@dataclass(slots=True)
class _Entry:
    """What is known of a host.

    Attributes:
        support: its support according to the last reply.
        expires_at: monotonic time at which this has to be queried again.
        query: the query that is in progress.
    """

    support: HostSupport = LEGACY
    expires_at: float = -math.inf
    query: asyncio.Task[HostSupport] | None = field(default=None, repr=False)


class HostCapabilities:
    """A cache of what hosts support; it sends one query at a time to each host.

    Args:
        identity: the dispatcher's identity.
        timers: the timers of the event loop.
        on_call_list: called with the ids of the calls that a host holds for this dispatcher.
    """

    def __init__(
        self, identity: Identity, timers: TimerWheel, on_call_list: Callable[[Host, Sequence[str]], None]
    ) -> None:
        self._identity = identity
        self._timers = timers
        self._on_call_list = on_call_list
        self._entries: dict[Host, _Entry] = {}

    def get_known(self, host: Host) -> HostSupport | None:
        """Return what a host supports; None if it has to be queried."""
        entry = self._entries.get(host)
        return None if entry is None or time.monotonic() >= entry.expires_at else entry.support

    async def get(self, host: Host, tls: HostTLS, config: Config) -> HostSupport:
        """Return what a host supports; query it if that is not known.

        Raises:
            HostUnreachable: the host refused the query with an error that a start would receive too.
            LineTooLong: the reply is too long.
            TimeoutError: the host did not reply in time.
            OSError, CertificateRefused, UnicodeError: see `harpcaller.hosts.connecting.connect`.
        """
        known = self.get_known(host)
        if known is not None:
            return known
        entry = self._entries.setdefault(host, _Entry())
        if entry.query is None or entry.query.done():
            entry.query = asyncio.create_task(self._query(host, tls, config, entry))
            entry.query.add_done_callback(_consume_exception)
        return await asyncio.shield(entry.query)

    def set_legacy(self, host: Host) -> None:
        """Record that a host runs a legacy harpd, as its acknowledgement has shown."""
        entry = self._entries.setdefault(host, _Entry())
        entry.support, entry.expires_at = LEGACY, time.monotonic() + _LEGACY_RETRY_SECONDS

    def invalidate(self, host: Host) -> None:
        """Query the host again before the next start, unless a query is in progress."""
        entry = self._entries.get(host)
        if entry is not None and (entry.query is None or entry.query.done()):
            del self._entries[host]

    async def close(self) -> None:
        """Cancel all queries."""
        queries = [entry.query for entry in self._entries.values() if entry.query is not None]
        for query in queries:
            query.cancel()
        if queries:
            await asyncio.wait(queries)

    async def _query(self, host: Host, tls: HostTLS, config: Config, entry: _Entry) -> HostSupport:
        reply = await self._request_call_list(host, tls, config)
        if isinstance(reply, Failed) and reply.type == "invalid_request":
            # A current harpd replies so to a request that arrived too slowly: a second one may succeed.
            reply = await self._request_call_list(host, tls, config)
        match reply:
            case CallList(calls, instance, keep_alive):
                entry.support, entry.expires_at = HostSupport(instance, keep_alive is not None), math.inf
                self._on_call_list(host, calls)
            case Failed(kind) if kind in _TEMPORARY_ERRORS:
                raise HostUnreachable(reply)
            case _:  # any other error: the host does not know the request
                log.info("host runs a legacy harpd", extra={"host": host.hostname})
                self.set_legacy(host)
        return entry.support

    async def _request_call_list(self, host: Host, tls: HostTLS, config: Config) -> Message | None:
        """Return the host's reply; None if the reply is not part of the protocol, as from another program."""
        conn = await open_connection(host, tls, config, self._timers, _MAX_LIST_BYTES)
        try:
            request = ListCalls(self._identity.owner_at(host.hostname), host.user, host.password, keep_alive=True)
            messages = MessageQueue(conn)
            conn.send_request(encode_request(request), Phase.SENT_LIST, messages)
            async with asyncio.timeout(config.acknowledgement_timeout):
                reply = await messages.receive()
            if reply is None:  # does not show a legacy harpd: a middlebox may have closed the connection
                raise ConnectionAbortedError("it closed the connection without an answer")
        except ProtocolError:
            return None
        else:
            return reply
        finally:
            conn.abort()


def _consume_exception(task: asyncio.Task[HostSupport]) -> None:
    """Prevent a log entry for a failed query if no run waits for it any more."""
    if not task.cancelled():
        task.exception()
