"""The tour of the demo: each step is a function whose source is shown before it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import harp


@dataclass(frozen=True)
class System:
    """The ports of the demo's two daemons, and how to authenticate."""

    harpcallerd: int
    harpd: int
    user: str
    password: str
    ca_file: str


Step: TypeAlias = Callable[[System], None]


def synopsis_dispatcher(system: System) -> None:
    """The client's synopsis: jobs through the dispatcher

    A job has an id immediately; its records can be followed while it runs. This job never returns: it reaches its
    limit of 5 seconds, and its result is an error.
    """
    rpc = harp.HarpCaller("localhost", system.harpcallerd)

    host = rpc.localhost(queue={"foo": "bar"}, max_exec_time=5)
    job = host.stream_infinity()
    for msg in job.follow(since=0):
        print(json.dumps(msg))

    print(job.id())
    print(repr(job.result()))

    result = rpc("localhost").return_immediate("bar", "baz").get()
    print(result)

    job_id = job.id()  # any process can use it, at any later time
    result = rpc.job(job_id).result()
    if result is harp.CALL_NOT_FINISHED:
        print("still running")
    elif result is harp.CALL_CANCELLED:
        print("cancelled")
    elif isinstance(result, harp.CommunicationError):
        print("could not ask:", result)
    elif isinstance(result, harp.RemoteError):
        print("ended by an error:", result.type)


def synopsis_direct(system: System) -> None:
    """The client's synopsis: harpd called directly, without a dispatcher"""
    server = harp.HarpServer(
        host="localhost", port=system.harpd, user=system.user, password=system.password, ca_file=system.ca_file
    )
    print(server.current_time())
    for msg in server.logs_in_next_minutes(10):
        if isinstance(msg, harp.Result):
            # last value, nothing more will be returned
            print(json.dumps(msg.value))
        else:
            print("log message:", json.dumps(msg))


def queue(system: System) -> None:
    """A queue: five jobs, never more than two at once

    The dispatcher reports the times: two jobs start at once.
    """
    rpc = harp.HarpCaller("localhost", system.harpcallerd)
    host = rpc.host("localhost", queue={"service": "database"}, concurrency=2)
    jobs = [host.sleep(1) for _ in range(5)]
    for job in jobs:
        job.get()
    first = jobs[0].start_time() or 0
    for number, job in enumerate(jobs):
        start, end = (job.start_time() or 0) - first, (job.end_time() or 0) - first
        print(f"job {number}: started at {start} s, ended at {end} s")


def follow(system: System) -> None:
    """A stream, each record as it arrives"""
    rpc = harp.HarpCaller("localhost", system.harpcallerd)
    job = rpc.localhost.count(numbers=5, pause=0.3)
    begin = time.monotonic()
    for number, record in job.follow(since=0, numbered=True):
        print(f"{time.monotonic() - begin:4.1f} s  record {number}: {record}")
    print("result:", job.get())


def exception(system: System) -> None:
    """An exception of the procedure, with its data"""
    rpc = harp.HarpCaller("localhost", system.harpcallerd)
    try:
        rpc.localhost.divide(1, 0).get()
    except harp.RemoteException as error:
        print(f"{error.type}: {error.message}, data {error.data}")


def timeout(system: System) -> None:
    """A procedure that reaches its time limit: it is killed, with everything it started"""
    rpc = harp.HarpCaller("localhost", system.harpcallerd)
    print(repr(rpc.localhost.too_slow().result(wait=True)))


def cancel(system: System) -> None:
    """A cancelled job, and the stop report of its processes"""
    rpc = harp.HarpCaller("localhost", system.harpcallerd)
    job = rpc.localhost.stream_infinity()
    with job.follow(since=0) as records:
        print("running:", next(records))
    print("not finished yet:", job.result() is harp.CALL_NOT_FINISHED)
    print("stopped, and confirmed by its host:", job.cancel(wait=True))
    print("cancelled:", job.result() is harp.CALL_CANCELLED)
    for process in job.details()["stop_report"]["processes"]:
        print("process", process["pid"], "was sent", *process["signals"], "and ended by", process["ended"])
    print(job.why())


STEPS: tuple[Step, ...] = (synopsis_dispatcher, synopsis_direct, queue, follow, exception, timeout, cancel)
