"""The schemas of the OpenAPI document: JSON Schema of bodies and responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harp.protocol.dispatcher import MAX_CALLS, MAX_QUEUE_NAME, MAX_REQUEST_ID, MAX_SECRETS
from harp.protocol.schema import MAX_NAME
from harpcaller.http.operations import reference
from harpcaller.http.problems import CODES
from harpcaller.model.jobs import State, StopState

Schema = Mapping[str, Any]

_PAYLOAD: Schema = {"description": "Any JSON value; with `payloads=text`, a string that has its text."}
_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_NAME}
_TEXT: Schema = {"type": "string"}
_BOOLEAN: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
UUID: Schema = {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}


def nullable(schema: Schema) -> Schema:
    """Return the schema of a value that may be null."""
    if "type" in schema and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def struct(members: Mapping[str, Schema], required: tuple[str, ...] | None = None, closed: bool = False) -> Schema:
    """Return the schema of an object, all of whose members are required unless they are given."""
    names = list(members if required is None else required)
    more = {"additionalProperties": False} if closed else {}
    return {"type": "object", "properties": dict(members), **({"required": names} if names else {}), **more}


def array(items: Schema) -> Schema:
    """Return the schema of an array."""
    return {"type": "array", "items": items}


_SECONDS = {"type": "number", "exclusiveMinimum": 0}
_CALL = {
    "host": {**_NAME, "description": "A name in the hosts registry."},
    "procedure": {**_NAME, "description": "The name of a procedure of this host."},
    "arguments": {"type": ["array", "object"], "description": "An array (positional) or an object (named)."},
    "timeout": nullable({**_SECONDS, "description": "Maximum seconds between two messages of the job."}),
    "max_exec_time": nullable({**_SECONDS, "description": "Maximum seconds from its start to its end."}),
    "queue": nullable(
        {
            **struct(
                {
                    "name": {"type": "object", "description": f"At most {MAX_QUEUE_NAME} bytes."},
                    "concurrency": {
                        "type": ["integer", "null"],
                        "minimum": 1,
                        "description": "Jobs that may run at once.",
                    },
                },
                required=("name",),
                closed=True,
            ),
            "description": "Jobs of the same queue run one after the other, or `concurrency` of them at once.",
        }
    ),
    "info": {"description": "Any JSON value; it is stored with the job."},
    "start_within": nullable(
        {"type": "number", "minimum": 0, "description": "Seconds for which a start that did not happen is tried again."}
    ),
    "request_id": nullable(
        {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_REQUEST_ID,
            "description": "A text of the client; calls with the same one are one job. Over HTTP, use Idempotency-Key.",
        }
    ),
    "secrets": nullable(
        {
            **array(_TEXT),
            "maxItems": MAX_SECRETS,
            "description": "JSON pointers to the values in `arguments` that are stored encrypted and never shown.",
        }
    ),
}
_ERROR = struct({"type": _TEXT, "message": _TEXT, "data": {}}, required=("type", "message"))
_END = {
    "oneOf": [
        struct({"result": {"description": "The returned value."}}),
        struct({"exception": _ERROR}),
        struct({"error": _ERROR}),
        struct({"cancelled": {"const": True}}),
    ]
}
_TIME = struct({"submit": _NUMBER, "start": nullable(_NUMBER), "end": nullable(_NUMBER)})
_QUEUE = nullable(struct({"id": _TEXT, "name": {"description": "An object; with `payloads=text`, its text."}}))
_STATE: Schema = {"enum": [state.value for state in State]}
_RIGHTS: Schema = {
    **array({"enum": ["read", "cancel", "rerun", "release"]}),
    "description": "What the client may do with the job now.",
}
_ROW = {
    "job": UUID,
    "state": _STATE,
    "host": _TEXT,
    "procedure": _TEXT,
    "queue": _QUEUE,
    "owner": nullable(_TEXT),
    "time": _TIME,
    "records": _COUNT,
    "end_type": nullable(_TEXT),
    "end_message": nullable(_TEXT),
    "stop": {"enum": [*(state.value for state in StopState), None]},
    "holds_slot": _BOOLEAN,
    "unreachable_since": nullable(_NUMBER),
    "arguments_preview": _TEXT,
    "info_preview": _TEXT,
    "run": {"type": ["string", "null"]},
    "rerun_of": nullable(UUID),
    "can": _RIGHTS,
}
_JOB = {
    "job": UUID,
    "state": _STATE,
    "host": _TEXT,
    "procedure": _TEXT,
    "owner": nullable(_TEXT),
    "queue": _QUEUE,
    "end_type": nullable(_TEXT),
    "end_message": nullable(_TEXT),
    "unreachable_since": nullable(_NUMBER),
    "run": {"type": ["string", "null"]},
    "rerun_of": nullable(UUID),
    "can": _RIGHTS,
    "position": nullable(_COUNT),
    "time": _TIME,
    "limits": {"type": "object"},
    "failed_starts": {"type": ["object", "null"]},
    "call": {"type": ["object", "null"]},
    "records": struct({"count": _COUNT, "bytes": _COUNT}),
    "stop": {"enum": [*(state.value for state in StopState), None]},
    "holds_slot": _BOOLEAN,
    "stop_request": {"type": ["object", "null"]},
    "stop_report": {"type": ["object", "null"]},
    "exit_info": {"type": ["object", "null"]},
    "phases": {"type": "object"},
    "why": _TEXT,
    "arguments": _PAYLOAD,
    "info": _PAYLOAD,
    "end": {"description": "An `End`; with `payloads=text`, its text. Null: it has not ended, or see `end_omitted`."},
    "end_omitted": nullable(struct({"bytes": _COUNT, "href": _TEXT})),
    "links": struct(dict.fromkeys(("self", "end", "result", "records"), _TEXT)),
}
_STOP = nullable(struct({"state": {"enum": [state.value for state in StopState]}, "stop_report": {}}))
_PROBLEM = {
    "type": _TEXT,
    "title": _TEXT,
    "status": {"type": "integer"},
    "detail": _TEXT,
    "code": {"enum": list(CODES)},
    "request": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
    "errors": array(struct({"pointer": _TEXT, "detail": _TEXT})),
    "retry_after": _NUMBER,
    "end": reference("End"),
}

SCHEMAS: Mapping[str, Schema] = {
    "Call": struct(_CALL, required=("host", "procedure", "arguments"), closed=True),
    "ManyCalls": struct({"calls": {**array(reference("Call")), "maxItems": MAX_CALLS}}, closed=True),
    "CallChanges": struct(
        {name: schema for name, schema in _CALL.items() if name not in ("request_id",)}, required=(), closed=True
    ),
    "Row": struct(_ROW),
    "JobPage": struct(
        {
            "jobs": array(reference("Row")),
            "next": nullable(_TEXT),
            "complete": _BOOLEAN,
            "examined": _COUNT,
            "searched_to": nullable(_NUMBER),
            "filter": {"type": "string", "description": "The filter as a search text."},
        }
    ),
    "JobCounts": struct(
        {
            "by": {
                "type": "object",
                "additionalProperties": array(struct({"value": _TEXT, "count": _COUNT, "more": _BOOLEAN})),
            },
            "exact": _BOOLEAN,
            "at": _NUMBER,
        }
    ),
    "JobStatistics": struct(
        {
            "step": _NUMBER,
            "buckets": array(
                struct(
                    {"at": _NUMBER, **dict.fromkeys(("submitted", "returned", "raised", "failed", "cancelled"), _COUNT)}
                )
            ),
            "complete": _BOOLEAN,
        }
    ),
    "JobIDs": struct({"jobs": array(UUID)}),
    "Job": struct(_JOB, required=("job",)),
    "End": _END,
    "NoResult": struct({"no_result": {"const": True}}),
    "Cancellation": struct({"wait": {"type": ["number", "null"], "minimum": 0, "maximum": 60}}, (), closed=True),
    "Cancelled": struct({"cancelled": _BOOLEAN, "stop": _STOP}),
    "NoMembers": struct({}, closed=True),
    "Released": struct({"released": _BOOLEAN}),
    "Problem": struct(_PROBLEM, required=("type", "title", "status", "detail", "code", "request")),
}
