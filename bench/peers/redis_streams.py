"""Redis streams: a worker adds records in pipelines; a follower reads whatever has arrived."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import redis

from bench.load import SETTINGS, fast_records, follow, follow_slowly, slow_records

#: Records in a pipeline, and the most that a follower reads at once.
_PIPELINE, _BATCH = 100, 1000


def _connect() -> Any:
    return redis.Redis(port=SETTINGS["redis"])


def _work() -> None:
    connection = _connect()
    while True:
        _, wanted = connection.blpop("wanted")
        _produce(connection, **json.loads(wanted))


def _produce(connection: Any, name: str, records: int, pause: float) -> None:
    if pause:
        for one in slow_records(records, pause):
            connection.xadd(name, {"record": json.dumps(one)})
        return
    left = fast_records(records)
    while batch := list(islice(left, _PIPELINE)):
        pipeline = connection.pipeline(transaction=False)
        for one in batch:
            pipeline.xadd(name, {"record": json.dumps(one)})
        pipeline.execute()


def _stream(records: int, pause: float = 0.0) -> Iterator[Any]:
    connection = _connect()
    name = f"stream-{time.monotonic_ns()}"
    connection.rpush("wanted", json.dumps({"name": name, "records": records, "pause": pause}))
    last: Any = "0"
    while records:
        [(_, entries)] = connection.xread({name: last}, count=_BATCH, block=60_000)
        for _, fields in entries:
            yield json.loads(fields[b"record"])
        last = entries[-1][0]
        records -= len(entries)
    connection.delete(name)


FUNCTIONS = {
    "worker": _work,
    "follow": partial(follow, _stream),
    "follow_slowly": partial(follow_slowly, _stream),
}
