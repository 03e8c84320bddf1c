"""Program: viewers of a live list, each with two connections: one reads all events, one asks for the list.

As the console does, a viewer asks for its list at the beginning, and after each event that has not all changes.
"""

from __future__ import annotations

import re
import selectors
import socket
import sys
from pathlib import Path
from typing import Any

_MORE = re.compile(rb'"more":[1-9]|event: reset')  # the event says that the list must be asked for
_END = 40  # bytes of an event's text in which it is


class _Viewer:
    """The connections of a viewer."""

    def __init__(self, port: int, token: str) -> None:
        head = f"Host: localhost\r\nAuthorization: Bearer {token}\r\n\r\n"
        self._question = f"GET /api/v1/jobs?limit=50&payloads=text HTTP/1.1\r\n{head}".encode()
        self._is_waiting = self._is_outdated = False
        self._end = b""
        self._missing = 0  # bytes of the answer
        self.events = socket.create_connection(("127.0.0.1", port), 60)
        self.lists = socket.create_connection(("127.0.0.1", port), 60)
        self.lists.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.events.sendall(f"GET /api/v1/events?payloads=text HTTP/1.1\r\n{head}".encode())
        received = b""
        while b"event: hello" not in received:
            if not (data := self.events.recv(65536)):
                raise RuntimeError(f"no event: {received!r}")
            received += data
        self._ask()

    def _ask(self) -> None:
        if self._is_waiting:
            self._is_outdated = True
            return
        self._is_waiting = True
        self.lists.sendall(self._question)

    def read_events(self) -> bool:
        """Read events; return False at their end."""
        data = self.events.recv(1 << 18)
        text = self._end + data
        if _MORE.search(text):
            self._ask()
            text = b""
        self._end = text[-_END:]
        return bool(data)

    def read_list(self) -> bool:
        """Read a part of an answer; return False if the connection is closed."""
        data = self.lists.recv(1 << 18)
        if not self._missing:
            head, _, body = data.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200") or not body:
                raise RuntimeError(f"got {data[:300]!r}")
            self._missing = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]) - len(body)
        else:
            self._missing -= len(data)
        if not self._missing:
            self._is_waiting = False
            if self._is_outdated:
                self._is_outdated = False
                self._ask()
        return bool(data)


def main(port: int, token: str, viewers: int, ready: Path) -> None:
    """Read events until the program is ended; create `ready` when all viewers have had their first one."""
    with selectors.DefaultSelector() as selector:
        for _ in range(viewers):
            viewer = _Viewer(port, token)
            selector.register(viewer.events, selectors.EVENT_READ, viewer.read_events)
            selector.register(viewer.lists, selectors.EVENT_READ, viewer.read_list)
        ready.touch()
        while selector.get_map():
            for key, _ in selector.select():
                read: Any = key.data
                if not read():
                    selector.unregister(key.fileobj)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
