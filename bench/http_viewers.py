"""Program: viewers of a live list, each with a connection of its own, that read all events."""

from __future__ import annotations

import selectors
import socket
import sys
from pathlib import Path
from typing import Any


def main(port: int, token: str, viewers: int, ready: Path) -> None:
    """Read events until the program is ended; create `ready` when all viewers have had their first one."""
    request = f"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    with selectors.DefaultSelector() as selector:
        for _ in range(viewers):
            sock = socket.create_connection(("127.0.0.1", port), 60)
            sock.sendall(request)
            received = b""
            while b"event: hello" not in received:
                if not (data := sock.recv(65536)):
                    raise RuntimeError(f"no event: {received!r}")
                received += data
            selector.register(sock, selectors.EVENT_READ)
        ready.touch()
        while selector.get_map():
            for key, _ in selector.select():
                sock_of: Any = key.fileobj
                if not sock_of.recv(1 << 16):
                    selector.unregister(sock_of)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
