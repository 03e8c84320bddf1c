"""HARP's client: remote procedures by way of a dispatcher (`HarpCaller`) or on one harpd (`HarpServer`).

    import harp

    rpc = harp.HarpCaller("localhost")
    print(rpc.web01.uptime().get())

The same with asyncio is in `harp.aio`. What is named here is loaded on first use: the daemons, which share
`harp.protocol`, load no client with it, and who does not need asyncio or ssl does not load them.

Spec: docs/client-api.md.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # not from `typing`: the process that calls are forked from loads this module, too
if TYPE_CHECKING:
    from harp import aio as aio
    from harp._core.calls import Call
    from harp._core.outcomes import CALL_CANCELLED, CALL_NOT_FINISHED, Result
    from harp._net.sync import JSONConnection, JSONSSLConnection
    from harp.client import HarpCaller, RemoteCall, RemoteProcedure, RemoteServer
    from harp.direct import HarpProcedure, HarpServer, HarpStreamIterator
    from harp.errors import CancelledException, CommunicationError, HarpException, RemoteError, RemoteException

__all__ = [
    "CALL_CANCELLED",
    "CALL_NOT_FINISHED",
    "Call",
    "CancelledException",
    "CommunicationError",
    "HarpCaller",
    "HarpException",
    "HarpProcedure",
    "HarpServer",
    "HarpStreamIterator",
    "JSONConnection",
    "JSONSSLConnection",
    "RemoteCall",
    "RemoteError",
    "RemoteException",
    "RemoteProcedure",
    "RemoteServer",
    "Result",
]


#: Where the names are, the cheapest module first.
_HOMES = ("harp.errors", "harp._core.outcomes", "harp._core.calls", "harp._net.sync", "harp.client", "harp.direct")


if not TYPE_CHECKING:  # a type checker knows the names from above, and refuses others

    def __getattr__(name: str) -> object:
        if name == "aio":
            return import_module("harp.aio")
        if name in __all__:
            for module in map(import_module, _HOMES):
                if name in module.__all__:
                    value = globals()[name] = getattr(module, name)
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
