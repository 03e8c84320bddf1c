"""A real warden as a child process, spoken with as the gate does: one Unix connection per call, JSON lines.

with Warden(tmp_path, PROCEDURES) as warden, warden.call("echo", [1]) as call:
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
from typing import Any

import psutil

from support.deadline import wait_until

#: Seconds within which everything has to happen; never waited for in full when all is well.
DEADLINE = 60.0

#: Whose kept calls are, unless a test says otherwise.
OWNER, SECRET = "owner-1", "secret-1"

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


class Warden:
    """A warden, and the gate's part in its life; a context manager that starts it and ends it by `shutdown`.

    Args:
        directory: where its files go.
        procedures: the text of the procedures file.
        settings: settings to lay over the usual ones.
    """

    def __init__(self, directory: Path, procedures: str, **settings: Any) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.runtime_directory = directory / "run"
        self.runtime_directory.mkdir(exist_ok=True)
        self.procedures_file = directory / "procedures.py"
        self.procedures_file.write_text(procedures)
        self.log_file = directory / "warden.log"
        self.log_file.touch()
        self.settings: dict[str, Any] = {
            "procedures": str(self.procedures_file),
            "python_path": {"prepend": [], "append": []},
            "default_user": None,
            "default_group": None,
            "max_calls": 500,
            "kill_grace": 60.0,
            "spool": 1 << 20,
            "spool_memory": 1 << 30,
            "disconnect_timeout": 3600.0,
            "result_ttl": 3600.0,
            "exit_info": {"stderr": False, "traceback": False},
            "cgroup": None,
            "outlive": False,
            "runtime_directory": str(self.runtime_directory),
            "logging": _LOGGING,
            **settings,
        }
        #: Whom it runs as; None: as the test.
        self.user: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._family: list[psutil.Process] = []

    # Its life.

    def spawn(self, descriptors: tuple[int, int] | None = None) -> subprocess.Popen[bytes]:
        """Start it and return at once.

        Args:
            descriptors: soft and hard limit of open files, None: as here.
        """
        assert self._process is None
        # By way of a descriptor, for a socket's address has no more than 107 bytes.
        self._directory = os.open(self.runtime_directory, os.O_PATH | os.O_DIRECTORY)
        self._address = f"/proc/self/fd/{self._directory}/warden"
        (self.runtime_directory / "warden").unlink(missing_ok=True)
        self._lifeline, theirs = socket.socketpair()
        limit = [] if descriptors is None else ["prlimit", f"--nofile={descriptors[0]}:{descriptors[1]}"]
        limit += [] if self.user is None else as_user(self.user)
        with theirs, self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*limit, sys.executable, "-P", "-m", "harpd.supervisor.main", str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        assert self._process.stdin is not None
        with self._process.stdin as stdin, contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(self.settings).encode())
        return self._process

    def start(self, descriptors: tuple[int, int] | None = None) -> Warden:
        """Start it and return once it takes calls."""
        process = self.spawn(descriptors)
        try:
            wait_until(lambda: self._takes_calls() or process.poll() is not None, DEADLINE, "the warden's socket")
            self.status()
        except BaseException:
            self.kill()
            print(self.log_file.read_text(), file=sys.stderr)
            raise
        return self

    def _takes_calls(self) -> bool:
        return (self.runtime_directory / "warden").exists()

    def wait(self) -> int:
        """Wait until it has ended, and its zygotes; return its exit status."""
        assert self._process is not None
        try:
            status = self._process.wait(DEADLINE)
            wait_until(lambda: not any(map(runs, self._family)), DEADLINE, f"the end of {self._family}")
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.end_gate()
            os.close(self._directory)
        return status

    def kill(self) -> None:
        """End it by SIGKILL; return when it is dead, whatever becomes of its calls."""
        assert self._process is not None
        self._process.kill()
        self._family = []
        self.wait()

    def end_gate(self) -> None:
        """Close the lifeline, as the gate's death does."""
        self._lifeline.close()

    def __enter__(self) -> Warden:
        return self.start() if self._process is None else self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._process is None:
            return
        if kind is not None:
            self.kill()
            return
        assert self.control("shutdown") == {"ok": True}
        assert self.wait() == 0, self.log_file.read_text()
        assert not (faults := self.faults()), faults
        assert not list((self.runtime_directory / "calls").glob("*/*"))

    # What it is asked.

    def connect(self) -> Conversation:
        """A connection on which nothing was said yet."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(DEADLINE)
        connection.connect(self._address)
        return Conversation(connection, "")

    def call(
        self, procedure: str, arguments: Any = (), call_id: str | None = None, kept: dict[str, Any] | None = None
    ) -> Conversation:
        """Call a procedure, and do not wait for anything."""
        conversation = self.connect()
        conversation.id = call_id or str(uuid.uuid4())
        request = {"call": conversation.id, "procedure": procedure, "arguments": arguments, "user": "u", "peer": "p"}
        conversation.send(request if kept is None else {**request, "resumable": kept})
        return conversation

    def keep(self, procedure: str, *arguments: Any, call_id: str | None = None, **terms: Any) -> Conversation:
        """Call a procedure whose call is kept, by `OWNER` with `SECRET`; `terms` are laid over the usual ones."""
        begun = time.clock_gettime(time.CLOCK_BOOTTIME)
        usual = {
            "received": begun,
            "owner": OWNER,
            "secret": SECRET,
            "disconnect_timeout": 60,
            "result_ttl": 60,
            "timeout": 60,
            "max_exec_time": 60,
        }
        warden = self.status()["instance"]
        return self.call(procedure, arguments, call_id, {**usual, "instance": warden, **terms})

    def attach(self, call_id: str, since: int = 0, behind: bytes = b"", **members: Any) -> Conversation:
        """Attach to a kept call; `members` are laid over the usual ones, `behind` is sent with the request."""
        conversation = self.connect()
        conversation.id = call_id
        request = {"attach": call_id, "owner": OWNER, "secret": SECRET, "since": since, "user": "u", "peer": "p"}
        conversation.send(json.dumps({**request, **members}).encode() + b"\n" + behind)
        return conversation

    def held(self, owner: str | None = None) -> list[str]:
        """The ids of an owner's kept calls."""
        with self.connect() as conversation:
            conversation.send({"calls": owner or OWNER})
            (answer,) = conversation.lines()
        ids: list[str] = answer["calls"]
        return ids

    def lines(self, procedure: str, *arguments: Any, **named: Any) -> list[Any]:
        """Call a procedure; return all that came."""
        with self.call(procedure, named or arguments) as call:
            return call.lines()

    def end(self, procedure: str, *arguments: Any, **named: Any) -> Any:
        """Call a procedure; return the closing line."""
        return self.lines(procedure, *arguments, **named)[-1]

    def result(self, procedure: str, *arguments: Any, **named: Any) -> Any:
        """Call a procedure; return its result."""
        end = self.end(procedure, *arguments, **named)
        assert end.keys() == {"result"}, end
        return end["result"]

    def control(self, request: str, **members: Any) -> Any:
        """Make a control request; return the answer."""
        with self.connect() as conversation:
            conversation.send({"control": request, **members})
            (answer,) = conversation.lines()
        return answer

    def status(self) -> dict[str, Any]:
        """What it says of itself."""
        status: dict[str, Any] = self.control("status")
        for pid in (status["supervisor"], status["zygote"]):
            if pid is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._family.append(psutil.Process(pid))
        return status

    def reload(self, text: str | None = None, **settings: Any) -> Any:
        """Have it load the procedures file, with another text perhaps; return the answer."""
        if text is not None:
            self.procedures_file.write_text(text)
        answer = self.control("reload", settings={**self.settings, **settings})
        self.status()
        return answer

    # Its log.

    def events(self, name: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """The events of its log that have this name and these fields."""
        lines = self.log_file.read_text("utf-8", "replace").splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [event for event in events if name in (None, event["event"]) and fields.items() <= event.items()]

    def wait_event(self, name: str, **fields: Any) -> dict[str, Any]:
        """Wait until the log has such an event; return the first."""
        return wait_until(lambda: self.events(name, **fields), DEADLINE, f"the event {name!r} {fields}")[0]

    def faults(self) -> list[str]:
        """What in its log no peer and no procedure may cause."""
        lines = self.log_file.read_text("utf-8", "replace").splitlines()
        marks = ("Traceback", "callback failed", "Exception ignored", "Fatal Python error")
        return [line for line in lines if any(mark in line for mark in marks) and "call printed" not in line]


class Conversation:
    """The gate's end of one connection; a context manager that closes it."""

    def __init__(self, connection: socket.socket, call_id: str) -> None:
        self.socket = connection
        self.id = call_id
        self._received = b""

    def send(self, message: Any) -> None:
        """Send bytes as they are, anything else as a JSON line."""
        self.socket.sendall(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")

    def raw_line(self) -> bytes:
        """The next line without its line feed; b"" when the warden has closed."""
        pieces = [self._received]
        while b"\n" not in pieces[-1]:
            data = self.socket.recv(1 << 20)
            if not data:
                self._received = b""
                assert not any(pieces), "the last line is cut"
                return b""
            pieces.append(data)
        line, _, self._received = b"".join(pieces).partition(b"\n")
        return line

    def line(self) -> Any:
        """The next line, decoded."""
        return json.loads(self.raw_line())

    def lines(self) -> list[Any]:
        """All lines until the warden closes, decoded."""
        return [json.loads(line) for line in iter(self.raw_line, b"")]

    def stop(self) -> None:
        """Ask to stop the call by closing one half, and wait until the warden closes; what still comes is nothing."""
        self.socket.shutdown(socket.SHUT_WR)
        while self.socket.recv(1 << 20):
            pass

    def close(self) -> None:
        """Close the connection, as the gate's death does."""
        self.socket.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_user(user: int) -> list[str]:
    """The command that runs another as this user, who may read every file (this Python, say) and nothing more."""
    reading = "+dac_read_search"
    ids = ["--reuid", str(user), "--regid", str(user), "--clear-groups"]
    return ["setpriv", *ids, "--inh-caps", reading, "--ambient-caps", reading]


def runs(process: psutil.Process) -> bool:
    """Whether this very process runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
