"""Control characters in all texts that clients and hosts choose: no command of ours prints one on a terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.peers import PeerConnection
from support.resumable_host import EXIT_INFO, acknowledgement, playing

#: Commands for a terminal, control characters of both ranges, and characters that change the direction of text.
ODD = "\x1b]0;title\x07\x1b[2J\x9b2J\x00\x08\r\x7f\u202e\u2066\u200f"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
HOST = f"h{ODD}"


def host(conn: PeerConnection) -> None:
    """Play a host whose calls raise; the last one waits."""
    with suppress(OSError, AssertionError):
        request = conn.expect()
        if "calls" in request:
            conn.reply({"harp": 1, "calls": [], "instance": "w1"})
            return
        conn.reply(acknowledgement(stream=True))
        lines: list[Any] = [{"stream": ODD}, {"stream": {ODD: [ODD]}}]
        if request["arguments"] != ["wait"]:
            end = {"type": f"T{ODD}", "message": f"m{ODD}\n{ODD}", "data": {ODD: ODD}}
            lines += [EXIT_INFO, {"exception": end}]
        conn.send(*(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
        conn.until_closed()


def test_commands_print_no_control_character(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HARP_")}
    environment |= {"PYTHONIOENCODING": "utf-8", "COLUMNS": "400"}
    (tmp_path / "access.toml").write_text(
        '[[rule]]\nwho = ["anonymous@*"]\nallow = ["call", "read", "cancel", "list"]\njobs = "any"\n'
    )
    call: dict[str, Any] = {"host": HOST, "procedure": f"p{ODD}", "arguments": [ODD], "info": {ODD: ODD}}
    queue = {"queue": {"name": {ODD: ODD}}}
    with playing(tmp_path, always=host) as peer:
        settings = {"audit_file": str(tmp_path / "audit.jsonl"), "access_file": str(tmp_path / "access.toml")}
        with Harpcallerd(tmp_path / "dispatcher", {HOST: peer.port}, settings=settings) as dispatcher:

            def submit(**members: Any) -> str:
                with dispatcher.connect() as client:  # only the controls below 0x20 must be escaped in JSON
                    client.send(json.dumps({"harpcaller": 1, **call, **members}, ensure_ascii=False).encode() + b"\n")
                    return str(json.loads(client.line())["job_id"])

            environment["HARP_DISPATCHER"] = f"127.0.0.1:{dispatcher.port}"
            ended = submit()
            assert "exception" in dispatcher.ask(get_result=ended)[0]
            unknown = submit(host=f"unknown{ODD}")
            assert "error" in dispatcher.ask(get_result=unknown)[0]
            running = submit(arguments=["wait"], **queue)
            waiting = submit(**queue)
            wait_until(lambda: dispatcher.ask(read_stream=running)[:1] != [], what="records")
            harp = [sys.executable, "-c", "import sys; from harp.cli import main; sys.exit(main())"]
            jobs, forms = (ended, unknown, running, waiting), ("table", "json")
            config = f"--config={dispatcher.config_file}"
            commands = [
                *([*harp, name, job] for name in ("status", "details", "why") for job in jobs),
                *([*harp, "show", "--format", form, job] for form in forms for job in jobs),
                *([*harp, "result", job] for job in (ended, unknown)),
                *([*harp, "read", ended, *options] for options in ([], ["--numbered"], ["--timed"])),
                [*harp, "follow", "--since", "0", ended],
                *([*harp, "jobs", "--count", by] for by in ("host", "procedure")),
                *(
                    [*harp, name, "--format", form]
                    for name in ("jobs", "hosts", "queues")
                    for form in ("table", "json")
                ),
                [*harp, "jobs", "--format", "table", "--columns", "job,host,procedure,queue,info,end"],
                [*harp, "call", "--wait", f"x{ODD}", "p"],
                [*harp, "cancel", waiting],
                dispatcher.command("list", "--all", "--queue"),
                *(dispatcher.command("info", *full, job) for full in ([], ["--full"]) for job in (ended, running)),
                *(dispatcher.command("audit", name, config) for name in ("tail", "search")),
            ]
            odd = 0
            for command in commands:
                arguments = [part.replace("\x00", "") for part in command]
                done = subprocess.run(arguments, env=environment, capture_output=True, timeout=60, check=False)
                output = (done.stdout + done.stderr).decode()
                found = CONTROL.search(output)
                assert found is None, (command[3:], output)
                assert "Traceback" not in output, (command[3:], output)
                odd += "\\u001b" in output
            assert odd == len(commands) - 1, "all but `cancel` print them, escaped"
            dispatcher.ask(cancel=running)
            assert dispatcher.ask(get_result=ended)[0]["exception"]["type"] == f"T{ODD}", "data are not changed"
