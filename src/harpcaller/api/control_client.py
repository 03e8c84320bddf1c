"""The client of the control socket: sends a command to a running harpcallerd and returns the reply.

A request is one line, ``{"command": NAME, ...}``. The reply is any number of lines ``{"item": OBJECT}``, then
``{"done": true}`` or ``{"error": MESSAGE}``; without such a last line, the reply is incomplete. This module imports no
event loop and no TLS, so that the program starts quickly.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harp.protocol.json_text import Envelope, InvalidJSON, Raw, dumps
from harp.protocol.lines import LineBuffer
from harp_daemon.sliced_json import decode_slices

_REPLY_TIMEOUT = 10.0  # maximum seconds for the reply to a simple command, and without a part of another reply
_READ_SIZE = 64 * 1024
_POLL_INTERVAL = 0.05  # seconds between two attempts to connect to a starting daemon


class ControlError(Exception):
    """A command that failed or was not answered. The message is for the user."""


class NotRunning(ControlError):
    """A control socket on which no daemon listens."""


class ControlClient:
    """A client of the control API of the harpcallerd with this control socket.

    Each method raises `ControlError` if the command failed, or the reply is late or incomplete, and `NotRunning` if no
    daemon is running.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def send_command(self, command: str, **options: Any) -> Iterator[Raw]:
        """Send a command with its options that are not None; yield the items of the reply as JSON text."""
        with self._connect() as connection:
            connection.settimeout(_REPLY_TIMEOUT)
            # A long command sends nothing for some time: is it the daemon that hangs?
            yield from self._exchange(connection, command, options, on_silence=self.is_running)

    def is_running(self) -> bool:
        """Return whether the daemon runs and replies."""
        try:
            with self._connect() as connection:
                connection.settimeout(_REPLY_TIMEOUT)
                list(self._exchange(connection, "status", {}))
        except NotRunning:
            return False
        return True

    def wait_running(self, timeout: float | None) -> bool:
        """Wait until the daemon runs, at most `timeout` seconds unless it is None; return whether it runs."""
        last = None if timeout is None else time.monotonic() + timeout
        while not self.is_running():
            if last is not None and time.monotonic() >= last:
                return False
            time.sleep(_POLL_INTERVAL)
        return True

    def stop(self, timeout: float | None) -> int:
        """Stop the daemon; return its process id when it has exited, after `timeout` seconds at most."""
        with self._connect() as connection:
            pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            try:
                process = os.pidfd_open(pid)
            except OSError as error:
                raise ControlError(f"cannot watch process {pid}: {error.strerror}") from error
            try:
                connection.settimeout(_REPLY_TIMEOUT if timeout is None else max(timeout, _POLL_INTERVAL))
                list(self._exchange(connection, "stop", {}))
                exited, _, _ = select.select([process], [], [], timeout)
            finally:
                os.close(process)
        if not exited:
            raise ControlError(f"process {pid} is still stopping after {timeout:g} s")
        return int(pid)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(self._path))
        except OSError as error:
            connection.close()
            if isinstance(error, (FileNotFoundError, ConnectionRefusedError, NotADirectoryError)):
                raise NotRunning(f"no harpcallerd is running on {self._path}") from error
            raise ControlError(f"control socket {self._path}: {error.strerror or error}") from error
        return connection

    def _exchange(
        self,
        connection: socket.socket,
        command: str,
        options: dict[str, Any],
        on_silence: Callable[[], object] | None = None,
    ) -> Iterator[Raw]:
        """Send a command and yield the items of its reply. The connection has the time-out of each wait.

        After a wait without data, `on_silence` is called before the next one; None: the reply is late.
        """
        given = {name: option for name, option in options.items() if option is not None}
        try:
            connection.sendall(dumps(Envelope(command=command, **given)) + b"\n")
            for line in _read_lines(connection, on_silence):
                members = decode_slices(line)
                if "done" in members:
                    return
                if "error" in members:
                    raise ControlError(str(members.value("error")))
                yield members.payload("item")
        except TimeoutError as error:
            raise ControlError(f"harpcallerd does not answer on {self._path}") from error
        except (OSError, InvalidJSON, KeyError) as error:
            raise ControlError(f"control socket {self._path}: {error}") from error
        raise ControlError("harpcallerd exited before its reply was complete")


def _read_lines(connection: socket.socket, on_silence: Callable[[], object] | None) -> Iterator[bytes]:
    """Yield the complete lines until the end. Raises OSError."""
    lines = LineBuffer(sys.maxsize)
    while True:
        try:
            data = connection.recv(_READ_SIZE)
        except TimeoutError:
            if on_silence is None:
                raise
            on_silence()
            continue
        if not data:
            return
        yield from lines.feed(data)
