"""The floor of the HTTP API: Starlette and uvicorn, as in the dispatcher, with a fixed answer or fixed events."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

_BODY = b'{"job":"%b"}\n' % (b"x" * 900)  # about as long as a job
_EVENT = b"id: 1\nevent: record\ndata: %b\n\n" % (b"x" * 80)  # about as long as a short record


async def _answer(request: Request) -> Response:
    return Response(_BODY, media_type="application/json")


async def _stream(request: Request) -> Response:
    async def events() -> AsyncIterator[bytes]:
        for _ in range(request.path_params["count"]):
            yield _EVENT
            await asyncio.sleep(1 / request.path_params["rate"])

    return StreamingResponse(events(), media_type="text/event-stream")


if __name__ == "__main__":
    routes = [Route("/api/v1/jobs/{job}", _answer), Route("/api/v1/events/{count:int}/{rate:int}", _stream)]
    uvicorn.run(Starlette(routes=routes), port=int(sys.argv[1]), http="httptools", log_config=None, access_log=False)
