"""A real supervisor as a child process, used like the frontend uses it. Each call has a separate link.

with Supervisor(tmp_path, PROCEDURES) as supervisor, supervisor.call("echo", [1]) as call:
    assert call.lines() == [{"harp": 1, "stream_result": False}, {"result": [1]}]
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from harpd.supervisor.frames import (
    ATTACH,
    CLOSED,
    COMMANDS,
    CREDIT,
    END,
    ERROR,
    HANG_UP,
    LINES,
    PREFACE,
    START,
    FrameBuffer,
    encode_credit,
    encode_frame,
)
from harpd.supervisor.listener import ACTIVE_SOCKET
from support.daemonlog import DaemonLog
from support.deadline import wait_until
from support.leftovers import COOKIE_VARIABLE
from support.other_user import as_user
from support.state_entries import read_entries

#: Seconds within which everything must happen; a test that succeeds does not wait for them.
DEADLINE = 60.0

#: The owner and secret of resumable calls, unless a test names others.
OWNER, SECRET = "owner-1", "secret-1"

#: The number of the channel on each link.
CHANNEL = 1

PLAIN = {"harp": 1, "stream_result": False}
STREAMS = {"harp": 1, "stream_result": True}

_LOGGING = {
    "syslog": False,
    "config": {
        "version": 1,
        "formatters": {"json": {"()": "harp_daemon.logs.JSONFormatter"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "root": {"level": "DEBUG", "handlers": ["stderr"]},
    },
}


class Supervisor(DaemonLog):
    """A supervisor and its launcher's part; a context manager that starts it and ends it by `shutdown`.

    Args:
        directory: the directory for its files.
        procedures: the text of the procedures file.
        settings: settings that replace the defaults.
    """

    def __init__(self, directory: Path, procedures: str, **settings: Any) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.runtime_directory = directory / "run"
        self.runtime_directory.mkdir(exist_ok=True)
        self.procedures_file = directory / "procedures.py"
        self.procedures_file.write_text(procedures)
        self.log_file = directory / "supervisor.log"
        self.log_file.touch()
        self.settings: dict[str, Any] = {
            "procedures": str(self.procedures_file),
            "python_path": {"prepend": [], "append": []},
            "default_user": None,
            "dynamic_uids": None,
            "rights": {},
            "environment": {COOKIE_VARIABLE: None},
            "default_group": None,
            "max_calls": 500,
            "kill_grace": 60.0,
            "spool": 1 << 20,
            "spool_memory": 1 << 30,
            "disconnect_timeout": 3600.0,
            "result_ttl": 3600.0,
            "output_lines": 1000,
            "output_bytes": 262144,
            "exit_info": {"stderr": False, "traceback": False},
            "cgroup": None,
            "outlive": False,
            "runtime_directory": str(self.runtime_directory),
            "logging": _LOGGING,
            **settings,
        }
        #: The user id that it runs as; None: that of the test.
        self.user: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._family: list[psutil.Process] = []

    # Start and end.

    def spawn(self, descriptors: tuple[int, int] | None = None) -> subprocess.Popen[bytes]:
        """Start it and return immediately.

        Args:
            descriptors: soft and hard limit of open files; None: those of the test.
        """
        assert self._process is None
        # Through a descriptor, because a socket's address has at most 107 bytes.
        self._directory = os.open(self.runtime_directory, os.O_PATH | os.O_DIRECTORY)
        self._address = f"/proc/self/fd/{self._directory}/{ACTIVE_SOCKET}"
        self._earlier_socket = self._find_socket()
        self._lifeline, inherited_end = socket.socketpair()
        limit = [] if descriptors is None else ["prlimit", f"--nofile={descriptors[0]}:{descriptors[1]}"]
        limit += [] if self.user is None else as_user(self.user)
        with inherited_end, self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*limit, sys.executable, "-P", "-m", "harpd.supervisor.main", str(inherited_end.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(inherited_end.fileno(),),
                start_new_session=True,
            )
        assert self._process.stdin is not None
        with self._process.stdin as stdin, contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(self.settings).encode())
        return self._process

    def start(self, descriptors: tuple[int, int] | None = None) -> Supervisor:
        """Start it and return once it accepts calls."""
        process = self.spawn(descriptors)
        try:
            wait_until(lambda: self._accepts_calls() or process.poll() is not None, DEADLINE, "the supervisor's socket")
            self.status()
        except BaseException:
            self.kill()
            print(self.log_file.read_text(), file=sys.stderr)
            raise
        return self

    def _accepts_calls(self) -> bool:
        return self._find_socket() not in (None, self._earlier_socket)

    def _find_socket(self) -> int | None:
        """Return the inode of the socket of new calls, which may be that of an earlier supervisor."""
        try:
            return (self.runtime_directory / ACTIVE_SOCKET).stat().st_ino
        except FileNotFoundError:
            return None

    def wait(self) -> int:
        """Wait until it and its zygotes have ended; return its exit status."""
        assert self._process is not None
        try:
            status = self._process.wait(DEADLINE)
            wait_until(lambda: not any(map(is_running, self._family)), DEADLINE, f"the end of {self._family}")
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.close_lifeline()
            os.close(self._directory)
        return status

    def kill(self) -> None:
        """Kill it by SIGKILL; return when it is dead, while its calls may still be running."""
        assert self._process is not None
        self._process.kill()
        self._family = []
        self.wait()

    def close_lifeline(self) -> None:
        """Close the lifeline, as the launcher's death does."""
        self._lifeline.close()

    def __enter__(self) -> Supervisor:
        return self.start() if self._process is None else self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._process is None:
            return
        if kind is not None:
            self.kill()
            return
        assert self.control("shutdown") == {"ok": True}
        assert self.wait() == 0, self.log_file.read_text()
        assert not (bugs := self.logged_bugs()), bugs
        assert read_entries(self.runtime_directory) == {}

    # Requests.

    def connect(self) -> Connection:
        """Open a connection, for a line and its reply."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(DEADLINE)
        connection.connect(self._address)
        return Connection(connection)

    def open_channel(self, kind: int, header: Any, behind: bytes = b"") -> Channel:
        """Open a link and a channel on it.

        Args:
            kind: START or ATTACH.
            header: bytes are sent unchanged, other values as JSON.
            behind: the arguments of a call, after the header; or commands, in a separate frame.
        """
        channel = Channel(self.connect().socket)
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        frames = encode_frame(CHANNEL, kind, text + b"\n" + behind if kind == START else text)
        channel.socket.sendall(PREFACE + frames)
        if kind == ATTACH and behind:
            channel.send(behind)
        return channel

    def call(
        self,
        procedure: str,
        arguments: Any = (),
        call_id: str | None = None,
        resumable: dict[str, Any] | None = None,
        **members: Any,
    ) -> Channel:
        """Start a call and return immediately; `members` are more ones of the header."""
        call_id = call_id or str(uuid.uuid4())
        header = {"call": call_id, "procedure": procedure, **members}
        if resumable is not None:
            header["resumable"] = resumable
        channel = self.open_channel(START, header, json.dumps(arguments).encode())
        channel.id = call_id
        return channel

    def call_resumable(self, procedure: str, *arguments: Any, call_id: str | None = None, **members: Any) -> Channel:
        """Start a resumable call of `OWNER` with `SECRET`; `members` replace defaults of the request."""
        defaults = {
            "received": time.clock_gettime(time.CLOCK_BOOTTIME),
            "owner": OWNER,
            "secret": SECRET,
            "disconnect_timeout": 60,
            "result_ttl": 60,
            "timeout": 60,
            "max_exec_time": 60,
        }
        instance = self.status()["instance"]
        return self.call(procedure, arguments, call_id, {**defaults, "instance": instance, **members})

    def attach(self, call_id: str, since: int = 0, behind: bytes = b"", **members: Any) -> Channel:
        """Attach to a resumable call; `members` replace defaults, `behind` are commands directly after the request."""
        header = {"attach": call_id, "owner": OWNER, "secret": SECRET, "since": since, **members}
        channel = self.open_channel(ATTACH, header, behind)
        channel.id = call_id
        return channel

    def list_calls(self, owner: str | None = None) -> list[str]:
        """Return the ids of an owner's resumable calls."""
        with self.connect() as connection:
            connection.send({"calls": owner or OWNER})
            (answer,) = connection.lines()
        ids: list[str] = answer["calls"]
        return ids

    def lines(self, procedure: str, *arguments: Any, **named: Any) -> list[Any]:
        """Call a procedure; return all lines."""
        with self.call(procedure, named or arguments) as call:
            return call.lines()

    def closing_line(self, procedure: str, *arguments: Any, **named: Any) -> Any:
        """Call a procedure; return the closing line."""
        return self.lines(procedure, *arguments, **named)[-1]

    def result(self, procedure: str, *arguments: Any, **named: Any) -> Any:
        """Call a procedure; return its result."""
        line = self.closing_line(procedure, *arguments, **named)
        assert line.keys() == {"result"}, line
        return line["result"]

    def control(self, request: str, **members: Any) -> Any:
        """Send a control request; return the reply."""
        with self.connect() as connection:
            connection.send({"control": request, **members})
            (answer,) = connection.lines()
        return answer

    def status(self) -> dict[str, Any]:
        """Return its status."""
        status: dict[str, Any] = self.control("status")
        for pid in (status["supervisor"], status["zygote"]):
            if pid is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._family.append(psutil.Process(pid))
        return status

    def reload(self, text: str | None = None, **settings: Any) -> Any:
        """Reload the procedures file, with another text if one is given; return the reply."""
        if text is not None:
            self.procedures_file.write_text(text)
        with self.request_reload() as connection:
            self.send_settings(**settings)
            (answer,) = connection.lines()
        self.status()
        return answer

    def request_reload(self) -> Connection:
        """Send the request to reload; return its connection once the supervisor has requested the settings."""
        connection = self.connect()
        connection.send({"control": "reload"})
        received = b""
        while not received.endswith(b"\nreload\n"):
            received += self._lifeline.recv(100)
        return connection

    def send_settings(self, **settings: Any) -> None:
        """Send settings as the launcher does, with these changes."""
        self._lifeline.sendall(json.dumps({**self.settings, **settings}).encode() + b"\n")

    # Its log.

    def logged_bugs(self) -> list[str]:
        """Return the log lines that no peer and no procedure may cause."""
        marks = ("Traceback", "callback failed", "Exception ignored", "Fatal Python error")
        of_procedures = ("call printed", "procedure raised")
        return [
            line
            for line in self.log_lines()
            if any(map(line.__contains__, marks)) and not any(map(line.__contains__, of_procedures))
        ]


