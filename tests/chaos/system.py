"""The system under test: real daemons that are restarted, with a proxy in front of each host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harp
from chaos.dispatcher import CLOCK, DOMAIN, SABOTAGES
from chaos.marks import SABOTAGE_FILE, VARIABLE
from chaos.proxy import Proxy, reserve_port
from chaos.service import Service
from harp import aio
from harpcaller.access.tokens import add_token
from harpcaller.store.sqlite import FILE_NAME
from support.certificates import server_files
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd

#: Settings in seconds, short enough that one run reaches them.
DISCONNECT_TIMEOUT, HOST_TIMEOUT, KILL_GRACE = 8.0, 20.0, 1.0

#: Seconds for which a start that certainly did not happen is tried again.
START_WITHIN = 5.0

#: Maximum number of jobs that hold a slot on a host.
MAX_CALLS_PER_HOST = 10

#: Maximum number of the dispatcher's client connections: more than the clients of a run need.
MAX_CONNECTIONS = 400

_DISPATCHER = {
    "disconnect_timeout": DISCONNECT_TIMEOUT,
    "result_ttl": 300,
    "host_timeout": HOST_TIMEOUT,
    "max_connections": MAX_CONNECTIONS,
    "max_calls_per_host": MAX_CALLS_PER_HOST,
    "start_within": START_WITHIN,
    "connect_timeout": 3,
    "acknowledgement_timeout": 5,
    "default_timeout": 60,
    "max_exec_time": 60,
    "disk_reserve": 1024 * 1024,  # the file system is small: see _DISK_SIZE
    "log_level": "info",
}

#: The hosts and their different limits: the first accepts fewer calls than the dispatcher may send, the second has a
#: small spool, so that procedures are paused, the third allows a shorter `disconnect_timeout` than requested.
_HOSTS: Mapping[str, Mapping[str, Any]] = {
    "web1": {"max_calls": 8},
    "web2": {"spool": 16 * 1024},
    "web3": {"disconnect_timeout": 6},
}
HOSTS = tuple(_HOSTS)

#: Promises that a procedure breaks on request.
PROCEDURE_SABOTAGES = ("orphan", "wrong-kill")
#: Seconds for a reply of a supervisor, and for a TLS handshake.
_ANSWER, _HANDSHAKE = 1.0, 5.0


@dataclass
class Host:
    """One of the hosts.

    Attributes:
        frontend: its frontend.
        launcher: the launcher of its supervisors.
        proxy: the proxy to which the dispatcher connects.
        port: the port of the frontend on 127.0.0.1.
        ca_file: the certificate that its clients trust.
    """

    name: str
    frontend: Service
    launcher: Service
    proxy: Proxy
    port: int
    ca_file: Path
    runtime_directory: Path

    def state_file(self, instance: str) -> Path:
        """Return the state file of a supervisor."""
        return self.runtime_directory / "calls" / f"{instance}.1"

    async def serves(self) -> bool:
        """Return whether the frontend does a TLS handshake."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        try:
            async with asyncio.timeout(_HANDSHAKE):
                _, writer = await asyncio.open_connection(
                    "127.0.0.1", self.port, ssl=context, server_hostname="localhost"
                )
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    async def supervisors(self) -> list[int]:
        """Return the pids of all supervisors that reply; retired supervisors count."""
        return sorted({int(status["supervisor"]) for status in await self.statuses()})

    async def statuses(self) -> list[dict[str, Any]]:
        """Return the status of each supervisor that replies; retired supervisors count."""
        found = [await self._status(name) for name in _sockets(self.runtime_directory)]
        return [status for status in found if status is not None]

    async def _status(self, name: str) -> dict[str, Any] | None:
        try:
            directory = os.open(self.runtime_directory, os.O_PATH)  # the address of a socket is limited to 107 bytes
        except OSError:
            return None  # it was removed
        try:
            async with asyncio.timeout(_ANSWER):
                reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{directory}/{name}")
                with contextlib.closing(writer):
                    writer.write(b'{"control":"status"}\n')
                    status: dict[str, Any] = json.loads(await reader.readline())
                    return status
        except (OSError, TimeoutError, ValueError):
            return None
        finally:
            os.close(directory)


def _sockets(directory: Path) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if name.startswith("supervisor-")]
    except OSError:
        return []  # it does not exist yet, or it was removed


def _marked(file: Path) -> dict[str, str]:
    """Return the environment of a daemon and its children, which identifies them as processes of this run."""
    return {VARIABLE: str(file)}


