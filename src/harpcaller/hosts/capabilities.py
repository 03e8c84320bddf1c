"""What is known of each host: whether its harpd keeps calls, by which warden, and whether it can be reached.

The first question to a host is which calls it holds for us. The answer names the warden that a start has to name, and
shows calls that nobody here wants any more. A harpd of the field does not understand the question: it is asked again
after a while, as it may have been replaced.

Spec: docs/protocol.md, Kept calls.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import Held, ListCalls, Message
from harpcaller.config import Config
from harpcaller.hosts.connecting import HostUnreachable
from harpcaller.hosts.connection import open_connection
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.tls import HostTLS
from harpcaller.model.jobs import Identity

__all__ = ["HostCapabilities"]

log = logging.getLogger(__name__)

#: Seconds after which a harpd of the field is asked again whether it is one.
_LEGACY_RETRY_SECONDS = 300.0
#: Errors of a harpd that understood the question, or can't tell yet.
_TEMPORARY_ERRORS = frozenset(
    {"auth_error", "too_many_connections", "shutdown", "procedure_loading_error", "system_error", "call_died"}
)

#: The most bytes of the list of calls that a host holds: two hundred thousand of them.
_MAX_LIST_BYTES = 8 * 1024 * 1024

_HostKey = tuple[str, str, int]


@dataclass(slots=True)
class _Entry:
    """A host's page.

    Attributes:
        warden: the warden's name; None: a harpd of the field, or nothing was learnt.
        keeps: whether it keeps connections for another request.
        learnt: when it was learnt.
        asking: the question under way.
    """

    instance: str | None = None
    keep_alive: bool = False
    learned_at: float | None = None
    query: asyncio.Task[str | None] | None = field(default=None, repr=False)


class HostCapabilities:
    """Learns about hosts, each question once at a time.

    Args:
        identity: who we are to the hosts.
        on_held: called with the calls that a host says it holds for us.
    """

    def __init__(self, identity: Identity, on_call_list: Callable[[Host, Sequence[str]], None]) -> None:
        self._identity = identity
        self._on_call_list = on_call_list
        self._entries: dict[_HostKey, _Entry] = {}

    async def get_instance(self, host: Host, tls: HostTLS, config: Config) -> str | None:
        """The warden that a start on this host has to name; None: its harpd is one of the field.

        Raises:
            HostUnreachable: the host refused the question for a reason that a start would meet as well.
            LineTooLong: it does not speak the protocol.
            TimeoutError: it did not answer.
            OSError, CertificateRefused, UnicodeError: it can't be reached, see `harpcaller.hosts.connecting`.
        """
        page = self._entries.setdefault(_host_key(host), _Entry())
        if page.learned_at is not None and (
            page.instance is not None or time.monotonic() - page.learned_at < _LEGACY_RETRY_SECONDS
        ):
            return page.instance
        if page.query is None or page.query.done():
            page.query = asyncio.create_task(self._query(host, tls, config, page))
            page.query.add_done_callback(_consume_exception)
        return await asyncio.shield(page.query)

    def supports_keep_alive(self, host: Host) -> bool:
        """Whether the host is known to keep connections for another request."""
        page = self._entries.get(_host_key(host))
        return page is not None and page.instance is not None and page.keep_alive

    def set_instance(self, host: Host, instance: str | None) -> None:
        """The host has said itself which warden it has; None: it is one of the field."""
        page = self._entries.setdefault(_host_key(host), _Entry())
        page.instance, page.learned_at = instance, time.monotonic()

    def invalidate(self, host: Host) -> None:
        """Ask the host again before the next start; a question that is under way will do."""
        page = self._entries.get(_host_key(host))
        if page is not None and (page.query is None or page.query.done()):
            del self._entries[_host_key(host)]

    async def close(self) -> None:
        """Ask nothing more."""
        asking = [page.query for page in self._entries.values() if page.query is not None and not page.query.done()]
        for task in asking:
            task.cancel()
        if asking:
            await asyncio.wait(asking)

    async def _query(self, host: Host, tls: HostTLS, config: Config, page: _Entry) -> str | None:
        answer = await self._request_call_list(host, tls, config)
        if isinstance(answer, Failed) and answer.type == "invalid_request":
            # Our own harpd says this of a question that was too long on its way: the next one may fare better.
            answer = await self._request_call_list(host, tls, config)
        match answer:
            case Held(calls, warden, keep):
                page.instance, page.keep_alive = warden, keep is not None
                self._on_call_list(host, calls)
            case Failed(kind) if kind in _TEMPORARY_ERRORS:
                raise HostUnreachable(answer)
            case _:  # another error: it does not know the question
                log.info("host's harpd does not keep calls: it is an older one", extra={"host": host.hostname})
                page.instance = None
        page.learned_at = time.monotonic()
        return page.instance

    async def _request_call_list(self, host: Host, tls: HostTLS, config: Config) -> Message | None:
        """Ask; return what the host says, None: what makes no sense here, as an older program may say."""
        conversation = await open_connection(host, tls, config, _MAX_LIST_BYTES)
        try:
            owner = self._identity.owner_at(host.hostname)
            conversation.send_request(ListCalls(owner, host.user, host.password, keep=True))
            async with asyncio.timeout(config.acknowledgement_timeout):
                lines: list[bytes] | None = []
                while lines == []:
                    lines = await conversation.read()
                if lines is None:  # which says nothing of the host: anything between may have cut the connection
                    raise ConnectionAbortedError("it closed the connection without an answer")
                return conversation.parse_line(lines[0])
        except ProtocolError:
            return None
        finally:
            conversation.abort()


def _consume_exception(task: asyncio.Task[str | None]) -> None:
    """Whoever asked may be gone by now: then nobody else takes note of a failure."""
    if not task.cancelled():
        task.exception()


def _host_key(host: Host) -> _HostKey:
    return host.hostname, host.address, host.port
