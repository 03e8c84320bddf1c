"""The ASGI application of the HTTP API: the router from the table of operations, and what all operations share.

Each request gets an id, is authenticated, and has its query and body read before its handler runs. Errors become
problems here. Spec: docs/http-api.md.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache, lru_cache, partial
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from msgspec import Struct
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harpcaller.access import AuthError, Refusal
from harpcaller.access.client import Client
from harpcaller.http import audit, events, fleet, jobs, lists, login, records
from harpcaller.http.authentication import NoProof, authenticate, check_request_origin, identify_connection
from harpcaller.http.guards import check_host
from harpcaller.http.openapi import encode_document
from harpcaller.http.operations import TAG, TAG_HEADER, UNCHANGED, Answer, APIRequest, Operation, has_tag, tag_of
from harpcaller.http.problems import COMMON_HEADERS, MEDIA_TYPE, Problem, new_request_id, to_problem
from harpcaller.http.service import BodyReservation, HTTPService, wait_disconnected
from harpcaller.reply_memory import ReplyShare

log = logging.getLogger(__name__)

#: The modules with operations, in the order of their documentation. Of two paths that match, the first is used.
MODULES = (lists, jobs, records, events, fleet, audit, login)
_OF_MODULES = [operation for module in MODULES for operation in module.OPERATIONS]


@lru_cache(1)
def _encode_openapi(base_path: str) -> tuple[bytes, str]:
    """Return the OpenAPI document and its tag; it takes some 10 ms to make."""
    document = encode_document(OPERATIONS, base_path)
    return document, tag_of(document)


async def get_openapi(request: APIRequest) -> Response:
    """Answer with the OpenAPI document."""
    document, tag = _encode_openapi(request.service.base_path)
    headers = {"ETag": f'"{tag}"', "Cache-Control": "no-cache"}
    if has_tag(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(document, headers=headers, media_type="application/json")


OPERATIONS: tuple[Operation, ...] = (
    *_OF_MODULES,
    Operation(
        method="GET",
        path="/openapi.json",
        operation_id="get_openapi",
        summary="Get the OpenAPI document",
        handler=get_openapi,
        is_public=True,
        headers=TAG_HEADER,
        responses={200: Answer("the document", {"type": "object"}, headers=TAG), 304: UNCHANGED},
    ),
)

API_PATH = "/api/v1"
_MAX_PARAMETERS = 100  #: Maximum number of query parameters.
_PIECE = 256 * 1024  #: Bytes of a response that are passed to the transport at once.


class HTTPApp:
    """The ASGI application.

    Args:
        service: what the operations need.
        operations: the operations of the API.
        routes: further routes below the base path, which are not operations.
        find_page: returns the page for a request to an unknown path, or None.
    """

    def __init__(
        self,
        service: HTTPService,
        operations: Sequence[Operation] = OPERATIONS,
        routes: Sequence[BaseRoute] = (),
        find_page: Callable[[Request], Response | None] = lambda request: None,
    ) -> None:
        self.service = service
        self._find_page = find_page
        self._base = service.base_path
        _encode_openapi(self._base)  # before the first request
        by_path: dict[str, dict[str, Operation]] = {}
        for operation in operations:
            by_path.setdefault(operation.path, {})[operation.method] = operation
        endpoints = [_Endpoint(service, path, of_path) for path, of_path in by_path.items()]
        self._fixed = {f"{self._base}{each.route}": each for each in endpoints if "{" not in each.route}
        self._templates = [
            (f"{self._base}{each.route}".split("/"), each) for each in endpoints if "{" in each.route
        ]  # the parts of a path, of which those in braces are parameters
        others = [Mount(self._base, Router(routes, False, self._not_found))] if self._base else routes
        self._others = Router(others, redirect_slashes=False, default=self._not_found)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, also with a problem if that fails."""
        if scope["type"] != "http":
            return
        try:
            await self._answer(scope, receive, send)
        except asyncio.CancelledError:
            if not self.service.stopping.is_set():
                raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        began_at = time.monotonic()
        request_id = new_request_id()
        state = scope["state"]
        state["request_id"], state["is_started"], state["ends_proof"] = request_id, False, False

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["is_started"] = True
                self._count(scope, message["status"], time.monotonic() - began_at)
                names = {name.lower() for name, _ in message["headers"]}
                more = [pair for pair in COMMON_HEADERS if pair[0] not in names]
                message["headers"] = [*message["headers"], *more, (b"harp-request", request_id.encode())]
            await send(message)

        try:
            self._check_host(scope)
            await self._find(scope)(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass
        except Exception as error:
            problem = await _settle(error, self.service, Request(scope, receive))
            fields = {"request": request_id, "client": scope["state"]["client"].peer, "code": problem.code}
            if problem.status >= 500:
                is_internal = problem.code == "internal_error"
                log.error("HTTP request failed", extra=fields, exc_info=error if is_internal else None)
            else:
                log.info("HTTP request refused", extra={**fields, "reason": problem.detail})
            if state["is_started"]:
                raise
            body = problem.encode(request_id, self._base)
            response = Response(body, problem.status, problem.all_headers(), media_type=MEDIA_TYPE)
            await response(scope, receive, send_with_headers)

    def _find(self, scope: Scope) -> ASGIApp:
        """Return the endpoint for the path of a request, whose parameters become `path_params`; or the other routes.

        It does what Starlette's router does, which compares a path with one regular expression after the other.
        """
        if (endpoint := self._fixed.get(scope["path"])) is not None:
            scope["path_params"] = {}
            return endpoint
        parts = scope["path"].split("/")
        for template, endpoint in self._templates:
            if len(template) == len(parts):
                pairs = list(zip(template, parts, strict=True))
                if all(part if name.startswith("{") else name == part for name, part in pairs):
                    scope["path_params"] = {name[1:-1]: part for name, part in pairs if name.startswith("{")}
                    return endpoint
        return self._others

    async def _not_found(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (page := self._find_page(Request(scope))) is not None:
            await page(scope, receive, send)
            return
        raise Problem("not_found", f"there is nothing at this path; the page {self._base}/docs lists what there is")

    def _check_host(self, scope: Scope) -> None:
        values = tuple([value for name, value in scope["headers"] if name == b"host"])
        local = scope.get("server")
        _check_host(values, tuple(self.service.settings.hosts), None if local is None else str(local[0]))

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request whose response begins, by the template of its path; clients choose only its parameters."""
        state = scope["state"]
        method = scope["method"] if scope["method"] in _METHODS else "other"
        waits = state.get("waits", False)
        self.service.metrics.record_http(state.get("route", "other"), method, status, None if waits else seconds)


@lru_cache(256)
def _check_host(values: tuple[bytes, ...], hosts: tuple[str, ...], local_address: str | None) -> None:
    """Check the values of `Host`, see `check_host`. Those that were accepted are remembered."""
    check_host([value.decode("latin-1") for value in values], {name.lower() for name in hosts}, local_address)


_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


async def _settle(error: Exception, service: HTTPService, request: Request) -> Problem:
    """Return the problem of an error, after its entry in the audit file, and the delay of a wrong token."""
    if isinstance(error, AuthError):
        service.metrics.auth_failures[("http",)] += 1
        # A page asks who is logged in before a login. Nothing is refused then that an auditor looks for.
        if not (isinstance(error, NoProof) and request.method in ("GET", "HEAD")):
            service.acting_as(request.state.client).record_unauthenticated(error)
    if isinstance(error, Refusal) and error.recorded is not None:
        await asyncio.wait([error.recorded])
        error.recorded.exception()  # it is refused all the same
    if isinstance(error, AuthError) and error.delay:
        disconnect = asyncio.ensure_future(wait_disconnected(request))
        try:
            await asyncio.wait([disconnect], timeout=error.delay)
        finally:
            disconnect.cancel()
    return to_problem(error)


class _Endpoint:
    """The operations of one path, by method."""

    def __init__(self, service: HTTPService, path: str, operations: dict[str, Operation]) -> None:
        self._service = service
        self.route = f"{API_PATH}{path}"
        self._operations = dict(operations)
        if "GET" in operations:
            self._operations["HEAD"] = operations["GET"]
        self._allow = ", ".join(sorted({*self._operations, "OPTIONS"}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["route"] = self.route
        operation = self._operations.get(scope["method"])
        if scope["method"] == "OPTIONS":
            await Response(status_code=204, headers={"Allow": self._allow})(scope, receive, send)
            return
        if operation is None:
            detail = f"{scope['method'][:20]}: expected one of {self._allow}"
            raise Problem("method_not_allowed", detail, headers={"Allow": self._allow})
        request = Request(scope, receive)
        if operation.is_public:
            check_request_origin(request, self._service)
            client = await identify_connection(request, self._service)
            await respond(self._service, operation, request, client, send)
            return
        proof = request.state.proof = await authenticate(request, self._service)
        self._service.check_rate(proof.client)
        if (connection := getattr(request.state, "connection", None)) is not None:
            connection.confirm()
        task = asyncio.current_task()
        assert task is not None

        def on_void() -> None:
            # A response that lasts checks it by itself, and a logout is answered.
            if not request.state.is_started and not request.state.ends_proof:
                request.state.is_revoked = True
                task.cancel()

        try:
            with self._service.watch(proof, on_void):
                await respond(self._service, operation, request, proof.client, send)
        except asyncio.CancelledError:
            if not getattr(request.state, "is_revoked", False):
                raise
            task.uncancel()
            raise AuthError(proof.find_error() or "the right of this request was revoked") from None


async def respond(service: HTTPService, operation: Operation, request: Request, client: Client, send: Send) -> None:
    """Send the response of an operation. Raises what its client or its handler has done wrong.

    The memory of the body is reserved until the response is in the kernel's buffer; it may contain the body. A long
    response to a GET, which has no body, needs a share of `reply_memory`: without one it is discarded, and built again.
    """
    reservation, share = BodyReservation(service, client.owner), ReplyShare(service.streams.memory)
    try:
        while True:
            response = await answer(service, operation, request, client, reservation)
            has_share = asyncio.Event()
            size = len(getattr(response, "body", b""))
            if operation.method != "GET" or share.reserve(size, has_share.set):
                break
            del response
            await has_share.wait()
        await response(request.scope, request.receive, partial(_send_in_pieces, send))
        if (connection := getattr(request.state, "connection", None)) is not None:
            await connection.drain()
    finally:
        share.release()
        reservation.release()


async def _send_in_pieces(send: Send, message: Message) -> None:
    """Send a part of a response; a long one in pieces, so that other requests have their turns meanwhile."""
    body = message.get("body", b"")
    if len(body) <= _PIECE:
        await send(message)
        return
    pieces, has_more = memoryview(body), message.get("more_body", False)
    for start in range(0, len(body), _PIECE):
        is_last = start + _PIECE >= len(body)
        await send({**message, "body": bytes(pieces[start : start + _PIECE]), "more_body": has_more or not is_last})
        await asyncio.sleep(0)


async def answer(
    service: HTTPService, operation: Operation, request: Request, client: Client, reservation: BodyReservation
) -> Response:
    """Return the response of an operation. Raises what its client or its handler has done wrong."""
    _check_accept(operation, request)
    query = parse_query(operation.query, request.scope["query_string"])
    body = b"" if operation.body is None else await _read_body(service, operation, request, reservation)
    if service.stopping.is_set():
        raise Problem("stopping", "the dispatcher stops; try again later", retry_after=5)
    acting = service.acting_as(client)
    path = request.path_params
    return await operation.handler(
        APIRequest(request.state.request_id, service, request, client, acting, path, query, body)
    )


@cache
def _read_names(query: type[Struct]) -> dict[str, str]:
    """Return the attribute of each query parameter. msgspec compiles annotations for that."""
    return {field.encode_name: field.name for field in msgspec.structs.fields(query)}


@lru_cache(64)
def parse_query(kind: type[Struct], query_string: bytes) -> Any:
    """Return the query parameters of a kind. Raises `Problem`. Those of clients that ask again are remembered."""
    names = _read_names(kind)
    try:
        pairs = parse_qsl(
            query_string.decode("ascii"),
            keep_blank_values=True,
            encoding="utf-8",
            errors="strict",
            max_num_fields=_MAX_PARAMETERS,
        )
    except ValueError as error:
        raise Problem("invalid_request", f"the query is not valid: {error}") from error
    values: dict[str, str] = {}
    for name, value in pairs:
        if name not in names:
            near = "".join(f"; did you mean {found}?" for found in get_close_matches(name, names, 1))
            raise Problem("invalid_request", f"{name[:100]}: unknown query parameter{near}")
        if name in values:
            raise Problem("invalid_request", f"{name}: given twice")
        values[name] = value
    try:
        query = msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        raise Problem("invalid_request", f"{where.rstrip('`')}: {what[:1].lower()}{what[1:]}") from error
    for name in values:
        if getattr(query, names[name]) is None:  # msgspec takes the text null for a missing value
            raise Problem("invalid_request", f"{name}: expected a value, got {values[name]!r}")
    return query


def _check_accept(operation: Operation, request: Request) -> None:
    """Raise `Problem` if the client accepts no response of the operation."""
    header = request.headers.get("accept")
    if header is None or "*/*" in header:
        return
    ranges = {part.partition(";")[0].strip().lower() for part in header.split(",")}
    kinds = sorted({kind for response in operation.responses.values() for kind in response.media_types})
    if any(kind in ranges or f"{kind.partition('/')[0]}/*" in ranges for kind in kinds):
        return
    raise Problem("not_acceptable", f"Accept: the response would be {', '.join(kinds)}")


async def _read_body(
    service: HTTPService, operation: Operation, request: Request, reservation: BodyReservation
) -> bytes:
    """Return the body of a request. Raises `Problem`; a body over the limit is refused before it is read."""
    assert operation.body is not None
    most, limit = operation.body.most, service.config().request_line
    detail = f"the body is longer than request_line, which is {limit} bytes"
    if most is not None and most < limit:
        limit, detail = most, f"the body of this request has at most {most} bytes"
    too_long = Problem("too_long", detail, headers={"Connection": "close"})
    length = request.headers.get("content-length")
    if length is not None and int(length) > limit:
        raise too_long
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise too_long
        if not reservation.grow(len(piece)):
            detail = "too many long requests at once; try again later"
            raise Problem("too_many_requests", detail, retry_after=1, headers={"Connection": "close"})
        pieces.append(piece)
    body = b"".join(pieces)
    kind = request.headers.get("content-type")
    if not body and not operation.body.required:
        return b"{}"
    media_type, _, parameters = (kind or "").partition(";")
    charset = parameters.replace(" ", "").replace('"', "").lower()
    if media_type.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        raise Problem("unsupported_media_type", "Content-Type: expected application/json in UTF-8")
    return body
