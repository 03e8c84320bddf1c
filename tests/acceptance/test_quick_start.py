"""The README's quick start, followed word by word: its commands are read from its text.

Two machines are made of namespaces, where that is permitted, with the README's addresses and system directories of
their own; the same is done in two directories of this machine on loopback, as any user. Differences from a
reader's machines:

- `apt-get` only checks that its packages are installed here. pip installs the project literally, but other
  packages from wheels that are made of the packages installed here: tests need no network.
- `systemctl` is `support/systemctl.py`, which runs the commands of the units: there is no systemd in a namespace.
- `editor` writes the password into the hosts file, as the text asks.

The quick start is installed literally, by pip on each machine, in its own test. The other pages begin after it: their
machines of namespaces get a copy of that installation, which has the same path there.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TypeAlias

import psutil
import pytest

from support.deadline import wait_until
from support.machines import (
    CommandFailed,
    LoopbackMachine,
    Machine,
    NamespaceMachine,
    join,
    missing_for_namespaces,
)
from support.quick_start import QuickStart, read_quick_start
from support.wheels import make_wheels

ROOT = Path(__file__).parents[2]
PASSWORD = secrets.token_urlsafe()
#: The step that makes certificates, which are then copied by hand.
CERTIFICATES = 2

Machines: TypeAlias = dict[str, Machine]


@pytest.fixture(scope="module")
def quick_start() -> QuickStart:
    return read_quick_start((ROOT / "README.md").read_text())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    wheels = tmp_path_factory.mktemp("wheels")
    make_wheels(ROOT, wheels)
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": wheels.as_uri(),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "TYPED_PASSWORD": PASSWORD,
    }


def free_port() -> int:
    """Return a free port outside the range from which the system assigns ports."""
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose path is short enough for Unix sockets below it."""
    with tempfile.TemporaryDirectory(prefix="harp-") as directory:
        yield Path(directory)


@pytest.fixture
def may_have_namespaces(directory: Path) -> None:
    (directory / "probe").mkdir()
    if missing := missing_for_namespaces(directory / "probe"):
        pytest.skip(f"machines of namespaces: {missing}; the quick start is followed on loopback only")


@pytest.fixture
def namespaces(
    quick_start: QuickStart, environment: dict[str, str], directory: Path, may_have_namespaces: None
) -> Iterator[Machines]:
    with ExitStack() as closing:
        dispatcher = closing.enter_context(NamespaceMachine("dispatcher", directory / "dispatcher", environment))
        server = closing.enter_context(NamespaceMachine(quick_start.server, directory / "server", environment))
        network = quick_start.address.rpartition(".")[0]
        join((dispatcher, f"{network}.1"), (server, quick_start.address))
        yield {machine.name: machine for machine in (dispatcher, server)}


@pytest.fixture
def without_namespaces(directory: Path) -> None:
    """Skip a test whose page is followed in namespaces."""
    (directory / "probe").mkdir()
    if not missing_for_namespaces(directory / "probe"):
        pytest.skip("the page is followed in namespaces")


@pytest.fixture
def loopback(quick_start: QuickStart, environment: dict[str, str], directory: Path) -> Iterator[Machines]:
    if shutil.which("openssl") is None:
        pytest.skip("the quick start needs openssl")
    replaced = {quick_start.address: "127.0.0.1", "4306": str(free_port()), "3502": str(free_port())}
    replaced["tls:*:"] = "tls:127.0.0.1:"
    with ExitStack() as closing:
        yield {
            name: closing.enter_context(LoopbackMachine(name, directory / name, environment, replaced))
            for name in ("dispatcher", quick_start.server)
        }


#: The directory that the first step makes, and its archive: of a machine of namespaces that has followed the step.
INSTALLED = "/opt/harp"
_archives: list[bytes] = []


