"""Machines for the quick start: a shell at a terminal, a copy of the project, and the programs of a machine.

`NamespaceMachine` has a separate network, processes and system directories; it needs root. `LoopbackMachine` is a
directory of this machine. Both are context managers; they remove all their resources.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil

from support.deadline import wait_until

__all__ = ["CommandFailed", "LoopbackMachine", "Machine", "NamespaceMachine", "join", "missing_for_namespaces"]

PROJECT = Path(__file__).parents[2]
#: Seconds for the commands of a step.
DEADLINE = 180.0

#: Not part of the project's copy.
_LEFT_OUT = shutil.ignore_patterns(".env", ".git", ".*_cache", ".hypothesis", "__pycache__", "tests", "bench", "docs")

#: Replacements of programs that cannot run on a machine of the test. `editor` types the password.
_PROGRAMS = {
    "apt-get": """
test "$1 $2" = "install -y" || { echo "apt-get: unexpected: $*"; exit 100; }
shift 2
for package; do
    case $package in
        python3-venv) python3 -c 'import venv, ensurepip' ;;
        openssl) command -v openssl ;;
        *) echo "apt-get: unable to locate package $package"; false ;;
    esac || exit 100
done
""",
    "editor": """
grep -q 'CHANGE ME' "$1" && sed -i "s/CHANGE ME/$TYPED_PASSWORD/" "$1"
""",
}


class CommandFailed(AssertionError):
    """A command ended with another exit status than 0, or did not end. The message has the terminal's output."""


