"""The two wire protocols, sans-IO: messages, strict JSON, lines, and which message may follow which.

`harp.protocol.requests` has the requests of clients to the dispatcher, `harp.protocol.replies` its replies,
`harp.protocol.harpd` the messages between harpd and its callers, `harp.protocol.ends` the ends of a call, which both
protocols share. `harp.protocol.schema` encodes, decodes and checks them all. Nothing here uses a network or a clock.
"""