def follow(quick_start: QuickStart, machines: Machines, literally: bool = False) -> str:
    """Follow the quick start; return the terminal's output of the last step.

    Args:
        quick_start: the quick start.
        machines: the machines.
        literally: run the commands of the installation, also where there is an archive of it.
    """
    shown = ""
    for number, step in enumerate(quick_start.steps, 1):
        for name in step.machines:
            if number == 1 and isinstance(machine := machines[name], NamespaceMachine):
                install(machine, step.commands, literally)
            else:
                shown = machines[name].run(*step.commands, answers={"Password: ": PASSWORD})
        if number == CERTIFICATES:
            copy_certificate(quick_start, machines)
    return shown


def install(machine: NamespaceMachine, commands: tuple[str, ...], literally: bool) -> None:
    """Follow the first step, or unpack its archive."""
    archive = f"{INSTALLED}.tar"
    if _archives and not literally:
        machine.write(archive, _archives[0], "0600")
        commands = (f"tar -xf {archive} -C /", *(one for one in commands if INSTALLED not in one))
    machine.run(*commands)
    if not _archives:
        machine.run(f"tar -cf {archive} -C / {INSTALLED.removeprefix('/')}")
        _archives.append(machine.read(archive))
    machine.run(f"rm -f {archive}")


def copy_certificate(quick_start: QuickStart, machines: Machines) -> None:
    copied = quick_start.copied
    for source, target in copied.files:
        machines[copied.target].write(target, machines["dispatcher"].read(source), copied.mode)


def check(quick_start: QuickStart, machines: Machines, shown: str) -> None:
    """Check the output of the last step; then renew the certificate as in step 2, and stop all services."""
    dispatcher, server = machines["dispatcher"], machines[quick_start.server]
    usage, job = (json.loads(line) for line in shown.splitlines())
    assert usage["path"] == "/"
    assert usage["total"] == shutil.disk_usage("/").total
    assert job["call"] == {"host": quick_start.server, "procedure": "disk_usage", "arguments": ["/"]}
    assert job["time"]["end"] is not None

    dispatcher.run(quick_start.renewal)
    copy_certificate(quick_start, machines)
    server.run(quick_start.reload)
    renewed = dispatcher.run(f"openssl x509 -noout -serial -in {quick_start.copied.files[0][0]}")
    served = f"openssl s_client -connect {quick_start.address}:4306 < /dev/null 2>&1 | openssl x509 -noout -serial"
    wait_until(lambda: dispatcher.run(served) == renewed, 60, "the renewed certificate")
    assert json.loads(dispatcher.run(*quick_start.steps[-1].commands[:2]))["path"] == "/"

    dispatcher.run("systemctl stop harpcallerd")
    stop_server(quick_start, machines)


def stop_server(quick_start: QuickStart, machines: Machines) -> None:
    """Stop harpd; the dispatcher was stopped before. Wait until no service is left."""
    machines[quick_start.server].run("systemctl stop harpd-supervisor harpd")
    for machine in machines.values():
        wait_until(partial(stopped, machine), 60, f"the end of all services of {machine.name}")


def stopped(machine: Machine) -> bool:
    return not running(machine, "/opt/harp/bin/")


def running(machine: Machine, program: str) -> list[psutil.Process]:
    """Return the machine's processes whose arguments contain a text."""
    found = []
    for process in machine.processes():
        with suppress(psutil.Error):
            if program in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.timeout(600)
def test_quick_start_in_namespaces(quick_start: QuickStart, namespaces: Machines) -> None:
    check(quick_start, namespaces, follow(quick_start, namespaces, literally=True))
    assert namespaces["dispatcher"].run("stat -c %U /var/lib/harpcaller") == "harpcaller\n"


@pytest.mark.usefixtures("without_namespaces")
@pytest.mark.timeout(600)
def test_quick_start_on_loopback(quick_start: QuickStart, loopback: Machines) -> None:
    check(quick_start, loopback, follow(quick_start, loopback))


