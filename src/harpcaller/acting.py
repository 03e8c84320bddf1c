"""The dispatcher's verbs for one client, under the policy. The APIs call these verbs only.

- A client without a right to a job gets what it would get for a job id that does not exist, at the same time: after
  the same look-ups, and not before `_DENIAL_SECONDS`, in which the decision takes place.
- A call that is denied, or above a limit, is refused. A client that is not authenticated may be a legacy client, which
  knows job ids only: it gets the id of a job that has ended as ``access_denied`` or ``rate_limited``. So that nobody
  fills the disk with such jobs, their rate and their length are limited.
- A request that waits for a job ends when the right to read the job is revoked.

One `ActingAs` is for one request, which is decided by the policy in use when it begins. Spec: docs/access.md.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, NoReturn

from harp.protocol.dispatcher import Call, Queue
from harp.protocol.ends import End, Failed
from harp.protocol.json_text import Raw, dumps
from harp.protocol.schema import ProtocolError
from harp_daemon import json_pieces
from harp_daemon.audit_reading import Cursor, Page, read_page
from harp_daemon.event_loop import run_in_turn
from harp_daemon.outcome import Outcome
from harpcaller.access import AccessDenied, AuthError, RateLimited
from harpcaller.access.client import LOCAL_ADMINISTRATOR, Client
from harpcaller.access.enforcement import SUBJECT_BYTES, Admission, Wait, may
from harpcaller.access.policy import ALLOW_ALL, Action, Decision, Rate, Target
from harpcaller.audit import ALLOWED, DENIED
from harpcaller.changes import ChangeFeed, Position, RowWriter, Subscription, View
from harpcaller.dispatcher import ALL_QUEUES, Dispatcher, QueueRights
from harpcaller.host_states import HostState
from harpcaller.hosts.registry import Host, HostChange
from harpcaller.job_rows import write_row
from harpcaller.model.job_filters import JobFilter
from harpcaller.model.jobs import (
    Job,
    JobCounts,
    JobDetails,
    JobPage,
    JobStatistics,
    JobSummary,
    NewJob,
    State,
    Subject,
)
from harpcaller.model.matching import may_have_fitted
from harpcaller.record_stream import RecordStream
from harpcaller.store import (
    CannotRerun,
    LimitReached,
    QueueSummary,
    RecordMatches,
    StorageError,
    UnknownJob,
)
from harpcaller.store.sqlite.staging import STEP_JOBS

log = logging.getLogger(__name__)

_DENIAL_SECONDS = 0.005  #: Minimum seconds until the reply about a job that is unknown to the client.
_QUEUED_RETRY = 1.0  #: `retry_after` of a client with too many queued jobs, in seconds.
_REFUSED_RATE = Rate(1000, 3600)  #: Calls of one owner that become jobs although they are refused: 1,000 an hour.
_MAX_REFUSED = 16 * 1024  #: Maximum bytes of the payloads of such a job.
_REFUSALS = frozenset({"access_denied", "rate_limited"})  #: The types of the ends of refused calls.
_MASK = b'"***"'  #: What is stored in place of a secret value.
#: The attributes of a call that a re-run may change.
_CHANGEABLE = (
    "host",
    "procedure",
    "arguments",
    "timeout",
    "max_exec_time",
    "queue",
    "info",
    "start_within",
    "secrets",
)
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})
#: The actions on which the rights to a row depend.
_ROW_ACTIONS = (Action.LIST, Action.READ, Action.CANCEL, Action.CALL, Action.MANAGE)
#: What a client needs that may see all jobs.
_SEEING = frozenset({Action.LIST, Action.READ})
_MAX_NAME = 255  #: Longer names are cut in messages, to this number of characters.
_NOBODY = ""  #: The owner of a job that belongs to no client: rules with `jobs = "own"` do not cover it.
_PAGE_SIZE = 500  #: Maximum number of queues that are read together for a list of all.


class ActingAs:
    """The verbs of a dispatcher for a client. See `Dispatcher` for what they do and raise.

    Verbs on a job also raise `UnknownJob` if the client has no right to it, the others `AccessDenied`. Calls may raise
    `RateLimited`.
    """

    __slots__ = ("_access", "_client", "_dispatcher", "_is_restricted", "_policy", "is_repeated")

    def __init__(self, dispatcher: Dispatcher, client: Client) -> None:
        self._dispatcher = dispatcher
        self._access = dispatcher.access
        self._client = client
        self._policy = self._access.policy_of(client)
        self.is_repeated = False  #: Whether all calls of this request have been submitted before, by their request ids.
        # Whether it depends on a job if the client may read and cancel it.
        self._is_restricted = self._policy is not ALLOW_ALL and client is not LOCAL_ADMINISTRATOR

    @property
    def _records_reads(self) -> bool:
        return self._dispatcher.audit.log is not None and self._dispatcher.config.audit_reads

    def record_unauthenticated(self, error: AuthError) -> None:
        """Record a request whose proof of identity is refused; `error.recorded` is its entry."""
        if error.recorded is None:
            fields = {"reason": error.reason, "token": error.token or None}
            error.recorded = self._dispatcher.audit.record_denial(self._client, "authenticate", **fields)

    async def record_session(self, action: str, session_id: str) -> None:
        """Record that a session has begun or ended."""
        await self._dispatcher.audit.record(self._client, action, ALLOWED, session=session_id)

    # Submission.

    def submit(self, call: Call, received_at: float | None = None, rerun_of: str | None = None) -> Outcome[str]:
        """Store a job; return a future of its id. `rerun_of` is the id of the job that it repeats, see `rerun`."""
        dispatcher, client, audit = self._dispatcher, self._client, self._dispatcher.audit
        audit.check_room()
        if self._policy is ALLOW_ALL:
            record = partial(audit.record_call, client, ALLOWED, None)
            admission = Admission(client.owner, rerun_of=rerun_of)
            return dispatcher.submit(call, client.peer, received_at, admission, record, None, self._note_repeated)
        try:
            decision = self._decide_call(call)
            if (rate := decision.limits.rate) is not None:
                self._take_rates({(client.owner, rate): 1})
        except (AccessDenied, RateLimited) as refusal:
            return self._submit_refused(call, refusal, received_at)
        admission = Admission(client.owner, decision.limits, client.owner, rerun_of=rerun_of)
        record = partial(audit.record_call, client, ALLOWED, decision.rule)
        on_limit = None if decision.limits.queued is None else partial(self._on_limit, call)
        return dispatcher.submit(call, client.peer, received_at, admission, record, on_limit, self._note_repeated)

    def _note_repeated(self) -> None:
        self.is_repeated = True

    def _on_limit(self, call: Call, error: LimitReached, job_id: Outcome[str]) -> None:
        """Handle that the client has too many queued jobs."""

        def on_submitted(submitted: Outcome[str]) -> None:
            error = submitted.exception()
            if job_id.done():
                return
            if error is not None:
                job_id.set_exception(error)
            else:
                job_id.set_result(submitted.result())

        try:
            refused = self._submit_refused(call, _to_refusal(error), None)
        except RateLimited as refusal:
            job_id.set_exception(refusal)
        else:
            refused.add_done_callback(on_submitted)

    def _submit_refused(
        self, call: Call, refusal: AccessDenied | RateLimited, received_at: float | None
    ) -> Outcome[str]:
        """Store a refused call as a job that has ended. Raises the refusal as `_refuse_by_job` does."""
        client, dispatcher = self._client, self._dispatcher
        try:
            admission = self._refuse_by_job(call, refusal)
        except (AccessDenied, RateLimited):
            self._record_refused_call(refusal, call)
            raise
        record = partial(dispatcher.audit.record_call, client, DENIED, refusal.fields.get("rule"))
        return dispatcher.submit(call, client.peer, received_at, admission, record)

    def _record_refused_call(self, refusal: AccessDenied | RateLimited, call: Call) -> None:
        fields = {"host": call.host, "procedure": call.procedure, "arguments": call.arguments}
        audit = self._dispatcher.audit
        refusal.recorded = audit.record_denial(self._client, "call", **fields, **refusal.fields, reason=str(refusal))

    async def submit_many(self, calls: Sequence[Call], as_one: bool = False) -> list[str]:
        """Store jobs, all or none; return their ids in the same order. A refusal names the first refused call.

        `as_one` as in `Dispatcher.submit_many`.
        """
        client, audit = self._client, self._dispatcher.audit
        audit.check_room()
        if self._policy is ALLOW_ALL:
            admissions = [Admission(client.owner)] * len(calls)
            record = partial(audit.record_calls, client, [None] * len(calls))
            return await self._store_many(calls, admissions, record, as_one)
        try:
            return await self._submit_many(calls, as_one)
        except (AccessDenied, RateLimited) as refusal:
            if isinstance(refusal, RateLimited):
                self._log_limit(refusal)
            self._record_refused_call(refusal, calls[refusal.fields.get("index", 0)])
            raise

    async def _store_many(
        self,
        calls: Sequence[Call],
        admissions: Sequence[Admission],
        record: Callable[[Sequence[NewJob]], Awaitable[None]],
        as_one: bool,
    ) -> list[str]:
        peer = self._client.peer
        return await self._dispatcher.submit_many(calls, peer, admissions, record, as_one, self._note_repeated)

    async def _submit_many(self, calls: Sequence[Call], as_one: bool) -> list[str]:
        client, audit = self._client, self._dispatcher.audit
        # In a thread, because it takes long to decide about many calls.
        decisions = await run_in_turn(self._decide_calls, calls)
        rates = Counter((client.owner, rate) for found in decisions if (rate := found.limits.rate) is not None)
        self._take_rates(rates)
        admissions = [Admission(client.owner, decision.limits, client.owner) for decision in decisions]
        try:
            record = partial(audit.record_calls, client, [decision.rule for decision in decisions])
            return await self._store_many(calls, admissions, record, as_one)
        except LimitReached as error:
            raise _to_refusal(error) from error

    def _decide_calls(self, calls: Sequence[Call]) -> list[Decision]:
        decisions = []
        for index, call in enumerate(calls):
            if index % STEP_JOBS == 0:
                json_pieces.between_pieces()
            try:
                decisions.append(self._decide_call(call))
            except (AccessDenied, RateLimited) as error:
                message = f"submit_many[{index}]: {error}"
                refusal = AccessDenied(message) if isinstance(error, AccessDenied) else RateLimited(message, None)
                refusal.fields = {**error.fields, "index": index}
                raise refusal from error
        return decisions

    def _decide_call(self, call: Call) -> Decision:
        """Return the decision about an allowed call. Raises `AccessDenied`, or `RateLimited` if it is too long."""
        client = self._client
        queue = None if call.queue is None else call.queue.name
        target = Target(call.host, call.procedure, call.arguments, queue, client.owner)
        decision = self._policy.decide(client, Action.CALL, target)
        if not decision.allowed:
            names = {"host": call.host[:_MAX_NAME], "procedure": call.procedure[:_MAX_NAME]}
            self._log_denial(Action.CALL, decision, **names)
            denial = AccessDenied(f"{client.owner} may not call {names['procedure']} on host {names['host']}")
            denial.fields = {"rule": decision.rule}
            raise denial
        most = decision.limits.bytes
        if most is not None:
            size = len(call.arguments) + (0 if call.info is None else len(call.info))
            if size > most:
                raise RateLimited(f"arguments and info have {size} bytes; the limit is {most}", None)
        return decision

    def _take_rates(self, wanted: Mapping[tuple[str, Rate], int]) -> None:
        """Count calls by owner and rate. Raises `RateLimited`."""
        delay = self._access.rates.take(wanted, time.monotonic())
        if delay is None or delay > 0:
            rates = ", ".join(str(rate) for _, rate in wanted)
            raise RateLimited(f"{self._client.owner} may submit calls at a rate of {rates}", delay)

    def _refuse_by_job(self, call: Call, refusal: AccessDenied | RateLimited) -> Admission:
        """Return the admission of a refused call, which becomes a job that has ended.

        Raises the refusal if the client is authenticated. It is also raised instead of storing many or long jobs.
        """
        if isinstance(refusal, RateLimited):
            self._log_limit(refusal)
        if self._client.authenticated:
            raise refusal
        payloads = call.arguments, call.info or b"", call.queue.name if call.queue else b""
        rate = f"refused calls of {self._client.owner}", _REFUSED_RATE
        if sum(map(len, payloads)) > _MAX_REFUSED or self._access.rates.take({rate: 1}, time.monotonic()) != 0:
            raise refusal
        if isinstance(refusal, RateLimited):
            end = Failed("rate_limited", str(refusal), dumps({"retry_after": refusal.retry_after}))
        else:
            end = Failed("access_denied", str(refusal))
        return Admission(self._client.owner, end=end)

    async def rerun(self, job_id: str, changes: Mapping[str, Any] = NO_CHANGES, request_id: str | None = None) -> str:
        """Submit a job again that the client may read; return the id of the new job.

        The new job has the host, procedure, arguments, info, queue and limits of the old one, its payloads to the byte,
        but for the attributes of `Call` in `changes`. With `request_id`, all re-runs of the job with it are one job.
        The concurrency of the queue is not stored: a queue without jobs gets that of `changes`, or 1. Raises
        `UnknownJob`, `CannotRerun`, `ProtocolError` for changes that make no call, and what `submit` raises.
        """
        job = await self.get_job(job_id)
        return await self.submit(_call_again(job, changes, request_id), rerun_of=job_id)

    # Jobs.

    async def get_job(self, job_id: str) -> Job:
        """Return a job."""
        is_plain = not self._is_restricted and not self._records_reads
        return await (self._dispatcher.get_job(job_id) if is_plain else self._read_permitted(job_id))

    async def details(self, job_id: str) -> dict[str, Any]:
        """Return all details of a job; the ids of other jobs are replaced by their number, unless it may read these."""
        return (await self.describe(job_id))[1]

    async def describe(self, job_id: str, is_new: bool = False) -> tuple[JobDetails, dict[str, Any]]:
        """Return what is stored of a job, and what `details` returns; `is_new`: the client has just submitted it."""
        began_at, denied = time.monotonic(), list[Subject]()
        decides = self._is_restricted and self._general_rights is None
        rights = (self._may_read, self._sees_others, self._permit_reads(denied)) if decides else ()
        try:
            stored, details = await self._dispatcher.describe(job_id, *rights, is_new=is_new)
        except UnknownJob:
            if not self._is_restricted and not self._records_reads:
                raise
            await self._raise_unknown(job_id, denied[0] if denied else None, Action.READ, began_at)
        if self._records_reads:
            await self._dispatcher.audit.record(self._client, "read", ALLOWED, job=job_id, **_names_of(stored.job))
        return stored, details

    def _sees_others(self, job: Job) -> bool:
        """Return whether the client may read jobs like this one of every owner."""
        of_others = Target(job.host, job.procedure, job.arguments, job.queue, _NOBODY)
        return self._is_allowed(Action.READ, of_others)

    def _permit_reads(self, denied: list[Subject]) -> Callable[[Subject], bool]:
        """Return a function for a reading thread: whether the client may read a job. Others are added to `denied`."""

        def permits(job: Subject) -> bool:
            if not self._may_read(job):
                denied.append(job)
            return not denied

        return permits

    def find_outage(self, job_id: str) -> float | None:
        """Return since when the host of a job that the client may read has not been reached; None: it is reached."""
        return self._dispatcher.find_outage(job_id)

    def result(self, job_id: str) -> Outcome[End]:
        """Return a future of the job's end. Cancelling the future ends the wait."""

        def watch() -> None:
            if not result.done():
                access.add_wait(result, Wait(self._client, job_id, self._policy, lambda: self._revoke(result, job_id)))
                result.add_done_callback(access.waits.pop)

        access, first_read = self._access, None
        if self._records_reads:
            first_read = self._read_permitted(job_id, watch)
        elif self._is_restricted:
            # No look-up for a job that is in memory, if the client may read it: this is the usual request.
            job = self._dispatcher.get_active_job(job_id) or access.get_recent(job_id)
            if job is None or not self._may_read(job):
                first_read = self._read_permitted(job_id, watch)
        result = self._dispatcher.result(job_id, first_read)
        if first_read is None:
            watch()
        return result

    def _revoke(self, result: Outcome[End], job_id: str) -> None:
        if not result.done():
            result.set_exception(self._revocation(job_id))

    def _revocation(self, job_id: str) -> Exception:
        """Return the error of a request whose right was revoked. Legacy clients know no such error."""
        if self._client.authenticated:
            return AccessDenied("the right to read this job was revoked")
        return UnknownJob(job_id)

    def record_delivery(self, job_id: str, received_at: float) -> None:
        """Record that the end of a job was sent to the client, after `result`."""
        self._dispatcher.record_delivery(job_id, received_at)

    def stream(
        self, job_id: str, since: int | None, recent: int | None, wait: bool, on_ready: Callable[[], None]
    ) -> RecordStream:
        """Return the records of a job; with `wait`, also future records. The caller closes the stream."""

        def watch() -> None:
            if stream.is_waiting:
                revoke = lambda: stream.fail(self._revocation(job_id))  # noqa: E731
                access.add_wait(stream, Wait(self._client, job_id, self._policy, revoke))
                stream.on_closed = lambda: access.waits.pop(stream, None)

        access = self._access
        is_plain = not self._is_restricted and not self._records_reads
        first_read = None if is_plain else self._read_permitted(job_id, watch)
        stream = self._dispatcher.stream(job_id, since, recent, wait, on_ready, first_read)
        if first_read is None:
            watch()
        return stream

    async def search_records(
        self, job_id: str, text: str, fold: bool, first: int, until: int, limit: int, max_bytes: int
    ) -> RecordMatches:
        """Return records of a job that have a text, as `Dispatcher.search_records`; `get_job` was called before."""
        if self._is_restricted:
            await self._check(job_id, Action.READ)
        return await self._dispatcher.search_records(job_id, text, fold, first, until, limit, max_bytes)

    async def cancel(self, job_id: str) -> bool:
        """Cancel a job; return False if it has ended, or is unknown to the client."""
        client = self._client
        try:
            job = await self._check(job_id, Action.CANCEL)
        except UnknownJob:
            return False
        cancelled = await self._dispatcher.cancel(job_id, client.peer, client.owner)
        if cancelled:
            await self._dispatcher.audit.record(client, "cancel", ALLOWED, job=job_id, **_names_of(job))
        return cancelled

    async def wait_stopped(self, job_id: str) -> JobDetails:
        """Wait until a job has ended and its stop is not pending; return its details."""
        await self._check(job_id, Action.CANCEL)
        return await self._dispatcher.wait_stopped(job_id)

    async def cancel_queue(self, queue: Raw) -> int:
        """Cancel the jobs of a queue that the client may cancel; return how many were cancelled."""
        dispatcher, client = self._dispatcher, self._client
        name = queue.decode("utf-8", "replace")
        if not self._is_restricted:
            cancelled = await dispatcher.cancel_queue(queue, client.peer, client.owner)
            await dispatcher.audit.record(client, "cancel", ALLOWED, queue=name, jobs=cancelled)
            return cancelled
        jobs = [job async for job in dispatcher.list_jobs(queue=queue) if self._may(Action.CANCEL, job)]
        jobs.sort(key=lambda job: job.state is State.RUNNING)  # so that no queued job gets the slot of another one
        cancelled = sum([await dispatcher.cancel(job.id, client.peer, client.owner) for job in jobs])
        await dispatcher.audit.record(client, "cancel", ALLOWED, queue=name, jobs=cancelled)
        return cancelled

    async def release_slot(self, job_id: str) -> bool:
        """Release the slot of a job that has ended; return False if it holds no slot, or is unknown to the client."""
        self.require_ever(Action.MANAGE)
        try:
            await self._check(job_id, Action.MANAGE)
        except UnknownJob:
            return False
        return await self._dispatcher.release_slot(job_id)

    async def _check(self, job_id: str, action: Action) -> Subject | None:
        """Return what decides about a job, if that is needed.

        Raises `UnknownJob` if the client has not this right to the job, or the job does not exist.
        """
        audit = self._dispatcher.audit
        is_recorded = self._records_reads if action is Action.READ else audit.log is not None
        if not self._is_restricted and not is_recorded:
            return None
        began_at = time.monotonic()
        job = (await self._dispatcher.find_subjects([job_id])).get(job_id)
        if self._is_restricted and (job is None or not self._may(action, job)):
            await self._raise_unknown(job_id, job, action, began_at)
        if action is Action.READ and is_recorded:
            await audit.record(self._client, "read", ALLOWED, job=job_id, **_names_of(job))
        return job

    async def _read_permitted(self, job_id: str, on_permitted: Callable[[], None] = lambda: None) -> Job:
        """Return a job that the client may read. Raises `UnknownJob` as `_check` does.

        `on_permitted` is called before it returns. A request is not in `Access.waits` earlier: while the rules change,
        it would learn from its error that the job exists.
        """
        began_at, denied = time.monotonic(), list[Subject]()
        try:
            job = await self._dispatcher.get_job(job_id, self._permit_reads(denied))
        except UnknownJob:
            await self._raise_unknown(job_id, denied[0] if denied else None, Action.READ, began_at)
        if self._records_reads:
            await self._dispatcher.audit.record(self._client, "read", ALLOWED, job=job_id, **_names_of(job))
        on_permitted()
        return job

    async def _raise_unknown(self, job_id: str, job: Subject | None, action: Action, began_at: float) -> NoReturn:
        if job is not None:
            names = {"host": job.host[:_MAX_NAME], "procedure": job.procedure[:_MAX_NAME]}
            self._log_denial(action, None, job=job_id, **names)
        # An unknown job has an entry, too: a wait for the disk would show that a job exists.
        recorded = self._dispatcher.audit.record_denial(self._client, action.value, job=job_id, **_names_of(job))
        if recorded is not None:
            await asyncio.wait([recorded])
            recorded.exception()  # the action is denied all the same
        await asyncio.sleep(_DENIAL_SECONDS - (time.monotonic() - began_at))
        raise UnknownJob(job_id)

    def _may(self, action: Action, job: Subject | Job | NewJob) -> bool:
        return may(self._policy, self._client, action, job)

    def _may_read(self, job: Subject | Job | NewJob) -> bool:
        return self._may(Action.READ, job)

    # Lists.

    async def list_jobs(
        self, ended: bool = False, host: str | None = None, queue: Raw | None = None, newest: int | None = None
    ) -> AsyncGenerator[Job, None]:
        """Yield the jobs that the client may list."""
        self.require_ever(Action.LIST)
        may_list = self._may_list if self._is_restricted else None
        jobs = self._dispatcher.list_jobs(ended, host, queue, newest, may_list)
        async for job in jobs:
            yield job

    def _may_list(self, job: Subject | Job) -> bool:
        return self._may(Action.LIST, job)

    async def find_jobs(
        self, wanted: JobFilter, newest_first: bool = True, limit: int = 50, cursor: str | None = None
    ) -> JobPage:
        """Return a part of the list of jobs that fit a filter and that the client may list.

        The search looks at a limited number of entries; `next` is the cursor of the next part. Jobs that the client may
        not list are not counted in `examined`. Raises `InvalidCursor` for a cursor of another list.
        """
        await self.begin_list(wanted)
        return await self.read_list(wanted, newest_first, limit, cursor)

    async def begin_list(self, wanted: JobFilter) -> Hashable:
        """Check that the client may list jobs, and record that it reads a list, before `read_list`.

        Returns a key of its rights: clients with equal keys get equal lists.
        """
        self.require_ever(Action.LIST)
        await self._record_list("jobs", wanted)
        general = self._general_rights
        return (self._client.principals, self._client.roles, self._policy) if general is None else general

    async def read_list(self, wanted: JobFilter, newest_first: bool, limit: int, cursor: str | None) -> JobPage:
        """Return what `find_jobs` does."""
        owners, permits, _ = self._list_rights()
        if owners == ():
            return JobPage((), None, True, 0, None)
        rights = owners, permits, self._is_restricted and self._general_rights is None
        return await self._dispatcher.find_jobs(wanted, newest_first, limit, cursor, *rights)

    async def get_summaries(self, job_ids: Sequence[str], action: Action = Action.LIST) -> list[JobSummary]:
        """Return the summaries of those of these jobs that the client may list, in the order of submission.

        With another action, of those to which the client has that right.
        """
        if action is Action.LIST:
            self.require_ever(action)
        if not self._is_restricted or action in (self._general_rights or ()):
            return await self._dispatcher.get_summaries(job_ids)
        summaries = await self._dispatcher.get_summaries(job_ids, with_subjects=True)
        return [found for found in summaries if found.subject is not None and self._may(action, found.subject)]

    async def count_jobs(self, wanted: JobFilter, by: Sequence[str], most: int = 10_000) -> JobCounts:
        """Return how many of the jobs that the client may list have each value of the facets `by`.

        The facets are ``state``, ``host``, ``procedure``, ``queue``, ``owner`` and ``end_type``. Each is counted under
        all other parts of the filter, up to `most` jobs.
        """
        rights = self._list_rights()
        await self._record_list("counts", wanted)
        return await self._dispatcher.count_jobs(wanted, by, most, *rights)

    async def job_statistics(
        self, since: float, until: float, step: float, states: frozenset[State] = frozenset()
    ) -> JobStatistics:
        """Return how many of the jobs that the client may list were submitted, and ended, in each step of a time."""
        rights = self._list_rights()
        return await self._dispatcher.job_statistics(since, until, step, states, *rights)

    async def _record_list(self, target: str, wanted: JobFilter | str) -> None:
        """Record that the client reads a list, if reads are recorded."""
        if self._records_reads:
            wanted = wanted if isinstance(wanted, str) else wanted.normal_form()
            await self._dispatcher.audit.record(self._client, "list", ALLOWED, target=target, filter=wanted or None)

    def _list_rights(self) -> tuple[tuple[str, ...] | None, Callable[[Subject], bool] | None, Hashable]:
        """Return of which owners the client may list jobs, what decides about each, and a key for equal rights.

        Raises `AccessDenied` if the client may list no jobs.
        """
        self.require_ever(Action.LIST)
        scope = self._policy.find_scope(self._client, Action.LIST)
        if scope.is_exact:
            return scope.owners, None, None
        return scope.owners, self._may_list, (self._client.principals, self._client.roles, self._policy)

    # Changes of jobs.

    @property
    def is_current(self) -> bool:
        """Whether the policy is still the one that was in use when the request began."""
        return self._policy is self._access.policy_of(self._client)

    @property
    def position(self) -> Position:
        """The position in the change feed after the last change."""
        return self._dispatcher.changes.position

    @property
    def event_ids(self) -> ChangeFeed:
        """The feed, which makes ids of events from positions, and reads them."""
        return self._dispatcher.changes

    def tag_list(self, question: str) -> str | None:
        """Return a text that differs for another question, and after each change of a job or of the client's rights.

        None: the client may not list all jobs, so that it must not learn whether others change. Raises `AccessDenied`
        if it may list no jobs.
        """
        self.require_ever(Action.LIST)
        if self._is_restricted and self._general_rights is None:
            return None
        client = self._client
        return self._dispatcher.changes.sign(repr((self._policy.sha256, client.principals, client.roles, question)))

    def watch_jobs(
        self,
        wanted: JobFilter,
        after: Position | None,
        on_ready: Callable[[], object],
        write: RowWriter = write_row,
    ) -> Subscription:
        """Return a subscription to the jobs that fit a filter and that the client may list, from a position on.

        It ends when the policy changes. The caller closes it. `write` returns the text of a row.
        """
        self.require_ever(Action.LIST)
        allowed = self._general_rights if self._is_restricted else frozenset(_ROW_ACTIONS)
        sees_all = allowed is not None
        view = View(
            key=(wanted, write, (self._client.principals, self._client.roles) if allowed is None else allowed),
            rights=self._find_rights if allowed is None else partial(_find_rights, allowed),
            select=partial(self._dispatcher.select_jobs, wanted),
            may_have_fitted=partial(may_have_fitted, wanted),
            sees_all=sees_all,
            fits_all=sees_all and wanted == JobFilter(),
            write=write,
        )
        return self._dispatcher.live.subscribe(view, after, on_ready)

    def watch_changes(self, job_id: str | None, on_change: Callable[[], object]) -> Callable[[], None]:
        """Call a function after changes of a job, or of any job; return a function that ends it.

        It is for requests that then read what the client may read. It may be called although nothing has changed.
        """
        return self._dispatcher.live.watch(job_id, on_change)

    @property
    def _general_rights(self) -> frozenset[Action] | None:
        """What a restricted client may do with every job; None: that depends on the job, or it is not restricted."""
        if not self._is_restricted:
            return None
        allowed = self._policy.find_general(self._client, _ROW_ACTIONS)
        # A client may read its own refused calls, even if it may read no other job.
        return allowed if allowed is not None and allowed >= _SEEING else None

    def _find_rights(self, summary: JobSummary) -> tuple[str, ...] | None:
        """Return the rights to a job; None if the client may not list it."""
        if summary.subject is None or not self._may_list(summary.subject):
            return None
        return self.rights(summary)

    def rights(self, summary: JobSummary) -> tuple[str, ...]:
        """Return what the client may do with a job now: ``read``, ``cancel``, ``rerun``, ``release``."""
        if (allowed := self._general_rights) is not None:
            return _find_rights(allowed, summary)
        subject = summary.subject
        if subject is None:
            is_refused = summary.end_type in _REFUSALS and summary.started is None
            names = summary.owner, summary.host, summary.procedure
            subject = Subject(*names, Raw(b"[]"), summary.queue, is_refused)
        return self._decide_rights(subject, summary.ended is not None, summary.holds_slot)

    def rights_finder(self) -> Callable[[JobSummary], tuple[str, ...]]:
        """Return a function that does what `rights` does, and decides at once what does not depend on the job."""
        allowed = self._general_rights
        return self.rights if allowed is None else partial(_find_rights, allowed)

    def rights_to(self, job: Job) -> tuple[str, ...]:
        """Return what the client may do with a job that it may read, as `rights` does."""
        is_refused = isinstance(job.end, Failed) and job.end.type in _REFUSALS and job.started is None
        if (allowed := self._general_rights) is not None:
            return _name_rights(allowed, job.ended is not None, is_refused, job.holds_slot)
        arguments = Raw(job.arguments[:SUBJECT_BYTES])
        subject = Subject(job.owner, job.host, job.procedure, arguments, job.queue, is_refused)
        return self._decide_rights(subject, job.ended is not None, job.holds_slot)

    def _decide_rights(self, subject: Subject, has_ended: bool, holds_slot: bool) -> tuple[str, ...]:
        found = []
        may_read = self._may_read(subject)
        if may_read:
            found.append("read")
        if not has_ended and self._may(Action.CANCEL, subject):
            found.append("cancel")
        target = Target(subject.host, subject.procedure, subject.arguments, subject.queue, self._client.owner)
        if may_read and not subject.is_refused and self._is_allowed(Action.CALL, target):
            found.append("rerun")
        if has_ended and holds_slot and self._may(Action.MANAGE, subject):
            found.append("release")
        return tuple(found)

    async def list_queues(self) -> list[QueueSummary]:
        """Return the queues that the client may list, see `find_queues`."""
        found, cursor = await self.find_queues(_PAGE_SIZE)
        while cursor is not None:
            page, cursor = await self.find_queues(_PAGE_SIZE, cursor)
            found += page
        return found

    def list_hosts(self) -> list[Host]:
        """Return the hosts that the client may list."""
        self.require_ever(Action.LIST)
        hosts = self._dispatcher.registry.list_hosts()
        return [host for host in hosts if self._is_allowed(Action.LIST, Target(host=host.hostname))]

    async def describe_hosts(self, names: Sequence[str] | None = None, wanted: str = "") -> list[HostState]:
        """Return what is known about the hosts that the client may list, or about those of these names, by name.

        `wanted` is what the client asks for, for the audit file.
        """
        self.require_ever(Action.LIST)
        if names is None:
            hosts = self.list_hosts()
        else:
            found = filter(None, map(self._dispatcher.registry.find_host, dict.fromkeys(names)))
            hosts = [host for host in found if self._may_list_host(host.hostname)]
        await self._record_list("hosts", wanted)
        hosts.sort(key=lambda host: host.hostname)
        return await self._dispatcher.describe_hosts(hosts, self._client.principals, self._sees_all_of_host)

    def find_host_names(self, text: str = "", after: str = "") -> Iterator[str]:
        """Yield the names behind `after` of hosts that the client may list and that have a text, in their order."""
        self.require_ever(Action.LIST)
        names = (host.hostname for host in self._dispatcher.registry.list_hosts())
        return filter(self._may_list_host, sorted(name for name in names if name > after and text in name.lower()))

    def _may_list_host(self, name: str) -> bool:
        return self._is_allowed(Action.LIST, Target(host=name))

    def _sees_all_of_host(self, name: str) -> bool:
        """Return whether the client may list the jobs of every owner on a host, and so learn how many there are."""
        return not self._is_restricted or self._is_allowed(Action.LIST, Target(host=name, owner=_NOBODY))

    def describe_registry(self) -> dict[str, Any]:
        """Return the state of the sources of hosts, see `HostsRegistry.describe`."""
        self.require_ever(Action.LIST)
        return self._dispatcher.registry.describe()

    async def find_queues(
        self,
        limit: int,
        cursor: str | None = None,
        wanted: str = "",
        fits: Callable[[QueueSummary], bool] = lambda queue: True,
    ) -> tuple[list[QueueSummary], str | None]:
        """Return queues that the client may list and that fit, and the cursor at which the list continues.

        A client that may list its own jobs only sees the queues in which some of them are open, and counts of these.
        `wanted` is what the client asks for, for the audit file. See `Dispatcher.find_queues`. Raises `InvalidCursor`.
        """
        self.require_ever(Action.LIST)
        await self._record_list("queues", wanted)
        return await self._dispatcher.find_queues(self._find_queue_rights(), fits, limit, cursor)

    async def get_queue(self, queue_id: str) -> QueueSummary | None:
        """Return the queue with an id; None if it has no open jobs, or the client may not list it."""
        self.require_ever(Action.LIST)
        return await self._dispatcher.get_queue(self._find_queue_rights(), queue_id)

    def _find_queue_rights(self) -> QueueRights:
        """Return which queues the client may see, and whether with the jobs of all owners."""
        if not self._is_restricted:
            return ALL_QUEUES
        principals = self._client.principals
        return QueueRights(
            owners=principals,
            sees_own_only=self._policy.find_scope(self._client, Action.LIST).owners is not None,
            sees_all=lambda queue: self._is_allowed(Action.LIST, Target(queue=queue.name, owner=_NOBODY)),
            sees_own=lambda queue: self._is_allowed(Action.LIST, Target(queue=queue.name, owner=principals[0])),
        )

    # What the client may do.

    def list_actions(self) -> tuple[Action, ...]:
        """Return the actions that some rule allows to the client for some target."""
        return tuple(action for action in Action if self._policy.may_ever(self._client, action))

    def decide(self, action: Action, target: Target) -> Decision:
        """Return the decision about an action on something that is no stored job."""
        return self._policy.decide(self._client, action, target)

    async def decide_on_job(self, action: Action, job_id: str) -> Decision:
        """Return the decision about an action on a job. Raises `UnknownJob`, also for one that it may not read."""
        began_at = time.monotonic()
        job = (await self._dispatcher.find_subjects([job_id])).get(job_id)
        if job is None or (self._is_restricted and not self._may_read(job)):
            await self._raise_unknown(job_id, job, Action.READ, began_at)
        target = Target(job.host, job.procedure, job.arguments, job.queue, job.owner or "")
        return self._policy.decide(self._client, action, target)

    async def require_on_job(self, action: Action, job_id: str) -> None:
        """Raise `AccessDenied` if the client may read a job, but not do this with it.

        Raises `UnknownJob` if it may do neither.
        """
        if not self._is_restricted:
            return
        began_at = time.monotonic()
        job = (await self._dispatcher.find_subjects([job_id])).get(job_id)
        if job is not None and self._may(action, job):
            return
        if job is None or not self._may_read(job):
            await self._raise_unknown(job_id, job, action, began_at)
        self._log_denial(action, None, job=job_id)
        denial = AccessDenied(f"{self._client.owner} does not have the right to this job: {action}")
        fields = {"job": job_id, **_names_of(job)}
        denial.recorded = self._dispatcher.audit.record_denial(self._client, action.value, **fields)
        raise denial

    # Administration.

    async def refresh_hosts(self, force: bool = False) -> int:
        """Refresh the hosts registry as `HostsRegistry.refresh` does; return the number of hosts."""
        self.require(Action.MANAGE)
        return await self._dispatcher.registry.refresh(force)

    async def compare_hosts(self) -> list[HostChange]:
        """Return what a refresh of the hosts would change, as `HostsRegistry.compare` does."""
        self.require(Action.MANAGE)
        return await self._dispatcher.registry.compare()

    async def prune(self, min_age: float | None = None, trust_clock: bool = False) -> int:
        """Delete old jobs; return how many."""
        self.require(Action.MANAGE)
        return await self._dispatcher.prune(min_age, trust_clock)

    async def read_audit(
        self,
        globs: Mapping[str, str],
        since: str | None = None,
        until: str | None = None,
        cursor: Cursor | None = None,
        limit: int = 100,
    ) -> Page | None:
        """Return entries of the audit file as `read_page` does; None: there is no audit file."""
        self.require(Action.ADMIN)
        audit_log = self._dispatcher.audit.log
        if audit_log is None:
            return None
        try:
            return await asyncio.to_thread(read_page, audit_log.path, globs, since, until, cursor, limit)
        except OSError as error:
            raise StorageError(f"the audit file cannot be read: {error.strerror}") from error

    def require(self, action: Action) -> None:
        """Raise `AccessDenied` if the client may not do something that concerns no host or job in particular."""
        decision = self._policy.decide(self._client, action, Target())
        if not decision.allowed:
            self._deny(action, decision)

    def require_ever(self, action: Action) -> None:
        """Raise `AccessDenied` if no rule allows an action to the client, whatever its target."""
        if not self._policy.may_ever(self._client, action):
            self._deny(action, None)

    def _is_allowed(self, action: Action, target: Target) -> bool:
        return self._policy.decide(self._client, action, target).allowed

    def _deny(self, action: Action, decision: Decision | None) -> None:
        self._log_denial(action, decision)
        denial = AccessDenied(f"{self._client.owner} does not have the right: {action}")
        rule = None if decision is None else decision.rule
        denial.recorded = self._dispatcher.audit.record_denial(self._client, action.value, rule=rule)
        raise denial

    def _log_limit(self, refusal: RateLimited) -> None:
        client = {"client": self._client.peer, "principal": self._client.owner}
        log.info("call above a limit refused", extra={"reason": str(refusal), **client})

    def _log_denial(self, action: Action, decision: Decision | None, **fields: str) -> None:
        if self._dispatcher.metrics is not None:
            self._dispatcher.metrics.denied[(action.value,)] += 1
        rule = None if decision is None else decision.rule
        client = {"client": self._client.peer, "principal": self._client.owner}
        log.info("access denied", extra={"action": action.value, **fields, "rule": rule, **client})


