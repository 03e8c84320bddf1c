"""A real harpcallerd as a child process, with a directory, a port and a control socket of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from support.deadline import wait_until

DEADLINE = 60.0


class Harpcallerd:
    """A dispatcher on a free port of 127.0.0.1; a context manager that starts and stops it.

    Args:
        directory: where its files go.
        hosts: the ports of the hosts that it knows, by name.
        credentials: user and password for all of them.
        settings: keys of its configuration.
    """

    def __init__(
        self,
        directory: Path,
        hosts: Mapping[str, int] | None = None,
        credentials: tuple[str, str] = ("user", "password"),
        settings: Mapping[str, Any] | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.config_file = directory / "harpcaller.toml"
        self.hosts_file = directory / "hosts"
        self.log_file = directory / "harpcallerd.log"
        self.socket = directory / "control"
        self.store = directory / "store"
        #: 0 before the first start; a later start takes the same port.
        self.port = 0
        self._credentials = dict(zip(("user", "password"), credentials, strict=True))
        self._settings = dict(settings or {})
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.log_file.touch()
        self.write_hosts(hosts or {})

    def write_hosts(self, hosts: Mapping[str, int]) -> None:
        """Write the hosts file anew."""
        lines = [
            {"hostname": name, "address": "127.0.0.1", "port": port, "credentials": self._credentials}
            for name, port in hosts.items()
        ]
        self.hosts_file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write_config(self, **changes: Any) -> None:
        """Write the configuration file anew, with changes that stay."""
        self._settings |= changes
        settings = {
            "listen": [f"127.0.0.1:{self.port}"],
            "stream_directory": str(self.store),
            "host_db": str(self.directory / "hosts.db"),
            "hosts_file": str(self.hosts_file),
            "log_format": "json",
            **self._settings,
        }
        self.config_file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))

    def command(self, *arguments: str) -> list[str]:
        """The program's command line."""
        return [sys.executable, "-P", "-m", "harpcaller.cli", f"--socket={self.socket}", *arguments]

    def control(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the control program."""
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=DEADLINE, check=False)

    def start(self) -> Harpcallerd:
        """Start it and return once it serves."""
        assert self._process is None
        self.write_config()
        seen = len(self.events("harpcallerd is serving"))
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self.command("start", f"--config={self.config_file}", *self._arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(lambda: self._serves(seen), DEADLINE, "harpcallerd serving")
        except BaseException:
            self.kill()
            raise
        self.port = self.events("harpcallerd is serving")[-1]["port"]
        return self

    def _serves(self, seen: int) -> bool:
        assert self._process is not None
        status = self._process.poll()
        assert status is None, f"harpcallerd ended with {status} at its start:\n{self.log_file.read_text()}"
        return len(self.events("harpcallerd is serving")) > seen

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End it by SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> int:
        """End it by SIGTERM; return its exit status."""
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(DEADLINE)
        finally:
            self.kill()

    def restart(self) -> None:
        """Start it again, on the same port, after `kill` or `stop`."""
        self.start()

    def log_lines(self) -> list[str]:
        """All that it wrote to its log."""
        return self.log_file.read_text("utf-8", "replace").splitlines()

    def events(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of its log that have this name and these fields."""
        events = [json.loads(line) for line in self.log_lines() if re.match(r"\{.*\}$", line)]
        return [event for event in events if event["event"] == name and fields.items() <= event.items()]

    def __enter__(self) -> Harpcallerd:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._process is not None:
            status = self.stop()
            if kind is None:
                assert status == 0, f"harpcallerd ended with {status}:\n{self.log_file.read_text()}"
