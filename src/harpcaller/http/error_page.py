"""The page to which the `type` of each problem leads."""

from __future__ import annotations

from html import escape

from starlette.requests import Request
from starlette.responses import Response

from harpcaller.http.problems import CODES

PATH = "/docs/errors"


def make_page() -> bytes:
    """Return the page: each code with its status and its title."""
    rows = [
        f'<tr id="{code}"><td><code>{code}</code></td><td>{status}</td><td>{escape(title)}</td></tr>'
        for code, (status, title) in sorted(CODES.items())
    ]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Errors of the HTTP API - HARP</title>'
    table = "<table><thead><tr><th>code</th><th>status</th><th>meaning</th></tr></thead><tbody>"
    more = "<p>`invalid_request` has the status 422 if the body is JSON, but not what is expected.</p>"
    return "".join([head, "<h1>Errors of the HTTP API</h1>", table, *rows, "</tbody></table>", more]).encode()


_PAGE = make_page()


async def send_page(_: Request) -> Response:
    """Answer with the page."""
    headers = {"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'", "Cache-Control": "no-cache"}
    return Response(_PAGE, headers=headers, media_type="text/html")
