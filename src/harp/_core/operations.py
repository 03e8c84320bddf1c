"""What the client does, apart from doing it: options, arguments, requests, how replies are read, what is kept.

Nothing here touches a socket. An operation is a generator (`Steps`): it yields a request, is sent the `Answer`
and returns the outcome; one that needs no request yields none. What comes as a stream is read by `harp._core.streams`.
`harp.client` and `harp.aio` are thin shells that do the talking, so each operation exists once.

What is final about a job is kept as the line it came in: everyone who asks gets values of his own, and threads
share nothing that changes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, Final, TypeAlias, TypedDict, TypeVar, final

from harp._core.retry import STORAGE_ERROR, Patience, closed_silently, too_old
from harp.errors import CancelledException, CommunicationError, HarpException, RemoteError, RemoteException
from harp.protocol import harpd as daemon
from harp.protocol import requests as protocol
from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned
from harp.protocol.fields import check, is_count, is_seconds
from harp.protocol.json_text import NotJSON, Raw, dumps, loads
from harp.protocol.replies import Details, NoResult, Reply, Status, Submitted, SubmittedMany, WasCancelled, decode_reply
from harp.protocol.requests import (
    VERSION,
    Cancel,
    FollowStream,
    GetDetails,
    GetResult,
    GetStatus,
    Queue,
    ReadStream,
    Request,
    SubmitMany,
)

__all__ = [
    "CALL_CANCELLED",
    "CALL_NOT_FINISHED",
    "REFUSALS",
    "Answer",
    "Call",
    "Credentials",
    "Job",
    "JobOptions",
    "Options",
    "Result",
    "Steps",
    "answered",
    "direct_request",
    "error_of",
    "name_of",
    "outcome_of",
    "passes",
    "plain_reply",
    "plain_request",
    "public",
    "submit",
    "submit_many",
    "surely",
    "waits",
]

T = TypeVar("T")

#: Errors that refuse the request. They say nothing about the job, so they are never taken for its end.
REFUSALS = frozenset({STORAGE_ERROR, "invalid_request", "invalid_jobid"})


@final
class _Sentinel:
    """A value that stands for itself, also after copy and pickle."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text

    def __repr__(self) -> str:
        return self._text

    def __reduce__(self) -> str:
        return self._name


#: Returned instead of a result while the call has not ended. Spec: docs/client-api.md, RemoteCall.
CALL_NOT_FINISHED: Final = _Sentinel("CALL_NOT_FINISHED", "<CallNotFinished>")

#: Returned as the result of a call that was cancelled. Spec: docs/client-api.md, RemoteCall.
CALL_CANCELLED: Final = _Sentinel("CALL_CANCELLED", "<CallCancelled>")


@dataclass(frozen=True, slots=True)
class Result:
    """The end result of a streaming procedure, the last item of a `HarpStreamIterator`.

    Args:
        value: what the procedure gave as its result, any JSON value.

    Spec: docs/client-api.md, Direct calls.
    """

    value: Any


def public(name: str, owner: object) -> str:
    """Let an attribute's name pass that may stand for a host or a procedure.

    Raises:
        AttributeError: it begins with an underscore. Python itself, copy, pickle and debuggers look for such
            names; none of them may start anything.
    """
    if name.startswith("_"):
        raise AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}", name=name, obj=owner)
    return name


def name_of(what: str, name: object) -> str:
    """Let a name pass that is a string and not empty. Raises `HarpException`."""
    if not isinstance(name, str) or not name:
        raise HarpException(f"{what}: expected a name, got {name!r}")
    return name


class JobOptions(TypedDict, total=False):
    """The options of a job; None is as good as absent."""

    queue: dict[str, Any] | None
    concurrency: int | None
    timeout: float | None
    max_exec_time: float | None
    info: Any


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a job, checked. `queue` and `info` are text: later changes of the values don't reach them."""

    queue: Raw | None = None
    concurrency: int | None = None
    timeout: float | None = None
    max_exec_time: float | None = None
    info: Raw | None = None

    def changed(self, options: Mapping[str, Any]) -> Options:
        """These options with some of them set anew.

        Raises:
            HarpException: an option is unknown or its value won't do; the message names the option.
        """
        for name in options:
            if name not in _OPTION_NAMES:
                raise HarpException(f"unknown option {name!r}, expected one of {', '.join(_OPTION_NAMES)}")
        return replace(self, **{name: _option(name, value) for name, value in options.items()})


