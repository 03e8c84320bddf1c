"""The README's first examples: the demo runs to its end, and the synopses run on a real system as documented."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.deadline import wait_until
from support.harpd import is_dead
from support.system import System, running

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, "-P", "-u", str(ROOT / "examples" / "demo.py")]

EXPECTED = [
    r'\{"number": 0, "time": \d+\}',
    r"RemoteError\('timeout', 'maximum execution time",
    r"'values': \['bar', 'baz'\]",
    r'log message: "minute 0: all is well"',
    r'^\{"messages": 10\}$',
    r"^job 4: started at \d+ s",
    r"^ *\d+\.\d s  record 4: ",
    r"^ZeroDivisionError: division by zero",
    r"^RemoteError\('timeout', 'the procedure took more than its limit of 1 s'",
    r"^cancelled: True$",
    r"^Both daemons have stopped",
]


@pytest.fixture
def environment() -> dict[str, str]:
    programs = Path(sys.executable).parent
    return {"PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT / "examples"), "PYTHONWARNINGS": "error"}


def test_demo_runs_to_its_end_and_exits_with_0(environment: dict[str, str]) -> None:
    done = subprocess.run(DEMO, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for pattern in EXPECTED:
        assert re.search(pattern, done.stdout, re.MULTILINE), f"{pattern} is missing in:\n{done.stdout}"


def test_demo_with_keep_has_a_failed_backup_with_its_records_and_cause(environment: dict[str, str]) -> None:
    """The printed commands work in the order in which they are printed, in one shell."""
    with subprocess.Popen([*DEMO, "--keep"], env=environment, stdout=subprocess.PIPE, text=True) as demo:
        try:
            assert demo.stdout is not None
            printed = "".join(iter(demo.stdout.readline, "Ctrl-C here stops both and removes the directory.\n"))
            exports, commands = commands_of(printed)
            outputs = {}
            for command in commands:
                script = f"{exports}{command}"
                answer = subprocess.run(
                    ["sh", "-euc", script], env=environment, capture_output=True, text=True, timeout=60, check=False
                )
                assert answer.returncode == 0, (command, answer.stderr)
                outputs[command] = answer.stdout
            assert outputs["harp jobs"].count('"state": "returned"') >= 3
            assert [row_of(line) for line in outputs["harp jobs backup"].splitlines()] == rows_of_the_readme()
            page = json.loads(outputs["harp show backup state:bad"])
            assert page["host"] == "db02"
            assert page["end"]["exception"]["type"] == "DatabaseError"
            assert "malformed" in page["end"]["exception"]["message"]
            assert page["recent_records"][-1]["data"] == {"table": "invoices", "state": "reading"}
            info = json.dumps(page)
            assert "reading table invoices" in info, "the last lines of stderr"
            assert "Traceback" in info
            assert outputs["harp hosts"].count('"up"') == 4
            assert '"total"' in outputs["harp call --wait db01 disk_usage /"]
            [status] = [output for command, output in outputs.items() if command.endswith(" status")]
            assert "logs_in_next_minutes" in status
            directory = re.search(r"unix:(\S+)/calls", printed)
            assert directory is not None
            assert '"db02"' in Path(directory[1], "audit.jsonl").read_text()
            link = re.search(r"^ +(http://127\.0\.0\.1:\d+/login)#k=\S{40,}$", printed, re.MULTILINE)
            assert link is not None
            with urllib.request.urlopen(link[1], timeout=60) as response:
                assert b"<html" in response.read()
            family = psutil.Process(demo.pid).children(recursive=True)
            assert len(family) >= 4
        finally:
            demo.send_signal(signal.SIGINT)
            assert demo.wait(60) == 0
        assert "Both daemons have stopped." in demo.stdout.read()
        wait_until(lambda: all(is_dead(member.pid) for member in family), 60, "the end of the demo's processes")


def row_of(line: str) -> tuple[str, ...]:
    """Return state, host, procedure and end of a job, as a table shows them."""
    job = json.loads(line)
    end = f"{job['end_type']}: {job['end_message']}" if job["end_type"] else ""
    return job["state"], job["host"], job["procedure"], end


def rows_of_the_readme() -> list[tuple[str, ...]]:
    """Return the same of the example in the README."""
    part = (ROOT / "README.md").read_text().partition("\n    $ harp jobs backup\n")[2].partition("\n\n")[0]
    rows = [line.split(maxsplit=6) for line in part.splitlines()[1:]]
    return [(state, host, procedure, *(end or [""])) for _, state, host, procedure, _, _, *end in rows]


def commands_of(printed: str) -> tuple[str, list[str]]:
    """Return the exports and the commands of harp and harpd that the demo prints; they run in this environment."""
    lines = re.findall(r"^   (\w.*)$", printed.replace("./dev run ", ""), re.MULTILINE)
    exports = "".join(f"{line}\n" for line in lines if line.startswith("export "))
    return exports, [line for line in lines if line.startswith(("harp", "TOKEN="))]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    procedures = (ROOT / "examples" / "procedures.py").read_text()
    with running(tmp_path_factory.mktemp("synopses"), procedures, names=("localhost",)) as system:
        yield system


def synopsis(title: str) -> str:
    page = (ROOT / "docs" / "client-api.md").read_text()
    found = re.search(rf"^### {title}\n+```python\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def output_of(program: str) -> list[str]:
    with redirect_stdout(StringIO()) as output:
        exec(program, {})
    return output.getvalue().splitlines()


def test_synopsis_with_dispatcher_runs_as_documented(system: System) -> None:
    """Only the port is changed, and the limit, so that the test does not take 15 seconds."""
    program = synopsis("With a dispatcher")
    program = program.replace('HarpCaller("localhost"', f'HarpCaller("localhost", {system.dispatcher.port}')
    begin = time.time()
    *records, job_id, result, state = output_of(program.replace("max_exec_time=15", "max_exec_time=3"))
    assert 1 <= len(records) <= 4
    assert records[0].startswith('{"number": 0, "time": ')
    assert re.fullmatch(r"[0-9a-f-]{36}", job_id)
    assert "maximum execution time" in result
    assert state.startswith("failed: invalid_jobid")
    job = system.rpc.job(job_id)
    assert begin - 1 <= job.submit_time() <= (job.start_time() or 0) <= (job.end_time() or 0) <= time.time()


def test_synopsis_with_harpd_runs_as_documented(system: System) -> None:
    program = synopsis("With a harpd").replace('"localhost"', f'"localhost", port={system.harpd.port}')
    program = program.replace('"username"', repr(system.harpd.user)).replace('"secret"', repr(system.harpd.password))
    now, *messages, result = output_of(program)
    assert abs(int(now) - time.time()) < 60
    assert messages == [f'log message: "minute {minute}: all is well"' for minute in range(10)]
    assert result == '{"messages": 10}'


def test_synopsis_with_asyncio_runs_as_documented(system: System) -> None:
    program = synopsis("With asyncio").replace('"localhost"', f'"localhost", {system.dispatcher.port}')
    program = program.replace("stream_infinity()", "count(3, 0)")
    body = textwrap.indent(program, "    ")
    namespace: dict[str, object] = {}
    exec(f"import asyncio\nasync def main():\n{body}", namespace)
    with redirect_stdout(StringIO()) as output:
        asyncio.run(namespace["main"]())  # type: ignore[operator]
    lines = output.getvalue().splitlines()
    assert lines[:3] == ["{'number': 0}", "{'number': 1}", "{'number': 2}"]
    assert lines[3:] in (["{'numbers': 3}"], ["<CallNotFinished>"])


def test_web_application_example_runs_as_documented(system: System, environment: dict[str, str]) -> None:
    command = [sys.executable, "-P", str(ROOT / "examples" / "webapp.py"), "--port=0"]
    dispatcher = f"--dispatcher=localhost:{system.dispatcher.port}"
    with subprocess.Popen([*command, dispatcher], env=environment, stdout=subprocess.PIPE, text=True) as application:
        try:
            assert application.stdout is not None
            address = application.stdout.readline().strip().rstrip("/")
            submitted = _curl(address + "/disk-usage/localhost", "POST")
            page = f"{address}/jobs/{submitted['job']}"
            wait_until(lambda: _curl(page)["state"] == "done", 60, "the job's end in the web application")
            assert _curl(page)["result"]["path"] == "/"
        finally:
            application.terminate()


def _curl(address: str, method: str = "GET") -> dict[str, Any]:
    with urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=60) as answer:
        body: dict[str, Any] = json.load(answer)
        return body