class Connection:
    """A connection for one line and its reply; a context manager that closes it."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._received = b""

    def send(self, message: Any) -> None:
        """Send bytes unchanged, other values as a JSON line."""
        self._send(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")

    def _send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _receive(self) -> bytes:
        """Receive some bytes of lines; b"" when the supervisor has closed."""
        return self.socket.recv(1 << 20)

    def raw_line(self) -> bytes:
        """Receive the next line without its line feed; b"" when the supervisor has closed."""
        pieces = [self._received]
        while b"\n" not in pieces[-1]:
            data = self._receive()
            if not data:
                self._received = b""
                assert not any(pieces), "the last line is incomplete"
                return b""
            pieces.append(data)
        line, _, self._received = b"".join(pieces).partition(b"\n")
        return line

    def line(self) -> Any:
        """Receive the next line, decoded."""
        return json.loads(self.raw_line())

    def lines(self) -> list[Any]:
        """Receive all lines until the supervisor closes, decoded."""
        return [json.loads(line) for line in iter(self.raw_line, b"")]

    def close(self) -> None:
        """Close the connection, as the frontend's death does."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Channel(Connection):
    """The frontend's end of a link with one channel. It credits received data immediately.

    Attributes:
        id: the call's id.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.id = ""
        self._frames = FrameBuffer(1 << 20)
        self._lines: list[bytes] = []
        self._closed = False

    def _send(self, data: bytes) -> None:
        self.socket.sendall(encode_frame(CHANNEL, COMMANDS, data))

    def _receive(self) -> bytes:
        while not self._lines and not self._closed:
            data = self.socket.recv(1 << 20)
            if not data:
                return b""
            for channel, kind, body in self._frames.feed(data):
                assert channel == CHANNEL
                if kind in (LINES, END, ERROR):
                    self._lines.append(body)
                    with contextlib.suppress(ConnectionError):  # the supervisor exits
                        self.socket.sendall(encode_frame(CHANNEL, CREDIT, encode_credit(len(body))))
                else:
                    assert kind in (CLOSED, CREDIT)
                    self._closed = self._closed or kind == CLOSED
        lines, self._lines = b"".join(self._lines), []
        return lines

    def hang_up(self) -> None:
        """Notify the supervisor that the client has disconnected."""
        self.socket.sendall(encode_frame(CHANNEL, HANG_UP))

    def stop(self) -> None:
        """Stop the call by hanging up; wait until the supervisor closes the channel, and discard its output."""
        self.hang_up()
        while self._receive():
            pass


def is_running(process: psutil.Process) -> bool:
    """Return whether this very process runs and is no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