_OPTION_NAMES = tuple(option.name for option in fields(Options))


def _option(name: str, value: Any) -> Any:
    """An option's checked value."""
    if value is None:
        return None
    text = _text(f"option {name!r}", value)
    if name == "info":
        return text
    if name == "queue":
        fits, expected = isinstance(value, dict), "a dict"
    elif name == "concurrency":
        fits, expected = is_count(value) and value > 0, "a positive integer"
    else:
        fits, expected = is_seconds(value), "a positive number of seconds"
    if not fits:
        raise HarpException(f"option {name!r}: expected {expected}, got {value!r}")
    return text if name == "queue" else value


def _text(what: str, value: Any) -> Raw:
    try:
        return dumps(value)
    except NotJSON as error:
        raise HarpException(f"{what} can't be sent as JSON: {error}") from error


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Raw:
    """A call's arguments as JSON text: an array, or an object when they are named.

    Raises:
        HarpException: both kinds are given, or one can't be written as JSON; the message names the argument.
    """
    if args and kwargs:
        raise HarpException("positional and named arguments can't be mixed in one call")
    if kwargs:
        named = [dumps(name) + b":" + _text(f"argument {name!r}", value) for name, value in kwargs.items()]
        return Raw(b"{" + b",".join(named) + b"}")
    return Raw(b"[" + b",".join(_text(f"argument {n}", value) for n, value in enumerate(args, 1)) + b"]")


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply, and the line it came in."""

    reply: Reply
    line: bytes


#: An operation: yields requests, is sent their answers (or has what kept them away thrown in), returns an outcome.
Steps: TypeAlias = Generator[Request, Answer, T]


def answered(request: Request, line: bytes) -> Answer:
    """Read the reply to a request. Raises `ProtocolError` for a line that does not answer it."""
    reply = decode_reply(line, request)
    match reply:
        case NoResult():
            check(not waits(request), "no result, though it was asked to wait for one")
        case Details(details):
            check(isinstance(details.get("why"), str), "details.why: expected a string")
        case WasCancelled(_, dict(stop)):
            check(isinstance(stop.get("state"), str), "stop.state: expected a string")
    return Answer(reply, line)


def waits(request: Request) -> bool:
    """Whether a request waits and changes nothing: it is repeated after an interruption."""
    return isinstance(request, GetResult) and request.wait


def passes(answer: Answer, patience: Patience) -> Answer:
    """Let an answer pass, unless it tells of trouble that is over soon, as when the dispatcher has just come back.

    Raises:
        RemoteError: it does; `Patience.pause` says what to do.
    """
    if isinstance(answer.reply, Failed):
        error = error_of(answer.reply)
        if patience.retries(error):
            raise error
    return answer


@dataclass(frozen=True, slots=True)
class Call:
    """A call to submit with others, by `harp.HarpCaller.submit_many`.

    Args:
        host: the host's name in the dispatcher's registry.
        procedure: the procedure's name.
        arguments: its arguments, a list or tuple; a dict when they are named. What is changed in it later is not sent.
        queue, concurrency, timeout, max_exec_time, info: options of the job, as for `harp.RemoteServer.__call__`.

    Raises:
        HarpException: one of them won't do; the message names it.

    Spec: docs/client-api.md, HarpCaller.
    """

    host: str
    procedure: str
    arguments: list[Any] | tuple[Any, ...] | dict[str, Any] = ()
    _: KW_ONLY
    queue: dict[str, Any] | None = None
    concurrency: int | None = None
    timeout: float | None = None
    max_exec_time: float | None = None
    info: Any = None
    _request: protocol.Call = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name_of("host", self.host)
        name_of("procedure", self.procedure)
        if isinstance(self.arguments, dict):
            arguments = _arguments((), self.arguments) if self.arguments else Raw(b"{}")
        elif isinstance(self.arguments, (list, tuple)):
            arguments = _arguments(tuple(self.arguments), {})
        else:
            raise HarpException(f"arguments: expected a list, a tuple or a dict, got {self.arguments!r}")
        options = Options(*[_option(name, getattr(self, name)) for name in _OPTION_NAMES])
        object.__setattr__(self, "_request", _request(self.host, self.procedure, arguments, options))


def submit_many(calls: Iterable[Call]) -> Steps[list[str]]:
    """Submit jobs, all or none; returns their ids in the same order.

    Raises:
        HarpException: what was given are no calls; nothing was sent.
        RemoteError: the dispatcher refused; no job was stored.
    """
    requests: list[protocol.Call] = []
    for call in calls:
        if not isinstance(call, Call):
            raise HarpException(f"calls[{len(requests)}]: expected a harp.Call, got {call!r}")
        requests.append(call._request)
    reply = yield from _asked_anew(SubmitMany(requests), "submit_many()")
    assert isinstance(reply, SubmittedMany)
    return list(reply.job_ids)


def submit(host: str, procedure: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options) -> Steps[str]:
    """Submit a job; returns its id.

    Raises:
        HarpException: arguments or options won't do; nothing was sent.
        RemoteError: the dispatcher refused.
    """
    reply = _accepted((yield _request(host, procedure, _arguments(args, kwargs), options)))
    assert isinstance(reply, Submitted)
    return reply.job_id


def _request(host: str, procedure: str, arguments: Raw, options: Options) -> protocol.Call:
    if options.concurrency is not None and options.queue is None:
        raise HarpException("option 'concurrency' needs option 'queue'")
    queue = None if options.queue is None else Queue(options.queue, options.concurrency or 1)
    return protocol.Call(host, procedure, arguments, options.timeout, options.max_exec_time, queue, options.info)


def _accepted(answer: Answer) -> Reply:
    if isinstance(answer.reply, Failed):
        raise error_of(answer.reply)
    return answer.reply


def _asked(request: Request) -> Steps[Reply]:
    return _accepted((yield request))


def _asked_anew(request: Request, feature: str) -> Steps[Reply]:
    """Ask what the dispatchers of the field don't know; the error tells when this may be one."""
    try:
        return _accepted((yield request))
    except CommunicationError as error:
        if not closed_silently(error):
            raise
        raise too_old(error, feature) from error


