"""Simulated hosts and a dispatcher that knows them, for the works that need them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.processes import program
from support.certificates import server_files
from support.harpcallerd import Harpcallerd

__all__ = ["HOST", "dispatcher_on_simulated_hosts", "host_name", "simulated_hosts"]

_DOMAIN = "simulated.example"


def host_name(number: int) -> str:
    """The name of a simulated host; a certificate for all of them names it."""
    return f"host{number:03}.{_DOMAIN}"


#: The first of them.
HOST = host_name(0)


@contextmanager
def simulated_hosts(directory: Path, hosts: int) -> Iterator[dict[str, Any]]:
    """Run `bench.simulated`; give what `dispatcher_on_simulated_hosts` has to know of it.

    Args:
        directory: where its files go.
        hosts: how many.
    """
    files = server_files(directory, (f"*.{_DOMAIN}",))
    listening = directory / "places"
    command = [sys.executable, "-P", "-m", "bench.simulated"]
    arguments = [str(files.certfile), str(files.keyfile), str(hosts), str(listening)]
    with program([*command, *arguments], directory / "simulated.log", ready=listening.exists):
        yield {"places": json.loads(listening.read_text()), "ca_file": str(files.ca_file)}


def dispatcher_on_simulated_hosts(
    directory: Path, simulated: Mapping[str, Any], hosts: Iterable[str], **settings: Any
) -> Harpcallerd:
    """A dispatcher that knows simulated hosts; not started yet.

    Args:
        directory: where its files go.
        simulated: what `simulated_hosts` gave.
        hosts: names for the first of them.
        **settings: more settings of the dispatcher.
    """
    usual = {"ca_file": simulated["ca_file"], "log_level": "info"}
    dispatcher = Harpcallerd(directory, settings={**usual, **settings})
    lines = []
    for name, (address, port) in zip(hosts, simulated["places"], strict=False):
        credentials = {"user": "u", "password": "p"}
        lines.append(json.dumps({"hostname": name, "address": address, "port": port, "credentials": credentials}))
    dispatcher.hosts_file.write_text("".join(f"{line}\n" for line in lines))
    return dispatcher
