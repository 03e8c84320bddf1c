"""The client's sockets and TLS: synchronous and asyncio connections and streams."""
