"""The system under test: real daemons, kept up, with a proxy before each host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harp
from chaos.dispatcher import CLOCK
from chaos.marks import VARIABLE
from chaos.proxy import Proxy, reserve_port
from chaos.service import Service
from harp import aio
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd

#: Seconds. The times of the product, short enough for a run to exercise them.
KEEP_RUNNING, HOST_LOST_AFTER, KILL_GRACE = 8.0, 20.0, 1.0

#: Most jobs that hold a slot on a host.
HOST_CONCURRENCY = 10

_DISPATCHER = {
    "disconnect_timeout": KEEP_RUNNING,
    "result_ttl": 300,
    "host_timeout": HOST_LOST_AFTER,
    "max_calls_per_host": HOST_CONCURRENCY,
    "connect_timeout": 3,
    "acknowledgement_timeout": 5,
    "default_timeout": 60,
    "max_exec_time": 60,
    "log_level": "info",
}

#: The hosts, and what is different in their configurations: one has no room for what the dispatcher would give it, one
#: makes procedures wait for their reader, one keeps calls for less than it is asked to.
_HOSTS: Mapping[str, Mapping[str, Any]] = {
    "web1": {"max_calls": 8},
    "web2": {"spool": 16 * 1024},
    "web3": {"disconnect_timeout": 6},
}
HOSTS = tuple(_HOSTS)

#: Seconds for a question to a supervisor.
_ANSWER = 1.0


@dataclass
class Host:
    """One of the hosts.

    Attributes:
        gate: its gate.
        calls: the keeper of its supervisors.
        proxy: the dispatcher's way to it.
    """

    name: str
    gate: Service
    calls: Service
    proxy: Proxy
    runtime_directory: Path

    async def supervisors(self) -> list[int]:
        """The supervisors that answer now, retired ones too."""
        found = [await self._supervisor_pid(name) for name in _sockets(self.runtime_directory)]
        return sorted({pid for pid in found if pid is not None})

    async def _supervisor_pid(self, name: str) -> int | None:
        directory = os.open(self.runtime_directory, os.O_PATH)  # a socket's address has no more than 107 bytes
        try:
            async with asyncio.timeout(_ANSWER):
                reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{directory}/{name}")
                with contextlib.closing(writer):
                    writer.write(b'{"control":"status"}\n')
                    return int(json.loads(await reader.readline())["supervisor"])
        except (OSError, TimeoutError, ValueError):
            return None
        finally:
            os.close(directory)


def _sockets(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith("supervisor-")] if directory.exists() else []


def _marked(file: Path) -> dict[str, str]:
    """What a daemon has in its environment, and all that it starts: by this they are known to be of this run."""
    return {VARIABLE: str(file)}


class System:
    """All daemons of a run.

    Args:
        run: the directory of everything; `store` in it is where the dispatcher keeps its jobs.
        seed: for the proxies' small choices.
        sabotage: what the dispatcher does wrong; ``none``: nothing.
    """

    def __init__(self, run: Path, seed: int, sabotage: str) -> None:
        self.run = run
        self.hosts: dict[str, Host] = {}
        self._holders: list[socket.socket] = []
        self._clock = run / "clock"
        self._clock.write_bytes(CLOCK.pack(0.0))
        self._wrong_by = 0.0
        (run / "marks").mkdir()
        for name in HOSTS:
            self._add_host(name, seed)
        ports = {name: host.proxy.port for name, host in self.hosts.items()}
        self.port = self._port()
        settings = {
            **_DISPATCHER,
            "listen": [f"127.0.0.1:{self.port}"],
            "ca_file": str(run / HOSTS[0] / "ca.pem"),
            "stream_directory": str(run / "store" / "jobs"),
        }
        self.files = Harpcallerd(
            run / "dispatcher", hosts=ports, credentials=(Harpd.user, Harpd.password), settings=settings
        )
        start = self.files.command("start", f"--config={self.files.config_file}")
        options = start[start.index("harpcaller.cli") + 1 :]
        own = [sys.executable, "-P", "-m", "chaos.dispatcher", str(self._clock), sabotage]
        self.dispatcher = Service("dispatcher", [*own, *options], _marked(run / "marks" / "none"), self.files.log_file)

    def _port(self) -> int:
        self._holders.append(reserve_port())
        return int(self._holders[-1].getsockname()[1])

    def _add_host(self, name: str, seed: int) -> None:
        procedures = Path(__file__).with_name("procedures.py").read_text()
        limits = {"kill_grace": KILL_GRACE, **_HOSTS[name]}
        port = self._port()
        files = Harpd(self.run / name, procedures, {"network": {"port": port}, "limits": limits})
        environment = _marked(self.marks[name])
        gate = Service(f"{name} gate", files.command("frontend"), environment, files.log_file)
        calls = Service(f"{name} calls", files.command("supervisor"), environment, files.directory / "calls.log")
        proxy = Proxy(port, f"{seed}/{name}")
        self.hosts[name] = Host(name, gate, calls, proxy, files.runtime_directory)

    @property
    def marks(self) -> dict[str, Path]:
        """The file of marks of each host."""
        return {name: self.run / "marks" / name for name in HOSTS}

    @property
    def services(self) -> list[Service]:
        """All daemons, in the order of their end: who uses another goes first."""
        hosts = self.hosts.values()
        return [self.dispatcher, *(host.gate for host in hosts), *(host.calls for host in hosts)]

    @property
    def rpc(self) -> harp.HarpCaller:
        """The client's view."""
        return harp.HarpCaller("127.0.0.1", self.port)

    @property
    def async_rpc(self) -> aio.AsyncHarpCaller:
        """The same for asyncio."""
        return aio.AsyncHarpCaller("127.0.0.1", self.port)

    async def start(self) -> None:
        """Start everything; it may take a while until it serves."""
        for host in self.hosts.values():
            await host.proxy.start()
        for service in reversed(self.services):
            service.start()

    async def stop(self) -> list[str]:
        """End everything in order; return what was wrong with how it ended."""
        wrong = []
        for service in self.services:
            status = await service.stop()
            if status != 0:
                wrong.append(f"{service.name}, told to stop, ended with status {status}")
        for host in self.hosts.values():
            await host.proxy.close()
        for holder in self._holders:
            holder.close()
        return wrong

    def step_clock(self, seconds: float) -> None:
        """Put the dispatcher's wall clock forward, or back."""
        self._wrong_by += seconds
        with self._clock.open("r+b") as file:
            file.write(CLOCK.pack(self._wrong_by))

    async def listed(self, *command: str, patience: float = 20.0) -> list[dict[str, Any]] | None:
        """What a listing command of `harpcallerd` prints; None: the dispatcher does not answer now."""
        process = await asyncio.create_subprocess_exec(
            *self.files.command(*command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(patience):
                printed, _ = await process.communicate()
        except TimeoutError:
            return None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            return None
        self.dispatcher.serves()
        return [json.loads(line) for line in printed.splitlines()]
