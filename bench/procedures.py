"""The procedures file of the measurements, as harpd loads it. Like most such files it imports little."""

import time

from harpd.proc import procedure, streaming_procedure


@procedure
def echo(value):
    """Return the value, from a process of its own."""
    return value


@procedure(max_calls_per_process=1_000_000)
def reused_echo(value):
    """Return the value, from a process that serves many calls."""
    return value


@procedure
def wait(seconds):
    """Return after a while."""
    time.sleep(seconds)


@streaming_procedure
def count(records):
    """Yield the records that `bench.load` expects."""
    for number in range(records):
        yield {"number": number, "text": "a line of output, as procedures have them"}


@streaming_procedure
def slowly(records, pause):
    """Yield a record now and then."""
    for number in range(records):
        time.sleep(pause)
        yield {"number": number, "at": time.time()}


@procedure
def spin(seconds):
    """Use a processor for a while."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


@streaming_procedure
def numbers(records):
    """Yield records as short as they can be."""
    yield from range(records)