def commands_of(page: str) -> list[str]:
    """Return the commands of a page, which begins with those of the environment."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def machine_of(line: str, quick_start: QuickStart, machines: Machines) -> Machine:
    """Return the machine of a command: the dispatcher's, or the one that its comment names."""
    return machines[quick_start.server if f"  # on {quick_start.server}" in line else "dispatcher"]


def follow_operations(quick_start: QuickStart, machines: Machines) -> None:
    """Run every command of docs/operations.md after the quick start, in the order of the page."""
    environment, *lines = commands_of("operations.md")
    assert len(lines) > 40
    for line in lines:
        machine_of(line, quick_start, machines).run(environment, line.partition("  # ")[0])
        if " renew " in line:
            copy_certificate(quick_start, machines)
        if "pki2/ca.pem > " in line:  # the page asks to copy the new certificate now
            for name, target in (("web01.pem", "server.pem"), ("web01.key", "server.key")):
                content = machines["dispatcher"].read(f"/etc/harpcaller/pki2/{name}")
                machines[quick_start.server].write(f"/etc/harpd/{target}", content, "0600")
            machines[quick_start.server].run(quick_start.reload)


def check_operations(quick_start: QuickStart, machines: Machines) -> None:
    follow(quick_start, machines)
    follow_operations(quick_start, machines)
    stop_server(quick_start, machines)


@pytest.mark.timeout(900)
def test_operations_page_in_namespaces(quick_start: QuickStart, namespaces: Machines) -> None:
    check_operations(quick_start, namespaces)


@pytest.mark.usefixtures("without_namespaces")
@pytest.mark.timeout(900)
def test_operations_page_on_loopback(quick_start: QuickStart, loopback: Machines) -> None:
    check_operations(quick_start, loopback)


def check_access(quick_start: QuickStart, machines: Machines) -> None:
    """Run every command of docs/access.md after the quick start, in the order of the page."""
    follow(quick_start, machines)
    environment, *lines = commands_of("access.md")
    shown: dict[str, str] = {}
    for line in lines:
        command = line.partition("  # ")[0]
        if command.startswith("umask"):  # it holds for the rest of the page, whose commands are run one by one
            environment = f"{environment}; {command}"
            continue
        expected = command.removeprefix("! ")
        run = machine_of(line, quick_start, machines).run
        if command == expected:
            shown[command.partition(" --")[0]] = run(environment, command)
        else:
            with pytest.raises(CommandFailed, match=r"denied|not accepted|auth_error"):
                run(environment, expected)
    assert "token:shop" in shown["harpcallerd access who"]
    assert "token:shop" in shown["harpcallerd audit search"]
    machines["dispatcher"].run("systemctl stop harpcallerd")
    stop_server(quick_start, machines)


@pytest.mark.timeout(900)
def test_access_page_in_namespaces(quick_start: QuickStart, namespaces: Machines) -> None:
    check_access(quick_start, namespaces)


@pytest.mark.usefixtures("without_namespaces")
@pytest.mark.timeout(900)
def test_access_page_on_loopback(quick_start: QuickStart, loopback: Machines) -> None:
    check_access(quick_start, loopback)


def leaves_nothing(machine: Machine) -> None:
    with pytest.raises(CommandFailed, match="failed: false && true"), machine:
        machine.run("trap '' HUP", "setsid --fork sleep 600 > /dev/null 2>&1 < /dev/null")
        wait_until(lambda: running(machine, "sleep"), 60, "the process that is left behind")
        machine.run("true", "false && true", "touch reached")
    assert machine.processes() == []
    assert not (machine.copy / "reached").exists()
    assert str(machine.directory) not in Path("/proc/self/mounts").read_text()


@pytest.mark.usefixtures("may_have_namespaces")
def test_failed_command_in_namespaces_leaves_nothing(directory: Path) -> None:
    leaves_nothing(NamespaceMachine("web01", directory / "web01", {}))


def test_failed_command_on_loopback_leaves_nothing(directory: Path) -> None:
    leaves_nothing(LoopbackMachine("web01", directory / "web01", {}, {}))
