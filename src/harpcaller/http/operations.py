"""The parts of the table of operations, from which the router, the OpenAPI document and docs/http-api.md are made.

A module with operations has a tuple `OPERATIONS`; `harpcaller.http.app` lists these modules.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec import Struct
from starlette.datastructures import Headers
from starlette.responses import Response

from harp.protocol.json_text import Envelope, Raw, dumps
from harpcaller.job_rows import dump_object

if TYPE_CHECKING:
    from starlette.requests import Request

    from harpcaller.access.client import Client
    from harpcaller.acting import ActingAs
    from harpcaller.http.service import HTTPService


class NoQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """No query parameters."""


@dataclass(slots=True)
class APIRequest:
    """A request of an authenticated client for an operation, which its `handler` answers."""

    id: str  #: The value of ``Harp-Request``.
    service: HTTPService
    http: Request  #: The request as Starlette has it.
    client: Client
    acting: ActingAs  #: The verbs of the dispatcher for the client.
    path: Mapping[str, str]  #: The parameters of the path.
    query: Any  #: The query parameters, as the operation's `query` has them.
    body: bytes  #: The body; empty if the operation has none.

    @property
    def headers(self) -> Headers:
        """The headers of the request."""
        return self.http.headers

    def renew_rights(self) -> None:
        """Decide by the rules that are in use now, after a wait."""
        if not self.acting.is_current:
            self.acting = self.service.acting_as(self.client)


Handler: TypeAlias = Callable[[APIRequest], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Body:
    """The body of a request: JSON Schema, and an example that a test sends."""

    schema: Mapping[str, Any]
    example: Any
    required: bool = True
    most: int | None = None  #: Maximum bytes, which are refused before they are read; None: `request_line`.


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful response: what it means, its media type, and the schema of its body; None: it has no body."""

    meaning: str
    schema: Mapping[str, Any] | None = None
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)  #: Name and meaning.
    other_media_types: tuple[str, ...] = ()  #: Media types that a client may ask for instead.

    @property
    def media_types(self) -> tuple[str, ...]:
        """All media types of the body."""
        return self.media_type, *self.other_media_types


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the API."""

    method: str
    path: str  #: Below the base path: ``/jobs/{job}``.
    operation_id: str
    summary: str
    handler: Handler
    responses: Mapping[int, Answer]
    query: type[Struct] = NoQuery
    body: Body | None = None
    action: str | None = None  #: The right that it needs, for the documentation; the application checks it.
    problems: tuple[str, ...] = ()  #: Codes of problems beside those of every operation.
    headers: Mapping[str, str] = field(default_factory=dict)  #: Headers of the request: name and meaning.
    is_public: bool = False  #: Whether it needs no authentication.
    description: str = ""


def reference(name: str) -> dict[str, str]:
    """Return a reference to a schema of the OpenAPI document."""
    return {"$ref": f"#/components/schemas/{name}"}


#: Of operations with a tag: the header of the request, that of the response, and the response without a body.
TAG_HEADER = {"If-None-Match": "an `ETag`: the response is 304 without a body if it is still that of the response"}
TAG = {"ETag": "changes with the response"}
UNCHANGED = Answer("the tag is that of `If-None-Match`")


def json_array(items: Iterable[Envelope]) -> Raw:
    """Return an array of objects that have `Raw` members."""
    return Raw(b"[%b]" % b",".join(map(dumps, items)))


def tag_of(text: bytes) -> str:
    """Return the tag of a response with this text."""
    return blake2b(text, digest_size=8).hexdigest()


def has_tag(request: APIRequest, tag: str) -> bool:
    """Return whether a request names a tag in ``If-None-Match``: its client has the response with this tag."""
    given = request.headers.get("if-none-match", "")
    return f'"{tag}"' in {one.strip().removeprefix("W/") for one in given.split(",")}


def tagged_response(request: APIRequest, value: Any, compared: Any = None) -> Response:
    """Return a response with a value, tagged with a digest; or only the tag, if the client has the response with it.

    The digest is that of `compared`, if it is given: the value without what differs each time.
    """
    text = dumps(value)
    tag = tag_of(text if compared is None else dumps(compared))
    if has_tag(request, tag):
        return not_modified(tag)
    return Response(text + b"\n", headers={"ETag": f'W/"{tag}"'}, media_type="application/json")


def not_modified(tag: str) -> Response:
    """Return the response to a client that has the response with this tag."""
    return Response(status_code=304, headers={"ETag": f'W/"{tag}"'})


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with a value, or with `Raw` members in an `Envelope`, as one line of JSON."""
    text = dump_object(value) if isinstance(value, Envelope) else dumps(value)
    return Response(text + b"\n", status, dict(headers or {}), media_type="application/json")
