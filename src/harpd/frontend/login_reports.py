"""Reports of failed logins to the supervisor, which has the audit file.

Equal ones of a second are one report with a count, and a message has a limited number of reports: an attacker who
fails often costs the supervisor little. While there is no supervisor, they are kept, in the same limited number.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from harpd.control.supervisor_client import SupervisorClient, SupervisorError

log = logging.getLogger("harpd.frontend")

_INTERVAL = 1.0  #: Seconds between two messages.
_MAX_REPORTS = 100  #: Maximum number of different reports in a message.
_MAX_NAME = 256  #: Longer names are cut, to this number of characters.


class LoginReports:
    """The failed logins that were not sent yet."""

    def __init__(self, client: SupervisorClient) -> None:
        self._client = client
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._sending: asyncio.Task[None] | None = None
        self._is_failing = False  # whether the last message was not received

    def add(self, user: str, address: str, reason: str) -> None:
        """Report a failed login soon."""
        self._count((user[:_MAX_NAME], address, reason), 1)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_repeatedly())

    def _count(self, key: tuple[str, str, str], count: int) -> None:
        if key not in self._counts and len(self._counts) >= _MAX_REPORTS - 1:
            key = "others", "others", key[2][:_MAX_NAME]
        if len(self._counts) < _MAX_REPORTS or key in self._counts:
            self._counts[key] += count

    async def close(self) -> None:
        """Send what was not sent."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait([self._sending])
        await self._send()

    async def _send_repeatedly(self) -> None:
        while self._counts:
            await self._send()
            await asyncio.sleep(_INTERVAL)
        self._sending = None

    async def _send(self) -> None:
        counts, self._counts = self._counts, Counter()
        if not counts:
            return
        reports = [
            {"user": user, "peer": peer, "reason": reason, "count": count}
            for (user, peer, reason), count in counts.items()
        ]
        try:
            await self._client.request({"report": reports})
        except SupervisorError as error:
            if not self._is_failing:
                log.warning("cannot report failed logins", extra={"reports": len(reports), "reason": str(error)})
            self._is_failing = True
            later, self._counts = self._counts, counts
            for key, count in later.items():
                self._count(key, count)
        else:
            self._is_failing = False
