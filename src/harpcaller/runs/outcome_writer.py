"""Writes the outcome of a run to the store: the job's end, the state of its stop, and metadata.

Every write is retried until the store succeeds. The first stored end wins; a run that finds another end stores only
the state of the stop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from harp.protocol.ends import End, Failed, Raised
from harp.protocol.harpd import StopReport
from harp.protocol.json_text import Raw, dumps
from harpcaller.model.jobs import NO_METADATA, Job, JobMetadata, StopState, state_of
from harpcaller.runs.context import RunContext
from harpcaller.runs.record_writer import retry_until_stored

log = logging.getLogger(__name__)

#: Maximum length of a logged error in characters.
_MAX_LOGGED = 500


class OutcomeWriter:
    """A writer of one job's outcome.

    Args:
        job: the job.
        context: store, notifier and clock.
        describe_call: returns where and how the call runs, for the metadata.
    """

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

    @property
    def has_survivors(self) -> bool:
        """Whether the stop report lists surviving processes."""
        return self.stop_report is not None and bool(StopReport(self.stop_report).survivors)

    async def store_end(
        self, end: End, stop: StopState | None = None, keep_slot: bool = False, metadata: JobMetadata = NO_METADATA
    ) -> bool:
        """Store the end of the job, and release its slot unless `keep_slot`; return False if it has ended before."""
        context = self._context
        known = self._merge_metadata(metadata)
        began = time.monotonic()

        async def finish() -> bool:
            now = context.wall()
            return await context.store.finish_job(self._id, end, now, stop=stop, keep_slot=keep_slot, metadata=known)

        stored = await retry_until_stored(context.pending_writes, self._id, finish)
        self.has_ended = True
        if stored:
            context.timings.record_end(self._id, began)
            self.log_fields = {"end": state_of(end).value, **_error_fields(end)}
        context.notifier.publish_end(self._id, end if stored else None)
        return stored

    async def store_stop(self, stop: StopState, keep_slot: bool = False, metadata: JobMetadata = NO_METADATA) -> None:
        """Store the state of an ended job's stop, and release its slot unless `keep_slot`."""
        context = self._context
        known = self._merge_metadata(metadata)
        self.log_fields = {**(self.log_fields or {"end": "cancelled"}), "stop": stop.value}

        async def settle() -> bool:
            return await context.store.finalize_stop(self._id, stop, keep_slot=keep_slot, metadata=known)

        await retry_until_stored(context.pending_writes, self._id, settle)
        context.notifier.publish_end(self._id)

    async def read_metadata(self) -> JobMetadata:
        """Return the stored metadata of the job."""

        async def read() -> JobMetadata:
            return (await self._context.store.get_details(self._id)).metadata

        return await retry_until_stored(self._context.pending_writes, self._id, read)

    def _merge_metadata(self, metadata: JobMetadata) -> JobMetadata:
        return JobMetadata(
            call=dumps(self._describe_call()),
            stop_request=metadata.stop_request,
            stop_report=metadata.stop_report or self.stop_report,
            exit_info=metadata.exit_info or self.exit_info,
        )


def _error_fields(end: End) -> dict[str, str]:
    """Return the log fields of an error or an exception."""
    if isinstance(end, (Failed, Raised)):
        return {"error": end.type[:_MAX_LOGGED], "reason": end.message[:_MAX_LOGGED]}
    return {}
