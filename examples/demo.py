"""The whole system on one machine, explained as it runs: `./dev demo`, `./dev demo --keep`.

It creates a private directory with a certificate authority and starts harpd and harpcallerd on free ports of
127.0.0.1. Then it runs the tour in tour.py, shows the Python code of each step, and stops the daemons. With --keep
it runs some jobs in place of the tour, one of them a backup that fails, and the daemons stay until Ctrl-C.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import tour

import harp

HERE = Path(__file__).parent
USER, PASSWORD = "demo", "only for this demo"
DATABASES = {"db01": "orders", "db02": "customers", "db03": "articles"}  # by host
DAMAGED = "customers"
HOSTS = ("localhost", *DATABASES)  # all are the same harpd
START_DEADLINE = 60.0  # seconds
STOP_DEADLINE = 30.0

HARPD_CONF = """\
network:
  address: 127.0.0.1
  port: 0
  certfile: {directory}/localhost.pem
  keyfile: {directory}/localhost.key
authentication:
  module: harpd.auth.inconfig
  users:
    {user}: "plain:{password}"
runtime_directory: {directory}/run
default_user: {default_user}
exit_info: {{stderr: true, traceback: true}}   # the tabs Process and Result of a job's page show them
strict_modes: false   # this copy of the project may belong to another user than the one who tries it
"""

HARPCALLER_TOML = """\
listen = ["127.0.0.1:0", {calls}]
tokens_file = {tokens_file}
audit_file = {audit_file}
http = {{listen = ["127.0.0.1:0"]}}
stream_directory = {stream_directory}
hosts_file = {hosts_file}
ca_file = {ca_file}
"""


class DemoError(Exception):
    """The demo cannot continue; the message has the reason and the log of the daemon."""


def make_certificates(directory: Path) -> None:
    """Create a certificate authority, and a certificate for the loopback names of this machine."""
    subprocess.run(["harp-cert", "ca", directory], check=True)
    subprocess.run(["harp-cert", "host", directory, "localhost", "127.0.0.1"], check=True)


@contextmanager
def daemon(log: Path, *command: str) -> Iterator[int]:
    """Run a daemon while the block runs; yield its port."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield port_of(process, log)
        process.send_signal(signal.SIGTERM)
        if code := process.wait(STOP_DEADLINE):
            raise DemoError(f"{command[0]} ended with exit code {code}; its log:\n{log.read_text()}")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_DEADLINE)


def port_of(process: subprocess.Popen[bytes], log: Path) -> int:
    """Wait until the daemon's log contains its port; return the port."""
    deadline = time.monotonic() + START_DEADLINE
    while time.monotonic() < deadline and process.poll() is None:
        if serving := re.search(r"is serving.* port=(\d+)", log.read_text()):
            return int(serving[1])
        time.sleep(0.02)
    raise DemoError(f"{process.args!r} does not serve; its log:\n{log.read_text()}")


@contextmanager
def system(directory: Path) -> Iterator[tuple[int, int]]:
    """Run both daemons while the block runs; yield the ports of harpcallerd and harpd."""
    make_certificates(directory)
    harpd_conf, toml = directory / "harpd.conf", directory / "harpcaller.toml"
    default_user = "nobody" if os.geteuid() == 0 else os.geteuid()  # only root can run calls as another user
    fields = {"directory": directory, "user": USER, "password": PASSWORD, "default_user": default_user}
    harpd_conf.write_text(HARPD_CONF.format(**fields))
    harpd_conf.chmod(0o600)
    with ExitStack() as running:
        harpd_port = running.enter_context(
            daemon(directory / "harpd.log", "harpd", f"--config={harpd_conf}", f"--procedures={HERE / 'procedures.py'}")
        )
        hosts = directory / "hosts.json"
        credentials = {"user": USER, "password": PASSWORD}
        host = {"address": "127.0.0.1", "port": harpd_port, "credentials": credentials}
        hosts.write_text("".join(json.dumps({"hostname": name, **host}) + "\n" for name in HOSTS))
        hosts.chmod(0o600)
        paths = {
            "calls": f"unix:{directory / 'calls'}",
            "stream_directory": directory / "jobs",
            "hosts_file": hosts,
            "tokens_file": directory / "tokens",
            "audit_file": directory / "audit.jsonl",
            "ca_file": directory / "ca.pem",
        }
        toml.write_text(HARPCALLER_TOML.format(**{key: json.dumps(str(path)) for key, path in paths.items()}))
        harpcallerd_port = running.enter_context(
            daemon(
                directory / "harpcallerd.log",
                "harpcallerd",
                f"--socket={directory / 'control'}",
                "start",
                f"--config={toml}",
            )
        )
        check_calls(harpcallerd_port, harpd_port, directory)
        yield harpcallerd_port, harpd_port


def check_calls(harpcallerd_port: int, harpd_port: int, directory: Path) -> None:
    """Make one direct call and one job, so that both daemons have served a request."""
    server = harp.HarpServer("localhost", USER, PASSWORD, harpd_port, ca_file=str(directory / "ca.pem"))
    server.current_time()
    harp.HarpCaller("localhost", harpcallerd_port).localhost.current_time().get()


