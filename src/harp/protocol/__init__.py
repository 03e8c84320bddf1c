"""The two wire protocols, sans-IO: messages, strict JSON, lines, and which message may follow which.

`harp.protocol.dispatcher` has the messages of clients and dispatcher, `harp.protocol.harpd` those of harpd and its
callers, `harp.protocol.ends` the ends of a call, which both share. `harp.protocol.schema` encodes, decodes and
checks them all. This package uses no network and no clock.
"""

TYPE_CHECKING = False
if not TYPE_CHECKING:  # a type checker finds the modules

    def __getattr__(name: str) -> object:
        from harp._distributions import missing_name

        raise missing_name(__name__, __path__, name)
