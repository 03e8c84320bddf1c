"""The pages for people: ``/docs`` leads to a first job with curl and lists all operations, ``/docs/errors`` the errors.

They are made from the table of operations and the list of codes, need no authentication, and show nothing of the
dispatcher but the address that the browser has used. No script runs in them.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from html import escape
from typing import Any, Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from harp import __version__
from harpcaller.http.authentication import is_secure
from harpcaller.http.openapi import own_problems, query_schemas
from harpcaller.http.operations import Operation
from harpcaller.http.problems import CODES
from harpcaller.http.schemas import SCHEMAS
from harpcaller.http.service import HTTPService

PATH: Final = "/docs"
ERRORS_PATH: Final = "/docs/errors"
_API: Final = "@API@"  # in the page: the address of the API

_STYLE: Final = """
:root { color-scheme: light dark; --line: light-dark(#d5dae1, #39424e); --dim: light-dark(#4f5b6a, #a3aebc);
  --fill: light-dark(#f1f3f6, #1c222b); --link: light-dark(#1d4ed8, #8ab4ff); }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  background: light-dark(#fff, #12161c); color: light-dark(#17202b, #e4e8ee); }
a { color: var(--link); }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { margin: 2.5rem 0 .25rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .875rem; }
code { overflow-wrap: anywhere; }
pre code { overflow-wrap: normal; }
pre { overflow-x: auto; padding: .75rem; background: var(--fill); border: 1px solid var(--line); }
.path { font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.dim { color: var(--dim); }
"""
_STYLE_HASH: Final = base64.b64encode(sha256(_STYLE.encode()).digest()).decode()
_POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _body(call: str) -> str:
    return f"""-H "Content-Type: application/json" \\
  -d '{call}'"""


_BODY: Final = _body('{"host": "web01", "procedure": "disk_usage", "arguments": ["/var"]}')
_STREAMING_BODY: Final = _body('{"host": "web01", "procedure": "count", "arguments": [5]}')


class _Step(NamedTuple):
    """A step of the first job."""

    heading: str
    text: str
    commands: str


_STEPS: Final = (
    _Step(
        "Get a token",
        text="An administrator makes one on the dispatcher's machine. It is shown once; keep it secret. The setting "
        "`tokens_file` of the dispatcher names the file for tokens.",
        commands="TOKEN=$(sudo harpcallerd token add my-program --role=operator)",
    ),
    _Step(
        "Tell curl where and who",
        text="`GET /me` shows who you are for the dispatcher, and what you may do. For a certificate of your own "
        "authority, each curl needs `--cacert FILE`, too.",
        commands=f'API={_API}\nAUTH="Authorization: Bearer $TOKEN"\ncurl -sS -H "$AUTH" "$API/me"',
    ),
    _Step(
        "Submit a job and wait for its end",
        text="Replace `web01` by one of your hosts, which `GET /hosts` lists, and `disk_usage` by a procedure of this "
        "host; `harpd status` on the host prints them, no request does. "
        "`wait` is the maximum number of seconds; a longer job is not stopped. `end` has the returned value.",
        commands=f"""\
curl -sS -H "$AUTH" "$API/hosts"
curl -sS -H "$AUTH" {_BODY} \\
  "$API/jobs?wait=30\"""",
    ),
    _Step(
        "Submit a job and follow it",
        text="`count` is a placeholder: replace it, and its argument, by a procedure of your host that yields records; "
        "`count` of HARP's example procedures yields five. The response to a submission has the id of the job. Its "
        "records come as lines of JSON when they are stored; the last line is the end of the job. With `form=sse` they "
        "come as server-sent events. Without `since=0`, a response with `follow` leaves out the records that are "
        "stored already.",
        commands=f"""\
JOB=$(curl -sS -H "$AUTH" {_STREAMING_BODY} \\
  "$API/jobs?payloads=none" | grep -o '"job": *"[^"]*"' | head -n 1 | cut -d '"' -f 4)
curl -sSN -H "$AUTH" "$API/jobs/$JOB/records?follow=1&since=0\"""",
    ),
    _Step(
        "Submit it exactly once",
        text="A program that does not know whether its submission has arrived sends it again with the same "
        "`Idempotency-Key`. It gets the job of the first one.",
        commands=f"""\
curl -sS -H "$AUTH" -H "Idempotency-Key: order-7" {_BODY} \\
  "$API/jobs?payloads=none\"""",
    ),
    _Step(
        "Find what failed",
        text="These are the jobs of the last hour that raised an exception or failed. "
        "A list has `next` while there is more: send it as `cursor`.",
        commands='curl -sS -H "$AUTH" "$API/jobs?state=bad&from=-1h&limit=20"',
    ),
)


def make_docs(operations: Sequence[Operation], base_path: str) -> str:
    """Return the page of the operations, with `_API` in the place of the address."""
    links = f"{base_path}/api/v1/openapi.json", f"{base_path}{ERRORS_PATH}"
    about = (
        f"<p>HARP {escape(__version__)}. The address is <code>{_API}</code>. For programs there is an "
        f'<a href="{links[0]}">OpenAPI document</a>. <a href="{links[1]}">Errors</a> have the media type '
        "<code>application/problem+json</code>.</p>"
    )
    parts = [_head("HTTP API"), "<h1>HTTP API of this dispatcher</h1>", about]
    parts.append('<h2 id="start">A first job in two minutes</h2><ol>')
    for step in _STEPS:
        commands = _code(escape(step.commands, quote=False))
        parts.append(f"<li><b>{step.heading}.</b> {_markup(step.text)}{commands}</li>")
    parts.append(
        "</ol><p>Send the token only over TLS, a Unix socket or from the dispatcher's machine; it is refused "
        "elsewhere. Arguments, results and records are the texts that were sent, byte for byte. If your JSON decoder "
        "changes large numbers, ask for <code>payloads=text</code>.</p>"
        '<h2 id="operations">Operations</h2><div class="scroll" tabindex="0" role="region" aria-label="Operations">'
        "<table><thead><tr><th>method and path</th><th>right</th><th>meaning</th></tr></thead><tbody>"
    )
    for one in operations:
        right = "" if one.action is None else f"<code>{one.action}</code>"
        parts.append(
            f'<tr><td><a href="#{one.operation_id}"><code>{one.method} {one.path}</code></a></td>'
            f"<td>{right}</td><td>{escape(one.summary)}</td></tr>"
        )
    parts.append("</tbody></table></div>")
    parts += [_show_operation(one) for one in operations]
    return "".join([*parts, "</main></body></html>\n"])


def make_errors(base_path: str) -> str:
    """Return the page of the codes of problems: each with its status and its title."""
    rows = [
        f'<tr id="{code}"><td><code>{code}</code></td><td>{status}</td><td>{escape(title)}</td></tr>'
        for code, (status, title) in sorted(CODES.items())
    ]
    table = '<div class="scroll" tabindex="0" role="region" aria-label="Errors"><table><thead><tr>'
    table += "<th>code</th><th>status</th><th>meaning</th></tr></thead><tbody>"
    more = (
        "<p><code>invalid_request</code> has the status 422 if the body is JSON, but not what is expected; "
        "<code>errors</code> then points to each member. <code>detail</code> says what is wrong. "
        "<code>request</code> is in the dispatcher's log, too.</p>"
        f'<p><a href="{base_path}{PATH}">The operations</a></p>'
    )
    return "".join(
        [
            _head("Errors of the HTTP API"),
            "<h1>Errors of the HTTP API</h1>",
            table,
            *rows,
            "</tbody></table></div>",
            more,
        ]
    )


def _head(title: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} - HARP</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><main>'
    )


def _code(shown: str) -> str:
    return f'<pre tabindex="0"><code>{shown}</code></pre>'


def _markup(text: str) -> str:
    """Return a text of the table, which may have code and links to other pages of the documentation, as HTML."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", escape(text.strip(), quote=False))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def _show_operation(one: Operation) -> str:
    parts = [
        f'<section id="{one.operation_id}"><h3>{escape(one.summary)}</h3>',
        f'<p class="path"><code>{one.method} {one.path}</code></p>',
        *(f"<p>{_markup(part)}</p>" for part in one.description.split("\n\n") if part.strip()),
        _code(escape(_curl(one), quote=False)),
    ]
    if rows := [*_query_rows(one), *_header_rows(one), *_body_rows(one)]:
        parts.append(
            f'<div class="scroll" tabindex="0" role="region" aria-label="Parameters: {escape(one.summary)}">'
            "<table><thead><tr><th>parameter</th><th>default</th><th>meaning</th></tr></thead><tbody>"
        )
        parts += [*rows, "</tbody></table></div>"]
    parts.append("<p>")
    for status, answer in one.responses.items():
        kind = "" if answer.schema is None else f' <span class="dim">{", ".join(answer.media_types)}</span>'
        parts.append(f"<b>{status}</b> {_markup(answer.meaning)}{kind}<br>")
    for status, codes in own_problems(one):
        parts.append(f"<b>{status}</b> {', '.join(f'<code>{code}</code>' for code in codes)}<br>")
    return "".join([*parts, "</p></section>"])


def _curl(one: Operation) -> str:
    """Return the command of an operation; what is in the path are variables of the shell."""
    path = re.sub(r"\{(\w+)\}", lambda found: f"${found[1].upper()}", one.path)
    words = ["curl -sS" if one.method == "GET" else f"curl -sS -X {one.method}"]
    if not one.is_public:
        words.append('-H "$AUTH"')
    if one.body is not None:
        body = json.dumps(one.body.example).replace("'", "'\\''")
        words.append(f"-H \"Content-Type: application/json\" \\\n  -d '{body}' \\\n ")
    return " ".join([*words, f'"$API{path}"'])


def _query_rows(one: Operation) -> Iterator[str]:
    for name, schema in query_schemas(one).items():
        default = f"<code>{escape(json.dumps(schema['default']))}</code>" if "default" in schema else ""
        yield _row(name, _kind_of(schema), default, schema.get("description", ""))


def _header_rows(one: Operation) -> Iterator[str]:
    for name, meaning in one.headers.items():
        yield _row(name, "header", "", meaning)


def _body_rows(one: Operation) -> Iterator[str]:
    if one.body is None:
        return
    schema = _resolve(one.body.schema)
    for name, member in schema.get("properties", {}).items():
        is_required = name in schema.get("required", ())
        kind = f"body: {_kind_of(member)}"
        yield _row(name, kind, "required" if is_required else "", _resolve(member).get("description", ""))


def _row(name: str, kind: str, default: str, meaning: str) -> str:
    return (
        f'<tr><td><code>{name}</code> <span class="dim">{kind}</span></td><td>{default}</td>'
        f"<td>{_markup(meaning)}</td></tr>"
    )


def _resolve(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema, or the one that it refers to."""
    if "$ref" in schema:
        return SCHEMAS[schema["$ref"].rpartition("/")[2]]
    return schema


def _kind_of(schema: Mapping[str, Any]) -> str:
    schema = _resolve(schema)
    if "enum" in schema:
        return " | ".join(escape(str(value)) for value in schema["enum"])
    found = schema.get("type", "any JSON value")
    return escape(" | ".join(found) if isinstance(found, list) else found)


class DocsPages:
    """The routes of the pages of one HTTP API."""

    def __init__(self, service: HTTPService, operations: Sequence[Operation]) -> None:
        self._service = service
        self._docs = make_docs(operations, service.base_path)
        self._errors = make_errors(service.base_path)

    def routes(self) -> list[Route]:
        """Return the routes, relative to the base path."""
        return [
            Route(PATH, self._send_docs, methods=["GET"]),
            Route(ERRORS_PATH, self._send_errors, methods=["GET"]),
        ]

    async def _send_docs(self, request: Request) -> Response:
        """Answer with the page of the operations, with the address that the browser has used."""
        scheme = "https" if is_secure(request, self._service) else "http"
        host = request.headers.get("host", "localhost")
        address = escape(f"{scheme}://{host}{self._service.base_path}/api/v1")
        return _respond(self._docs.replace(_API, address))

    async def _send_errors(self, _: Request) -> Response:
        return _respond(self._errors)


def _respond(page: str) -> Response:
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache", "Vary": "Host"}
    return Response(page.encode(), headers=headers, media_type="text/html")