def _find_rights(allowed: frozenset[Action], summary: JobSummary) -> tuple[str, ...]:
    """Return the rights to a job of a client that may do these actions with every job, as `ActingAs.rights`."""
    is_refused = summary.end_type in _REFUSALS and summary.started is None
    return _name_rights(allowed, summary.ended is not None, is_refused, summary.holds_slot)


@lru_cache(1000)
def _name_rights(allowed: frozenset[Action], has_ended: bool, is_refused: bool, holds_slot: bool) -> tuple[str, ...]:
    found = ["read"]
    if not has_ended and Action.CANCEL in allowed:
        found.append("cancel")
    if not is_refused and Action.CALL in allowed:
        found.append("rerun")
    if has_ended and holds_slot and Action.MANAGE in allowed:
        found.append("release")
    return tuple(found)


def _names_of(job: Subject | Job | None) -> dict[str, Any]:
    return {} if job is None else {"host": job.host, "procedure": job.procedure, "owner": job.owner}


def _call_again(job: Job, changes: Mapping[str, Any], request_id: str | None) -> Call:
    """Return the call of a job again, with changes. Raises `CannotRerun`, or `ProtocolError`."""
    for name in changes:
        if name not in _CHANGEABLE:
            raise ProtocolError(f"{name[:_MAX_NAME]}: expected one of {', '.join(_CHANGEABLE)}")
    if isinstance(job.end, Failed) and job.end.type in _REFUSALS and job.started is None:
        raise CannotRerun("the job is a refused call, which was not accepted; submit it as a new call")
    if "arguments" not in changes and (job.secrets is not None or job.arguments.find(_MASK) >= 0):
        raise CannotRerun("the job has secret arguments, which are not kept; submit it again with all its arguments")
    fields: dict[str, Any] = {
        "host": job.host,
        "procedure": job.procedure,
        "arguments": job.arguments,
        "timeout": job.timeout,
        "max_exec_time": job.max_exec_time,
        "queue": None if job.queue is None else Queue(job.queue),
        "info": job.info,
        "start_within": job.start_within,
    }
    return Call(**fields | dict(changes), request_id=request_id)


def _to_refusal(error: LimitReached) -> RateLimited:
    return RateLimited(str(error), _QUEUED_RETRY if error.may_pass else None)
