"""The two wire protocols, sans-IO: messages, strict JSON, lines, and which message may follow which.

`harp.protocol.requests` holds what clients ask of the dispatcher, `harp.protocol.replies` what it says,
`harp.protocol.harpd` the messages with harpd, `harp.protocol.ends` the ends of a call that both share. Imports data
modules of the standard library only.
"""
