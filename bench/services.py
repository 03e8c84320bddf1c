"""What peers need: servers on free ports with files of their own, and an environment for their Python packages."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import venv
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.load import Missing
from bench.processes import ROOT, free_port, listens, program

#: Versions and hashes of the peers' packages.
_LOCK = Path(__file__).parent / "peers" / "requirements.lock"
#: Programs, and the Debian package of each.
_PACKAGES = {"redis-server": "redis-server", "sshd": "openssh-server", "ssh": "openssh-client"}


def _path(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise Missing(f"no program {name}; as root: apt-get install --no-install-recommends {_PACKAGES[name]}")
    return found


def peers_python(say: Callable[[str], None]) -> Path | None:
    """Return the Python that has the peers; make its environment if it is missing or older than the lock.

    None: pip failed, and `say` has received its message.
    """
    directory = ROOT / ".env" / f"peers-{'.'.join(map(str, sys.version_info[:3]))}"
    python = directory / "bin" / "python"
    stamp = directory / "stamp"
    wanted = f"{zlib.crc32(_LOCK.read_bytes())} {directory}\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    say(f"making the peers' environment {directory.relative_to(ROOT)} (once, about a minute)")
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    options = ["-qq", "--disable-pip-version-check", "--require-hashes", "--only-binary", ":all:"]
    command = [str(python), "-m", "pip", "install", *options, "-r", str(_LOCK)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        say(f"cannot install the peers' packages: {done.stderr.strip()[-1000:]}")
        return None
    stamp.write_text(wanted)
    return python


@contextmanager
def redis(directory: Path, *, durable: bool) -> Iterator[tuple[int, int]]:
    """Run a Redis; yield its process id and port.

    Durable: each write is synced before its reply. Else: Redis's defaults.
    """
    port = free_port()
    synced = ["--appendonly", "yes", "--appendfsync", "always"] if durable else []
    command = [_path("redis-server"), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(directory), *synced]
    with program(command, directory / "redis.log", ready=lambda: listens(port)) as server:
        yield server.pid, port


@contextmanager
def ssh_server(directory: Path) -> Iterator[tuple[int, list[str]]]:
    """Run an sshd that accepts a key of this user; yield its process id, and the options of `ssh`, destination last."""
    sshd = _path("sshd")
    _path("ssh")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd needs it to drop privileges; a unit would make it
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
        f"SetEnv HOME={directory}\n"  # an empty home: a user's shell profile is not a cost of ssh
    )
    options = [
        *("-F", "/dev/null", "-p", str(port), "-i", str(directory / "user"), "-T"),
        *("-o", "BatchMode=yes", "-o", f"UserKnownHostsFile={directory / 'known_hosts'}", "-o", "IdentitiesOnly=yes"),
        f"{getpass.getuser()}@127.0.0.1",
    ]
    command = [sshd, "-D", "-e", "-f", str(config)]
    with program(command, directory / "sshd.log", ready=lambda: listens(port)) as server:
        yield server.pid, options