def _not_stopped(job_id: str, stop: Mapping[str, Any]) -> RemoteError:
    """What `cancel` says of a stop that the host has not confirmed."""
    if stop["state"] != "failed":
        return RemoteError("stop_unknown", f"nobody can say whether the processes of job {job_id} are gone", stop)
    receipt = stop.get("receipt")
    survivors = receipt.get("survivors") if isinstance(receipt, dict) else None
    if not isinstance(survivors, list) or not survivors:
        return RemoteError("stop_failed", f"the host has not confirmed that job {job_id} is stopped", stop)
    return RemoteError("stop_failed", f"processes of job {job_id} survive: {', '.join(map(_process, survivors))}", stop)


def _process(survivor: Any) -> str:
    if isinstance(survivor, dict) and "pid" in survivor:
        return f"{survivor['pid']} ({survivor.get('command')})"
    return str(survivor)


def error_of(report: Failed) -> RemoteError:
    """What the dispatcher or harpd reports as an error."""
    return RemoteError(report.type, report.message, report.data)


def outcome_of(end: End) -> Any:
    """What `result()` gives for an end."""
    match end:
        case Returned(result):
            return result
        case Raised(kind, message, data):
            return RemoteException(kind, message, data)
        case Failed():
            return error_of(end)
        case Cancelled():
            return CALL_CANCELLED


