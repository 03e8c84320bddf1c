"""The fast decoder of the usual requests: calls, many calls, and waiting for a result.

`harp.protocol.dispatcher` defines the requests. This decoder returns the same values in about half of the time, and
10,000 calls in a fifth. For an unusual or invalid line it returns None, and `decode_request` uses the decoder of
`harp.protocol.dispatcher`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec

from harp.protocol.dispatcher import (
    MAX_CALLS,
    MAX_REQUEST_ID,
    MAX_TOKEN,
    Call,
    GetResult,
    Queue,
    Received,
    SubmitMany,
)
from harp.protocol.dispatcher import decode_request as decode_any_request
from harp.protocol.json_text import InvalidJSON, Raw, decode_checked
from harp.protocol.schema import MAX_NAME, ProtocolError, is_arguments
from harp_daemon import json_pieces
from harp_daemon.sliced_json import decode_slices

#: The most bytes of a line that is decoded in one step, during which no other thread runs: at most about 15 ms.
_MAX_STEP = 1024 * 1024
#: The same of a line with many calls, and its most commas: hostile ones of more elements would need longer. The calls
#: are separated in one step, and then decoded by steps of this many: about 1 ms.
_MAX_MANY, _MAX_COMMAS, _STEP_CALLS = 4 * 1024 * 1024, 250_000, 400

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
_Number = Annotated[int, msgspec.Meta(gt=0, lt=10**9)]


class _Members(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    pass


class _Queue(_Members):
    name: msgspec.Raw
    concurrency: _Number | None = None

    def to_queue(self) -> Queue:
        return _queue(Raw(self.name), self.concurrency or 1)


_queue = lru_cache(256)(Queue)  # the calls of a request often have the same one
_NO_INFO = msgspec.Raw()


class _Call(_Members):
    host: _Name
    procedure: _Name
    arguments: msgspec.Raw
    timeout: _Number | None = None
    max_exec_time: _Number | None = None
    queue: _Queue | None = None
    info: msgspec.Raw = _NO_INFO
    start_within: Annotated[int, msgspec.Meta(ge=0, lt=10**9)] | None = None
    request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_REQUEST_ID)] | None = None

    def to_request(self) -> Call:
        arguments = Raw(self.arguments)
        if not is_arguments(arguments):
            raise ProtocolError("arguments: neither an array nor an object")
        call: dict[str, Any] = {"host": self.host, "procedure": self.procedure, "arguments": arguments}
        if self.queue is not None:
            call["queue"] = self.queue.to_queue()
        if self.info is not _NO_INFO and (info := Raw(self.info)) != b"null":
            call["info"] = info
        for name in _OPTIONS:
            if (value := getattr(self, name)) is not None:
                call[name] = value
        return Call.of_valid(call)


#: The options of a call whose values need no conversion.
_OPTIONS = ("timeout", "max_exec_time", "start_within", "request_id")


class _Auth(_Members):
    token: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TOKEN)]


class _Submit(_Call, kw_only=True):
    harpcaller: Literal[1]
    keep_alive: bool | None = None
    auth: _Auth | None = None


class _SubmitMany(_Members):
    harpcaller: Literal[1]
    submit_many: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_CALLS)]
    keep_alive: bool | None = None
    auth: _Auth | None = None

    def to_request(self) -> SubmitMany:
        calls: list[Call] = []
        for first in range(0, len(self.submit_many), _STEP_CALLS):
            json_pieces.between_pieces()
            text = b"[%b]" % b",".join(self.submit_many[first : first + _STEP_CALLS])
            calls += [call.to_request() for call in _decode_exactly(_calls.decode, text)]
        return SubmitMany(calls)


class _GetResult(_Members):
    harpcaller: Literal[1]
    get_result: str
    wait: bool | None = None
    keep_alive: bool | None = None
    auth: _Auth | None = None

    def to_request(self) -> GetResult:
        return GetResult(self.get_result, self.wait is not False)


_submit = msgspec.json.Decoder(_Submit)
_submit_many = msgspec.json.Decoder(_SubmitMany)
_calls = msgspec.json.Decoder(list[_Call])
_get_result = msgspec.json.Decoder(_GetResult)


def decode_request(line: bytes) -> Received:
    """Return the request of a line. Raises `ProtocolError`."""
    return decode_usual_request(line) or decode_any_request(line, decode_slices)


def decode_usual_request(line: bytes) -> Received | None:
    """Return what `decode_request` returns, or None if the line is long, unusual or invalid."""
    is_many = line.find(b'"submit_many"') >= 0  # `in` takes longer
    is_get = line.find(b'"get_result"') >= 0
    if len(line) > (_MAX_MANY if is_many else _MAX_STEP) or (is_many and line.count(b",") > _MAX_COMMAS):
        return None
    decode = _submit_many.decode if is_many else _get_result.decode if is_get else _submit.decode
    try:
        decode_checked(line)
        members = _decode_exactly(decode, line)
        token = None if members.auth is None else members.auth.token
        return Received(members.to_request(), bool(members.keep_alive), token)
    except (msgspec.MsgspecError, InvalidJSON, ProtocolError, RecursionError):
        return None


def _decode_exactly(decode: Callable[[bytes], Any], text: bytes) -> Any:
    """Return what msgspec decodes. Raises `InvalidJSON` if that may not be all of the text.

    Of repeated members, msgspec returns only the last. Equal lengths without spaces prove that none is missing.
    """
    decoded = decode(text)
    written = msgspec.json.encode(decoded)
    if len(written) - written.count(b" ") != len(text) - text.count(b" "):
        raise InvalidJSON("repeated members")
    return decoded