def show_step(number: int, step: tour.Step, arguments: tour.System) -> None:
    """Print the title and the source code of a step, then run it."""
    title, _, explanation = (inspect.getdoc(step) or "").partition("\n")
    body = inspect.getsource(step).split('"""', 2)[2]
    print(f"\n\033[1m{number}. {title}\033[0m" if sys.stdout.isatty() else f"\n{number}. {title}")
    if explanation.strip():
        print(textwrap.indent(explanation.strip(), "   "))
    print(textwrap.indent(textwrap.dedent(body).strip("\n"), "   | ", lambda line: True))
    print()
    step(arguments)
    sys.stdout.flush()


INSTRUCTIONS = """
Both daemons keep running, and have run some jobs. The backup of db02 has failed: see its records and its cause.
This link opens the console in a browser, once within 5 minutes:

   {link}

In another terminal, from this directory:

   export HARP_DISPATCHER=unix:{directory}/calls
   ./dev run harp jobs
   ./dev run harp jobs backup
   ./dev run harp show backup state:bad
   ./dev run harp hosts
   ./dev run harp call --wait db01 disk_usage /
   ./dev run harp call --follow db01 count 5

No command lists the procedures of a host from afar; this one, on the host, prints them:

   ./dev run harpd --config={directory}/harpd.conf status

The dispatcher has its own commands. The first prints another link for a browser, the last a token for the HTTP API,
which {http}/docs describes:

   export CONTROL={directory}/control
   ./dev run harpcallerd --socket=$CONTROL web-login
   ./dev run harpcallerd --socket=$CONTROL list --all
   TOKEN=$(./dev run harpcallerd --socket=$CONTROL token add web --role=operator)
   curl -H "Authorization: Bearer $TOKEN" {http}/api/v1/jobs

From Python (./dev run python), through the dispatcher and without it:

   >>> import harp
   >>> rpc = harp.HarpCaller("unix:{directory}/calls")
   >>> rpc.db01.current_time().get()
   >>> server = harp.HarpServer("localhost", "{user}", "{password}", {harpd}, ca_file="{directory}/ca.pem")
   >>> server.current_time()

The logs are {directory}/harpd.log and {directory}/harpcallerd.log.
Ctrl-C here stops both and removes the directory."""


def make_databases(directory: Path) -> None:
    """Create the databases that the jobs back up, for the user of the calls. A page of one table is damaged."""
    for name in DATABASES.values():
        file = directory / f"{name}.sqlite"
        connection = sqlite3.connect(file)
        for table in ("accounts", "addresses", "invoices", "payments"):
            connection.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, text TEXT)")
            rows = [(None, f"{table} of {name}")] * 200
            connection.executemany(f"INSERT INTO {table} VALUES (?, ?)", rows)  # noqa: S608 - names from above
        connection.commit()
        [page] = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'invoices'").fetchone()
        [size] = connection.execute("PRAGMA page_size").fetchone()
        connection.close()
        if name == DAMAGED:
            with file.open("r+b") as damaged:
                damaged.seek((page - 1) * size)
                damaged.write(bytes(size))
    if os.geteuid() == 0:
        for path in (directory, *directory.iterdir()):
            shutil.chown(path, "nobody")


def submit_samples(harpcallerd_port: int, data: Path) -> None:
    """Run some jobs, of which three fail, so that lists have something to show."""
    rpc = harp.HarpCaller("localhost", harpcallerd_port)
    host = rpc.localhost
    jobs = [
        host(queue={"nightly": "reports"}).disk_usage("/"),
        host(queue=None, info={"ticket": 7}).count(5, 0),
        host(info=None).divide(1, 0),
        host.disk_usage("/no such directory"),
    ]
    for job in jobs:
        job.result(wait=True)
    make_databases(data)
    backups = [
        rpc.host(name, queue={"backup": name}, max_exec_time=500).backup(str(data / f"{database}.sqlite"))
        for name, database in DATABASES.items()
    ]
    for job in backups:
        job.result(wait=True)


def login_link(directory: Path) -> str:
    """Return a link that logs in to the console."""
    command = ["harpcallerd", f"--socket={directory / 'control'}", "web-login"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def wait_for_interrupt(directory: Path, harpcallerd_port: int, harpd_port: int) -> None:
    """Run the jobs, print how to use the daemons, then wait for Ctrl-C or SIGTERM."""
    stopped = threading.Event()
    with tempfile.TemporaryDirectory(prefix="harp-demo-data-") as data:
        submit_samples(harpcallerd_port, Path(data))
        link = login_link(directory)
        http = link.partition("/login")[0]
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: stopped.set())
        fields = {"directory": directory, "user": USER, "password": PASSWORD, "link": link, "http": http}
        print(INSTRUCTIONS.format(harpd=harpd_port, **fields), flush=True)
        stopped.wait()


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__)
    parser.add_argument(
        "--keep",
        action="store_true",
        help="no tour: run some jobs, print how to use the daemons, and keep them until Ctrl-C",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="harp-demo-") as name:
        directory = Path(name)
        print(f"Starting harpd and harpcallerd on 127.0.0.1, with all their files in {directory}")
        try:
            with system(directory) as (harpcallerd_port, harpd_port):
                if options.keep:
                    wait_for_interrupt(directory, harpcallerd_port, harpd_port)
                else:
                    arguments = tour.System(harpcallerd_port, harpd_port, USER, PASSWORD, str(directory / "ca.pem"))
                    for number, step in enumerate(tour.STEPS, 1):
                        show_step(number, step, arguments)
        except (DemoError, harp.HarpException) as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
    more = "Their directory is removed." if options.keep else "`./dev demo --keep` keeps them for your own experiments."
    print(f"\nBoth daemons have stopped. {more}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
