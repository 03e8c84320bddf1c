"""The near end of the control socket: asks a running harpcallerd and hands out what it answers.

The protocol is ours alone. A request is one line, ``{"command": NAME, ...}``. The answer is lines
``{"item": OBJECT}``, any number of them, then ``{"done": true}`` or ``{"error": MESSAGE}``; a connection that ends
before has been cut. Standard library and `harp.protocol` only, so that the program answers quickly.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harp.protocol.json_text import Envelope, InvalidJSON, Raw, dumps, slice_text

__all__ = ["ControlError", "Daemon", "NotRunning"]

#: Seconds in which a daemon that is well answers a simple question.
_PATIENCE = 10.0

#: Seconds between two looks for a daemon that is not there yet.
_PAUSE = 0.05


class ControlError(Exception):
    """The daemon could not do what it was asked, or did not answer. The message is for the one who asked."""


class NotRunning(ControlError):
    """No daemon listens on the control socket."""


class Daemon:
    """A harpcallerd, as one who may open its control socket sees it.

    Args:
        path: its control socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, command: str, **options: Any) -> Iterator[Raw]:
        """Give a command; yield the objects that it answers with, as their text.

        Args:
            command: name of the command; `harpcaller.api.control_server` lists them.
            options: what goes with it; those that are None are left out.

        Raises:
            NotRunning: there is no daemon.
            ControlError: it refused, failed, or ended before its answer was whole.
        """
        with self._connect() as connection:
            yield from self._converse(connection, command, options)

    def is_running(self) -> bool:
        """Whether it answers. Raises `ControlError` when it is there and does not."""
        try:
            with self._connect() as connection:
                connection.settimeout(_PATIENCE)
                for _ in self._converse(connection, "status", {}):
                    pass
        except NotRunning:
            return False
        return True

    def wait_running(self, timeout: float | None) -> bool:
        """Wait until it runs, at most `timeout` seconds if that is not None; return whether it does."""
        last = None if timeout is None else time.monotonic() + timeout
        while not self.is_running():
            if last is not None and time.monotonic() >= last:
                return False
            time.sleep(_PAUSE)
        return True

    def stop(self, timeout: float | None) -> int:
        """Stop it, and wait until its process is gone.

        Args:
            timeout: seconds to wait at most, None: as long as it takes.

        Returns:
            The id that the process had.

        Raises:
            NotRunning: there is no daemon.
            ControlError: it did not answer, or is still there after `timeout` seconds.
        """
        with self._connect() as connection:
            pid = _peer(connection)
            try:
                process = os.pidfd_open(pid)
            except OSError as error:
                raise ControlError(f"process {pid} can't be watched: {error.strerror}") from error
            try:
                connection.settimeout(_PATIENCE if timeout is None else max(timeout, _PAUSE))
                for _ in self._converse(connection, "stop", {}):
                    pass
                gone, _, _ = select.select([process], [], [], timeout)
            finally:
                os.close(process)
        if not gone:
            raise ControlError(f"process {pid} is still stopping after {timeout:g} s")
        return pid

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

    def _converse(self, connection: socket.socket, command: str, options: dict[str, Any]) -> Iterator[Raw]:
        given = {name: option for name, option in options.items() if option is not None}
        try:
            connection.sendall(dumps(Envelope(command=command, **given)) + b"\n")
            with connection.makefile("rb") as answer:
                for line in answer:
                    members = slice_text(line)
                    if "done" in members:
                        return
                    if "error" in members:
                        raise ControlError(str(members.value("error")))
                    yield members.payload("item")
        except TimeoutError as error:
            raise ControlError(f"harpcallerd does not answer on {self._path}") from error
        except (OSError, InvalidJSON, KeyError) as error:
            raise ControlError(f"control socket {self._path}: {error}") from error
        raise ControlError("harpcallerd ended before its answer was whole")


def _peer(connection: socket.socket) -> int:
    """The process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, _, _ = struct.unpack("3i", credentials)
    return int(pid)
