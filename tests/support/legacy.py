"""Legacy programs, as sections A, B and E of the protocol specification describe them.

They are strict where the real programs are strict (an unexpected key in a reply is an error) and unusual where those
are unusual (white space, sorted keys, a connection that closes immediately). Blocking sockets and threads; no code of
HARP is used.
"""

from __future__ import annotations

import json
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Seconds that a legacy dispatcher waits for connection and acknowledgement together.
START_TIMEOUT = 10.0

DEADLINE = 60.0


class BadProtocol(Exception):
    """An error that the legacy program reports as `bad_protocol`."""


def legacy_tls_client() -> ssl.SSLContext:
    """TLS 1.2 at best, no verification, no server name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def legacy_dispatcher_call(
    port: int, procedure: str, arguments: Any, user: str, password: str, pieces: int | None = None
) -> list[dict[str, Any]]:
    """Call harpd as the legacy dispatcher does; return the messages, the acknowledgement first. Raises BadProtocol."""
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), START_TIMEOUT) as plain:
        with legacy_tls_client().wrap_socket(plain) as connection:
            auth = {"password": password, "user": user}
            line = json.dumps({"procedure": procedure, "arguments": arguments, "harp": 1, "auth": auth}) + "\n"
            data = line.encode()
            for start in range(0, len(data), pieces or len(data)):
                connection.sendall(data[start : start + (pieces or len(data))])
            replies = connection.makefile("rb")
            first = _legacy_reply(replies.readline(), ({"harp", "stream_result"}, {"harp", "error"}))
            if time.monotonic() - begin > START_TIMEOUT:
                raise BadProtocol("no acknowledgement within the legacy dispatcher's patience")
            messages = [first]
            while "error" not in messages[-1] and "result" not in messages[-1] and "exception" not in messages[-1]:
                connection.settimeout(DEADLINE)
                forms = ({"result"}, {"exception"}, {"harp", "error"})
                messages.append(
                    _legacy_reply(replies.readline(), (*forms, {"stream"}) if first["stream_result"] else forms)
                )
            if replies.readline():
                raise BadProtocol("data after the end")
            return messages


def _legacy_reply(line: bytes, forms: tuple[set[str], ...]) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise BadProtocol(f"closed: {line!r}")
    message: dict[str, Any] = json.loads(line)
    if set(message) not in forms:
        raise BadProtocol(f"keys {sorted(message)}")
    for kind in ("error", "exception"):
        if kind in message and set(message[kind]) not in ({"type", "message"}, {"type", "message", "data"}):
            raise BadProtocol(f"keys of {kind}: {sorted(message[kind])}")
    if message.get("harp", 1) != 1 or not isinstance(message.get("stream_result", True), bool):
        raise BadProtocol(f"{message}")
    return message


def legacy_client(port: int, **request: Any) -> list[dict[str, Any]]:
    """Send a request like the legacy client; return one reply line, or lines until one has no `packet`."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as connection:
        connection.sendall(json.dumps(dict(reversed([*request.items(), ("harpcaller", 1)]))).encode() + b"\n")
        replies = []
        with connection.makefile("rb") as lines:
            for line in lines:
                replies.append(json.loads(line))
                if "packet" not in replies[-1]:
                    break
        return replies


Answer = Callable[["Line"], None]


class Line:
    """One connection of a server: the request line, and methods to reply."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.text = connection.makefile("rb").readline()

    def send(self, message: Any, odd: bool = True) -> None:
        """Send a message like the legacy program: sorted keys and, if `odd`, white space around."""
        line = json.dumps(message, sort_keys=True, indent=1).replace("\n", " ") if odd else json.dumps(message)
        self._connection.sendall(f"  {line} \r\n".encode() if odd else line.encode() + b"\n")

    def wait_for_close(self) -> None:
        """Wait until the other side has closed."""
        while self._connection.recv(4096):
            pass


@contextmanager
def server(answer: Answer, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serve lines on a free port until the block ends; close each connection after its answer."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(DEADLINE)
            try:
                connection = context.wrap_socket(self.request, server_side=True) if context else self.request
                with connection:
                    answer(Line(connection))
            except (OSError, ValueError):
                return  # the other side's matter: it closed, or sent no line

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = False
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield listening.server_address[1]
        finally:
            listening.shutdown()
            thread.join()


def legacy_tls_server(certfile: Path, keyfile: Path) -> ssl.SSLContext:
    """TLS 1.2 only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certfile, keyfile)
    return context


