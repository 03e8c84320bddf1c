"""The last bytes of a supervisor on a connection, to peers that read them, or do not."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from harpd.supervisor.event_loop import READ, EventLoop
from harpd.supervisor.listener import FinalReplies

REPLY = b"x" * (1 << 20)


def test_replies_that_are_not_read_give_way() -> None:
    """Each could be the list of all calls of an owner, and a frontend that was taken over does not read them."""
    loop = EventLoop()
    replies = FinalReplies(loop)
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(257)]
        for own, peer in pairs:
            stack.enter_context(own)
            stack.enter_context(peer)
            own.setblocking(False)
            replies.send(own, REPLY)
        assert [own.fileno() < 0 for own, _ in pairs] == [True] + 256 * [False]
        last = pairs[-1][1]
        received = 0

        def read() -> None:
            nonlocal received
            data = last.recv(1 << 16)
            received += len(data)
            if not data:
                loop.stop()

        loop.watch(last.fileno(), READ, read)
        loop.run()
        assert received == len(REPLY)
        assert pairs[-1][0].fileno() < 0
