"""A stand-in for `systemctl` where systemd does not run: it starts, reloads and stops HARP's units.

A program: `systemctl.py [--root DIRECTORY] [--same-user] ACTION UNIT...`; ACTION is `enable --now`, `disable --now`,
`start`, `restart`, `reload` or `stop`.

It implements the part of a service manager that HARP's units need: order, directories, user, environment, ExecStartPre,
readiness, ExecReload and KillSignal. It does not restart a service, and it does not confine one (ProtectSystem= and
others). The caller ends the services: by `stop`, or with their process namespace.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

#: Seconds for a service to become ready, or to end.
DEADLINE = 60.0
#: Seconds between two checks of a process.
_PAUSE = 0.05

#: Keys that are implemented here.
_DONE = {
    *("After", "Before", "Wants", "WantedBy", "Type", "ExecStartPre", "ExecStart", "ExecReload", "KillSignal", "User"),
    *("RuntimeDirectory", "RuntimeDirectoryMode", "StateDirectory", "StateDirectoryMode"),
}
#: Keys that make no difference here.
_IGNORED = {
    *(
        "Description",
        "NotifyAccess",
        "RestartKillSignal",
        "StartLimitIntervalSec",
        "KillMode",
        "Delegate",
        "DelegateSubgroup",
        "TimeoutStopSec",
        "Restart",
    ),
    *("RestartSec", "RuntimeDirectoryPreserve", "NoNewPrivileges", "ProtectSystem", "ProtectHome", "PrivateTmp"),
    *("CapabilityBoundingSet", "AmbientCapabilities", "PrivateDevices", "PrivateMounts", "PrivateIPC"),
    *("ProtectClock", "ProtectControlGroups", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules"),
    *("ProtectKernelTunables", "ProtectProc", "ProcSubset", "RestrictAddressFamilies", "RestrictNamespaces"),
    *("RestrictRealtime", "RestrictSUIDSGID", "LockPersonality", "KeyringMode", "SystemCallArchitectures"),
    *("SystemCallErrorNumber", "SystemCallFilter", "UMask", "MemoryDenyWriteExecute"),
}


@dataclass
class Unit:
    """A unit file."""

    name: str
    values: dict[str, list[str]] = field(default_factory=dict)

    def words(self, key: str) -> list[str]:
        """Return all words of the key's values."""
        return [word for value in self.values.get(key, []) for word in value.split()]

    def one(self, key: str, default: str = "") -> str:
        """Return the key's last value."""
        return self.values.get(key, [default])[-1]


