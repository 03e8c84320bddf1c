"""The two wire protocols, sans-IO: messages, strict JSON, lines, and which message may follow which.

`harp.protocol.dispatcher` holds the messages between client and dispatcher, `harp.protocol.daemon` those with
harpd, `harp.protocol.ends` the ends of a call that both share. Imports data modules of the standard library only.
"""
