"""What the peers need: Python packages in an environment of their own, servers from Debian.

The environment lies in .env/ beside the project's own and is as new as bench/peers/requirements.lock. Debian's
packages are installed only by root, and not started: the measurements start servers of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.clients import Missing

__all__ = ["LOCK", "ROOT", "debian_program", "install_debian", "peers_python"]

#: The project's directory.
ROOT = Path(__file__).parents[1]
#: The packages of the peers, with versions and hashes.
LOCK = Path(__file__).parent / "peers" / "requirements.lock"

#: Debian's packages, and what each is here for.
_PACKAGES = {
    "redis-server": "redis-server",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "postgres": "postgresql",
    "initdb": "postgresql",
}

#: Where a server's start is asked for while packages are installed. 101: no.
_POLICY = Path("/usr/sbin/policy-rc.d")


def _find(name: str) -> str | None:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:  # Debian keeps the programs of each version apart
        versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4]))
        found = str(versions[-1]) if versions else None
    return found


def debian_program(name: str) -> str:
    """The path of a program that a package of Debian's brings.

    Raises:
        Missing: it is not there; the message names the package.
    """
    found = _find(name)
    if found is None:
        raise Missing(f"there is no {name}; as root: apt-get install {_PACKAGES[name]}")
    return found


def install_debian(say: Callable[[str], None]) -> None:
    """Install what is missing, if this is root on a Debian; else leave it to `debian_program` to say so.

    Args:
        say: told what is done, and what went wrong.
    """
    missing = sorted({package for name, package in _PACKAGES.items() if _find(name) is None})
    if not missing or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    say(f"installing {', '.join(missing)} from Debian, without starting any")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with tempfile.TemporaryFile() as log, _nothing_is_started():
        for command in (
            ["apt-get", "update", "-q"],
            ["apt-get", "install", "-qy", "--no-install-recommends", *missing],
        ):
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=quiet, check=False)
            if done.returncode != 0:
                log.seek(0)
                say(f"{' '.join(command)} failed:\n{log.read().decode('utf-8', 'replace')[-1000:]}")
                return


@contextmanager
def _nothing_is_started() -> Iterator[None]:
    """Debian starts a server that it installs, unless this program says no."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()


def peers_python(say: Callable[[str], None]) -> Path:
    """The Python that has the peers; its environment is made when it is missing or older than the lock.

    Args:
        say: told when this will take a while.

    Raises:
        Missing: the packages could not be installed; the message is pip's.
    """
    directory = ROOT / ".env" / f"peers-{'.'.join(map(str, sys.version_info[:3]))}"
    python = directory / "bin" / "python"
    stamp = directory / "stamp"
    wanted = f"{zlib.crc32(LOCK.read_bytes())} {directory}\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    say(f"making the peers' environment {directory.relative_to(ROOT)} (once, about a minute)")
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    options = ["-qq", "--disable-pip-version-check", "--require-hashes", "--only-binary", ":all:"]
    command = [str(python), "-m", "pip", "install", *options, "-r", str(LOCK)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise Missing(f"the peers' packages could not be installed: {done.stderr.strip()[-1000:]}")
    stamp.write_text(wanted)
    return python
