"""A scripted harpd for tests of the dispatcher: the name of the procedure selects the behaviour."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.certificates import server_files
from support.peers import Peer, PeerConnection, server_context

_SINGLE = {"harp": 1, "stream_result": False}
_STREAM = {"harp": 1, "stream_result": True}


def scripted_harpd(directory: Path) -> Peer:
    """Return a peer that answers every call; use it in ``with``.

    Procedures: ``echo`` returns its arguments, ``count`` streams N numbers, ``repeat`` streams a record N times,
    ``raise`` and ``error`` end in that way, ``fail`` ends with an error of the given type, ``hang`` never ends,
    ``feed`` streams its arguments and then the records that the test sends.
    """
    return Peer(always=_play, tls=server_context(server_files(directory)))


def _play(conn: PeerConnection) -> None:
    # A call can be cancelled at any time, also before its request is sent.
    with suppress(AssertionError, OSError):
        _answer(conn, conn.expect())


def _answer(conn: PeerConnection, request: dict[str, Any]) -> None:
    if "calls" in request:  # a legacy harpd does not know this request
        conn.reply({"harp": 1, "error": {"type": "invalid_request", "message": "procedure: missing"}})
        return
    match request["procedure"], request["arguments"]:
        case "echo", arguments:
            conn.reply(_SINGLE, {"result": arguments})
        case "count", [most]:
            conn.reply(_STREAM, *({"stream": number} for number in range(most)), {"result": "counted"})
        case "repeat", [times, record]:
            conn.reply(_STREAM, *([{"stream": record}] * times), {"result": None})
        case "raise", _:
            conn.reply(_SINGLE, {"exception": {"type": "ValueError", "message": "no", "data": {"class": "ValueError"}}})
        case "error", _:
            conn.reply({"harp": 1, "error": {"type": "auth_error", "message": "who?", "data": [1]}})
        case "fail", [kind]:
            conn.reply(_SINGLE, {"harp": 1, "error": {"type": kind, "message": "harpd's own"}})
        case "garbage", _:
            conn.reply(b"HTTP/1.1 400 Bad Request\n")
        case "hang", _:
            conn.reply(_SINGLE)
            conn.until_closed(deadline=None)
        case "feed", [*first]:
            conn.reply(_STREAM, *({"stream": record} for record in first))
            conn.until_closed(deadline=None)
        case name, _:
            conn.reply(
                {"harp": 1, "error": {"type": "no_such_procedure", "message": name, "data": {"procedure": name}}}
            )


def connection_of(peer: Peer, *arguments: Any) -> PeerConnection:
    """Return the connection of the call with these arguments."""
    for conn in peer.connections:
        if conn.received and json.loads(conn.received[0]).get("arguments") == list(arguments):
            return conn
    raise AssertionError(f"no call with the arguments {arguments}")
