"""The procedures file of the measurements, as harpd loads it.

It imports little, as most do; so it has words of its own for what `bench.load` expects.
"""

import inspect
import os
import time

from harpd.proc import Result, procedure, streaming_procedure

TEXT = "a line of output, as procedures have them"


@procedure
def echo(value):
    """Give back what was given, from a process of its own."""
    return value


if "max_calls_per_process" in inspect.signature(procedure).parameters:

    @procedure(max_calls_per_process=1_000_000)
    def reused_echo(value):
        """The same, from a process that serves many calls."""
        return value


def until_there(path):
    """Return once there is a file."""
    while not os.path.exists(path):
        time.sleep(0.005)


@procedure
def wait(path):
    """Wait for a file to be there."""
    until_there(path)


@streaming_procedure
def count(records):
    """The stream."""
    for number in range(records):
        yield {"number": number, "text": TEXT}


@streaming_procedure
def slowly(records, pause):
    """The slow stream."""
    for number in range(records):
        time.sleep(pause)
        yield {"number": number, "at": time.time()}


@streaming_procedure
def count_when(path, records):
    """The stream, once all are there to see it: a record says that it is about to begin."""
    yield "about to begin"
    until_there(path)
    for number in range(records):
        yield {"number": number, "text": TEXT}
    yield Result(records)
