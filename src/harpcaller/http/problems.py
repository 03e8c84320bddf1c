"""Errors of the HTTP API: each becomes a problem (RFC 9457) with the error type of the client protocol, if it has one.

Spec: docs/http-api.md, Errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from harp.protocol.json_text import Envelope, InvalidJSON, dumps
from harp.protocol.schema import ProtocolError
from harpcaller.access import AccessDenied, AuthError, RateLimited
from harpcaller.cursors import InvalidCursor
from harpcaller.http.guards import CrossOrigin, WrongHost
from harpcaller.model.job_filters import InvalidFilter
from harpcaller.store import CannotRerun, RequestIDReused, StorageError, UnknownJob

MEDIA_TYPE = "application/problem+json"
_MAX_DETAIL = 1000  #: Maximum length of `detail` in characters: it may quote the client's data.
_STORAGE_RETRY = 5  #: `Retry-After` in seconds while the store fails or the dispatcher stops.

#: The codes of problems: status and title.
CODES: Mapping[str, tuple[int, str]] = {
    "invalid_request": (400, "Invalid request"),
    "invalid_cursor": (400, "Invalid cursor"),
    "auth_error": (401, "Not authenticated"),
    "access_denied": (403, "Access denied"),
    "cross_origin": (403, "The request comes from another page"),
    "invalid_jobid": (404, "No such job"),
    "not_found": (404, "Not found"),
    "method_not_allowed": (405, "Method not allowed"),
    "not_acceptable": (406, "Not acceptable"),
    "request_timeout": (408, "The request was not complete in time"),
    "cannot_rerun": (409, "The job cannot be submitted again"),
    "no_result": (409, "The job has no result"),
    "too_long": (413, "The request is too long"),
    "url_too_long": (414, "The URL is too long"),
    "unsupported_media_type": (415, "Unsupported media type"),
    "wrong_host": (421, "Wrong host"),
    "key_reused": (422, "The key was used for another request"),
    "too_many_requests": (429, "Too many requests"),
    "too_many_connections": (429, "Too many connections"),
    "rate_limited": (429, "Above a limit"),
    "head_too_long": (431, "The head of the request is too long"),
    "internal_error": (500, "Internal error"),
    "storage_error": (503, "Storage error"),
    "stopping": (503, "The dispatcher stops"),
}

#: The headers of every response; the last one, unless it has its own.
COMMON_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)

_IDS = Random()  # noqa: S311 - a system call for each request would cost more
#: The path of a member at the start of a message of `ProtocolError`, and an unknown member at its end.
_PATH = re.compile(r"([A-Za-z_]+(?:\[\d+\])?(?:\.[A-Za-z_]+(?:\[\d+\])?)*): ")
_UNKNOWN_KEY = re.compile(r"unknown key ([^,]+)")


def new_request_id() -> str:
    """Return the value of ``Harp-Request`` for a request: 16 hexadecimal digits, which need not be a secret."""
    return f"{_IDS.getrandbits(64):016x}"


class Problem(Exception):
    """The refusal of a request. `code` is one of `CODES`; `status` replaces its usual status.

    `errors` are pairs of a JSON pointer into the body and a reason; `members` are further members of the problem.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        status: int | None = None,
        errors: Sequence[tuple[str, str]] = (),
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail if len(detail) <= _MAX_DETAIL else f"{detail[:_MAX_DETAIL]}..."
        self.status = CODES[code][0] if status is None else status
        self.errors = errors
        self.retry_after = retry_after
        self.headers = dict(headers or {})
        self.members = members or {}

    @property
    def title(self) -> str:
        """The title, which is the same for each problem with this code."""
        return CODES[self.code][1]

    def encode(self, request_id: str, base: str = "") -> bytes:
        """Return the body of the response."""
        body = Envelope(
            type=f"{base}/docs/errors#{self.code}",
            title=self.title,
            status=self.status,
            detail=self.detail,
            code=self.code,
            request=request_id,
        )
        if self.errors:
            body["errors"] = [{"pointer": pointer, "detail": detail[:_MAX_DETAIL]} for pointer, detail in self.errors]
        if self.retry_after is not None:
            body["retry_after"] = self.retry_after
        body.update(self.members)
        return dumps(body) + b"\n"

    def all_headers(self) -> dict[str, str]:
        """Return the headers of the response."""
        headers = {"Content-Type": MEDIA_TYPE, **self.headers}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, int(self.retry_after + 0.999)))
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="harp"'
        return headers


def to_problem(error: BaseException) -> Problem:
    """Return the problem of an error that a handler raised. Errors without a problem of their own are internal."""
    match error:
        case Problem():
            return error
        case ProtocolError():
            return of_protocol_error(error)
        case InvalidJSON():
            return Problem("invalid_request", str(error))
        case WrongHost():
            return Problem("wrong_host", str(error))
        case CrossOrigin():
            return Problem("cross_origin", str(error))
        case AuthError():
            return Problem("auth_error", str(error))
        case AccessDenied():
            return Problem("access_denied", str(error))
        case RateLimited():
            return Problem("rate_limited", str(error), retry_after=error.retry_after)
        case UnknownJob():
            return Problem("invalid_jobid", f"there is no job {error}")
        case RequestIDReused():
            return Problem("key_reused", "the key or request id was used for another request")
        case CannotRerun():
            return Problem("cannot_rerun", str(error))
        case InvalidFilter():
            return Problem("invalid_request", str(error))
        case InvalidCursor():
            return Problem("invalid_cursor", f"cursor: {error}")
        case StorageError():
            return Problem("storage_error", str(error), retry_after=_STORAGE_RETRY)
        case _:
            return Problem("internal_error", "internal error of the dispatcher; see its log")


def of_protocol_error(error: ProtocolError) -> Problem:
    """Return the problem of an invalid body."""
    message = error.message
    if error.type == "parse_error" or "repeated key" in message or "nested deeper" in message:
        return Problem("invalid_request", message)
    return Problem("invalid_request", message, 422, [(_pointer_of(message), message)])


def _pointer_of(message: str) -> str:
    """Return the JSON pointer to the member that a message names first, such as ``calls[3]: host: missing``."""
    pointer, at = "", 0
    while found := _PATH.match(message, at):
        pointer += "/" + found[1].replace("]", "").replace(".", "/").replace("[", "/")
        at = found.end()
    if unknown := _UNKNOWN_KEY.match(message, at):
        pointer += "/" + unknown[1].replace("~", "~0").replace("/", "~1")
    return pointer
