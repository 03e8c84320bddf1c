"""Base classes of both shells' classes for direct calls: everything except the public methods that send requests."""

from __future__ import annotations

import os
from typing import Any, Generic, TypeVar

from harp._core.calls import Credentials, check_name, direct_request
from harp._core.connection_pool import ConnectionPool
from harp._core.endpoint import Endpoint
from harp._core.steps import Connection, PooledPeer, Steps, mark_ambiguous
from harp._core.streams import DirectReader

C = TypeVar("C", bound=Connection)
S = TypeVar("S", bound="DirectServerBase[Any]")


class DirectServerBase(PooledPeer[C]):
    """A harpd that is called without a dispatcher."""

    def __init__(
        self,
        host: str,
        user: str,
        password: str,
        port: int = 4306,
        ca_file: str | os.PathLike[str] | None = None,
        *,
        keep_alive: bool = False,
    ) -> None:
        self._endpoint = Endpoint(host, port)
        self._credentials = Credentials(user, password)
        self._ca_file = ca_file
        self._pool = ConnectionPool[C](bool(keep_alive))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._endpoint.host!r}, {self._credentials!r}, port={self._endpoint.port}, "
            f"ca_file={self._ca_file!r}, keep_alive={self._pool.enabled})"
        )

    def _start_call(self, line: bytes) -> Steps[tuple[C, DirectReader, bool]]:
        """Send a call and read harpd's acknowledgement.

        Returns:
            The connection, the reader of the following lines, and whether the result is streamed.
        """
        pooled = self._pool.get(self._clock.now())
        conn = pooled or (yield self._open())
        reader = DirectReader()
        try:
            with mark_ambiguous(pooled is not None):
                reply = yield conn.exchange(line)
            with conn.map_errors("reply"):
                is_stream = reader.read_acknowledgement(reply)
        except BaseException:
            yield conn.close()
            raise
        return conn, reader, is_stream


class DirectProcedureBase(Generic[S]):
    """A procedure on a harpd."""

    def __init__(self, server: S, name: str) -> None:
        self._server = server
        self._name = check_name("procedure", name)

    def _request(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        server = self._server
        return direct_request(self._name, args, kwargs, server._credentials, server._pool.enabled)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name} on {self._server!r}>"
