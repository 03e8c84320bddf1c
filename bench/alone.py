"""Ours, for what no peer is measured in: a full store, a start, many hosts and followers, deep and long loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from bench.contenders import Contender, Place
from bench.filling import HOSTS, full_store, queued_store
from bench.ours import PROCEDURES, SYNCED, client_program, serving
from bench.processes import Client
from bench.simulation import HOST, simulated_hosts
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd

__all__ = ["DEPTH", "START", "STORE", "SUSTAINED", "WIDE"]

_PROGRAM = "harp_scale"


@contextmanager
def _beside_each_other(place: Place) -> Iterator[Client]:
    """Two dispatchers and one harpd: the one that is not asked has nothing to do."""
    procedures = PROCEDURES.read_text()
    full = full_store(place.shared, procedures, place.sizes.stored)
    with Harpd(place.directory / "harpd", procedures) as harpd:
        hosts = dict.fromkeys(("web01", *HOSTS), harpd.port)
        credentials = (harpd.user, harpd.password)
        usual = {"ca_file": str(harpd.ca_file), "log_level": "info"}
        of_full = {**usual, "stream_directory": str(full)}
        with (
            Harpcallerd(place.directory / "empty", hosts, credentials, usual) as empty,
            Harpcallerd(place.directory / "full", hosts, credentials, of_full) as filled,
        ):
            settings = {
                name: {"port": one.port, "socket": str(one.socket), "store": str(store)}
                for name, one, store in (("empty", empty, empty.store_directory), ("full", filled, full))
            }
            with client_program(_PROGRAM, place.directory, settings) as client:
                yield client


@contextmanager
def _about_to_start(place: Place) -> Iterator[Client]:
    full = full_store(place.shared, PROCEDURES.read_text(), place.sizes.stored)
    queued = queued_store(place.shared, full, HOST, place.sizes.queued)
    with simulated_hosts(place.directory, 1) as simulated:
        with client_program(_PROGRAM, place.directory, {"simulated": simulated, "queued": str(queued)}) as client:
            yield client


@contextmanager
def _on_many_hosts(place: Place) -> Iterator[Client]:
    with simulated_hosts(place.directory, place.sizes.hosts) as simulated:
        with client_program(_PROGRAM, place.directory, {"simulated": simulated}) as client:
            yield client


_on_one_host = partial(serving, module=_PROGRAM)

STORE = Contender(
    "HARP",
    SYNCED,
    {
        "stored-jobs": "stored_jobs",
        "stored-status": "query",
        "stored-result": "query",
        "stored-list": "query",
        "stored-host": "query",
        "stored-queue": "query",
    },
    _beside_each_other,
    ours=True,
)
START = Contender("HARP", SYNCED, {"start": "start"}, _about_to_start, ours=True)
WIDE = Contender("HARP", SYNCED, {"wide": "wide", "idle": "idle"}, _on_many_hosts, ours=True)
DEPTH = Contender("HARP", SYNCED, {"depth": "depth"}, _on_one_host, ours=True)
SUSTAINED = Contender("HARP", SYNCED, {"sustained": "sustained"}, _on_one_host, ours=True)
