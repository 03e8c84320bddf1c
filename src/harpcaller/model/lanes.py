"""The keys of lanes, which decide the order in which queued jobs get their slot. Pure: no clock, no input or output.

Each queued job is in one lane: the lane of its queue or, if it has no queue, the lane of its host. A lane is first
in, first out; only its head may start. Between lanes the order of submission decides. So a search for jobs to start
reads the heads only, however many jobs wait behind them.
"""

from __future__ import annotations

import hashlib

from harp.protocol.json_text import Raw
from harpcaller.model.canonical import canonical


def queue_lane(name: Raw) -> str:
    """Return the key of the lane of a queue with this name, a JSON object. Names with equal values have equal keys.

    Spec: docs/protocol.md, Client and dispatcher, Call.
    """
    return "queue:" + _digest(canonical(name))


def host_lane(host: str) -> str:
    """Return the key of the lane for the jobs of this host that have no queue."""
    return "host:" + _digest(host)


def _digest(text: str) -> str:
    # 128 bits: two queues never share a key, and a name of any length has a short key
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