class Manager:
    """Starts and stops units.

    Args:
        root: the directory with `etc`, `run` and `var`.
        same_user: run services as the user of this process; otherwise as `User=`.
    """

    def __init__(self, root: Path, same_user: bool) -> None:
        self._root = root
        self._same_user = same_user
        self._state = root / "run" / "units"
        self._state.mkdir(parents=True, exist_ok=True)

    def units(self, names: list[str]) -> list[Unit]:
        """Return the units and the units of their `Wants`, in the order of their start."""
        loaded: dict[str, Unit] = {}
        missing = [f"{name.removesuffix('.service')}.service" for name in names]
        while missing:
            name = missing.pop()
            loaded[name] = unit = self._load(name)
            missing += [w for w in unit.words("Wants") if w not in loaded and self._file(w).exists()]
        order = TopologicalSorter({name: set(unit.words("After")) & loaded.keys() for name, unit in loaded.items()})
        for name, unit in loaded.items():
            for later in set(unit.words("Before")) & loaded.keys():
                order.add(later, name)
        return [loaded[name] for name in order.static_order()]

    def _file(self, name: str) -> Path:
        return self._root / "etc/systemd/system" / name

    def _load(self, name: str) -> Unit:
        unit = Unit(name)
        for line in self._file(name).read_text().splitlines():
            if not line or line.startswith(("#", ";", "[")):
                continue
            key, _, value = line.partition("=")
            if key not in _DONE | _IGNORED:
                sys.exit(f"systemctl: {name}: {key}: unknown key")
            unit.values.setdefault(key, []).append(value)
        if unit.one("Type") != "notify" or len(unit.values.get("ExecStart", [])) != 1:
            sys.exit(f"systemctl: {name}: expected Type=notify and one ExecStart")
        return unit

    def start(self, unit: Unit) -> None:
        """Start a unit, unless it runs; return once it is ready."""
        if self._pid(unit) is not None:
            return
        how = self._surroundings(unit)
        log = self._state / f"{unit.name}.log"
        with log.open("ab") as output:
            how |= {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "cwd": "/"}
            for command in unit.values.get("ExecStartPre", []):
                status = subprocess.run(shlex.split(command.lstrip("-+")), **how, check=False).returncode
                if status and not command.startswith("-"):
                    sys.exit(f"systemctl: {unit.name}: {command}: exit status {status}\n{log.read_text()}")
            ready = self._state / f"{unit.name}.ready"
            ready.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.bind(str(ready))
                ready.chmod(0o666)
                channel.settimeout(_PAUSE)
                how["env"]["NOTIFY_SOCKET"] = str(ready)
                process = subprocess.Popen(shlex.split(unit.one("ExecStart")), **how, start_new_session=True)
                (self._state / f"{unit.name}.pid").write_text(str(process.pid))
                last = time.monotonic() + DEADLINE
                while process.poll() is None and time.monotonic() < last:
                    try:
                        if b"READY=1" in channel.recv(4096).split(b"\n"):
                            return
                    except TimeoutError:
                        continue
        process.kill()
        sys.exit(f"systemctl: {unit.name}: did not become ready, exit status {process.wait()}\n{log.read_text()}")

    def _surroundings(self, unit: Unit) -> dict[str, Any]:
        """Make the unit's directories; return its user and environment, as `subprocess.Popen` takes them."""
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        how: dict[str, Any] = {"env": environment}
        user = unit.one("User")
        if user and not self._same_user:
            account = pwd.getpwnam(user)
            how |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            environment |= {"USER": user, "LOGNAME": user, "HOME": account.pw_dir}
        for key, place in (("RuntimeDirectory", "run"), ("StateDirectory", "var/lib")):
            for name in unit.words(key):
                directory = self._root / place / name
                directory.mkdir(parents=True, exist_ok=True)
                directory.chmod(int(unit.one(f"{key}Mode", "0755"), 8))
                os.chown(directory, how.get("user", -1), how.get("group", -1))
        return how

    def reload(self, unit: Unit) -> None:
        """Run the unit's ExecReload."""
        pid = self._pid(unit)
        if pid is None:
            sys.exit(f"systemctl: {unit.name}: not running")
        subprocess.run(shlex.split(unit.one("ExecReload").replace("$MAINPID", str(pid))), check=True)

    def stop(self, unit: Unit, number: str = "") -> None:
        """Stop a unit, by another signal than its own on request; return once its main process has ended."""
        pid = self._pid(unit)
        if pid is None:
            return
        os.kill(pid, signal.Signals[number or unit.one("KillSignal", "SIGTERM")])
        last = time.monotonic() + DEADLINE
        while self._pid(unit) is not None:
            if time.monotonic() > last:
                sys.exit(f"systemctl: {unit.name}: did not end within {DEADLINE:g} s")
            time.sleep(_PAUSE)

    def _pid(self, unit: Unit) -> int | None:
        """Return the unit's main process; None: it does not run."""
        try:
            pid = int((self._state / f"{unit.name}.pid").read_text())
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if state in "ZX" else pid


def main() -> None:
    """Run the command line."""
    command = argparse.ArgumentParser()
    command.add_argument("--root", type=Path, default=Path("/"))
    command.add_argument("--same-user", action="store_true")
    actions = command.add_subparsers(dest="action", required=True)
    for action in ("enable", "disable", "start", "restart", "reload", "stop"):
        adding = actions.add_parser(action)
        adding.add_argument("units", nargs="+")
        if action.endswith("able"):
            adding.add_argument("--now", action="store_true", required=True)
    parsed = command.parse_args()
    manager = Manager(parsed.root, parsed.same_user)
    units = manager.units(parsed.units)
    named = {f"{name.removesuffix('.service')}.service" for name in parsed.units}
    match parsed.action:
        case "enable":
            for unit in units:
                if not unit.words("WantedBy"):
                    sys.exit(f"systemctl: {unit.name}: no WantedBy=, it cannot be enabled")
                manager.start(unit)
        case "start":
            for unit in units:
                manager.start(unit)
        case "restart":
            for unit in units:
                if unit.name in named:
                    manager.stop(unit, unit.one("RestartKillSignal"))
                    manager.start(unit)
        case "reload":
            for unit in units:
                if unit.name in named:
                    manager.reload(unit)
        case "stop" | "disable":
            for name in parsed.units:  # systemd begins with the first one, whatever Before= says
                [unit] = (unit for unit in units if unit.name == f"{name.removesuffix('.service')}.service")
                manager.stop(unit)


if __name__ == "__main__":
    main()
