"""A real harpcallerd as a child process, with a separate configuration.

with Harpcallerd(tmp_path, hosts={"web01": harpd.port}, credentials=(harpd.user, harpd.password)) as dispatcher:
    rpc = harp.HarpCaller("127.0.0.1", dispatcher.port)
    ...
    dispatcher.restart(kill=True)
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.daemonlog import DEADLINE, DaemonLog
from support.deadline import wait_until
from support.toml import toml

#: Logged for each address: of the client API, then of the HTTP API.
_SERVING = "harpcallerd is serving", "harpcallerd is serving HTTP"
#: Maximum length of a Unix socket's path, with a margin.
_LONGEST_PATH = 100


class Harpcallerd(DaemonLog):
    """A harpcallerd on a free port of 127.0.0.1; a context manager that starts and stops it.

    Args:
        directory: the directory of its files; not shared.
        hosts: the hosts of its registry: names and the ports of their harpd on 127.0.0.1.
        credentials: user and password for all hosts.
        settings: keys that extend or replace those of the configuration file; None removes a key.
        options: more options of `start`.
        descriptors: the hard limit of open files; None: that of this process.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        directory: Path,
        hosts: Mapping[str, int] | None = None,
        credentials: tuple[str, str] = ("u", "p"),
        settings: Mapping[str, Any] | None = None,
        options: tuple[str, ...] = (),
        descriptors: int | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.config_file = directory / "harpcaller.toml"
        self.hosts_file = directory / "hosts"
        self.log_file = directory / "harpcallerd.log"
        self.store_directory = directory / "jobs"
        #: The control socket.
        self.socket = directory / "control"
        if len(str(self.socket)) > _LONGEST_PATH:
            short = tempfile.mkdtemp(prefix="harpcallerd-")
            atexit.register(shutil.rmtree, short, ignore_errors=True)
            self.socket = Path(short) / "control"
        #: The port; 0 before the first start. A later start takes the same one.
        self.port = self._configured_port = 0
        #: Directory of the program for the next start; None: the installed one.
        self.code: Path | None = None
        self._credentials = credentials
        self._options = options
        self._descriptors = descriptors
        self._process: subprocess.Popen[bytes] | None = None
        self.log_file.touch()
        self.set_hosts(hosts or {})
        self.configure(settings or {})

    def set_hosts(self, hosts: Mapping[str, int]) -> None:
        """Write the hosts file, which is read again after a change."""
        user, password = self._credentials
        credentials = {"user": user, "password": password}
        lines = (
            {"hostname": name, "address": "127.0.0.1", "port": port, "credentials": credentials}
            for name, port in hosts.items()
        )
        self.hosts_file.touch(0o600)  # it has passwords
        self.hosts_file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Write the configuration file: the default one with these keys. It takes effect by `reload`."""
        self._settings = settings
        usual: dict[str, Any] = {
            "listen": [f"{self.host}:{self._configured_port}"],
            "stream_directory": str(self.store_directory),
            "host_db": str(self.directory / "hosts.db"),
            "hosts_file": str(self.hosts_file),
            "log_level": "debug",
            "log_format": "json",
        }
        if not settings.keys() & {"ca_file", "known_certs_file"}:
            usual["verify"] = False
        keys = {**usual, **settings}
        lines = (f"{key} = {toml(value)}\n" for key, value in keys.items() if value is not None)
        self.config_file.write_text("".join(lines))

    def command(self, *arguments: str) -> list[str]:
        """Return a command line of the program with this control socket."""
        return [sys.executable, "-P", "-m", "harpcaller.cli", f"--socket={self.socket}", *arguments]

    def control(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the program as a control program; return its exit status and output."""
        return subprocess.run(
            self.command(*arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE
        )

    def listed(self, *arguments: str) -> list[Any]:
        """Return the decoded output of a command that must succeed: one object per line."""
        done = self.control(*arguments)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def start(self) -> Self:
        """Start the daemon and return when it accepts requests."""
        assert self._process is None
        limit = [] if self._descriptors is None else ["prlimit", f"--nofile={self._descriptors}"]
        start = self.command("start", f"--config={self.config_file}", *self._options)
        self._configured_port = self.port
        self.configure(self._settings)
        seen = len(self.events(*_SERVING))
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*limit, *start],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=None if self.code is None else {**os.environ, "PYTHONPATH": str(self.code)},
            )
        try:
            serving = wait_until(lambda: self._serves(seen), DEADLINE, "harpcallerd serving")
        except BaseException:
            self.kill()
            raise
        self.port = next((event["port"] for event in serving if event["event"] == _SERVING[0] and "port" in event), 0)
        return self

    def _serves(self, seen: int) -> list[dict[str, Any]]:
        """Return the events about all addresses, the last events of its start; none before all are there."""
        assert self._process is not None
        status = self._process.poll()
        assert status is None, f"harpcallerd ended with {status} at its start:\n{self.log_file.read_text()}"
        addresses = [*self._settings.get("listen", [""]), *(self._settings.get("http") or {}).get("listen", [])]
        found = self.events(*_SERVING)[seen:]
        return found if len(found) >= len(addresses) else []

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    def reload(self) -> dict[str, Any]:
        """Send SIGHUP; return the log event of the result."""
        outcomes = ("reloaded", "reload failed; nothing is changed")
        seen = len(self.events(*outcomes))
        os.kill(self.pid, signal.SIGHUP)
        return wait_until(lambda: self.events(*outcomes)[seen:], DEADLINE, "the reload")[0]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the exit; return the exit status."""
        if self._process is None:
            return 0
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the exit; return the exit status."""
        assert self._process is not None
        try:
            return self._process.wait(DEADLINE)
        finally:
            self.kill()

    def kill(self) -> None:
        """Send SIGKILL if the process is running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self, kill: bool = False) -> None:
        """Stop the daemon, with SIGKILL on request, and start it again on the same port."""
        if kill:
            self.kill()
        else:
            status = self.stop()
            assert status == 0, f"harpcallerd ended with {status}:\n{self.log_file.read_text()}"
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        status = self.stop()
        if kind is None:
            assert status == 0, f"harpcallerd ended with {status}:\n{self.log_file.read_text()}"
            assert not self.faults()

    def faults(self) -> list[str]:
        """Return the log lines of internal errors."""
        marks = ("Traceback", '"traceback"', "Exception ignored", "never retrieved", "Warning: ", "Fatal Python error")
        return [line for line in self.log_lines() if any(mark in line for mark in marks)]

    def connect(self) -> LineClient:
        """Return a connected raw client."""
        return LineClient(socket.create_connection((self.host, self.port), DEADLINE))

    def ask(self, **request: Any) -> list[Any]:
        """Send a request; return all decoded replies. The key `harpcaller` is added."""
        with self.connect() as client:
            client.send({"harpcaller": 1, **request})
            return client.messages()

    def submit(self, host: str, procedure: str, *arguments: Any, **options: Any) -> str:
        """Submit a job; return its id."""
        (reply,) = self.ask(host=host, procedure=procedure, arguments=list(arguments), **options)
        return str(reply["job_id"])


class LineClient:
    """A raw client that sends and receives lines; a context manager that closes it.

    Args:
        connection: the socket, connected; its timeout is a deadline for everything.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._replies = connection.makefile("rb")

    def send(self, message: Any) -> None:
        """Send bytes unchanged, and anything else as a JSON line."""
        self.socket.sendall(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")

    def half_close(self) -> None:
        """Close the sending side."""
        self.socket.shutdown(socket.SHUT_WR)

    def line(self) -> bytes:
        """Return the next line with its line feed; b"" after the end."""
        return self._replies.readline()

    def message(self) -> Any:
        """Return the next line, decoded."""
        return json.loads(self.line())

    def lines(self) -> list[bytes]:
        """Return all lines until the end."""
        return self._replies.readlines()

    def messages(self) -> list[Any]:
        """Return all lines until the end, decoded."""
        return [json.loads(line) for line in self.lines()]

    def close(self) -> None:
        """Close the connection."""
        self._replies.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
