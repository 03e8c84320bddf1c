"""Servers of Debian's that peers stand on: Redis, PostgreSQL, OpenSSH. Each has a free port and its own directory."""

from __future__ import annotations

import getpass
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.installing import debian_program
from bench.processes import as_user, free_port, listens, program

__all__ = ["SSHServer", "postgres", "redis", "ssh_server"]

#: Debian's user nobody. PostgreSQL refuses to run as root.
_NOBODY = 65534


@contextmanager
def redis(directory: Path, *, durable: bool) -> Iterator[int]:
    """A Redis; gives its port.

    Args:
        directory: where its files go.
        durable: every write is synced before it is answered; else it is as it comes, with a snapshot now and then.
    """
    port = free_port()
    synced = ["--appendonly", "yes", "--appendfsync", "always"] if durable else []
    command = [debian_program("redis-server"), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(directory)]
    with program([*command, *synced], directory / "redis.log", ready=lambda: listens(port)):
        yield port


@contextmanager
def postgres(directory: Path) -> Iterator[str]:
    """A PostgreSQL as it comes, which syncs every commit; gives its address as a URL.

    Args:
        directory: where its data go; kept, and used again.
    """
    user = _NOBODY if os.geteuid() == 0 else None
    directory.mkdir(exist_ok=True)
    data = directory / "data"
    log = directory / "postgres.log"
    if user is not None:
        os.chown(directory, user, user)
    if not data.exists():
        initdb = [
            debian_program("initdb"),
            "--auth=trust",
            "--username=bench",
            "--encoding=UTF8",
            "--locale=C",
            str(data),
        ]
        with log.open("ab") as output:
            subprocess.run(
                initdb,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=directory,
                check=True,
                **as_user(user),
            )
    port = free_port()
    command = [debian_program("postgres"), "-D", str(data), "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    pid_file = data / "postmaster.pid"

    def ready() -> bool:
        return pid_file.exists() and "ready" in pid_file.read_text()

    with program([*command, "-c", "unix_socket_directories="], log, ready=ready, user=user):
        yield f"postgresql://bench@127.0.0.1:{port}/postgres"


@dataclass(frozen=True)
class SSHServer:
    """A running sshd.

    Attributes:
        port: where.
        options: what `ssh` needs to log in, its destination last.
    """

    port: int
    options: list[str]


@contextmanager
def ssh_server(directory: Path) -> Iterator[SSHServer]:
    """An sshd that lets this user in by key."""
    sshd = debian_program("sshd")
    debian_program("ssh")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(
            mode=0o755, exist_ok=True
        )  # where it gives up its privileges; a service's start makes it
    for name in ("host", "user"):
        key = directory / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    port = free_port()
    (directory / "authorized_keys").write_bytes((directory / "user.pub").read_bytes())
    _, host_key, *_ = (directory / "host.pub").read_text().split()
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} ssh-ed25519 {host_key}\n")
    config = directory / "sshd_config"
    config.write_text(
        f"ListenAddress 127.0.0.1:{port}\n"
        f"HostKey {directory / 'host'}\n"
        f"AuthorizedKeysFile {directory / 'authorized_keys'}\n"
        "PidFile none\nStrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nMaxStartups 200\nMaxSessions 100\n"
        # An empty home: what a user's shell does at its start is not ssh's cost.
        f"SetEnv HOME={directory}\n"
    )
    options = [
        *("-F", "/dev/null", "-p", str(port), "-i", str(directory / "user"), "-T"),
        *("-o", "BatchMode=yes", "-o", f"UserKnownHostsFile={directory / 'known_hosts'}", "-o", "IdentitiesOnly=yes"),
        f"{getpass.getuser()}@127.0.0.1",
    ]
    command = [sshd, "-D", "-e", "-f", str(config)]
    with program(command, directory / "sshd.log", ready=lambda: listens(port)):
        yield SSHServer(port, options)
