"""The whole system: a real harpd, a real harpcallerd with it as host `web01`, and the client library."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harp
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd

DEADLINE = 60.0


@dataclass(frozen=True)
class System:
    """A running system."""

    harpd: Harpd
    dispatcher: Harpcallerd

    @property
    def rpc(self) -> harp.HarpCaller:
        """The client's view of the dispatcher. It keeps no connection, because nobody closes it."""
        return harp.HarpCaller("127.0.0.1", self.dispatcher.port, keep_alive=False)

    @property
    def server(self) -> harp.HarpServer:
        """The client's view of harpd. It keeps no connection, because nobody closes it."""
        harpd = self.harpd
        ca_file = str(harpd.ca_file)
        return harp.HarpServer("127.0.0.1", harpd.user, harpd.password, harpd.port, ca_file=ca_file, keep_alive=False)

    def transcript(self, line: bytes) -> list[bytes]:
        """Send a line to the dispatcher; return the received lines until it closes."""
        with socket.create_connection(("127.0.0.1", self.dispatcher.port), DEADLINE) as connection:
            connection.sendall(line)
            with connection.makefile("rb") as replies:
                return replies.readlines()

    def log_lines(self) -> list[str]:
        """Return all log lines of both daemons."""
        return [*self.harpd.log_lines(), *self.dispatcher.log_lines()]


@contextmanager
def running(
    directory: Path,
    procedures: str,
    harpd: Mapping[str, Any] | None = None,
    dispatcher: Mapping[str, Any] | None = None,
    names: tuple[str, ...] = ("web01",),
) -> Iterator[System]:
    """Run a system; stop it at the end, and check that no process remains.

    Args:
        directory: the directory of all files.
        procedures: the text of the procedures file.
        harpd: changes to harpd's configuration.
        dispatcher: changes to the dispatcher's configuration.
        names: the names of the harpd in the dispatcher's registry.
    """
    with Harpd(directory / "harpd", procedures, dict(harpd or {})) as one:
        settings = {"ca_file": str(one.ca_file), **(dispatcher or {})}
        credentials = (one.user, one.password)
        with Harpcallerd(
            directory / "harpcallerd", hosts=dict.fromkeys(names, one.port), credentials=credentials, settings=settings
        ) as other:
            yield System(one, other)