def legacy_harpd(line: Line) -> None:
    """Answer a request as the legacy harpd: ignores unknown keys, does not check arguments."""
    try:
        request = json.loads(line.text)
    except ValueError:
        return line.send({"error": {"type": "parse_error", "message": "no JSON"}, "harp": 1})
    if request.get("harp") != 1:
        return line.send({"error": {"type": "invalid_request", "message": "wrong version"}, "harp": 1})
    if request["auth"] != {"user": "u", "password": "p"}:
        return line.send({"error": {"type": "auth_error", "message": "no"}, "harp": 1})
    match request["procedure"]:
        case "echo":
            line.send({"stream_result": False, "harp": 1})
            line.send({"result": request["arguments"]})
        case "stream":
            line.send({"stream_result": True, "harp": 1})
            for number in range(*request["arguments"]):
                line.send({"stream": {"n": number}}, odd=bool(number % 2))
            line.send({"result": None})
        case "raise":
            line.send({"stream_result": False, "harp": 1})
            line.send({"exception": {"type": "TypeError", "message": "f() takes 0", "data": {"class": "TypeError"}}})
        case "error":
            line.send({"stream_result": False, "harp": 1})
            line.send({"error": {"type": "read_error", "message": "odd", "data": None}, "harp": 1})
        case "hang":
            line.send({"stream_result": False, "harp": 1})
            line.wait_for_close()
        case "close":
            line.send({"stream_result": False, "harp": 1})
        case "garbage":
            line.send({"stream_result": False, "harp": 1})
            line.send({"result": 1, "exception": 2})
        case name:
            line.send({"error": {"type": "no_such_procedure", "message": name, "data": {"procedure": name}}, "harp": 1})
    return None


class LegacyDispatcher:
    """A legacy dispatcher with one job for each state: closes without a reply on unknown requests."""

    JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
    _CALL_KEYS = frozenset({"host", "procedure", "arguments", "timeout", "max_exec_time", "queue", "info"})

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []

    def __call__(self, line: Line) -> None:
        """Answer one request."""
        try:
            request = json.loads(line.text)
        except ValueError:
            return
        if request.pop("harpcaller", None) != 1:
            return
        self.requests.append(request)
        keys = set(request)
        if "procedure" in keys and keys <= self._CALL_KEYS:
            line.send({"job_id": self.JOB, "harpcaller": 1})
        elif keys == {"cancel"}:
            line.send({"cancelled": request["cancel"] == self.JOB})
        elif keys == {"get_result", "wait"}:
            line.send({"result": [1]} if request["wait"] else {"no_result": True})
        elif keys == {"get_status"}:
            call = {"host": "h", "procedure": "p", "arguments": [1]}
            line.send({"call": call, "time": {"submit": 1, "start": 2, "end": None}, "info": None})
        elif keys in ({"follow_stream"}, {"follow_stream", "since"}, {"follow_stream", "recent"}):
            if request["follow_stream"] != self.JOB:
                return
            for number in range(request.get("since", 0), 3):
                line.send({"packet": number, "data": number}, odd=False)
            line.send({"result": "end"})
        elif keys in ({"read_stream"}, {"read_stream", "since"}, {"read_stream", "recent"}):
            if request["read_stream"] != self.JOB:
                return
            line.send({"packet": 0, "data": 0})
            line.send({"continue": True})
