"""Program: our client for what only we are measured in: a full store, many hosts, deep queues, long loads."""

from __future__ import annotations

from bench import lasting, stored, wide
from bench.clients import serve

if __name__ == "__main__":
    serve({**stored.WORKS, **wide.WORKS, **lasting.WORKS})
