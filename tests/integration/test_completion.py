"""Completion of command lines, in the real shells: what a person types, and what the shell makes of it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import harp
from support.harpcallerd import Harpcallerd
from support.peers import Peer, PeerConnection
from support.terminal import Terminal

PROGRAM = "import sys; from harp.cli import main; sys.exit(main())"
COMPLETE = """
import json, sys
from harp.cli import main
for words in json.loads(sys.argv[2]):
    main(["complete-line", sys.argv[1], "--", *words])
    print("--")
"""

ACCESS = """
[[rule]]
who = ["anonymous@*"]
allow = ["call", "read", "list"]
jobs = "any"
"""

#: Names that would be commands, or more than one word, if a shell got them.
HOSTILE = ("web$(touch owned)", "web;touch owned", "web`touch owned`", "web two", "web\x1b[2J", "web\\", "web'")


@dataclass
class Shop:
    """A dispatcher with hosts and one job, and a directory with the program `harp`."""

    dispatcher: Harpcallerd
    job: str
    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HARP_")}
        return {
            **inherited,
            "PATH": f"{self.directory}:{os.environ['PATH']}",
            "HARP_DISPATCHER": f"127.0.0.1:{self.dispatcher.port}",
            "HOME": str(self.directory),
            "XDG_CONFIG_HOME": str(self.directory.parent / "config"),
            "XDG_DATA_HOME": str(self.directory.parent / "data"),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "LC_ALL": "C.UTF-8",
        }

    def complete(self, *lines: str, shell: str = "zsh", **more: str) -> list[list[str]]:
        """Return the completions of each line, which ends at the cursor; all of one process."""
        words = [line.split(" ") for line in lines]
        command = [sys.executable, "-c", COMPLETE, shell, json.dumps(words)]
        environment = {**self.environment, **more}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert done.stderr == ""
        return [part.splitlines() for part in done.stdout.split("--\n")[:-1]]

    def complete_words(self, *lines: str) -> dict[str, list[str]]:
        """Return the completions of each line, without the descriptions."""
        found = self.complete(*lines)
        return {line: [each.partition("\t")[0] for each in part] for line, part in zip(lines, found, strict=True)}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    directory = tmp_path_factory.mktemp("completion")
    (directory / "access.toml").write_text(ACCESS)
    program = directory / "bin" / "harp"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{PROGRAM}" "$@"\n')
    program.chmod(0o755)
    settings = {"access_file": str(directory / "access.toml"), "start_within": 0}
    hosts = dict.fromkeys(("web01", "web02", "db01", *HOSTILE), 1)
    with Harpcallerd(directory / "harpcallerd", hosts=hosts, settings=settings) as dispatcher:
        job = harp.HarpCaller("127.0.0.1", dispatcher.port, keep_alive=False).web01.backup()
        job.result(wait=True)
        yield Shop(dispatcher, job.id(), program.parent)


def test_commands_options_and_values_are_completed(shop: Shop) -> None:
    expected = {
        "co": ["completion"],
        "completion ": ["bash", "zsh", "fish"],
        "completion bash ": [],
        "jobs --form": ["--format"],
        "jobs --format ": ["table", "json", "lines"],
        "jobs --columns job,st": ["job,state", "job,started", "job,stop"],
        "jobs --count o": ["owner"],
        "--ca-file ": [":files"],
        "--dispatcher x stat": ["status"],
        "nonsense ": [],
    }
    assert shop.complete_words(*expected) == expected
    ((help,),) = shop.complete("why")
    assert help.startswith("why\texplain in one sentence")


def test_jobs_and_hosts_are_completed_from_the_dispatcher(shop: Shop) -> None:
    expected = {
        f"cancel --wait {shop.job[:10]}": [shop.job],
        f"show {shop.job[:3]}": [shop.job],
        "why ffffffff-ffff": [],
        "call web": ["web01", "web02"],
        "call --wait d": ["db01"],
        "call web01 ": [],  # procedures are not known
        "hosts ": ["db01", "web01", "web02"],
    }
    assert shop.complete_words(*expected) == expected
    ((found,),) = shop.complete("why ")
    assert found.startswith(f"{shop.job}\tfailed backup on web01, ")


def test_filters_are_completed(shop: Shop) -> None:
    expected = {
        "jobs sta": ["state:", "started_from:", "started_to:"],
        "jobs backup state:fa": ["state:failed"],
        "jobs state:queued,fa": ["state:queued,failed"],
        "jobs host:db": ["host:db01"],
        "jobs procedure:": ["procedure:backup"],
    }
    assert shop.complete_words(*expected) == expected
    assert shop.complete("jobs state:fa", shell="bash") == [["failed"]]  # bash replaces what is after the colon


def test_contexts_are_completed(shop: Shop) -> None:
    file = shop.directory.parent / "config" / "harp" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text('[contexts.prod]\ndispatcher = "h"\n[contexts.test]\ndispatcher = "h"\n')
    try:
        found = shop.complete_words("--context p")
    finally:
        shutil.rmtree(file.parent)
    assert found == {"--context p": ["prod"]}


def test_silent_dispatcher_is_not_waited_for(shop: Shop) -> None:
    def silent(conn: PeerConnection) -> None:
        conn.expect()
        conn.until_closed()

    with Peer(silent) as peer:
        assert shop.complete("why ", HARP_DISPATCHER=f"{peer.host}:{peer.port}") == [[]]
        assert peer.connections[0].closed.wait(60)
    assert shop.complete("why ", "call ", HARP_DISPATCHER="127.0.0.1:1") == [[], []]
    assert shop.complete("why ", "jobs host:", HARP_DISPATCHER="") == [[], []]


STARTS = {
    "bash": (["--norc", "--noprofile", "-i"], "PS1='> '; eval \"$(harp completion bash)\"; echo rea''dy\n"),
    "zsh": (
        ["-f", "-i"],
        "PS1='> '; autoload -U compinit; compinit -u -D; eval \"$(harp completion zsh)\"; echo rea''dy\n",
    ),
    "fish": (["-i"], "harp completion fish | source; echo rea''dy\n"),
}


@pytest.fixture(params=list(STARTS))
def shell(request: pytest.FixtureRequest, shop: Shop) -> Iterator[Terminal]:
    program = shutil.which(request.param)
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    options, start = STARTS[request.param]
    with Terminal([program, *options], shop.environment, columns=200) as terminal:
        terminal.press(start)
        terminal.read_until("ready")
        yield terminal


def test_shell_completes_a_job_and_runs_the_command(shell: Terminal, shop: Shop) -> None:
    shell.press(f"harp why {shop.job[:12]}\t")
    shell.read_until(shop.job)
    shell.press("\n")
    shell.read_until("it failed after")


def test_shell_completes_a_filter_with_a_colon(shell: Terminal, shop: Shop) -> None:
    shell.press("harp jobs state:fai\t")
    shell.read_until("state:failed")
    shell.press(" --format lines\n")
    shell.read_until(f'"job": "{shop.job}"')


def test_shell_offers_hosts_but_no_hostile_names(shell: Terminal, shop: Shop) -> None:
    shell.press("harp call web\t\t\t")
    text = shell.read_until("web02")
    assert "web01" in text
    assert "touch" not in text
    assert "\x1b[2J" not in shell.printed[-2000:]
    assert not list(shop.directory.rglob("owned"))
