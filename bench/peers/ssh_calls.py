"""OpenSSH: a command on the other side, JSON in its arguments, JSON out.

Multiplexed: over a connection that each client keeps.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.load import calls
from bench.peers import SETTINGS


def _fresh() -> Callable[[Any], Any]:
    command = ["ssh", *SETTINGS["options"]]
    if SETTINGS["multiplexed"]:
        path = f"ControlPath={SETTINGS['directory']}/{os.getpid()}"
        command[1:1] = ["-o", "ControlMaster=auto", "-o", path, "-o", "ControlPersist=30"]

    def call(value: Any) -> Any:
        # Arguments on the command line: what is sent on stdin waits 40 ms for an acknowledgement of TCP.
        remote = f"echo {shlex.quote(json.dumps(value))}"
        # The connection that stays is a process that keeps stderr open: nothing may wait for that to close.
        done = subprocess.run([*command, remote], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    return call


WORKS = {"fresh": partial(calls, _fresh)}
