"""What is known of each host: its supervisor's instance id, and whether it supports resumable calls and keep-alive.

The first request to a host lists the calls that it holds for this dispatcher. The reply contains the instance id that
a start has to name, and shows orphaned calls. A legacy harpd rejects this request. The request is sent again
after 300 s, because the host may have been upgraded.

Spec: docs/protocol.md, Resumable calls.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import CallList, ListCalls, Message
from harpcaller.config import Config
from harpcaller.hosts.connecting import HostUnreachable
from harpcaller.hosts.connection import open_connection
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


@dataclass(slots=True)
class _Entry:
    """What is known of a host.

    Attributes:
        instance: the supervisor's instance id; None for a legacy harpd, or if not known.
        keep_alive: whether the host supports keep-alive.
        learned_at: monotonic time of the last reply; None before it.
        query: the query that is in progress.
    """

    instance: str | None = None
    keep_alive: bool = False
    learned_at: float | None = None
    query: asyncio.Task[str | None] | None = field(default=None, repr=False)


class HostCapabilities:
    """A cache of what hosts support; it sends one query at a time to each host.

    `on_call_list` is called with the ids of the calls that a host holds for this dispatcher.
    """

    def __init__(self, identity: Identity, on_call_list: Callable[[Host, Sequence[str]], None]) -> None:
        self._identity = identity
        self._on_call_list = on_call_list
        self._entries: dict[Host, _Entry] = {}

    async def get_instance(self, host: Host, tls: HostTLS, config: Config) -> str | None:
        """Return the instance id that a start on this host has to name; None for a legacy harpd.

        Raises:
            HostUnreachable: the host refused the query with an error that a start would receive too.
            LineTooLong: the reply is too long.
            TimeoutError: the host did not reply in time.
            OSError, CertificateRefused, UnicodeError: see `harpcaller.hosts.connecting.connect`.
        """
        entry = self._entries.setdefault(host, _Entry())
        if entry.learned_at is not None:
            age = time.monotonic() - entry.learned_at
            if entry.instance is not None or age < _LEGACY_RETRY_SECONDS:
                return entry.instance
        if entry.query is None or entry.query.done():
            entry.query = asyncio.create_task(self._query(host, tls, config, entry))
            entry.query.add_done_callback(_consume_exception)
        return await asyncio.shield(entry.query)

    def supports_keep_alive(self, host: Host) -> bool:
        """Return whether the host is known to support keep-alive."""
        entry = self._entries.get(host)
        return entry is not None and entry.instance is not None and entry.keep_alive

    def set_legacy(self, host: Host) -> None:
        """Record that a host runs a legacy harpd, as its acknowledgement has shown."""
        entry = self._entries.setdefault(host, _Entry())
        entry.instance, entry.learned_at = None, time.monotonic()

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

    async def _query(self, host: Host, tls: HostTLS, config: Config, entry: _Entry) -> str | None:
        reply = await self._request_call_list(host, tls, config)
        if isinstance(reply, Failed) and reply.type == "invalid_request":
            # A current harpd replies so to a request that arrived too slowly: a second one may succeed.
            reply = await self._request_call_list(host, tls, config)
        match reply:
            case CallList(calls, instance, keep_alive):
                entry.instance, entry.keep_alive = instance, keep_alive is not None
                self._on_call_list(host, calls)
            case Failed(kind) if kind in _TEMPORARY_ERRORS:
                raise HostUnreachable(reply)
            case _:  # any other error: the host does not know the request
                log.info("host runs a legacy harpd", extra={"host": host.hostname})
                entry.instance = None
        entry.learned_at = time.monotonic()
        return entry.instance

    async def _request_call_list(self, host: Host, tls: HostTLS, config: Config) -> Message | None:
        """Return the host's reply; None if the reply is not part of the protocol, as from another program."""
        conn = await open_connection(host, tls, config, _MAX_LIST_BYTES)
        try:
            owner = self._identity.owner_at(host.hostname)
            conn.send_request(ListCalls(owner, host.user, host.password, keep_alive=True))
            async with asyncio.timeout(config.acknowledgement_timeout):
                lines: list[bytes] | None = []
                while lines == []:
                    lines = await conn.read()
                if lines is None:  # does not show a legacy harpd: a middlebox may have closed the connection
                    raise ConnectionAbortedError("it closed the connection without an answer")
                return conn.parse_line(lines[0])
        except ProtocolError:
            return None
        finally:
            conn.abort()


def _consume_exception(task: asyncio.Task[str | None]) -> None:
    """Prevent a log entry for a failed query if no run waits for it any more."""
    if not task.cancelled():
        task.exception()
