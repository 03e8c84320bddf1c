"""Ours: harpd and harpcallerd as users start them, with the defaults of their settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bench.contenders import Contender, Place
from bench.installing import ROOT
from bench.processes import Client
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd

__all__ = ["DIRECT", "JOBS", "PROCEDURES", "STREAM", "SYNCED", "client_program", "daemons", "serving", "settings"]

#: The procedures file.
PROCEDURES = Path(__file__).with_name("procedures.py")
#: Seconds until a file of users counts as settled, and a little more; see `harpd.auth.passfile`.
_SETTLED = 2.2

#: As harpd logs by itself: events of level info, as text. With a format that the harness can read.
_LOGGING = {
    "version": 1,
    "formatters": {"json": {"()": "harp_daemon.logs.JSONFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
}


@contextmanager
def daemons(directory: Path, *, dispatcher: bool = True) -> Iterator[tuple[Harpd, Harpcallerd | None]]:
    """A harpd with a file of hashed passwords, and a dispatcher that knows it as ``web01``.

    Args:
        directory: where their files go.
        dispatcher: whether there is one.
    """
    users = directory / "users"
    command = ["openssl", "passwd", "-6", Harpd.password]
    hashed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    users.write_text(f"{Harpd.user}:{hashed}")
    authentication = {"module": "harpd.auth.passfile", "file": str(users)}
    harpd = Harpd(directory / "harpd", PROCEDURES.read_text(), {"authentication": authentication})
    harpd.logging_file.write_text(yaml.safe_dump(_LOGGING))
    # As anywhere: a file of users that has just been written is read, and its hashes made, for each request.
    time.sleep(max(0.0, users.stat().st_ctime + _SETTLED - time.time()))
    with harpd:
        if not dispatcher:
            yield harpd, None
            return
        usual = {"ca_file": str(harpd.ca_file), "log_level": "info"}
        credentials = (Harpd.user, Harpd.password)
        hosts = {"web01": harpd.port}
        with Harpcallerd(directory / "dispatcher", hosts=hosts, credentials=credentials, settings=usual) as harpcallerd:
            yield harpd, harpcallerd


@contextmanager
def client_program(module: str, directory: Path, settings: Mapping[str, Any]) -> Iterator[Client]:
    """Start a client program of this package.

    Args:
        module: its name.
        directory: for its files.
        settings: what it finds in its environment, beside the directory.
    """
    command = [sys.executable, "-P", "-m", f"bench.{module}"]
    environment = {
        "BENCH_SETTINGS": json.dumps({"directory": str(directory), **settings}),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    with Client.running(command, directory / "client.log", environment) as client:
        yield client


def settings(harpd: Harpd, harpcallerd: Harpcallerd | None) -> dict[str, Any]:
    """What our client programs have to know of the daemons."""
    pids = {"gate": harpd.pid, "warden": harpd.warden}
    return {
        "user": Harpd.user,
        "password": Harpd.password,
        "harpd": harpd.port,
        "ca_file": str(harpd.ca_file),
        "harpcallerd": None if harpcallerd is None else harpcallerd.port,
        "pids": pids if harpcallerd is None else {"dispatcher": harpcallerd.pid, **pids},
    }


@contextmanager
def serving(place: Place, *, dispatcher: bool = True, module: str = "harp_client") -> Iterator[Client]:
    """Start the daemons, and a client program of this package."""
    with daemons(place.directory, dispatcher=dispatcher) as (harpd, harpcallerd):
        with client_program(module, place.directory, settings(harpd, harpcallerd)) as client:
            yield client


#: What of ours is on stable storage when.
SYNCED = "each job, record and end is synced before anybody is told"

DIRECT = Contender(
    "HARP",
    "nothing is stored",
    {
        "fresh-1": "fresh",
        "fresh-16": "fresh",
        "kept-1": "kept",
        "kept-16": "kept",
        "reused-1": "reused",
        "reused-16": "reused",
    },
    partial(serving, dispatcher=False),
    ours=True,
)

JOBS = Contender(
    "HARP",
    SYNCED,
    {
        "latency": "latency",
        "jobs": "jobs",
        "reused-jobs": "reused_jobs",
        "submit-1": "submissions",
        "submit-16": "submissions",
        "submit-many": "submissions",
    },
    serving,
    ours=True,
)

STREAM = Contender(
    "HARP",
    SYNCED,
    {"stream": "follow", "long-stream": "follow", "slow-stream": "follow_slowly", "crowd": "crowd"},
    serving,
    ours=True,
)
