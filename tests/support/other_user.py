"""Run a program as another user."""

from __future__ import annotations

import sys
from pathlib import Path

_SOURCE = Path(__file__).parents[2] / "src"


def as_user(user: int) -> list[str]:
    """Return a command prefix that runs a command as this user, who may read every file, for example this Python."""
    reading = "+dac_read_search"
    ids = ["--reuid", str(user), "--regid", str(user), "--clear-groups"]
    return ["setpriv", *ids, "--inh-caps", reading, "--ambient-caps", reading]


def without_rights(user: int, program: str, *arguments: object) -> list[str]:
    """Return a command that runs a Python program as this user, without capabilities.

    The program can use the modules `os`, `socket`, `fcntl` and `sys`: the user may be unable to read files of Python.
    """
    begin = (
        f"import encodings.idna, fcntl, os, socket, sys\nsys.path.insert(0, {str(_SOURCE)!r})\n"
        f"from harpd.processes.capabilities import become_unprivileged\nbecome_unprivileged({user}, {user})\n"
    )
    return [sys.executable, "-c", begin + program, *map(str, arguments)]
