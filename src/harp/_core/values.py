"""What callers pass and receive: names, arguments and options, checked and turned into requests; the outcomes of calls.

Values are encoded as soon as they are passed: a later change of a list or dict does not change the request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final, NamedTuple, NoReturn, TypedDict

from harp.errors import (
    AccessDenied,
    AuthenticationFailed,
    HarpException,
    RateLimited,
    RemoteError,
    RemoteException,
    RequestRefused,
)
from harp.protocol import dispatcher as protocol
from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned
from harp.protocol.json_text import NotJSON, Raw, dumps
from harp.protocol.schema import MAX_NAME, ProtocolError, is_count, is_seconds, is_seconds_or_zero

ID_LENGTH: Final = 36  #: Characters of a job id.


def missing_attribute(name: str, owner: object) -> AttributeError:
    """Return the error for a name that begins with an underscore: Python, copy, pickle and debuggers look them up."""
    return AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}", name=name, obj=owner)


def check_name(field: str, name: str) -> str:
    """Return a name. Raise `HarpException` if it is not a string, or empty."""
    if not isinstance(name, str) or not name:
        raise HarpException(f"{field}: expected a name, got {name!r}")
    return name


class Secret:
    """A value in the arguments of a call that the dispatcher encrypts in its store, and never shows.

    Its repr is ``Secret(***)``. It cannot be pickled; copies are the same object. Spec: docs/client-api.md, Secret.
    """

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    @property
    def value(self) -> Any:
        """The value in plain text."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a token or a harp.Secret cannot be pickled: a pickle would contain it in plain text")


def check_token(token: str) -> str:
    """Return a token. Raise `HarpException`, which does not quote it, if it is not a text without white space."""
    if not isinstance(token, str):
        raise HarpException(f"token: expected a string, got {type(token).__name__}")
    if not 0 < len(token) <= protocol.MAX_TOKEN or any(each.isspace() or not each.isprintable() for each in token):
        raise HarpException(f"token: expected 1 to {protocol.MAX_TOKEN} characters without white space")
    return token


class JobOptions(TypedDict, total=False):
    """The options of a job; None means that an option is not set."""

    queue: dict[str, Any] | None
    concurrency: int | None
    timeout: float | None
    max_exec_time: float | None
    info: Any
    start_within: float | None
    request_id: str | None


#: The options: which values are valid, in a function and in words.
_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "queue": (lambda value: isinstance(value, dict), "a dict"),
    "concurrency": (lambda value: is_count(value) and value > 0, "a positive integer"),
    "timeout": (is_seconds, "a positive number of seconds"),
    "max_exec_time": (is_seconds, "a positive number of seconds"),
    "info": (lambda value: True, "any value"),
    "start_within": (is_seconds_or_zero, "a number of seconds of at least 0"),
    "request_id": (protocol.is_request_id, f"a text of 1 to {protocol.MAX_REQUEST_ID} characters"),
}

