"""What a run stores of its job's end: the end itself, how a stop turned out, and the facts beside.

Everything is tried again until the store takes it. The first end that is stored stands; who finds another there has
only the stop left to settle.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from harp.protocol.ends import End, Failed, Raised
from harp.protocol.harpd import Receipt
from harp.protocol.json_text import Raw, dumps
from harpcaller.model.jobs import NO_FACTS, Facts, Job, Stop, state_of
from harpcaller.runs.context import Surroundings
from harpcaller.runs.record_writer import persist

__all__ = ["Settling"]

log = logging.getLogger(__name__)

#: Characters of an end's message that are logged.
_LOGGED_MESSAGE = 500


class Settling:
    """Stores the end of one job.

    Args:
        job: the job.
        around: store, news and clock.
        call: says where and how the call runs, for the facts.
    """

    def __init__(self, job: Job, around: Surroundings, call: Callable[[], dict[str, Any]]) -> None:
        self._id = job.id
        self._around = around
        self._call = call
        #: Whether the job has an end.
        self.ended = job.end is not None
        #: What the host has said of the stop, and of the end of the process.
        self.receipt: Raw | None = None
        self.evidence: Raw | None = None
        #: What the log is to say of the end.
        self.told: dict[str, Any] = {}

    @property
    def survives(self) -> bool:
        """Whether the receipt says that something of the call survives."""
        return self.receipt is not None and bool(Receipt(self.receipt).survivors)

    async def finish(
        self, end: End, stop: Stop | None = None, keep_slot: bool = False, facts: Facts = NO_FACTS
    ) -> bool:
        """Store the end; False when the job has one already. Its slot is free then, unless it is kept."""
        around = self._around
        known = self._known(facts)
        asked = time.monotonic()

        async def finish() -> bool:
            now = around.wall()
            return await around.store.finish_job(self._id, end, now, stop=stop, keep_slot=keep_slot, facts=known)

        stored = await persist(around.trouble, self._id, finish)
        self.ended = True
        if stored:
            around.timings.ended(self._id, asked)
            self.told = {"end": state_of(end).value, **_why(end)}
        around.news.end(self._id, end if stored else None)
        return stored

    async def settle(self, stop: Stop, keep_slot: bool = False, facts: Facts = NO_FACTS) -> None:
        """Store how the stop of a job that has an end turned out; its slot is free then, unless it is kept."""
        around = self._around
        known = self._known(facts)
        self.told = {**(self.told or {"end": "cancelled"}), "stop": stop.value}

        async def settle() -> bool:
            return await around.store.settle_stop(self._id, stop, keep_slot=keep_slot, facts=known)

        await persist(around.trouble, self._id, settle)
        around.news.end(self._id)

    async def facts(self) -> Facts:
        """What is stored beside the end."""

        async def read() -> Facts:
            return (await self._around.store.get_details(self._id)).facts

        return await persist(self._around.trouble, self._id, read)

    def _known(self, facts: Facts) -> Facts:
        return Facts(
            call=dumps(self._call()),
            stopped=facts.stopped,
            receipt=facts.receipt or self.receipt,
            evidence=facts.evidence or self.evidence,
        )


def _why(end: End) -> dict[str, str]:
    """What the log says of an end that is no result."""
    if isinstance(end, (Failed, Raised)):
        return {"error": end.type[:_LOGGED_MESSAGE], "reason": end.message[:_LOGGED_MESSAGE]}
    return {}
