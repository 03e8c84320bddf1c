"""A real harpd as a child process, and a client that speaks lines over TLS, for transcripts.

with Harpd(tmp_path, PROCEDURES) as harpd, harpd.connect() as client:
    client.send({"harp": 1, "procedure": "echo", "arguments": [1], "auth": harpd.auth})
    assert client.lines() == [{"harp": 1, "stream_result": False}, {"result": 1}]
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import yaml

from support.certificates import server_files
from support.daemonlog import DEADLINE, DaemonLog
from support.deadline import wait_until

_LOGGING = {
    "version": 1,
    "formatters": {"json": {"()": "harp_daemon.logs.JSONFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "root": {"level": "DEBUG", "handlers": ["stderr"]},
}


#: Whose kept calls are, unless a test says otherwise.
OWNER, SECRET = "the owner of calls", "a secret of calls"


class Harpd(DaemonLog):
    """A harpd on a free port of 127.0.0.1; a context manager that starts and stops it.

    Args:
        directory: where its files go; its own, and short enough for no limit to matter.
        procedures: the text of the procedures file.
        configuration: sections to lay over the usual ones: ``{"limits": {"max_calls": 2}}``.
        options: more options of the command line.
        descriptors: the hard limit of open files, None: as it is here.
        apart: gate and calls are two programs, as the services are; else one program is both.
    """

    host = "127.0.0.1"
    user = "tester"
    password = "correct horse"  # as in the configuration below

    def __init__(
        self,
        directory: Path,
        procedures: str,
        configuration: dict[str, Any] | None = None,
        options: tuple[str, ...] = (),
        descriptors: int | None = None,
        apart: bool = False,
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        files = server_files(directory)
        self.ca_file, self.certfile, self.keyfile = files.ca_file, files.certfile, files.keyfile
        self.config_file = directory / "harpd.conf"
        self.procedures_file = directory / "procedures.py"
        self.logging_file = directory / "logging.conf"
        self.log_file = directory / "harpd.log"
        self.runtime_directory = directory / "run"
        #: The port; 0 before the first start. A later start takes the same one.
        self.port = self._configured_port = 0
        self._options = options
        self._descriptors = descriptors
        self._process: subprocess.Popen[bytes] | None = None
        self._apart = apart
        self._calls: subprocess.Popen[bytes] | None = None
        self.procedures_file.write_text(procedures)
        self.logging_file.write_text(yaml.safe_dump(_LOGGING))
        self.log_file.touch()
        self.configure(configuration or {})

    @property
    def auth(self) -> dict[str, str]:
        """What a request has under `auth`."""
        return {"user": self.user, "password": self.password}

    def configure(self, changes: dict[str, Any]) -> None:
        """Write the configuration file: the usual one with sections laid over it. Takes effect by `reload`."""
        self._changes = changes
        configuration: dict[str, Any] = {
            "network": {
                "address": self.host,
                "port": self._configured_port,
                "certfile": str(self.certfile),
                "keyfile": str(self.keyfile),
            },
            "authentication": {"module": "harpd.auth.inconfig", "users": {self.user: f"plain:{self.password}"}},
            "runtime_directory": str(self.runtime_directory),
        }
        for name, section in changes.items():
            usual = configuration.get(name)
            merged = isinstance(usual, dict) and isinstance(section, dict) and name != "authentication"
            configuration[name] = {**usual, **section} if merged and usual is not None else section
        self.config_file.write_text(yaml.safe_dump(configuration))

    def command(self, *options: str) -> list[str]:
        """The program's command line."""
        return [
            *(sys.executable, "-P", "-m", "harpd.cli"),
            *("--config", str(self.config_file), "--procedures", str(self.procedures_file)),
            *("--logging", str(self.logging_file), *self._options, *options),
        ]

    def start(self) -> Harpd:
        """Start it, or what of it does not run, and return once it takes calls."""
        assert self._process is None
        if self._apart and self._calls is None:
            self.start_calls()
        return self.start_gate()

    def start_gate(self) -> Harpd:
        """Start the gate, and what else is in its program; return once it takes connections."""
        self._configured_port = self.port
        self.configure(self._changes)
        seen = len(self.events("harpd is serving"))
        self._process = self._spawn(*(("frontend",) if self._apart else ()))
        try:
            wait_until(lambda: self._serves(seen), DEADLINE, "harpd serving")
        except BaseException:
            self.kill()
            if self._calls is not None:
                self.end_calls()
            raise
        self.port = self.events("harpd is serving")[-1]["port"]
        return self

    def start_calls(self) -> None:
        """Start the program that keeps the calls; return once there is a supervisor."""
        assert self._calls is None
        seen = len(self.events("supervisor is serving"))
        calls = self._calls = self._spawn("supervisor")
        try:
            wait_until(
                lambda: calls.poll() is not None or len(self.events("supervisor is serving")) > seen,
                DEADLINE,
                "a supervisor",
            )
            assert calls.poll() is None, f"harpd supervisor has ended:\n{self.log_file.read_text()}"
        except BaseException:
            self.end_calls(signal.SIGKILL)
            raise

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        limit = [] if self._descriptors is None else ["prlimit", f"--nofile={self._descriptors}"]
        with self.log_file.open("ab") as log:
            return subprocess.Popen(
                [*limit, *self.command(*command)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory
            )

    def end_calls(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the program that keeps the calls by a signal; return its exit status. Supervisors may go on."""
        assert self._calls is not None
        self._calls.send_signal(number)
        try:
            return self._calls.wait(DEADLINE)
        finally:
            self._calls.kill()
            self._calls.wait()
            self._calls = None

    def _serves(self, seen: int) -> bool:
        assert self._process is not None
        status = self._process.poll()
        assert status is None, f"harpd ended with {status} at its start:\n{self.log_file.read_text()}"
        return len(self.events("harpd is serving")) > seen

    @property
    def pid(self) -> int:
        """The gate's process id."""
        assert self._process is not None
        return self._process.pid

    def status(self) -> dict[str, Any]:
        """Return the status of the supervisor that accepts new calls."""
        return self.ask({"control": "status"})

    def ask(self, request: Any, name: str = "supervisor") -> dict[str, Any]:
        """Send a supervisor a line; return the first that comes back."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(DEADLINE)
            descriptor = os.open(self.runtime_directory, os.O_PATH)
            try:
                connection.connect(f"/proc/self/fd/{descriptor}/{name}")
            finally:
                os.close(descriptor)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as answer:
                found: dict[str, Any] = json.loads(answer.readline())
        return found

    def statuses(self) -> list[dict[str, Any]]:
        """What each living supervisor says of itself."""
        found = []
        for name in sorted(path.name for path in self.runtime_directory.glob("supervisor-*")):
            with contextlib.suppress(ConnectionError, FileNotFoundError, json.JSONDecodeError):
                found.append(self.ask({"control": "status"}, name))
        return found

    @property
    def supervisor(self) -> int:
        """The supervisor's process id."""
        return int(self.status()["supervisor"])

    @property
    def zygote(self) -> int:
        """The zygote's process id."""
        return int(self.status()["zygote"])

    def reload(self, calls: bool = False) -> dict[str, Any]:
        """Send SIGHUP to the gate, or to the program that keeps the calls; return the event that says how it went."""
        outcomes = ("reloaded", "reload failed; nothing is changed")
        process = self._calls if calls else self._process
        assert process is not None
        seen = len(self.events(*outcomes))
        process.send_signal(signal.SIGHUP)
        return wait_until(lambda: self.events(*outcomes)[seen:], DEADLINE, "the reload")[0]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it by a signal, all calls too; return its exit status once nothing of it is left."""
        if self._process is None and self._calls is None:
            self.end_supervisors()
            return 0
        family = self._family()
        status = self.stop_gate(number)
        if self._calls is not None:
            status = self.end_calls() or status
        wait_until(lambda: all(map(_is_dead, family)), DEADLINE, f"the end of {family}")
        return status

    def stop_gate(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the gate by a signal, if it runs; return its exit status."""
        if self._process is None:
            return 0
        self._process.send_signal(number)
        try:
            return self._process.wait(DEADLINE)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the gate by SIGKILL, if it still runs; supervisors may go on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def end_supervisors(self) -> None:
        """End the supervisors that nobody keeps any more, and all calls."""
        family = self._family()
        for status in self.statuses():
            with contextlib.suppress(ConnectionError, FileNotFoundError, json.JSONDecodeError):
                self.ask({"control": "shutdown"}, f"supervisor-{status['instance']}")
        wait_until(lambda: all(map(_is_dead, family)), DEADLINE, f"the end of {family}")

    def _family(self) -> list[psutil.Process]:
        """All its processes but the programs themselves."""
        found: set[psutil.Process] = set()
        own = [process.pid for process in (self._process, self._calls) if process is not None]
        supervisors = [status["supervisor"] for status in self.statuses()] if self.runtime_directory.exists() else []
        for pid in own + supervisors:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                found |= {process, *process.children(recursive=True)}
        return [process for process in found if process.pid not in own]

    def __enter__(self) -> Harpd:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        status = self.stop()
        if kind is None:
            assert status == 0, f"harpd ended with {status}:\n{self.log_file.read_text()}"
            assert not (faults := self.faults()), faults

    def faults(self) -> list[str]:
        """Lines of its log that no peer and no procedure may cause."""
        marks = ("Exception ignored", "never retrieved", "Warning: ", "Fatal Python error")
        bugs = ("unexpected error", "connection failed", "callback failed")
        lines = [line for line in self.log_lines() if "call printed" not in line]
        return [
            *(line for line in lines if line.startswith("Traceback") or any(mark in line for mark in marks)),
            *(str(event) for event in self.events(*bugs)),
        ]

    def connect(self, **changes: Any) -> LineClient:
        """A raw client, connected. `changes` are set on its SSL context."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        for name, value in changes.items():
            setattr(context, name, value)
        return LineClient(self.host, self.port, context)

    def request(self, procedure: str, arguments: Any, **members: Any) -> dict[str, Any]:
        """A request as the protocol has it; `members` are laid over it."""
        return {"harp": 1, "procedure": procedure, "arguments": arguments, "auth": self.auth, **members}

    def keep(self, procedure: str, *arguments: Any, **terms: Any) -> LineClient:
        """Start a kept call, of owner `OWNER` with secret `SECRET`; return the client after its request.

        `terms` are laid over the usual ones. The client's `call` is the call's id.
        """
        usual = {"id": str(uuid.uuid4()), "owner": OWNER, "secret": SECRET, "disconnect_timeout": 60, "result_ttl": 60}
        limits = {"timeout": 60, "max_exec_time": 600}
        call = {**usual, **limits, **terms}
        if "instance" not in call:
            call["instance"] = self.status()["instance"]
        client = self.connect()
        client.call = call["id"]
        client.send(self.request(procedure, list(arguments), call=call))
        return client

    def attach(self, call: str, since: int = 0, **members: Any) -> LineClient:
        """Attach to a kept call; `members` are laid over the request. Return the client after its request."""
        client = self.connect()
        client.call = call
        request = {"harp": 1, "attach": call, "owner": OWNER, "secret": SECRET, "since": since, "auth": self.auth}
        client.send({**request, **members})
        return client

    def held(self, owner: str | None = None) -> Any:
        """The answer to the question which kept calls there are, decoded."""
        with self.connect() as client:
            client.send({"harp": 1, "calls": OWNER if owner is None else owner, "auth": self.auth})
            (answer,) = client.lines()
        return answer

    def call(self, procedure: str, *arguments: Any) -> list[Any]:
        """Call a procedure; return all messages that came, decoded."""
        with self.connect() as client:
            client.send(self.request(procedure, list(arguments)))
            return client.lines()


def is_dead(pid: int) -> bool:
    """Whether a process does not run any more; it may be waiting for its parent to notice."""
    try:
        return _is_dead(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def _is_dead(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class LineClient:
    """Speaks lines over TLS and hides nothing; a context manager that closes it."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext) -> None:
        plain = socket.create_connection((host, port), DEADLINE)
        try:
            self.socket = context.wrap_socket(plain, server_hostname="localhost")
        except BaseException:
            plain.close()
            raise
        self._received = b""
        #: The id of the kept call that it speaks of.
        self.call = ""

    def send(self, message: Any) -> None:
        """Send bytes as they are, anything else as a JSON line."""
        self.socket.sendall(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")

    def line(self) -> bytes:
        """The next line without its line feed; what is left of it when harpd closes, then b""."""
        while b"\n" not in self._received:
            data = self.socket.recv(65536)
            if not data:
                line, self._received = self._received, b""
                return line
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def message(self) -> Any:
        """The next line, decoded."""
        return json.loads(self.line())

    def raw_lines(self) -> list[bytes]:
        """All lines until harpd closes."""
        return list(iter(self.line, b""))

    def lines(self) -> list[Any]:
        """All lines until harpd closes, decoded."""
        return [json.loads(line) for line in self.raw_lines()]

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def __enter__(self) -> LineClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
