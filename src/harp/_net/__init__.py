"""The client's sockets and TLS: synchronous and asyncio connections, and their iterators."""
