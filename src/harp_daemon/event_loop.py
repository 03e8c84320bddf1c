"""How a daemon runs its event loop: asyncio's own, with settings that suit many connections."""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import logging
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from harp_daemon import logs, memory

log = logging.getLogger(__name__)

T = TypeVar("T")

_KEPT_BYTES, _MAPPED_BYTES = 64 * 1024 * 1024, 16 * 1024 * 1024

#: Receive buffer of each TLS connection, in bytes. asyncio allocates 256 KiB, even for an idle connection.
_TLS_RECEIVE_BYTES = 32 * 1024

#: Seconds after which a thread that is busy lets the event loop run. With Python's 5 ms, each event waits so long.
_SWITCH_INTERVAL = 0.0005


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run the coroutine of a daemon to its end and return its result."""
    memory.tune(_KEPT_BYTES, _MAPPED_BYTES)
    asyncio.sslproto.SSLProtocol.max_size = _TLS_RECEIVE_BYTES
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        with asyncio.Runner() as runner:
            runner.get_loop().set_exception_handler(_log_unexpected)
            logs.write_per_turn(runner.get_loop().call_soon)
            return runner.run(main)
    finally:
        logs.write_per_turn(None)


def _log_unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    log.error("unexpected error", exc_info=error, extra={"where": context.get("message")})
