"""What each host supports: its supervisor's instance id, resumable calls and keep-alive.

The first request to a host lists its calls of this dispatcher; the reply also has the instance id. A legacy harpd
rejects the request; it is sent again after 300 s. Spec: docs/protocol.md, Resumable calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from harp.protocol.ends import Failed
from harp.protocol.harpd import CALLER, SECRETS, CallList, ListCalls, Message, Phase, encode_request
from harp.protocol.schema import ProtocolError
from harp_daemon.timer_wheel import TimerWheel
from harpcaller.config import Config
from harpcaller.hosts.connecting import HostUnreachable, open_connection
from harpcaller.hosts.connection import MessageQueue
from harpcaller.hosts.registry import Host
from harpcaller.hosts.resolving import Resolver
from harpcaller.hosts.tls import HostTLS
from harpcaller.model.jobs import Identity

log = logging.getLogger(__name__)

_LEGACY_RETRY_SECONDS = 300.0  #: Seconds after which a legacy harpd is queried again.
#: Errors that do not prove a legacy harpd: a current one may reply them, too, whatever the request is.
_UNSPECIFIC_ERRORS = frozenset(
    {
        "access_denied",
        "auth_error",
        "authentication_timeout",
        "call_died",
        "procedure_loading_error",
        "shutdown",
        "system_error",
        "too_many_connections",
    }
)
_MAX_LIST_BYTES = 1024 * 1024  #: Maximum length of a list of calls in bytes: about 26,000 calls.


class HostSupport(NamedTuple):
    """What a host supports; the default is a legacy harpd."""

    instance: str | None = None  # the supervisor's instance id, which a start must name; None: a legacy harpd
    keep_alive: bool = False
    caller: bool = False  # a start may say for whom it is
    secrets: bool = False  # a start may say which values of its arguments are secret
    version: str | None = None  # of the harpd; None: it does not send it

    def describe(self) -> dict[str, Any]:
        """Return what lists of hosts show."""
        features = [name for name in ("keep_alive", "caller", "secrets") if getattr(self, name)]
        return {
            "keeps_calls": self.instance is not None,
            "instance": self.instance,
            "features": features,
            "version": self.version,
        }


LEGACY = HostSupport()


class HostCapabilities:
    """A cache of the capabilities of hosts; `on_call_list` is called with the call ids that a host lists."""

    def __init__(
        self,
        identity: Identity,
        timers: TimerWheel,
        resolver: Resolver,
        on_call_list: Callable[[Host, Sequence[str]], None],
    ) -> None:
        self._identity = identity
        self._timers = timers
        self._resolver = resolver
        self._on_call_list = on_call_list
        self._cached: dict[Host, HostSupport] = {}
        self._queries: dict[Host, asyncio.Task[HostSupport]] = {}

    def get_cached(self, host: Host) -> HostSupport | None:
        """Return what a host supports; None if it must be queried."""
        return self._cached.get(host)

    async def get(self, host: Host, tls: HostTLS, config: Config) -> HostSupport:
        """Return what a host supports; query it if that is not cached. Raises one of `CONNECTION_ERRORS`."""
        if (cached := self.get_cached(host)) is not None:
            return cached
        query = self._queries.get(host)
        if query is None:
            query = self._queries[host] = asyncio.create_task(self._query(host, tls, config))
            query.add_done_callback(partial(self._on_queried, host))
        return await asyncio.shield(query)

    def _on_queried(self, host: Host, query: asyncio.Task[HostSupport]) -> None:
        del self._queries[host]
        if not query.cancelled():
            query.exception()  # marks it as retrieved, in case no run waits for it

    def set_legacy(self, host: Host) -> None:
        """Store that a host runs a legacy harpd, as its acknowledgement has shown."""
        self._cached[host] = LEGACY
        self._timers.call_later(_LEGACY_RETRY_SECONDS, partial(self.invalidate, host))

    def invalidate(self, host: Host) -> None:
        """Query the host again before the next start."""
        self._cached.pop(host, None)

    async def close(self) -> None:
        """Cancel all queries."""
        for query in self._queries.values():
            query.cancel()
        await asyncio.gather(*self._queries.values(), return_exceptions=True)

    async def _query(self, host: Host, tls: HostTLS, config: Config) -> HostSupport:
        reply = await self._request_call_list(host, tls, config)
        if isinstance(reply, Failed) and reply.type == "invalid_request":
            # A current harpd sends this reply if the request arrived too slowly; a second request may succeed.
            reply = await self._request_call_list(host, tls, config)
        match reply:
            case CallList(calls, instance, keep_alive, features, version):
                announced = features or ()
                support = HostSupport(
                    instance, keep_alive is not None, CALLER in announced, SECRETS in announced, version
                )
                self._cached[host] = support
                self._on_call_list(host, calls)
                return support
            case Failed(kind) if kind in _UNSPECIFIC_ERRORS:  # a start would receive the same error
                raise HostUnreachable(reply)
            case _:  # the host does not support the request
                log.info("host runs a legacy harpd", extra={"host": host.hostname})
                self.set_legacy(host)
                return LEGACY

    async def _request_call_list(self, host: Host, tls: HostTLS, config: Config) -> Message | None:
        """Return the host's reply; None if it violates the protocol, for example because it is another program's."""
        conn = await open_connection(host, tls, config, self._timers, self._resolver, _MAX_LIST_BYTES)
        try:
            request = ListCalls(self._identity.owner_at(host.hostname), host.user, host.password, keep_alive=True)
            messages = MessageQueue(conn)
            conn.send_request(encode_request(request), Phase.SENT_LIST, messages)
            async with asyncio.timeout(config.acknowledgement_timeout):
                reply = await messages.receive()
        except ProtocolError:
            return None
        finally:
            conn.abort()
        if reply is None:  # this does not prove a legacy harpd: a middlebox may have closed the connection
            raise ConnectionAbortedError("it closed the connection without a reply")
        return reply
