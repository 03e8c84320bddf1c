"""The synchronous client without a dispatcher: `HarpServer` for a harpd, its procedures, their streamed results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harp._core.harpd import DirectProcedureBase, DirectServerBase
from harp._net.sync import Iteration, JSONConnection, JSONSSLConnection, Stream, SyncPeer, method

__all__ = ["HarpProcedure", "HarpServer", "HarpStreamIterator"]


class HarpStreamIterator(Iteration):
    """The records of a streaming procedure, then its end result as a `Result`: the items of `orig_iterator`.

    `close`, or the end of ``with``, closes the connection, which cancels the call. Iterating raises `RemoteException`
    if the procedure did, `RemoteError` if harpd stopped the call, and `CommunicationError` if the connection broke or
    harpd sent invalid data. Spec: docs/client-api.md, HarpStreamIterator.
    """

    def __init__(self, orig_iterator: Iterable[Any]) -> None:
        self._items = iter(orig_iterator)

    def __next__(self) -> Any:
        return next(self._items)

    def close(self) -> None:
        """End the iteration early, and close the original iterator if it has `close`."""
        close = getattr(self._items, "close", None)
        if close is not None:
            close()


class HarpProcedure(DirectProcedureBase["HarpServer"]):
    """A procedure on a harpd; calling it runs it. Spec: docs/client-api.md, HarpProcedure."""

    __call__ = method(DirectProcedureBase._call)

    def _iterator(self, *stream: Any) -> HarpStreamIterator:
        return HarpStreamIterator(Stream(*stream))


class HarpServer(SyncPeer, DirectServerBase[JSONConnection, HarpProcedure]):
    """A harpd, called without a dispatcher. Any attribute is a procedure on it.

    `host` is a name or an address; `user` and `password` authenticate each call. `ca_file` is a PEM file with the
    authorities that may issue the server's certificate, which must be valid for `host` if `verify_hostname`; None
    verifies neither. `keep_alive` is whether connections stay open for further calls, if harpd supports it; no call is
    sent twice. `tls_minimum` is the lowest version of TLS: "1.0", "1.1", "1.2" or "1.3".

    As a context manager it closes its waiting connections at the end, and can be used afterwards, too. A pickle has the
    password, the repr does not. Raises `HarpException` if an argument is invalid. Spec: docs/client-api.md,
    HarpServer and Keep-alive connections.
    """

    _procedure_class = HarpProcedure

    def _open(self) -> JSONConnection:
        return JSONSSLConnection(self._endpoint.host, self._endpoint.port, self._ca_file, **self._tls)