class Machine:
    """A machine.

    Args:
        name: its name.
        directory: its own directory, for the copy of the project and more.
        environment: further environment variables.
    """

    def __init__(self, name: str, directory: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.directory = directory
        self.copy = directory / "copy"
        self._programs = directory / "programs"
        self._programs.mkdir(parents=True)
        self._environment = {
            "PATH": f"{self._programs}:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(directory),
            "LANG": "C.UTF-8",
            **environment,
        }
        self._write_programs(_PROGRAMS)
        shutil.copytree(PROJECT, self.copy, ignore=_LEFT_OUT)

    def _write_programs(self, programs: Mapping[str, str]) -> None:
        for name, text in programs.items():
            (self._programs / name).write_text(f"#!/bin/sh\n{text}")
            (self._programs / name).chmod(0o755)

    def _write_systemctl(self, *options: str) -> None:
        script = [sys.executable, "-P", str(PROJECT / "tests/support/systemctl.py"), *options]
        self._write_programs({"systemctl": f'exec {shlex.join(script)} "$@"\n'})

    def adapt(self, text: str) -> str:
        """Return text of the project as this machine needs it."""
        return text

    def _enter(self) -> list[str]:
        """Return the beginning of a command that runs a program on this machine."""
        return []

    def run(self, *commands: str, answers: Mapping[str, str] | None = None) -> str:
        """Type commands at a terminal, in the directory of the project's copy; return the terminal's output.

        Args:
            commands: lines for a shell; the first that fails is the last.
            answers: the text to type for each prompt.

        Raises:
            CommandFailed: a command failed, or there was no end within `DEADLINE`.
        """
        script = [f"cd {shlex.quote(str(self.copy))} || exit"]
        for command in map(self.adapt, commands):
            message = shlex.quote(f"failed: {command}")
            script += [command, f'_status=$?; test $_status = 0 || {{ echo {message}; exit "$_status"; }}']
        shell = [*self._enter(), "setsid", "--ctty", "--wait", "sh", "-c", "\n".join(script)]
        own, terminal = pty.openpty()
        with open(own, "r+b", buffering=0) as keyboard:
            try:
                process = subprocess.Popen(
                    shell, stdin=terminal, stdout=terminal, stderr=terminal, env=self._environment, umask=0o022
                )
            finally:
                os.close(terminal)
            try:
                shown = _answer_prompts(own, answers or {})
                status = process.wait(DEADLINE)
            except BaseException:
                _end_family(process)
                raise
            del keyboard
        if status:
            raise CommandFailed(f"{self.name}: exit status {status}\n{shown}")
        return shown

    def read(self, path: str) -> bytes:
        """Return a file's content; the path is absolute or begins in the project's copy."""
        command = [*self._enter(), "cat", str(self.copy / self.adapt(path))]
        return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout

    def write(self, path: str, content: bytes, mode: str) -> None:
        """Write a file."""
        script = 'umask 077; cat > "$1" && chmod "$2" "$1"'
        command = [*self._enter(), "sh", "-c", script, "sh", str(self.copy / self.adapt(path)), mode]
        subprocess.run(command, input=content, check=True)

    def processes(self) -> list[psutil.Process]:
        """Return the processes that run on the machine."""
        raise NotImplementedError

    def close(self) -> None:
        """End all processes of the machine."""
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until(lambda: not self.processes(), DEADLINE, f"the end of {left}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _answer_prompts(terminal: int, answers: Mapping[str, str]) -> str:
    """Return all output of a terminal, and answer its prompts. Raises `CommandFailed` after `DEADLINE`."""
    shown, seen = "", 0
    last = time.monotonic() + DEADLINE
    while select.select([terminal], [], [], max(0.0, last - time.monotonic()))[0]:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # EIO: no process has the terminal open
            data = b""
        if not data:
            return shown
        shown += data.decode(errors="replace").replace("\r\n", "\n")
        for prompt, answer in answers.items():
            if shown[seen:].endswith(prompt):
                seen = len(shown)
                os.write(terminal, f"{answer}\n".encode())
    raise CommandFailed(f"no end within {DEADLINE:g} s\n{shown}")


def _end_family(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


_UNSHARE = ("unshare", "--mount", "--net", "--pid", "--uts", "--fork", "--mount-proc", "--kill-child")

#: Directories of the system that a machine sees, and can write without changing them: an overlay.
_OVERLAID = ("/etc", "/opt", "/run", "/var")

#: Arguments: the machine's name, a directory for written files, and the directories.
_OVERLAY = """
set -e
hostname "$1"
mount -t tmpfs -o mode=755 tmpfs "$2"
written=$2
shift 2
for directory; do
    upper=$written$directory/upper work=$written$directory/work
    mkdir -p "$upper" "$work"
    mount -t overlay -o "lowerdir=$directory,upperdir=$upper,workdir=$work" overlay "$directory"
done
ip link set lo up
"""

#: After `_OVERLAY`. The first process ends when its input does, and all others with it. Orphans leave no zombie.
_INIT = f"""{_OVERLAY}
printf '127.0.0.1 localhost\\n::1 localhost ip6-localhost\\n' > /etc/hosts
mkdir -p /etc/systemd/system
trap '' CHLD
echo ready
exec cat
"""

#: After `_OVERLAY`, to find out whether everything is permitted.
_PROBE = f"""{_OVERLAY}
ip link add probe0 type veth peer name probe1
"""


def missing_for_namespaces(directory: Path) -> str:
    """Return the reason why a `NamespaceMachine` is not possible here; empty if it is possible.

    Args:
        directory: an empty directory to try it with.
    """
    needed = ("ip", "openssl", "unshare", "nsenter", "setsid", "useradd")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if absent := [program for program in needed if shutil.which(program, path=path) is None]:
        return f"not installed: {', '.join(absent)}"
    if os.geteuid() != 0:
        return "needs root"
    command = [*_UNSHARE, "sh", "-c", _PROBE, "sh", "probe", str(directory), *_OVERLAID]
    environment = {**os.environ, "PATH": path}
    tried = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE, check=False)
    return "" if tried.returncode == 0 else f"not permitted: {' '.join(tried.stderr.split())}"


class NamespaceMachine(Machine):
    """A machine with separate namespaces for network, processes, mounts and host name.

    They end with their first process, which the kernel kills when this process ends.
    """

    def __init__(self, name: str, directory: Path, environment: Mapping[str, str]) -> None:
        super().__init__(name, directory, environment)
        self._write_systemctl()
        written = directory / "written"
        written.mkdir()
        closed = [str(path) for path in Path(sys.base_prefix).resolve().parents if not path.stat().st_mode & 1]
        overlaid = [*_OVERLAID, *closed[-1:]]  # the services' user has to reach Python
        self._namespace = ""
        self._unshare = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", _INIT, "sh", name, str(written), *overlaid],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
        )
        try:
            assert self._unshare.stdout is not None
            assert self._unshare.stdout.readline() == b"ready\n", f"{name} could not be made"
            (first,) = psutil.Process(self._unshare.pid).children()
            self.first_process = first.pid
            self._namespace = os.readlink(f"/proc/{first.pid}/ns/pid")
            self.run(*(f"chmod o+x {shlex.quote(path)}" for path in closed))
        except BaseException:
            self.close()
            raise

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self.first_process}", "--mount", "--net", "--pid", "--uts", "--"]

    def processes(self) -> list[psutil.Process]:
        """Return the processes that are in the machine's namespace of processes."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == self._namespace:
                    found.append(process)
        return found

    def close(self) -> None:
        """End the first process, and so all others and the namespaces."""
        with self._unshare:  # closes its pipes, and waits
            self._unshare.kill()
        if self._namespace:
            wait_until(lambda: not self.processes(), DEADLINE, f"the end of {self.name}")


def join(one: tuple[NamespaceMachine, str], other: tuple[NamespaceMachine, str]) -> None:
    """Connect two machines by a cable; each has an address of one network."""
    ends = [f"eth0 netns {machine.first_process}" for machine, _ in (one, other)]
    subprocess.run(f"ip link add {ends[0]} type veth peer name {ends[1]}".split(), check=True)
    for machine, address in (one, other):
        machine.run(f"ip address add {address}/24 dev eth0", "ip link set eth0 up")


class LoopbackMachine(Machine):
    """A directory of this machine: the system's directories are in it, also in the texts of the project's copy.

    Services run as the user of this process, and no user is created.

    Args:
        name: its name.
        directory: its own directory; short, as the paths of Unix sockets are bounded.
        environment: further environment variables.
        replaced: words that are others here (addresses, ports), in commands and in the project's copy.
    """

    def __init__(self, name: str, directory: Path, environment: Mapping[str, str], replaced: Mapping[str, str]) -> None:
        super().__init__(name, directory, environment)
        self._replaced = replaced
        self._root = directory / "root"
        for needed in ("etc/systemd/system", "opt", "run", "var/lib"):
            (self._root / needed).mkdir(parents=True)
        (self._root / "var/run").symlink_to("../run")
        self._write_systemctl(f"--root={self._root}", "--same-user")
        self._write_programs({"useradd": "", "chown": 'test -e "$2"\n'})
        for pattern in ("src/**/*.py", "examples/**/*"):
            for path in self.copy.glob(pattern):
                if path.is_file():
                    path.write_text(self.adapt(path.read_text()))

    def adapt(self, text: str) -> str:
        """Return text with its paths in the machine's directory, and its words replaced."""
        for word, other in self._replaced.items():
            text = re.sub(rf"(?<![\w.]){re.escape(word)}(?![\w.])", other, text)
        paths = r"(?<![\w/])/(etc/harp|etc/systemd/|opt/harp/|opt/harp$|var/lib/harp|(?:var/)?run/harp)"
        return re.sub(paths, rf"{self._root}/\1", text, flags=re.MULTILINE)

    def processes(self) -> list[psutil.Process]:
        """Return the processes whose arguments or environment name the machine's directory."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if f"{self.directory}/" in "\n".join([*process.cmdline(), *process.environ().values()]):
                    found.append(process)
        return found
