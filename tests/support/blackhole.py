"""A port that accepts no connection and refuses none: attempts to connect to it wait."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_FILLERS = 4  #: Connections that fill the queue of a listener with the shortest queue.


@contextmanager
def black_hole() -> Iterator[int]:
    """Yield the port of a listener on 127.0.0.1 with a full queue: Linux ignores further attempts."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(_FILLERS):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
