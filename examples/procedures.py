"""Procedures to try: what an operator puts into /etc/harpd/harpd.py on each server.

Clients call a decorated function by its name. The caller receives its return value, its records and its exception;
lines that it prints go to the log of harpd.
"""

import os
import shutil
import sqlite3
import sys
import time
from pathlib import Path

from harpd.proc import Result, procedure, streaming_procedure


@procedure
def current_time():
    """Return the server's time in Unix seconds."""
    return int(time.time())


@procedure
def return_immediate(*values):
    """Return the arguments."""
    return {"values": list(values), "pid": os.getpid()}


@procedure
def disk_usage(path="/"):
    """Return the total, used and free bytes of the file system of `path`."""
    total, used, free = shutil.disk_usage(path)
    return {"path": path, "total": total, "used": used, "free": free}


@procedure
def divide(a, b):
    """Return the quotient; for b=0, the caller receives the exception ZeroDivisionError."""
    return a / b


@procedure
def sleep(seconds):
    """Sleep for some seconds; return how many."""
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
    """Yield records one by one; the end result is their number."""
    for number in range(numbers):
        yield {"number": number}
        time.sleep(pause)
    yield Result({"numbers": numbers})


@streaming_procedure
def stream_infinity():
    """Yield one record each second until the call is stopped."""
    number = 0
    while True:
        yield {"number": number, "time": int(time.time())}
        number += 1
        time.sleep(1)


@streaming_procedure
def logs_in_next_minutes(minutes):
    """Yield log messages; here a minute takes a tenth of a second."""
    for minute in range(minutes):
        time.sleep(0.1)
        yield f"minute {minute}: all is well"
    yield Result({"messages": minutes})


@streaming_procedure
def backup(file):
    """Write each table of an SQLite file into a text file in the directory `<file>.backup`."""
    directory = Path(f"{file}.backup")
    directory.mkdir(exist_ok=True)
    database = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    tables = [name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
    for table in tables:
        print("reading table", table, file=sys.stderr)  # to the log of harpd
        yield {"table": table, "state": "reading"}
        query = f'SELECT * FROM "{table}"'  # noqa: S608 - the database itself has named it
        rows = database.execute(query).fetchall()
        (directory / table).write_text("".join(f"{row}\n" for row in rows))
        yield {"table": table, "state": "saved", "rows": len(rows)}
    yield Result({"directory": str(directory), "tables": len(tables)})