_read_options = attrgetter(*_OPTIONS)


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a job, checked; `queue` and `info` become JSON text. Raise `HarpException`, which names one."""
    checked = dict(options)
    for name, value in options.items():
        if name not in _OPTIONS:
            raise HarpException(f"unknown option {name!r}, expected one of {', '.join(_OPTIONS)}")
        if value is not None:
            text = _encode(f"option {name!r}", value)
            is_valid, expected = _OPTIONS[name]
            if not is_valid(value):
                raise HarpException(f"option {name!r}: expected {expected}, got {value!r}")
            if name in ("queue", "info"):
                checked[name] = text
    return checked


def _encode(what: str, value: Any) -> Raw:
    try:
        return dumps(value)
    except NotJSON as error:
        raise HarpException(f"{what} cannot be sent as JSON: {error}") from error


class Arguments(NamedTuple):
    """The arguments of a call as JSON text, with secret values in plain text, and the pointers to these; None: none."""

    text: Raw
    secrets: tuple[str, ...] | None = None


def encode_arguments(args: Mapping[str, Any] | Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Arguments:
    """Return a call's arguments: an array, or an object of named arguments.

    Raise `HarpException` for both kinds, and for an argument without a form in JSON, which the message names.
    """
    if args and kwargs:
        raise HarpException("positional and named arguments cannot be mixed in one call")
    arguments = kwargs or args
    try:
        return Arguments(dumps(arguments))
    except NotJSON:  # there are secret values, or an argument has no form in JSON: find out which
        pointers: list[str] = []
        try:
            revealed = _reveal(arguments, "", pointers)
        except RecursionError:
            raise HarpException("the arguments are nested too deep, or contain themselves") from None
        if len(pointers) > protocol.MAX_SECRETS:
            raise HarpException(f"a call may have at most {protocol.MAX_SECRETS} secret values") from None
        for name, value in revealed.items() if isinstance(revealed, Mapping) else enumerate(revealed, 1):
            _encode(f"argument {name!r}", value)
        return Arguments(_encode("the arguments", revealed), tuple(pointers) or None)


def _reveal(value: Any, pointer: str, pointers: list[str]) -> Any:
    """Return a value with each `Secret` in it replaced by its value, and add the JSON pointers to these."""
    if isinstance(value, Secret):
        try:
            dumps(value.value)
        except NotJSON:
            # The reason may quote the value.
            raise HarpException(f"the secret value at {pointer} of the arguments has no form in JSON") from None
        pointers.append(pointer)
        return value.value
    if isinstance(value, Mapping):
        return {key: _reveal(each, f"{pointer}/{_pointer_token(key)}", pointers) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_reveal(each, f"{pointer}/{index}", pointers) for index, each in enumerate(value)]
    return value


def _pointer_token(key: Any) -> str:
    """Return a key of a dict as a part of a JSON pointer; any text if it has no form in JSON."""
    name = key if isinstance(key, str) else dumps(key).decode() if isinstance(key, (int, float, type(None))) else ""
    return name.replace("~", "~0").replace("/", "~1")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of many, to be submitted by `harp.HarpCaller.submit_many`.

    `host` is the host's name in the dispatcher's registry, `arguments` a list or tuple, or a dict of named arguments;
    later changes of it have no effect. The options are those of `harp.RemoteServer.__call__`.

    Raises `HarpException` if a value is invalid; the message names it. Spec: docs/client-api.md, HarpCaller.
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
    start_within: float | None = None
    request_id: str | None = None
    _request: protocol.Call = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_name("host", self.host)
        check_name("procedure", self.procedure)
        if not isinstance(self.arguments, (list, tuple, dict)):
            raise HarpException(f"arguments: expected a list, a tuple or a dict, got {self.arguments!r}")
        arguments = encode_arguments(self.arguments)
        options = {name: value for name, value in zip(_OPTIONS, _read_options(self), strict=True) if value is not None}
        checked = check_options(options) if options else options
        object.__setattr__(self, "_request", job_request(self.host, self.procedure, arguments, checked))


def job_request(host: str, procedure: str, arguments: Arguments, options: Mapping[str, Any]) -> protocol.Call:
    """Return the request that submits a job.

    Raise `HarpException` for `concurrency` without `queue`, and for a name that is too long.
    """
    call: dict[str, Any] = {"host": host, "procedure": procedure, "arguments": arguments.text}
    try:
        if options:
            call |= {name: value for name, value in options.items() if value is not None}
            concurrency = call.pop("concurrency", None)
            if "queue" in call:
                call["queue"] = _queue(call["queue"], concurrency or 1)
            elif concurrency is not None:
                raise HarpException("option 'concurrency' needs option 'queue'")
        if arguments.secrets is not None:
            call["secrets"] = arguments.secrets
        # All else was checked when it was passed.
        is_valid = len(host) <= MAX_NAME and len(procedure) <= MAX_NAME
        return protocol.Call.of_valid(call) if is_valid else protocol.Call(**call)
    except ProtocolError as error:
        raise HarpException(str(error)) from error


_queue = lru_cache(100)(protocol.Queue)  # many calls have the same one


def encode_line(value: Any, what: str = "the value") -> bytes:
    """Return a value as a line of JSON. Raise `HarpException`, which names the part that has no form in JSON."""
    return bytes(_encode(what, value)) + b"\n"


class _Sentinel(Enum):
    """Unique values, which stay the same objects when they are copied or pickled."""

    CALL_NOT_FINISHED = "<CallNotFinished>"
    CALL_CANCELLED = "<CallCancelled>"

    def __str__(self) -> str:
        return self.value

    __repr__ = __str__


#: Returned instead of a result while the call has not ended. Spec: docs/client-api.md, RemoteCall.
CALL_NOT_FINISHED: Final = _Sentinel.CALL_NOT_FINISHED

#: Returned as the result of a call that was cancelled. Spec: docs/client-api.md, RemoteCall.
CALL_CANCELLED: Final = _Sentinel.CALL_CANCELLED


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a streaming procedure, the last item of its iterator. Spec: docs/client-api.md, Direct calls."""

    value: Any


def error_of(report: Failed) -> RemoteError:
    """Return the exception for an error that the dispatcher or harpd reports."""
    return RemoteError(report.type, report.message, report.data)


_REFUSALS = {"auth_error": AuthenticationFailed, "access_denied": AccessDenied, "rate_limited": RateLimited}


def refusal_of(reply: protocol.Refused) -> RequestRefused | RemoteError:
    """Return the exception for a refused request. Some refusals are answers: to ask again makes no difference."""
    if reply.type in ("invalid_jobid", "request_id_reused"):
        return RemoteError(reply.type, reply.message, reply.data)
    error = _REFUSALS.get(reply.type, RequestRefused)(reply.type, reply.message, reply.data)
    error.retry_after = reply.retry_after
    return error


def outcome_of(end: End) -> Any:
    """Return the value of `result()` for an end."""
    match end:
        case Returned(result):
            return result
        case Raised(kind, message, data):
            return RemoteException(kind, message, data)
        case Failed():
            return error_of(end)
        case Cancelled():
            return CALL_CANCELLED
