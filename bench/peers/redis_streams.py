"""Redis streams: a worker adds records, each by itself or many in a pipeline, a follower reads what is there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import redis

from bench.load import follow, follow_slowly, record
from bench.peers import SETTINGS

#: Records in a pipeline.
_PIPELINE = 100
#: The most that a follower takes at once.
_BATCH = 1000


def _connect() -> Any:
    return redis.Redis(port=SETTINGS["redis"])


def _work() -> None:
    connection = _connect()
    while True:
        _, wanted = connection.blpop("wanted")
        _produce(connection, **json.loads(wanted))


def _produce(connection: Any, name: str, records: int, pause: float) -> None:
    if pause:
        for number in range(records):
            time.sleep(pause)
            connection.xadd(name, {"record": json.dumps({"number": number, "at": time.time()})})
    elif SETTINGS["pipelined"]:
        for first in range(0, records, _PIPELINE):
            pipeline = connection.pipeline(transaction=False)
            for number in range(first, min(first + _PIPELINE, records)):
                pipeline.xadd(name, {"record": json.dumps(record(number))})
            pipeline.execute()
    else:
        for number in range(records):
            connection.xadd(name, {"record": json.dumps(record(number))})


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


WORKS = {"follow": partial(follow, _stream), "follow_slowly": partial(follow_slowly, _stream)}

if __name__ == "__main__" and sys.argv[1:] == ["worker"]:
    _work()
