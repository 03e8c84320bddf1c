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
from harpcaller.hosts.connection import dial
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.tls import HostTLS
from harpcaller.model.jobs import Identity

__all__ = ["HostBook"]

log = logging.getLogger(__name__)

#: Seconds after which a harpd of the field is asked again whether it is one.
_ASK_AGAIN = 300.0
#: Errors of a harpd that understood the question, or can't tell yet.
_NOT_NOW = frozenset(
    {"auth_error", "too_many_connections", "shutdown", "procedure_loading_error", "system_error", "call_died"}
)

#: The most bytes of the list of calls that a host holds: two hundred thousand of them.
_LONGEST_LIST = 8 * 1024 * 1024

_Place = tuple[str, str, int]


@dataclass(slots=True)
class _Page:
    """A host's page.

    Attributes:
        warden: the warden's name; None: a harpd of the field, or nothing was learnt.
        keeps: whether it keeps connections for another request.
        learnt: when it was learnt.
        asking: the question under way.
    """

    warden: str | None = None
    keeps: bool = False
    learnt: float | None = None
    asking: asyncio.Task[str | None] | None = field(default=None, repr=False)


class HostBook:
    """Learns about hosts, each question once at a time.

    Args:
        identity: who we are to the hosts.
        on_held: called with the calls that a host says it holds for us.
    """

    def __init__(self, identity: Identity, on_held: Callable[[Host, Sequence[str]], None]) -> None:
        self._identity = identity
        self._on_held = on_held
        self._pages: dict[_Place, _Page] = {}

    async def warden(self, host: Host, tls: HostTLS, config: Config) -> str | None:
        """The warden that a start on this host has to name; None: its harpd is one of the field.

        Raises:
            HostUnreachable: the host refused the question for a reason that a start would meet as well.
            LineTooLong: it does not speak the protocol.
            TimeoutError: it did not answer.
            OSError, CertificateRefused, UnicodeError: it can't be reached, see `harpcaller.hosts.connecting`.
        """
        page = self._pages.setdefault(_place(host), _Page())
        if page.learnt is not None and (page.warden is not None or time.monotonic() - page.learnt < _ASK_AGAIN):
            return page.warden
        if page.asking is None or page.asking.done():
            page.asking = asyncio.create_task(self._ask(host, tls, config, page))
            page.asking.add_done_callback(_heed)
        return await asyncio.shield(page.asking)

    def keeps(self, host: Host) -> bool:
        """Whether the host is known to keep connections for another request."""
        page = self._pages.get(_place(host))
        return page is not None and page.warden is not None and page.keeps

    def learnt(self, host: Host, warden: str | None) -> None:
        """The host has said itself which warden it has; None: it is one of the field."""
        page = self._pages.setdefault(_place(host), _Page())
        page.warden, page.learnt = warden, time.monotonic()

    def forget(self, host: Host) -> None:
        """Ask the host again before the next start; a question that is under way will do."""
        page = self._pages.get(_place(host))
        if page is not None and (page.asking is None or page.asking.done()):
            del self._pages[_place(host)]

    async def close(self) -> None:
        """Ask nothing more."""
        asking = [page.asking for page in self._pages.values() if page.asking is not None and not page.asking.done()]
        for task in asking:
            task.cancel()
        if asking:
            await asyncio.wait(asking)

    async def _ask(self, host: Host, tls: HostTLS, config: Config, page: _Page) -> str | None:
        answer = await self._answer(host, tls, config)
        if isinstance(answer, Failed) and answer.type == "invalid_request":
            # Our own harpd says this of a question that was too long on its way: the next one may fare better.
            answer = await self._answer(host, tls, config)
        match answer:
            case Held(calls, warden, keep):
                page.warden, page.keeps = warden, keep is not None
                self._on_held(host, calls)
            case Failed(kind) if kind in _NOT_NOW:
                raise HostUnreachable(answer)
            case _:  # another error: it does not know the question
                log.info("host's harpd does not keep calls: it is an older one", extra={"host": host.hostname})
                page.warden = None
        page.learnt = time.monotonic()
        return page.warden

    async def _answer(self, host: Host, tls: HostTLS, config: Config) -> Message | None:
        """Ask; return what the host says, None: what makes no sense here, as an older program may say."""
        conversation = await dial(host, tls, config, _LONGEST_LIST)
        try:
            owner = self._identity.owner_at(host.hostname)
            conversation.ask(ListCalls(owner, host.user, host.password, keep=True))
            async with asyncio.timeout(config.acknowledgement_timeout):
                lines: list[bytes] | None = []
                while lines == []:
                    lines = await conversation.read()
                if lines is None:  # which says nothing of the host: anything between may have cut the connection
                    raise ConnectionAbortedError("it closed the connection without an answer")
                return conversation.message(lines[0])
        except ProtocolError:
            return None
        finally:
            conversation.abort()


def _heed(task: asyncio.Task[str | None]) -> None:
    """Whoever asked may be gone by now: then nobody else takes note of a failure."""
    if not task.cancelled():
        task.exception()


def _place(host: Host) -> _Place:
    return host.hostname, host.address, host.port