class System:
    """All daemons of a run.

    Args:
        run: the directory of everything; `store` in it is where the dispatcher keeps its jobs.
        seed: for random choices of the proxies.
        sabotage: the promise that the dispatcher breaks, or ``none``.

    Attributes:
        hosts: the hosts by name.
        hosts_text: the contents of the hosts file.
        port, http_port: the ports of the dispatcher for clients, and of its HTTP API.
        viewer_token: the token of a client that may list all jobs.
    """

    def __init__(self, run: Path, seed: int, sabotage: str) -> None:
        self.run = run
        self._sabotage = sabotage
        self._victim = run / "marks" / SABOTAGE_FILE
        self.hosts: dict[str, Host] = {}
        self._reservations: list[socket.socket] = []
        self._clock = run / "clock"
        self._clock.write_bytes(CLOCK.pack(0.0))
        self._clock_offset = 0.0
        self._lookups = run / "lookups"
        self._lookups.mkdir()
        (run / "marks").mkdir()
        for name in HOSTS:
            self._add_host(name, seed)
        self.port = self._port()
        self.http_port = self._port()
        self.viewer_token, _ = add_token(run / "tokens", "viewer", ["viewer"])
        settings = {
            **_DISPATCHER,
            "listen": [f"127.0.0.1:{self.port}"],
            "ca_file": str(run / HOSTS[0] / "ca.pem"),
            "tokens_file": str(run / "tokens"),
            "http": {"listen": [f"127.0.0.1:{self.http_port}"], "requests_per_client": 100_000},
            "stream_directory": str(self.store_file.parent),
        }
        self.files = Harpcallerd(run / "dispatcher", settings=settings)
        text = "".join(self._line(host) for host in self.hosts.values())
        self.hosts_text = text.encode()
        self.files.hosts_file.write_bytes(self.hosts_text)
        start = self.files.command("start", f"--config={self.files.config_file}")
        options = start[start.index("harpcaller.cli") + 1 :]
        broken = sabotage if sabotage in SABOTAGES else "none"
        own = [sys.executable, "-P", "-m", "chaos.dispatcher", str(self._clock), str(self._lookups), broken]
        self.dispatcher = Service("dispatcher", [*own, *options], _marked(run / "marks" / "none"), self.files.log_file)

    def _port(self) -> int:
        self._reservations.append(reserve_port())
        return int(self._reservations[-1].getsockname()[1])

    @property
    def store_file(self) -> Path:
        """The file of the dispatcher's store."""
        return self.run / "store" / "jobs" / FILE_NAME

    @staticmethod
    def _line(host: Host) -> str:
        """Return the line of a host in the hosts file: its address is a name."""
        credentials = {"user": Harpd.user, "password": Harpd.password}
        address = host.name + DOMAIN
        line = {"hostname": host.name, "address": address, "port": host.proxy.port, "credentials": credentials}
        return json.dumps(line) + "\n"

    def _add_host(self, name: str, seed: int) -> None:
        procedures = Path(__file__).with_name("procedures.py").read_text()
        limits = {"kill_grace": KILL_GRACE, **_HOSTS[name]}
        port = self._port()
        changes = {"network": {"port": port}, "limits": limits, "environment": {VARIABLE: None}}
        files = Harpd(self.run / name, procedures, changes)
        server_files(files.directory, ("127.0.0.1", "localhost", name + DOMAIN))
        environment = _marked(self.marks[name])
        frontend = Service(f"{name} frontend", files.command("frontend"), environment, files.log_file)
        log = files.directory / "supervisor.log"
        launcher = Service(f"{name} launcher", files.command("supervisor"), environment, log)
        proxy = Proxy(port, f"{seed}/{name}")
        self.hosts[name] = Host(name, frontend, launcher, proxy, port, files.ca_file, files.runtime_directory)

    @property
    def marks(self) -> dict[str, Path]:
        """The file of marks of each host, by name."""
        return {name: self.run / "marks" / name for name in HOSTS}

    @property
    def services(self) -> list[Service]:
        """All daemons, in the order in which they are stopped."""
        hosts = self.hosts.values()
        return [self.dispatcher, *(host.frontend for host in hosts), *(host.launcher for host in hosts)]

    @property
    def rpc(self) -> harp.HarpCaller:
        """A synchronous client of the dispatcher."""
        return harp.HarpCaller("127.0.0.1", self.port)

    @property
    def async_rpc(self) -> aio.AsyncHarpCaller:
        """An asyncio client of the dispatcher."""
        return aio.AsyncHarpCaller("127.0.0.1", self.port)

    async def start(self, bystander: int) -> None:
        """Start all proxies and daemons; do not wait until they serve.

        Args:
            bystander: a process that does not belong to the system; a procedure that breaks a promise gets its pid.
        """
        if self._sabotage in PROCEDURE_SABOTAGES:
            self._victim.write_text(f"{self._sabotage} {bystander}")
        for host in self.hosts.values():
            await host.proxy.start()
        for service in reversed(self.services):
            service.start()

    async def stop(self) -> list[str]:
        """Stop all daemons in order; return the errors."""
        problems = []
        for service in self.services:
            status = await service.stop()
            if status != 0:
                problems.append(f"{service.name} exited with status {status} after SIGTERM")
        for host in self.hosts.values():
            await host.proxy.close()
        for reservation in self._reservations:
            reservation.close()
        return problems

    def hang_lookups(self, host: str, hang: bool) -> None:
        """Have the lookups of a host's name hang, or end."""
        file = self._lookups / (host + DOMAIN)
        if hang:
            file.touch()
        else:
            file.unlink(missing_ok=True)

    def step_clock(self, seconds: float) -> None:
        """Change the dispatcher's wall clock by some seconds."""
        self._clock_offset += seconds
        with self._clock.open("r+b") as file:
            file.write(CLOCK.pack(self._clock_offset))

    async def list_from_dispatcher(self, *command: str, patience: float = 20.0) -> list[dict[str, Any]] | None:
        """Return the output of a listing command of `harpcallerd`; None: the dispatcher does not reply."""
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
        self.dispatcher.on_serving()
        return [json.loads(line) for line in printed.splitlines()]
