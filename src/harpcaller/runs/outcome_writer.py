"""Writes the outcome of a run to the store: the job's end, the state of its stop, and metadata.

Every write is retried until the store succeeds. The first stored end wins; a run that finds another end stores only
the state of the stop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from harp.protocol.ends import End, Failed, Raised
from harp.protocol.json_text import Raw, dumps
from harpcaller.model.jobs import Job, JobMetadata, StopState, state_of
from harpcaller.runs.context import RunContext

log = logging.getLogger(__name__)

#: Maximum length of a logged error in characters.
_MAX_LOGGED = 500


class OutcomeWriter:
    """A writer of one job's outcome. `describe_call` returns where and how the call runs, for the metadata."""

    def __init__(self, job: Job, context: RunContext, describe_call: Callable[[], dict[str, Any]]) -> None:
        self._id = job.id
        self._context = context
        self._describe_call = describe_call
        #: Whether the job has ended.
        self.has_ended = job.end is not None
        #: The host's stop report and exit info.
        self.stop_report: Raw | None = None
        self.exit_info: Raw | None = None
        #: Log fields of the end.
        self.log_fields: dict[str, Any] = {}

    async def store_end(
        self, end: End, stop: StopState | None = None, keep_slot: bool = False, stop_request: Raw | None = None
    ) -> bool:
        """Store the end of the job, and release its slot unless `keep_slot`; return False if it has ended before."""
        context = self._context
        metadata = self._metadata(stop_request=stop_request)
        began = time.monotonic()

        async def finish() -> bool:
            now = context.wall()
            return await context.store.finish_job(self._id, end, now, stop=stop, keep_slot=keep_slot, metadata=metadata)

        stored = await context.retry_until_stored(self._id, finish)
        self.has_ended = True
        if stored:
            context.timings.record_end(self._id, began)
            self.log_fields = {"end": state_of(end).value}
            if isinstance(end, (Failed, Raised)):
                self.log_fields |= {"error": end.type[:_MAX_LOGGED], "reason": end.message[:_MAX_LOGGED]}
        context.notifier.publish_end(self._id, end if stored else None)
        return stored

    async def store_stop(self, stop: StopState, keep_slot: bool = False, stop_report: Raw | None = None) -> None:
        """Store the state of an ended job's stop, and release its slot unless `keep_slot`."""
        context = self._context
        metadata = self._metadata(stop_report=stop_report)
        self.log_fields = {**(self.log_fields or {"end": "cancelled"}), "stop": stop.value}
        finalize = partial(context.store.finalize_stop, self._id, stop, keep_slot=keep_slot, metadata=metadata)
        await context.retry_until_stored(self._id, finalize)
        context.notifier.publish_end(self._id)

    def _metadata(self, stop_request: Raw | None = None, stop_report: Raw | None = None) -> JobMetadata:
        call = dumps(self._describe_call())
        return JobMetadata(call, stop_request, stop_report or self.stop_report, self.exit_info)
