"""The floor of the HTTP API: Starlette and uvicorn, as the dispatcher runs them, with a fixed answer."""

from __future__ import annotations

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_BODY = b'{"job":"%b"}\n' % (b"x" * 900)  # about as long as a job


async def _answer(request: Request) -> Response:
    return Response(_BODY, media_type="application/json")


if __name__ == "__main__":
    application = Starlette(routes=[Route("/api/v1/jobs/{job}", _answer)])
    uvicorn.run(application, port=int(sys.argv[1]), http="httptools", log_config=None, access_log=False)
