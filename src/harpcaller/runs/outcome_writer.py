"""Writes the outcome of a run to the store: the job's end, the state of its stop, and metadata.

The first stored end wins; a run that finds another end stores only the state of the stop.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from harp.protocol.ends import End, Failed, Raised
from harp.protocol.json_text import Raw, dumps
from harpcaller.model.jobs import Job, JobMetadata, StopState, state_of
from harpcaller.runs.context import RunContext

#: Maximum length of a logged error in characters.
_MAX_LOGGED = 500


class OutcomeWriter:
    """A writer of one job's outcome.

    Args:
        job: the job.
        context: the environment of the run.
        describe_call: returns where and how the call runs, for the metadata.
        on_error: called if a write raised an exception that is not a `StorageError`.
    """

    def __init__(
        self,
        job: Job,
        context: RunContext,
        describe_call: Callable[[], dict[str, Any]],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._id = job.id
        self._context = context
        self._describe_call = describe_call
        self._on_error = on_error
        #: Whether the job has ended.
        self.has_ended = job.end is not None
        #: The host's stop report and exit info.
        self.stop_report: Raw | None = None
        self.exit_info: Raw | None = None
        #: Log fields of the end.
        self.log_fields: dict[str, Any] = {}

    def store_end(
        self,
        end: End,
        on_stored: Callable[[bool], None],
        stop: StopState | None = None,
        keep_slot: bool = False,
        stop_request: Raw | None = None,
    ) -> None:
        """Store the end of the job, and release its slot unless `keep_slot`.

        `on_stored` is called afterwards, with False if the job had ended before.
        """
        context = self._context
        metadata = self._metadata(stop_request=stop_request)
        began = time.monotonic()

        def on_done(stored: bool) -> None:
            self.has_ended = True
            if stored:
                context.timings.record_end(self._id, began)
                self.log_fields = {"end": state_of(end).value}
                if isinstance(end, (Failed, Raised)):
                    self.log_fields |= {"error": end.type[:_MAX_LOGGED], "reason": end.message[:_MAX_LOGGED]}
            context.notifier.publish_end(self._id, end if stored else None)
            on_stored(stored)

        def finish() -> Awaitable[bool]:
            context.request_claim()
            now = context.wall()
            return context.store.finish_job(self._id, end, now, stop=stop, keep_slot=keep_slot, metadata=metadata)

        context.writes.begin(self._id, finish, on_done, self._on_error)

    def store_outcome(
        self,
        end: End | None,
        on_stored: Callable[[], None],
        stop: StopState | None,
        stop_of_ended: StopState,
        keep_slot: bool = False,
        report_of_ended: Raw | None = None,
    ) -> None:
        """Store the end of the job, or only the outcome of its stop if it has another end.

        Args:
            end: the end; None if the job has ended.
            on_stored: called afterwards.
            stop: the state of the stop that is stored with `end`.
            stop_of_ended: the state of the stop if the job has another end.
            keep_slot: whether the job keeps its slot.
            report_of_ended: the stop report if the job has another end; None: the one of the host.
        """

        def store_stop() -> None:
            self._store_stop(stop_of_ended, on_stored, keep_slot, report_of_ended)

        if end is None or self.has_ended:
            store_stop()
        else:
            self.store_end(end, lambda stored: on_stored() if stored else store_stop(), stop, keep_slot)

    def _store_stop(
        self, stop: StopState, on_stored: Callable[[], None], keep_slot: bool, stop_report: Raw | None
    ) -> None:
        context = self._context
        metadata = self._metadata(stop_report=stop_report)
        self.log_fields = {**(self.log_fields or {"end": "cancelled"}), "stop": stop.value}

        def on_done(_: bool) -> None:
            context.notifier.publish_end(self._id)
            on_stored()

        def finalize() -> Awaitable[bool]:
            context.request_claim()
            return context.store.finalize_stop(self._id, stop, keep_slot=keep_slot, metadata=metadata)

        context.writes.begin(self._id, finalize, on_done, self._on_error)

    def _metadata(self, stop_request: Raw | None = None, stop_report: Raw | None = None) -> JobMetadata:
        call = dumps(self._describe_call())
        return JobMetadata(call, stop_request, stop_report or self.stop_report, self.exit_info)
