"""The synchronous client without a dispatcher: `HarpServer` for a harpd, and what it gives out.

As in `harp.client`, here is only the talking, and looking at an object never sends anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from harp._core.connection_pool import Idle
from harp._core.operations import Credentials, direct_request, name_of, public, surely
from harp._core.streams import DirectReader
from harp._net.connection import Endpoint, JSONConnection, JSONSSLConnection
from harp._net.iterators import Iteration, Stream

__all__ = ["HarpProcedure", "HarpServer", "HarpStreamIterator"]


class HarpServer:
    """A harpd, called without a dispatcher. Any attribute is a procedure on it.

    A context manager that closes, at its end, the connections that wait for another call; so does the end of the
    object. Calls are possible after it, too.

    Args:
        host: name or address of the host.
        user: name to authenticate as.
        password: the user's password. It is in a pickle of this object, never in its repr.
        port: harpd's port.
        ca_file: PEM file with the authorities that the server's certificate must come from, and it must be for
            `host`; None verifies neither.
        keep: whether connections are kept for further calls, if harpd keeps them. Each carries one call at a time,
            and no call is ever sent twice.

    Raises:
        HarpException: `host`, `port`, `user` or `password` won't do.

    Spec: docs/client-api.md, HarpServer.
    """

    def __init__(
        self,
        host: str,
        user: str,
        password: str,
        port: int = 4306,
        ca_file: str | os.PathLike[str] | None = None,
        *,
        keep: bool = False,
    ) -> None:
        self._endpoint = Endpoint(host, port)
        self._credentials = Credentials(user, password)
        self._ca_file = ca_file
        self._keep = bool(keep)
        self._idle = Idle(JSONConnection.close)

    def __getattr__(self, procedure: str) -> HarpProcedure:
        """The procedure of this name."""
        return HarpProcedure(self, public(procedure, self))

    def _connect(self) -> JSONConnection:
        return JSONSSLConnection(self._endpoint.host, self._endpoint.port, self._ca_file)

    def __repr__(self) -> str:
        where, who = self._endpoint, self._credentials
        return f"HarpServer({where.host!r}, {who!r}, port={where.port}, ca_file={self._ca_file!r}, keep={self._keep})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for conn in self._idle.drain():
            conn.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_idle": Idle(JSONConnection.close)}  # a copy has connections of its own


class HarpProcedure:
    """A procedure on a harpd; calling it runs it.

    Args:
        server: the harpd.
        name: name of the procedure; here it may begin with an underscore.

    Spec: docs/client-api.md, HarpProcedure.
    """

    def __init__(self, server: HarpServer, name: str) -> None:
        self._server = server
        self._name = name_of("procedure", name)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the procedure and wait for its result, however long that takes.

        Args:
            *args: positional arguments, any JSON values.
            **kwargs: named arguments, instead of positional ones.

        Returns:
            The result; of a streaming procedure a `HarpStreamIterator`, as soon as it runs.

        Raises:
            HarpException: both kinds of arguments, or one that JSON can't carry; nothing was sent.
            RemoteException: the procedure raised.
            RemoteError: harpd refused the call or cut it short.
            CommunicationError: harpd can't be reached, is not who it should be, or broke off.

        Spec: docs/client-api.md, HarpProcedure.
        """
        server = self._server
        line = direct_request(self._name, args, kwargs, server._credentials, server._keep)
        kept = server._idle.take(time.monotonic())
        conn = kept or server._connect()
        reader = DirectReader()
        try:
            with surely(kept is not None):
                answer = conn.ask(line)
            with conn.endpoint.mapped("reply"):
                streams = reader.streams(answer)
        except BaseException:
            conn.close()
            raise
        stream = Stream(conn, reader, server._idle if server._keep else None)
        return HarpStreamIterator(stream) if streams else next(stream).value

    def __repr__(self) -> str:
        return f"<HarpProcedure {self._name} on {self._server!r}>"


class HarpStreamIterator(Iteration):
    """The records of a streaming procedure, then its end result as a `Result`.

    Leaving early, by `close` or ``with``, closes the connection, which cancels the call.

    Args:
        orig_iterator: what gives the items.

    Iterating raises:
        RemoteException: the procedure raised.
        RemoteError: the call was cut short.
        CommunicationError: harpd broke off.

    Spec: docs/client-api.md, HarpStreamIterator.
    """

    def __init__(self, orig_iterator: Iterable[Any]) -> None:
        self._items = iter(orig_iterator)

    def __next__(self) -> Any:
        return next(self._items)

    def close(self) -> None:
        """End the iteration early; closes what it iterates over, if that can be closed."""
        close = getattr(self._items, "close", None)
        if close is not None:
            close()
