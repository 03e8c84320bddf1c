"""HARP's client: remote procedures through a dispatcher (`HarpCaller`) or directly on one harpd (`HarpServer`).

    import harp

    rpc = harp.HarpCaller("localhost")
    print(rpc.web01.uptime().get())

`harp.aio` is the same for asyncio. The names of this package are imported on first use. So a daemon that imports
`harp.protocol` does not load the client, and programs load asyncio and TLS only if they use them.

Spec: docs/client-api.md.
"""

from __future__ import annotations

from importlib import import_module

from harp import _distributions

TYPE_CHECKING = False  # not from `typing`: the zygote imports this package, too, and stays small without it
if TYPE_CHECKING:
    from harp import aio as aio
    from harp._core.lists import HostSummary, JobCounts, JobSummary, QueueSummary, ValueCount
    from harp._core.values import CALL_CANCELLED, CALL_NOT_FINISHED, Call, Result, Secret
    from harp._net.sync import JSONConnection, JSONSSLConnection
    from harp.client import HarpCaller, RemoteCall, RemoteProcedure, RemoteServer
    from harp.direct import HarpProcedure, HarpServer, HarpStreamIterator
    from harp.errors import (
        AccessDenied,
        AuthenticationFailed,
        CancelledException,
        CommunicationError,
        HarpException,
        NotSupported,
        RateLimited,
        RemoteError,
        RemoteException,
        RequestRefused,
    )

__version__ = "1.0.0.dev0"  #: The version of the distribution `harpcaller`.

__all__ = [
    "CALL_CANCELLED",
    "CALL_NOT_FINISHED",
    "AccessDenied",
    "AuthenticationFailed",
    "Call",
    "CancelledException",
    "CommunicationError",
    "HarpCaller",
    "HarpException",
    "HarpProcedure",
    "HarpServer",
    "HarpStreamIterator",
    "HostSummary",
    "JSONConnection",
    "JSONSSLConnection",
    "JobCounts",
    "JobSummary",
    "NotSupported",
    "QueueSummary",
    "RateLimited",
    "RemoteCall",
    "RemoteError",
    "RemoteException",
    "RemoteProcedure",
    "RemoteServer",
    "RequestRefused",
    "Result",
    "Secret",
    "ValueCount",
]


#: The modules of the names; modules that load faster are first.
_HOMES = ("harp.errors", "harp._core.values", "harp._core.lists", "harp._net.sync", "harp.client", "harp.direct")


if not TYPE_CHECKING:  # a type checker uses the imports above, and rejects other names

    def __getattr__(name: str) -> object:
        if name == "aio":
            return import_module("harp.aio")
        if name in __all__:
            try:
                for module in map(import_module, _HOMES):
                    if hasattr(module, name):
                        value = globals()[name] = getattr(module, name)
                        return value
            except ImportError as error:  # a file of another project may have replaced ours
                raise _distributions.explain_mixture(error) or error from error
        raise _distributions.missing_name(__name__, __path__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
