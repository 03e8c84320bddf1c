"""OpenSSH: a remote command with JSON in its arguments and in its output. Multiplexed: each client has a connection."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.load import SETTINGS, calls


def _connect() -> Callable[[Any], Any]:
    command = ["ssh", *SETTINGS["options"]]
    if SETTINGS["multiplexed"]:
        path = f"ControlPath={SETTINGS['directory']}/{os.getpid()}"
        command[1:1] = ["-o", "ControlMaster=auto", "-o", path, "-o", "ControlPersist=30"]

    def call(value: Any) -> Any:
        # On the command line: data on stdin would wait 40 ms for an acknowledgement of TCP.
        remote = f"echo {shlex.quote(json.dumps(value))}"
        # stderr is not a pipe: the process of the shared connection would keep it open.
        done = subprocess.run([*command, remote], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    return call


FUNCTIONS = dict.fromkeys(("fresh", "kept"), partial(calls, _connect))
