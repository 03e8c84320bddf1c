"""Procedures to try: what an operator puts into /etc/harpd/harpd.py on each server.

Every decorated function can be called under its name. What it returns, yields or raises goes to the caller;
what it prints goes to the log of harpd.
"""

import os
import shutil
import time

from harpd.proc import Result, procedure, streaming_procedure


@procedure
def current_time():
    """The server's time, in Unix seconds."""
    return int(time.time())


@procedure
def return_immediate(*values):
    """What was given."""
    return {"values": list(values), "pid": os.getpid()}


@procedure
def disk_usage(path="/"):
    """Bytes in all, used and free of the file system that holds `path`."""
    total, used, free = shutil.disk_usage(path)
    return {"path": path, "total": total, "used": used, "free": free}


@procedure
def divide(a, b):
    """A quotient, or ZeroDivisionError: exceptions travel."""
    return a / b


@procedure
def sleep(seconds):
    """Take a while; say how long."""
    time.sleep(seconds)
    return {"slept": seconds}


@procedure(timeout=1)
def too_slow():
    """Take longer than this procedure's own limit of one second."""
    time.sleep(60)


@procedure(uid="nobody")
def whoami():
    """Run as another user (harpd must be root for that)."""
    return {"uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups()}


@streaming_procedure
def count(numbers, pause=0.2):
    """Yield records one by one; the end result is how many there were."""
    for number in range(numbers):
        yield {"number": number}
        time.sleep(pause)
    yield Result({"numbers": numbers})


@streaming_procedure
def stream_infinity():
    """Yield a record a second, until somebody ends it."""
    number = 0
    while True:
        yield {"number": number, "time": int(time.time())}
        number += 1
        time.sleep(1)


@streaming_procedure
def logs_in_next_minutes(minutes):
    """Yield log messages as they come. Here a minute passes in a tenth of a second."""
    for minute in range(minutes):
        time.sleep(0.1)
        yield f"minute {minute}: all is well"
    yield Result({"messages": minutes})
