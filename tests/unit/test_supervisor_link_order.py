"""A link of the supervisor: what must be written before data is sent is written before it."""

from __future__ import annotations

import socket

import pytest

from harpd.supervisor import frames
from harpd.supervisor.event_loop import EventLoop
from harpd.supervisor.link import Link, Links


def test_link_has_audit_entries_written_before_it_sends() -> None:
    loop, order = EventLoop(), list[str]()
    here, frontend = socket.socketpair()
    with here, frontend:
        for end in (here, frontend):
            end.setblocking(False)

        def before_sending() -> None:
            with pytest.raises(BlockingIOError):  # nothing has arrived
                frontend.recv(1)
            order.append("written")

        link = Link(loop, here, (1000, 10_000), lambda *_: None, lambda *_: None, Links(), before_sending)
        link.write(1, frames.CLOSED)  # schedules the sending, before something else of this turn is recorded
        loop.call_later(0, loop.stop)
        loop.run()
        assert order == ["written"]
        assert frontend.recv(100) == frames.encode_frame(1, frames.CLOSED, b"")

        link.write(1, frames.CLOSED)
        link.finish(1.0)  # this process exits
        assert len(order) == 2