class Job:
    """A job's operations, and what is known for good about it.

    Args:
        job_id: the job's identifier.
    """

    def __init__(self, job_id: str) -> None:
        self.id = name_of("job_id", job_id)
        self._end: bytes | None = None
        self._status: bytes | None = None

    def keep(self, answer: Answer) -> None:
        """Keep an end that a reply tells, unless it is the refusal of a request."""
        refusal = isinstance(answer.reply, Failed) and answer.reply.type in REFUSALS
        if isinstance(answer.reply, End) and not refusal:
            self._end = answer.line

    def result(self, wait: bool) -> Steps[Any]:
        """The job's end as a value; errors are returned, not raised."""
        request = GetResult(self.id, bool(wait))
        try:
            answer = (yield request) if self._end is None else answered(request, self._end)
        except (CommunicationError, RemoteError) as error:
            return error.with_traceback(None)
        if isinstance(answer.reply, NoResult):
            return CALL_NOT_FINISHED
        self.keep(answer)
        assert isinstance(answer.reply, End)
        return outcome_of(answer.reply)

    def get(self, wait: bool) -> Steps[Any]:
        """The job's end as a value; errors are raised."""
        outcome = yield from self.result(wait)
        if isinstance(outcome, HarpException):
            raise outcome
        if outcome is CALL_CANCELLED:
            raise CancelledException(f"job {self.id} was cancelled")
        return outcome

    def cancel(self, wait: bool) -> Steps[bool]:
        """Cancel the job; returns whether this stopped it, and with `wait`, once its host has confirmed that.

        Raises:
            RemoteError: ``stop_failed`` or ``stop_unknown``: the host has not confirmed it.
        """
        request = Cancel(self.id, bool(wait))
        reply = yield from (_asked_anew(request, "cancel(wait=True)") if request.wait else _asked(request))
        assert isinstance(reply, WasCancelled)
        if reply.stop is not None and reply.stop["state"] != "confirmed":
            raise _not_stopped(self.id, reply.stop)
        return reply.cancelled

    def details(self) -> Steps[dict[str, Any]]:
        """All that is known of the job."""
        reply = yield from _asked_anew(GetDetails(self.id), "details() and why()")
        assert isinstance(reply, Details)
        details: dict[str, Any] = reply.details
        return details

    def why(self) -> Steps[str]:
        """One sentence that says why the job waits, runs or ended."""
        details = yield from self.details()
        return str(details["why"])

    def submitted(self) -> Steps[Status]:
        """A status in which what was submitted is right, as in every one."""
        return self._status_with(lambda status: True)

    def started(self) -> Steps[Status]:
        """A status in which the start is final, or else a fresh one."""
        return self._status_with(lambda status: status.start is not None or status.end is not None)

    def ended(self) -> Steps[Status]:
        """A status in which the end is final, or else a fresh one."""
        return self._status_with(lambda status: status.end is not None)

    def _status_with(self, final: Callable[[Status], bool]) -> Steps[Status]:
        request = GetStatus(self.id)
        if self._status is not None:
            known = answered(request, self._status).reply
            assert isinstance(known, Status)
            if final(known):
                return known
        answer = yield request
        reply = _accepted(answer)
        assert isinstance(reply, Status)
        self._status = answer.line
        return reply

    def stream(
        self, follow: bool, since: int | None, recent: int | None, timed: bool = False
    ) -> FollowStream | ReadStream:
        """The request for the job's records.

        Raises:
            HarpException: a number won't do, or both are given.
        """
        try:
            return (FollowStream if follow else ReadStream)(self.id, since, recent, bool(timed))
        except ValueError as error:
            raise HarpException(str(error)) from error


def plain_request(req: dict[str, Any]) -> bytes:
    """The line of a request that the caller made himself; the version is added when it is absent.

    Raises:
        HarpException: it is no dict, or has no form in JSON.
    """
    if not isinstance(req, dict):
        raise HarpException(f"request: expected a dict, got {req!r}")
    return bytes(_text("the request", {"harpcaller": VERSION, **req})) + b"\n"


def plain_reply(line: bytes) -> dict[str, Any]:
    """A reply as it came. Raises `ValueError` when it is not a JSON object."""
    reply = loads(line)
    check(isinstance(reply, dict), "expected an object")
    found: dict[str, Any] = reply
    return found


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who calls harpd."""

    user: str
    password: str

    def __post_init__(self) -> None:
        for name in ("user", "password"):
            if not isinstance(getattr(self, name), str):
                raise HarpException(f"{name}: expected a string, got {type(getattr(self, name)).__name__}")

    def __repr__(self) -> str:
        return f"user={self.user!r}, password='***'"


def direct_request(
    procedure: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], credentials: Credentials, keep: bool
) -> bytes:
    """The line that asks harpd for a call, and with `keep` for another one over the same connection.

    Raises:
        HarpException: the arguments won't do.
    """
    return daemon.encode_request(
        daemon.Request(procedure, _arguments(args, kwargs), credentials.user, credentials.password, keep=keep)
    )


@contextmanager
def surely(kept: bool) -> Iterator[None]:
    """Let what keeps an answer away say that the call may have run, when its connection was kept from another call.

    The peer may have closed it for its age just when the request was on its way, or may have broken off in the middle
    of the call: that looks the same. So the call is not made again.
    """
    try:
        yield
    except CommunicationError as error:
        if not kept:
            raise
        unknown = f"{error} (a kept connection broke: it is not known whether the call ran)"
        raise CommunicationError(unknown) from error.__cause__
