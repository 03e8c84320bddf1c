"""HARP's client: the functions for the workloads that peers do too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import harp
from bench.load import SETTINGS, Figures, Queue, calls, follow, follow_slowly, queue_functions

#: Seconds that a job blocks a queue: until the measurement ends.
_FOREVER = 7_200


def connect_server(procedure: str, **options: Any) -> Any:
    """Return a procedure of harpd, called directly."""
    user, password, port, ca_file = (SETTINGS[name] for name in ("user", "password", "harpd", "ca_file"))
    return getattr(harp.HarpServer("127.0.0.1", user, password, port, ca_file, **options), procedure)


def _rpc(port: int | None = None) -> harp.HarpCaller:
    return harp.HarpCaller("127.0.0.1", port or SETTINGS["dispatcher"], keep_alive=True)


def connect_queue(procedure: str = "echo", port: int | None = None, host: str = "web01") -> Queue:
    """Connect to a dispatcher.

    Args:
        procedure: the job.
        port: port of the dispatcher; None: the one in the settings.
        host: where jobs run.
    """
    rpc = _rpc(port)
    full = {"full": 1}
    waiting = rpc.host(host, queue=full)
    filled: list[Any] = []

    def fill() -> None:
        """Have one job run in a queue of concurrency 1: all later ones wait."""
        if not filled:
            filled.append(waiting.wait(_FOREVER))

    def submit_waiting(value: Any) -> Any:
        fill()
        return waiting.echo(value)

    def submit_many(values: Sequence[Any]) -> Any:
        fill()
        return rpc.submit_many([harp.Call(host, procedure, [value], queue=full) for value in values])

    return Queue(getattr(rpc.host(host), procedure), lambda call: call.get(), submit_waiting, submit_many)


def _kept(clients: int, seconds: float) -> Figures:
    """Return the figures of direct calls on open connections; ``harpd``: CPU of all its processes for a call."""
    figures = calls(partial(connect_server, "echo", keep_alive=True), clients, seconds)
    return {**figures, "harpd": sum(figures[f"cpu {name}"] for name in ("frontend", "supervisor", "zygote", "workers"))}


FUNCTIONS: dict[str, Callable[..., Figures]] = {
    **queue_functions(connect_queue),
    "reused_jobs": queue_functions(partial(connect_queue, "reused_echo"))["jobs"],
    "fresh": partial(calls, partial(connect_server, "echo", keep_alive=False)),
    "kept": _kept,
    "reused": partial(calls, partial(connect_server, "reused_echo", keep_alive=True)),
    "follow": partial(follow, lambda records: _rpc().web01.count(records).follow(since=0)),
    "follow_slowly": partial(follow_slowly, lambda records, pause: _rpc().web01.slowly(records, pause).follow(since=0)),
}
