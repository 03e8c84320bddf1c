"""Whether the dispatcher is ready for work: the checks of ``/readyz``, of ``harpcallerd status`` and of its start.

A host that cannot be reached is never a reason: its jobs wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import NamedTuple

from harp_daemon.process import notify_service_manager
from harpcaller.dispatcher import Dispatcher
from harpcaller.store import StorageError

log = logging.getLogger(__name__)

_RECENT_COMMIT = 10.0  #: Seconds for which a commit proves that the store can be written.
_WRITE_TIMEOUT = 5.0  #: Maximum seconds for a write without a change.
_START_INTERVAL = 0.2  #: Seconds between two checks while the dispatcher starts.
#: While the start takes longer than the first number of seconds, the service manager waits for the second one more.
_PATIENCE, _EXTENSION = 5.0, 30.0


class Check(NamedTuple):
    """A condition of readiness."""

    name: str
    ok: bool
    detail: str


class Health:
    """The checks of a dispatcher.

    A commit within `recent_commit` seconds proves that the store can be written; otherwise a write without a change
    does, within `write_timeout` seconds.
    """

    def __init__(
        self, dispatcher: Dispatcher, recent_commit: float = _RECENT_COMMIT, write_timeout: float = _WRITE_TIMEOUT
    ) -> None:
        self.is_stopping = False  #: Set when the program stops.
        self._dispatcher = dispatcher
        self._recent_commit, self._write_timeout = recent_commit, write_timeout
        self._writing: asyncio.Future[Check] | None = None

    async def check(self) -> list[Check]:
        """Return the checks; the dispatcher is ready if all are ok."""
        store = await self._check_store()
        registry_is_ready = self._dispatcher.registry.is_ready
        has_recovered = self._dispatcher.is_claiming or self.is_stopping
        return [
            store,
            Check("hosts", registry_is_ready, "" if registry_is_ready else "the hosts registry is not loaded yet"),
            Check("recovery", has_recovered, "" if has_recovered else "the jobs before the start are not taken over"),
            Check("serving", not self.is_stopping, "the dispatcher stops" if self.is_stopping else ""),
        ]

    async def _check_store(self) -> Check:
        if waiting := self._dispatcher.waiting_writes:
            return Check("store", False, f"{waiting} writes have failed and are repeated")
        if (missing := self._dispatcher.missing_store) is not None:
            return Check("store", False, missing)
        if time.monotonic() - self._dispatcher.store.committed_at < self._recent_commit:
            return Check("store", True, "")
        if self._writing is None or self._writing.done():  # one write for all that ask
            self._writing = asyncio.ensure_future(self._write())
        return await asyncio.shield(self._writing)

    async def _write(self) -> Check:
        try:
            async with asyncio.timeout(self._write_timeout):
                await self._dispatcher.store.check_writable()
        except TimeoutError:
            return Check("store", False, f"no write within {self._write_timeout:g} s")
        except StorageError as error:
            return Check("store", False, str(error))
        return Check("store", True, "")

    async def notify_when_ready(self, patience: float = _PATIENCE) -> None:
        """Tell the service manager when the dispatcher is ready for the first time, and after a while that it waits."""
        began_at, status = time.monotonic(), ""
        while failed := [check for check in await self.check() if not check.ok]:
            if time.monotonic() - began_at > patience:
                # Another run of `host_db_script` may take minutes; jobs are accepted meanwhile.
                status = "; ".join(check.detail for check in failed)
                notify_service_manager(f"EXTEND_TIMEOUT_USEC={int(_EXTENSION * 1e6)}\nSTATUS=not ready: {status}")
            await asyncio.sleep(_START_INTERVAL)
        notify_service_manager("READY=1\nSTATUS=" if status else "READY=1")
        log.info("harpcallerd is ready")
