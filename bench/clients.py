"""Clients as processes, and the client program that the harness asks.

Standard library only, as `bench.load`. A client of the measurement is a process of its own, forked before anything has
a connection: neither Python's lock nor what a library does with threads makes one client wait for another.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

__all__ = ["Figures", "Missing", "quantile", "serve", "together"]

T = TypeVar("T")

#: Figures of a piece of work, by name.
Figures = dict[str, float]

#: Seconds until clients that wait for each other give up.
_PATIENCE = 60.0

_fork = multiprocessing.get_context("fork")


class Missing(Exception):
    """The contender can't do this work; the message says what it lacks. Its row is left out, with this note."""


def together(clients: int, body: Callable[[int, Callable[[], object]], T]) -> list[T]:
    """Run clients as processes; return what each returns, a value that can be pickled.

    Args:
        clients: how many.
        body: is given the client's number and a function to call once it is prepared: that returns when all are.

    Raises:
        RuntimeError: a client failed; the message is its traceback.
        Missing: a client says so.
    """
    barrier = _fork.Barrier(clients)

    def run(number: int, pipe: Connection) -> None:
        outcome: tuple[str, Any]
        try:
            outcome = ("value", body(number, lambda: barrier.wait(_PATIENCE)))
        except Missing as lack:
            barrier.abort()
            outcome = ("missing", str(lack))
        except Exception:  # noqa: BLE001 - told to whoever waits for this client
            barrier.abort()
            outcome = ("error", traceback.format_exc())
        pipe.send(outcome)
        pipe.close()

    started = []
    for number in range(clients):
        ours, theirs = _fork.Pipe(duplex=False)
        process = _fork.Process(target=run, args=(number, theirs), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    outcomes = []
    for process, pipe in started:
        try:
            outcomes.append(pipe.recv())
        except EOFError:
            outcomes.append(("error", "a client has died"))
        process.join()
    for kind, what in outcomes:
        if kind == "missing":
            raise Missing(what)
    # Who broke first says why; the others only that they waited in vain.
    errors = sorted((what for kind, what in outcomes if kind == "error"), key=lambda what: "BrokenBarrier" in what)
    if errors:
        raise RuntimeError(errors[0])
    return [what for _, what in outcomes]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def serve(works: Mapping[str, Callable[..., Figures]]) -> None:
    """Do what the harness asks for, until it has nothing more: a JSON object a line on stdin, an answer on stdout.

    What is printed meanwhile goes to stderr.

    Args:
        works: what can be asked for under ``work``; the object's other keys are the arguments.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    replies.write('{"ready": true}\n')
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            work = works.get(request.pop("work"))
            if work is None:
                raise Missing("it has nothing of this kind")
            answer = {"figures": work(**request)}
        except Missing as lack:
            answer = {"missing": str(lack)}
        except Exception as error:  # noqa: BLE001 - the harness tells it
            traceback.print_exc()
            answer = {"error": str(error) or repr(error)}
        with suppress(BrokenPipeError):
            replies.write(json.dumps(answer) + "\n")
