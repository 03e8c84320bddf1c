"""The operations on a dispatcher's jobs.

An operation is a generator (`Operation`): it yields a request, is sent the `ParsedReply` (or the error that prevented
one is thrown in), and returns its outcome. An operation whose outcome is known yields no request. Streams are read by
`harp._core.streams`; `harp._core.dispatcher` performs operations.

The final state of a job is stored as the line that reported it. Each caller gets values of its own, so threads share
no mutable data.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from harp._core.calls import Call, check_name
from harp._core.outcomes import CALL_CANCELLED, CALL_NOT_FINISHED, error_of, outcome_of
from harp._core.retry import STORAGE_ERROR, ReconnectPolicy, closed_without_reply, unsupported_by_peer
from harp.errors import CancelledException, CommunicationError, HarpException, RemoteError
from harp.protocol import requests as protocol
from harp.protocol.ends import End, Failed
from harp.protocol.fields import check
from harp.protocol.json_text import loads
from harp.protocol.replies import Details, NoResult, Reply, Status, Submitted, SubmittedMany, WasCancelled, decode_reply
from harp.protocol.requests import (
    Cancel,
    FollowStream,
    GetDetails,
    GetResult,
    GetStatus,
    ReadStream,
    Request,
    SubmitMany,
)

T = TypeVar("T")

#: Errors that refuse the request. They do not describe the job, so they are never its end.
REFUSALS = frozenset({STORAGE_ERROR, "invalid_request", "invalid_jobid"})


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """A reply, and its line."""

    reply: Reply
    line: bytes


#: An operation yields requests, is sent their replies, and returns its outcome.
Operation: TypeAlias = Generator[Request, ParsedReply, T]


def parse_reply(request: Request, line: bytes) -> ParsedReply:
    """Return the reply to a request. Raise `ProtocolError` for a line that does not answer it."""
    reply = decode_reply(line, request)
    match reply:
        case NoResult():
            check(not is_waiting(request), "no result, although the request waits for one")
        case Details(details):
            check(isinstance(details.get("why"), str), "details.why: expected a string")
        case WasCancelled(_, dict(stop)):
            check(isinstance(stop.get("state"), str), "stop.state: expected a string")
    return ParsedReply(reply, line)


def parse_plain_reply(line: bytes) -> dict[str, Any]:
    """Return a reply as a dict. Raise `ValueError` when it is not a JSON object."""
    reply = loads(line)
    check(isinstance(reply, dict), "expected an object")
    found: dict[str, Any] = reply
    return found


def is_waiting(request: Request) -> bool:
    """Return whether a request waits for a job and changes nothing: it is repeated after an interruption."""
    return isinstance(request, GetResult) and request.wait


def raise_if_transient(parsed: ParsedReply, policy: ReconnectPolicy) -> ParsedReply:
    """Return a reply, unless it reports an error that is temporary during an outage.

    Raises:
        RemoteError: the temporary error; `ReconnectPolicy.next_pause` decides about another attempt.
    """
    if isinstance(parsed.reply, Failed):
        error = error_of(parsed.reply)
        if policy.is_transient(error):
            raise error
    return parsed


def submit(request: protocol.Call) -> Operation[str]:
    """Submit a job and return its id. Raise `RemoteError` when the dispatcher refuses."""
    reply = _accepted((yield request))
    assert isinstance(reply, Submitted)
    return reply.job_id


def submit_many(calls: Iterable[Call]) -> Operation[list[str]]:
    """Submit jobs, all or none, and return their ids in the same order.

    Raises:
        HarpException: an item is not a `Call`; nothing was sent.
        RemoteError: the dispatcher refused; no job was stored.
    """
    requests: list[protocol.Call] = []
    for call in calls:
        if not isinstance(call, Call):
            raise HarpException(f"calls[{len(requests)}]: expected a harp.Call, got {call!r}")
        requests.append(call._request)
    reply = yield from _request_extension(SubmitMany(requests), "submit_many()")
    assert isinstance(reply, SubmittedMany)
    return list(reply.job_ids)


def _accepted(parsed: ParsedReply) -> Reply:
    if isinstance(parsed.reply, Failed):
        raise error_of(parsed.reply)
    return parsed.reply


def _request(request: Request) -> Operation[Reply]:
    return _accepted((yield request))


def _request_extension(request: Request, feature: str) -> Operation[Reply]:
    """Send a request that legacy dispatchers lack; the error names the feature if the dispatcher may be one."""
    try:
        return _accepted((yield request))
    except CommunicationError as error:
        if not closed_without_reply(error):
            raise
        raise unsupported_by_peer(error, feature) from error


def _stop_error(job_id: str, stop: Mapping[str, Any]) -> RemoteError:
    """Return the error of `cancel` for a stop that the host has not confirmed."""
    if stop["state"] != "failed":
        message = f"the processes of job {job_id} may still run: the host cannot report on them"
        return RemoteError("stop_unknown", message, stop)
    report = stop.get("stop_report")
    survivors = report.get("survivors") if isinstance(report, dict) else None
    if not isinstance(survivors, list) or not survivors:
        return RemoteError("stop_failed", f"the host has not confirmed that job {job_id} is stopped", stop)
    return RemoteError("stop_failed", f"processes of job {job_id} survive: {', '.join(map(_process, survivors))}", stop)


def _process(survivor: Any) -> str:
    if isinstance(survivor, dict) and "pid" in survivor:
        return f"{survivor['pid']} ({survivor.get('command')})"
    return str(survivor)


class Job:
    """A job's operations, and its final facts.

    Args:
        job_id: the job's identifier.
    """

    def __init__(self, job_id: str) -> None:
        self.id = check_name("job_id", job_id)
        self._end: bytes | None = None
        self._status: bytes | None = None

    def store_end(self, parsed: ParsedReply) -> None:
        """Store the end that a reply reports, unless it refuses the request."""
        refusal = isinstance(parsed.reply, Failed) and parsed.reply.type in REFUSALS
        if isinstance(parsed.reply, End) and not refusal:
            self._end = parsed.line

    def result(self, wait: bool) -> Operation[Any]:
        """Return the job's end as a value; errors are returned, not raised."""
        request = GetResult(self.id, bool(wait))
        try:
            parsed = (yield request) if self._end is None else parse_reply(request, self._end)
        except (CommunicationError, RemoteError) as error:
            return error.with_traceback(None)
        if isinstance(parsed.reply, NoResult):
            return CALL_NOT_FINISHED
        self.store_end(parsed)
        assert isinstance(parsed.reply, End)
        return outcome_of(parsed.reply)

    def get(self, wait: bool) -> Operation[Any]:
        """Return the job's end as a value; errors are raised."""
        outcome = yield from self.result(wait)
        if isinstance(outcome, HarpException):
            raise outcome
        if outcome is CALL_CANCELLED:
            raise CancelledException(f"job {self.id} was cancelled")
        return outcome

    def cancel(self, wait: bool) -> Operation[bool]:
        """Cancel the job and return whether this stopped it; with `wait`, once its host has confirmed that.

        Raises:
            RemoteError: ``stop_failed`` or ``stop_unknown``: the host has not confirmed it.
        """
        request = Cancel(self.id, bool(wait))
        reply = yield from (_request_extension(request, "cancel(wait=True)") if request.wait else _request(request))
        assert isinstance(reply, WasCancelled)
        if reply.stop is not None and reply.stop["state"] != "confirmed":
            raise _stop_error(self.id, reply.stop)
        return reply.cancelled

    def details(self) -> Operation[dict[str, Any]]:
        """Return all that is known about the job."""
        reply = yield from _request_extension(GetDetails(self.id), "details() and why()")
        assert isinstance(reply, Details)
        details: dict[str, Any] = reply.details
        return details

    def why(self) -> Operation[str]:
        """Return the sentence that explains why the job waits, runs or ended."""
        details = yield from self.details()
        return str(details["why"])

    def submitted(self) -> Operation[Status]:
        """Return any status: all have the same submitted facts."""
        return self._status_where(lambda status: True)

    def started(self) -> Operation[Status]:
        """Return the status if its start is final, else request a new one."""
        return self._status_where(lambda status: status.start is not None or status.end is not None)

    def ended(self) -> Operation[Status]:
        """Return the status if its end is final, else request a new one."""
        return self._status_where(lambda status: status.end is not None)

    def _status_where(self, is_final: Callable[[Status], bool]) -> Operation[Status]:
        request = GetStatus(self.id)
        if self._status is not None:
            stored = parse_reply(request, self._status).reply
            assert isinstance(stored, Status)
            if is_final(stored):
                return stored
        parsed = yield request
        reply = _accepted(parsed)
        assert isinstance(reply, Status)
        self._status = parsed.line
        return reply

    def stream_request(
        self, follow: bool, since: int | None, recent: int | None, timed: bool = False
    ) -> FollowStream | ReadStream:
        """Return the request for the job's records.

        Raises:
            HarpException: a number is invalid, or both are given.
        """
        try:
            return (FollowStream if follow else ReadStream)(self.id, since, recent, bool(timed))
        except ValueError as error:
            raise HarpException(str(error)) from error
