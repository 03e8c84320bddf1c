"""The OpenAPI document, made from the table of operations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from harp import __version__
from harpcaller.http.operations import Answer, Operation
from harpcaller.http.problems import CODES, MEDIA_TYPE
from harpcaller.http.schemas import SCHEMAS, UUID

#: The problems that every operation with a body, and every operation, may have.
_OF_BODY = ("too_long", "unsupported_media_type")
_OF_ALL = (
    "invalid_request",
    "auth_error",
    "not_acceptable",
    "url_too_long",
    "too_many_requests",
    "internal_error",
    "storage_error",
)
#: Responses with events are described by one event, as there is no other way in OpenAPI 3.1.
_EVENTS = "text/event-stream"
_EVENT = {
    "type": "object",
    "description": "One event.",
    "required": ["event", "data"],
    "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": {"type": "string"}},
}
_STATUSES_OF_BODY = (422,)  #: Of `invalid_request`, if the body is JSON, but not what is expected.
_VARIABLE = re.compile(r"\{(\w+)\}")
_PATH_SCHEMAS = {"job": UUID}


def openapi_document(operations: Sequence[Operation], base_path: str = "") -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "HARP",
            "version": __version__,
            "description": f"Jobs of a dispatcher over HTTP. The page {base_path}/docs leads to a first job.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "externalDocs": {"description": "The operations, for people.", "url": f"{base_path}/docs"},
        "servers": [{"url": f"{base_path}/api/v1"}],
        "paths": paths,
        "components": {
            "schemas": dict(SCHEMAS),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "A token of `harpcallerd token add`."},
                "session": {"type": "apiKey", "in": "cookie", "name": "harp", "description": "A session of a login."},
            },
        },
        "security": [{"bearer": []}, {"session": []}],
    }


def _operation(operation: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {"operationId": operation.operation_id, "summary": operation.summary}
    if operation.description:
        found["description"] = operation.description
    if parameters := list(_parameters(operation)):
        found["parameters"] = parameters
    if operation.body is not None:
        content = {"schema": operation.body.schema, "example": operation.body.example}
        found["requestBody"] = {"required": operation.body.required, "content": {"application/json": content}}
    responses = {str(status): _response(operation, answer) for status, answer in operation.responses.items()}
    for status, codes in problems_of(operation).items():
        problem = {"schema": {"$ref": "#/components/schemas/Problem"}}
        responses[str(status)] = {"description": ", ".join(codes), "content": {MEDIA_TYPE: problem}}
    found["responses"] = responses
    if operation.is_public:
        found["security"] = []
    return found


def _response(operation: Operation, answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = {"description": answer.meaning}
    if answer.schema is not None:
        found["content"] = {answer.media_type: {"schema": answer.schema}}
    elif answer.other_media_types:  # several forms; none of them is one JSON value
        kinds = (answer.media_type, *answer.other_media_types)
        found["content"] = {kind: {"schema": _EVENT if kind == _EVENTS else {"type": "string"}} for kind in kinds}
    if answer.headers:
        found["headers"] = {
            name: {"description": meaning, "schema": {"type": "string"}} for name, meaning in answer.headers.items()
        }
    if operation.operation_id == "submit_job":  # the operations on the job that it has submitted
        ids = ("get_job", "get_end", "get_result", "cancel_job")
        found["links"] = {name: {"operationId": name, "parameters": {"job": "$response.body#/job"}} for name in ids}
    return found


def _parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    for name in _VARIABLE.findall(operation.path):
        schema = _PATH_SCHEMAS.get(name, {"type": "string"})
        yield {"name": name, "in": "path", "required": True, "schema": schema}
    for name, schema in query_schemas(operation).items():
        described = dict(schema)
        description = described.pop("description", None)
        parameter = {"name": name, "in": "query", "required": False, "schema": described}
        yield parameter if description is None else {**parameter, "description": description}
    for name, meaning in operation.headers.items():
        yield {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": meaning}


def query_schemas(operation: Operation) -> dict[str, Any]:
    """Return the schemas of an operation's query parameters."""
    (_,), schemas = msgspec.json.schema_components([operation.query], ref_template="#/components/schemas/{name}")
    found: dict[str, Any] = schemas[operation.query.__name__]["properties"]
    return {name: _without_null(schema) for name, schema in found.items()}


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter: None is that it is missing."""
    schema = dict(schema)
    options = [option for option in schema.pop("anyOf", ()) if option != {"type": "null"}]
    if "default" in schema and schema["default"] is None:
        del schema["default"]
    return {**options[0], **schema} if len(options) == 1 else {**schema, **({"anyOf": options} if options else {})}


def problems_of(operation: Operation) -> dict[int, list[str]]:
    """Return the codes of the problems that an operation may have, by status."""
    codes = [*_OF_ALL, *operation.problems, *(_OF_BODY if operation.body is not None else ())]
    if operation.is_public:
        codes.remove("auth_error")
    found: dict[int, list[str]] = {}
    for code in codes:
        found.setdefault(CODES[code][0], []).append(code)
    if operation.body is not None:
        for status in _STATUSES_OF_BODY:
            found.setdefault(status, []).append("invalid_request")
    return dict(sorted(found.items()))


def encode_document(operations: Sequence[Operation], base_path: str = "") -> bytes:
    """Return the text of the document."""
    return json.dumps(openapi_document(operations, base_path), indent=1).encode() + b"\n"


def own_problems(operation: Operation) -> Iterator[tuple[int, list[str]]]:
    """Yield the problems of an operation that not every operation may have: status and codes."""
    for status, codes in problems_of(operation).items():
        if own := [code for code in codes if code in operation.problems]:
            yield status, own
