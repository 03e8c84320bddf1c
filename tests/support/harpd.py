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
from support.leftovers import COOKIE_VARIABLE
from support.other_user import as_user

_LOGGING: dict[str, Any] = {
    "version": 1,
    "formatters": {"json": {"()": "harp_daemon.logs.JSONFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "root": {"level": "DEBUG", "handlers": ["stderr"]},
}


#: The user of the frontend if the tests run as root. To run them with a separate frontend:
#: HARP_FRONTEND_USER=64321 ./dev test tests/integration/test_frontend.py
_FRONTEND_USER = int(os.environ.get("HARP_FRONTEND_USER", "0"))

#: The default owner and secret of resumable calls.
OWNER, SECRET = "the owner of calls", "a secret of calls"


class Harpd(DaemonLog):
    """A harpd on a free port of 127.0.0.1; a context manager that starts and stops it.

    Args:
        directory: the directory of its files, not shared; a short path.
        procedures: the text of the procedures file.
        configuration: sections that change the defaults: ``{"limits": {"max_calls": 2}}``.
        options: more command-line options.
        descriptors: the hard limit of open files; None: that of this process.
        services: run frontend and supervisor as two programs, like the services; otherwise as one.
        stderr: the programs log to this descriptor, too; None: stderr is the log.
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
        services: bool = False,
        stderr: int | None = None,
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
        self._frontend: subprocess.Popen[bytes] | None = None
        self._last_client: LineClient
        self._services = services
        self._launcher: subprocess.Popen[bytes] | None = None
        self._prefix: list[str] = []
        self.keyfile.chmod(0o600)
        self.procedures_file.write_text(procedures)
        self._stderr = stderr
        logging: dict[str, Any] = _LOGGING
        if stderr is not None:
            file = {"class": "logging.FileHandler", "formatter": "json", "filename": str(self.log_file)}
            root = {"level": "DEBUG", "handlers": ["stderr", "file"]}
            logging = {**_LOGGING, "handlers": {**_LOGGING["handlers"], "file": file}, "root": root}
        self.logging_file.write_text(yaml.safe_dump(logging))
        self.log_file.touch()
        self.configure(configuration or {})

    @property
    def auth(self) -> dict[str, str]:
        """The member `auth` of a request."""
        return {"user": self.user, "password": self.password}

    def configure(self, changes: dict[str, Any]) -> None:
        """Write the configuration file: the defaults with these changes. They take effect by `reload`."""
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
            **(
                {"default_user": "root", "frontend_user": _FRONTEND_USER}
                if os.geteuid() == 0 and not self._prefix
                else {}
            ),
            "environment": {COOKIE_VARIABLE: None},  # a process that a test leaves behind is found by it
        }
        for name, section in changes.items():
            usual = configuration.get(name)
            merged = isinstance(usual, dict) and isinstance(section, dict) and name != "authentication"
            configuration[name] = {**usual, **section} if merged and usual is not None else section
        self.config_file.write_text(yaml.safe_dump(configuration))
        self.config_file.chmod(0o600)

    def without_runtime_directory(self) -> Harpd:
        """Configure no runtime directory, for a user without a default one: another user if the test's is root."""
        self.configure({"runtime_directory": None})
        self._prefix = ["env", "-u", "XDG_RUNTIME_DIR", "-u", "RUNTIME_DIRECTORY"]
        if os.geteuid() == 0:
            self._prefix += as_user(4242)
            self.directory.parent.chmod(0o1777)  # for the files that its calls write
        return self

    def command(self, *options: str) -> list[str]:
        """Return the program's command line."""
        return [
            *self._prefix,
            *(sys.executable, "-P", "-m", "harpd.cli"),
            *("--config", str(self.config_file), "--procedures", str(self.procedures_file)),
            *("--logging", str(self.logging_file), *self._options, *options),
        ]

    def start(self) -> Harpd:
        """Start the programs that do not run; return when harpd accepts calls."""
        assert self._frontend is None
        if self._services and self._launcher is None:
            self.start_launcher()
        return self.start_frontend()

    def start_frontend(self) -> Harpd:
        """Start the frontend, or the single program; return when it accepts connections."""
        self._configured_port = self.port
        self.configure(self._changes)
        seen = len(self.events("harpd is serving"))
        self._frontend = self._spawn(*(("frontend",) if self._services else ()))
        try:
            wait_until(lambda: self._serves(seen), DEADLINE, "harpd serving")
        except BaseException:
            self.kill()
            if self._launcher is not None:
                self.stop_launcher()
            raise
        self.port = self.events("harpd is serving")[-1]["port"]
        return self

    def start_launcher(self) -> None:
        """Start the program `harpd supervisor`; return when a supervisor is active."""
        assert self._launcher is None
        seen = len(self.events("supervisor is serving"))
        launcher = self._launcher = self._spawn("supervisor")
        try:
            wait_until(
                lambda: launcher.poll() is not None or len(self.events("supervisor is serving")) > seen,
                DEADLINE,
                "a supervisor",
            )
            assert launcher.poll() is None, f"harpd supervisor exited:\n{self.log_file.read_text()}"
        except BaseException:
            self.stop_launcher(signal.SIGKILL)
            raise

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        limit = [] if self._descriptors is None else ["prlimit", f"--nofile={self._descriptors}"]
        with self.log_file.open("ab") as log:
            return subprocess.Popen(
                [*limit, *self.command(*command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log if self._stderr is None else self._stderr,
                cwd=self.directory,
            )

    def stop_launcher(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop the program `harpd supervisor` by a signal; return its exit status. Supervisors may continue."""
        assert self._launcher is not None
        self._launcher.send_signal(number)
        try:
            return self._launcher.wait(DEADLINE)
        finally:
            self._launcher.kill()
            self._launcher.wait()
            self._launcher = None

    def _serves(self, seen: int) -> bool:
        assert self._frontend is not None
        status = self._frontend.poll()
        assert status is None, f"harpd ended with {status} at its start:\n{self.log_file.read_text()}"
        return len(self.events("harpd is serving")) > seen

    @property
    def pid(self) -> int:
        """The process id of the frontend, or of the single program."""
        assert self._frontend is not None
        return self._frontend.pid

    def status(self) -> dict[str, Any]:
        """Return the status of the supervisor that accepts new calls."""
        return self.ask({"control": "status"})

    def ask(self, request: Any, name: str = "supervisor") -> dict[str, Any]:
        """Send a line to a supervisor; return the first line of the reply, decoded."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(DEADLINE)
            descriptor = os.open(self.runtime_directory, os.O_PATH)
            try:
                connection.connect(f"/proc/self/fd/{descriptor}/{name}")
            finally:
                os.close(descriptor)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                reply: dict[str, Any] = json.loads(lines.readline())
        return reply

    def statuses(self) -> list[dict[str, Any]]:
        """Return the status of each running supervisor."""
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

    def reload(self, launcher: bool = False) -> dict[str, Any]:
        """Send SIGHUP to the frontend or to the launcher; return the log event of the outcome."""
        outcomes = ("reloaded", "reload failed; nothing is changed")
        process = self._launcher if launcher else self._frontend
        assert process is not None
        seen = len(self.events(*outcomes))
        process.send_signal(signal.SIGHUP)
        return wait_until(lambda: self.events(*outcomes)[seen:], DEADLINE, "the reload")[0]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop harpd and all calls by a signal; return its exit status when all its processes have ended."""
        if self._frontend is None and self._launcher is None:
            self.stop_supervisors()
            return 0
        family = self._family()
        status = self.stop_frontend(number)
        if self._launcher is not None:
            status = self.stop_launcher() or status
        wait_until(lambda: all(map(_is_dead, family)), DEADLINE, f"the end of {family}")
        return status

    def stop_frontend(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop the frontend by a signal, if it runs; return its exit status."""
        if self._frontend is None:
            return 0
        self._frontend.send_signal(number)
        try:
            return self._frontend.wait(DEADLINE)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the frontend by SIGKILL, if it runs; supervisors may continue."""
        if self._frontend is not None:
            self._frontend.kill()
            self._frontend.wait()
            self._frontend = None

    def stop_supervisors(self) -> None:
        """Stop the supervisors without a launcher, and all calls."""
        family = self._family()
        for status in self.statuses():
            with contextlib.suppress(ConnectionError, FileNotFoundError, json.JSONDecodeError):
                self.ask({"control": "shutdown"}, f"supervisor-{status['instance']}")
        wait_until(lambda: all(map(_is_dead, family)), DEADLINE, f"the end of {family}")

    def _family(self) -> list[psutil.Process]:
        """Return all its processes except frontend and launcher."""
        found: set[psutil.Process] = set()
        own = [process.pid for process in (self._frontend, self._launcher) if process is not None]
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
        """Return the log lines that show a bug: no peer and no procedure can cause them."""
        marks = ("Exception ignored", "never retrieved", "Warning: ", "Fatal Python error")
        bugs = ("unexpected error", "connection failed", "callback failed")
        lines = [line for line in self.log_lines() if "call printed" not in line]
        return [
            *(line for line in lines if line.startswith("Traceback") or any(mark in line for mark in marks)),
            *(str(event) for event in self.events(*bugs)),
        ]

    def connect(self, **changes: Any) -> LineClient:
        """Return a connected raw client. `changes` are set on its SSL context."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        for name, value in changes.items():
            setattr(context, name, value)
        return LineClient(self.host, self.port, context)

    def request(self, procedure: str, arguments: Any, **members: Any) -> dict[str, Any]:
        """Return a request; `members` change it."""
        return {"harp": 1, "procedure": procedure, "arguments": arguments, "auth": self.auth, **members}

    def start_resumable(self, procedure: str, *arguments: Any, **terms: Any) -> LineClient:
        """Start a resumable call with owner `OWNER` and secret `SECRET`; return the client after its request.

        `terms` change the default terms. The client's `call` is the call's id.
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
        """Attach to a resumable call; `members` change the request. Return the client after its request."""
        client = self.connect()
        client.call = call
        request = {"harp": 1, "attach": call, "owner": OWNER, "secret": SECRET, "since": since, "auth": self.auth}
        client.send({**request, **members})
        return client

    def list_calls(self, owner: str | None = None) -> Any:
        """Return the list of the owner's resumable calls, decoded."""
        with self.connect() as client:
            client.send({"harp": 1, "calls": OWNER if owner is None else owner, "auth": self.auth})
            (reply,) = client.lines()
        return reply

    def call(self, procedure: str, *arguments: Any) -> list[Any]:
        """Call a procedure; return all messages, decoded. `last_call` returns its id."""
        with self.connect() as client:
            self._last_client = client
            client.send(self.request(procedure, list(arguments)))
            return client.lines()

    def call_id(self, client: LineClient) -> str:
        """Wait until the call of a client is accepted; return its id."""
        return str(self.wait_event("call accepted", peer=client.address)["call"])

    def last_call(self) -> str:
        """Return the id of the last call by `call`."""
        return self.call_id(self._last_client)


def is_dead(pid: int) -> bool:
    """Return whether a process has exited; it may be a zombie."""
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
    """A client that sends and receives lines over TLS; a context manager that closes it."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext) -> None:
        plain = socket.create_connection((host, port), DEADLINE)
        #: Its own address, as the log has it.
        self.address = ":".join(map(str, plain.getsockname()))
        try:
            self.socket = context.wrap_socket(plain, server_hostname="localhost")
        except BaseException:
            plain.close()
            raise
        self._received = b""
        #: The id of its resumable call.
        self.call = ""

    def send(self, message: Any) -> None:
        """Send bytes unchanged, any other value as a JSON line."""
        self.socket.sendall(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")

    def line(self) -> bytes:
        """Return the next line without its line feed; when harpd closes, the incomplete rest, then b""."""
        pieces = [self._received]
        while b"\n" not in pieces[-1]:
            data = self.socket.recv(65536)
            if not data:
                self._received = b""
                return b"".join(pieces)
            pieces.append(data)
        line, _, self._received = b"".join(pieces).partition(b"\n")
        return line

    def message(self) -> Any:
        """Return the next line, decoded."""
        return json.loads(self.line())

    def raw_lines(self) -> list[bytes]:
        """Return all lines until harpd closes."""
        return list(iter(self.line, b""))

    def lines(self) -> list[Any]:
        """Return all lines until harpd closes, decoded."""
        return [json.loads(line) for line in self.raw_lines()]

    def closing_line(self) -> Any:
        """Return the closing line of its resumable call; release the call, after which harpd closes."""
        while not (line := self.message()).keys() & {"result", "exception", "error"}:
            pass
        self.send({"release": True})
        assert self.lines() == []
        return line

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def __enter__(self) -> LineClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
