"""Simulated hosts of the measurements: to a dispatcher they are like real hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

import harp
from bench.harp_only import host_name, simulated_dispatcher, simulated_hosts
from bench.simulated import address_of


def test_simulated_hosts_serve_a_dispatcher_like_real_hosts(tmp_path: Path) -> None:
    with simulated_hosts(tmp_path, 3) as simulated:
        assert [address for address, _ in simulated["addresses"]] == [address_of(number) for number in range(3)]
        names = [host_name(number) for number in range(3)]
        with simulated_dispatcher(tmp_path, simulated) as dispatcher:
            rpc = harp.HarpCaller("127.0.0.1", dispatcher.port)
            assert [rpc.host(name).echo(name).get() for name in names] == names
            together = [rpc.host(name).gather(6) for name in names * 2]
            assert [job.get() for job in together] == [None] * 6
            assert list(rpc.host(names[0]).count(5).follow(since=0)) == [0, 1, 2, 3, 4]
            watched = rpc.host(names[0]).watch()
            assert next(iter(watched.follow(since=0))) == "running"
            assert watched.cancel(wait=True)
            with pytest.raises(harp.RemoteError, match="simulated hosts do not have it"):
                rpc.host(names[0]).fly().get()
            stop = dispatcher.ask(get_details=watched.id())[0]["details"]
            assert (stop["stop"], stop["stop_report"]["complete"]) == ("confirmed", True)


def test_addresses_of_many_hosts_differ() -> None:
    addresses = [address_of(number) for number in range(1000)]
    assert len(set(addresses)) == 1000
    assert all(address.startswith("127.0.") and not address.endswith((".0", ".255")) for address in addresses)
