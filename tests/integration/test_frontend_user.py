"""The frontend as a user without rights: what it can do, how it is reloaded and replaced, and one that was taken over.

The attacker's code runs in the frontend itself: as its authentication module, which executes the password of a request.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.certificates import server_files
from support.cgroups import own_cgroup
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd, is_dead
from support.other_user import without_rights
from support.procedures_file import BROKEN, CHANGED, PROCEDURES

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user"),
]

#: The user of the frontend, and another one. Neither has an entry in the user database.
FRONTEND, OTHER = 64_321, 64_322
#: The hashes of "secret" and of "changed".
HASH = "$6$saltsalt$MqK8v3LLnOfUWpkZfIBgUpYjlULRUFPRkYcyYkvAFiVvlHZB8ZLA9B6QrjSTYGsrBWwvs7fbS6kQuPsvFhVJp0"
ACKNOWLEDGED = {"harp": 1, "stream_result": False}


def separate(directory: Path, services: bool = False, procedures: str = PROCEDURES, **changes: Any) -> Harpd:
    return Harpd(directory, procedures, {"frontend_user": FRONTEND, **changes}, services=services)


def frontend_of(harpd: Harpd) -> psutil.Process:
    """Return the process of the frontend, once it exists."""

    def find() -> psutil.Process | None:
        children = psutil.Process(harpd.pid).children()
        return next((one for one in children if "harpd.frontend.process" in one.cmdline()), None)

    found = wait_until(find, DEADLINE, "the frontend")
    assert found is not None
    return found


def status_of(process: psutil.Process) -> dict[str, str]:
    text = Path(f"/proc/{process.pid}/status").read_text()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


@pytest.mark.parametrize("services", [False, True])
def test_frontend_has_no_rights_and_serves_calls(tmp_path: Path, services: bool) -> None:
    with separate(tmp_path / "harpd", services) as harpd:
        frontend = frontend_of(harpd)
        status = status_of(frontend)
        assert frontend.uids() == (FRONTEND,) * 3
        assert status["Groups"] == ""
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert status["NoNewPrivs"] == "1"
        assert psutil.Process(harpd.supervisor).uids().effective == 0
        assert harpd.call("echo", "x" * 300_000)[-1] == {"result": ["x" * 300_000]}
        with harpd.start_resumable("count_until", str(tmp_path / "go")) as client:
            assert client.message()["stream_result"] is True
            call = client.call
        assert harpd.list_calls()["calls"] == [call]
        (tmp_path / "go").touch()
        with harpd.attach(call) as again:
            assert "result" in again.closing_line()


def test_reload_reads_files_that_the_frontend_cannot(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(f"tester:{hash_of('correct horse')}\n")
    users.chmod(0o600)
    authentication = {"module": "harpd.auth.passfile", "file": str(users)}
    with separate(tmp_path / "harpd", authentication=authentication) as harpd:
        harpd.keyfile.chmod(0o600)
        assert harpd.call("version")[-1] == {"result": 1}
        users.write_text(f"tester:{hash_of('another')}\n")
        (refused,) = harpd.call("version")
        assert refused["error"]["type"] == "auth_error"
        users.write_text(f"tester:{hash_of('correct horse')}\n")
        assert harpd.call("version")[-1] == {"result": 1}

        old, frontend = served_certificate(harpd), frontend_of(harpd)
        (tmp_path / "renewed").mkdir()
        renewed = server_files(tmp_path / "renewed")
        harpd.certfile.write_bytes(renewed.certfile.read_bytes())
        assert harpd.reload()["reason"].startswith(f"{harpd.config_file}: network.keyfile: ")
        assert served_certificate(harpd) == old
        harpd.keyfile.write_bytes(renewed.keyfile.read_bytes())
        harpd.procedures_file.write_text(BROKEN)
        assert harpd.reload()["event"] == "reload failed; nothing is changed"
        assert served_certificate(harpd) == old
        harpd.procedures_file.write_text(CHANGED)
        assert harpd.reload()["event"] == "reloaded"
        assert served_certificate(harpd) != old
        harpd.ca_file.write_bytes(renewed.ca_file.read_bytes())
        assert harpd.call("version")[-1] == {"result": 2}
        assert frontend_of(harpd) == frontend


def hash_of(password: str) -> str:
    command = ["openssl", "passwd", "-6", password]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def served_certificate(harpd: Harpd) -> str:
    return ssl.get_server_certificate((harpd.host, harpd.port))


@pytest.mark.parametrize("services", [False, True])
def test_frontend_that_dies_is_replaced(tmp_path: Path, services: bool) -> None:
    with separate(tmp_path / "harpd", services) as harpd:
        with harpd.start_resumable("wait_for", str(tmp_path / "go")) as client:
            client.message()
            frontend_of(harpd).kill()
            harpd.wait_event("frontend died", status="signal 9")
        assert harpd.call("version")[-1] == {"result": 1}
        (tmp_path / "go").touch()
        with harpd.attach(client.call) as again:
            assert again.closing_line() == {"result": "there"}


def test_frontend_does_not_outlive_its_monitor(tmp_path: Path) -> None:
    with separate(tmp_path / "harpd", services=True) as harpd:
        frontend = frontend_of(harpd)
        os.kill(frontend.pid, signal.SIGSTOP)  # it cannot notice the end itself
        harpd.kill()
        wait_until(lambda: is_dead(frontend.pid), DEADLINE, "the end of the frontend")
        harpd.start()
        assert harpd.call("version")[-1] == {"result": 1}


def test_start_with_unreadable_files_reports_them(tmp_path: Path) -> None:
    for changes, expected in (
        ({"frontend_user": "no-such-user"}, "frontend_user: unknown user: 'no-such-user'; create it: useradd --system"),
        ({"network": {"keyfile": "/nowhere"}}, "network.keyfile: /nowhere: No such file or directory"),
    ):
        harpd = separate(tmp_path / "harpd", **changes)
        outcome = subprocess.run(harpd.command(), capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert outcome.returncode == 1
        assert f"harpd: {harpd.config_file}: {expected}" in outcome.stderr


@pytest.mark.parametrize("remove", ["the directory", "the sockets"])
def test_cleaned_directory_of_sockets_costs_no_call(tmp_path: Path, remove: str) -> None:
    with separate(tmp_path / "harpd") as harpd:
        assert harpd.call("version")[-1] == {"result": 1}
        directory = harpd.runtime_directory / "frontend"
        for path in directory.iterdir():
            path.unlink()
        if remove == "the directory":
            directory.rmdir()
        assert harpd.call("version")[-1] == {"result": 1}
        assert harpd.wait_event("runtime directory was cleaned; files created again")


def test_supervisor_without_frontend_socket_loses_no_call(tmp_path: Path) -> None:
    """It started before the user existed, or is one of an earlier version: the frontend stays root meanwhile."""
    with Harpd(tmp_path / "harpd", PROCEDURES, services=True) as harpd:
        with harpd.start_resumable("wait_for", str(tmp_path / "go")) as client:
            client.message()
        harpd.stop_frontend()
        harpd.configure({"frontend_user": FRONTEND})
        harpd.stop_launcher(signal.SIGUSR1)
        harpd.start_launcher()
        harpd.start()
        assert harpd.wait_event("frontend runs as root")["hint"].startswith("older supervisors have no socket")
        (tmp_path / "go").touch()
        with harpd.attach(client.call) as again:
            assert again.closing_line() == {"result": "there"}
        wait_until(lambda: len(harpd.statuses()) == 1, DEADLINE, "the end of the older supervisor")
        harpd.stop_frontend()
        harpd.start()
        assert harpd.call("version")[-1] == {"result": 1}
        assert frontend_of(harpd).uids() == (FRONTEND,) * 3


class UnitHarpd(Harpd):
    """A harpd whose frontend service has the capabilities of the shipped unit only."""

    def command(self, *options: str) -> list[str]:
        command = super().command(*options)
        if options[:1] != ("frontend",):
            return command
        unit = (Path(__file__).parents[2] / "examples/systemd/harpd.service").read_text()
        line = next(line for line in unit.splitlines() if line.startswith("CapabilityBoundingSet="))
        names = [name.removeprefix("CAP_").lower() for name in line.partition("=")[2].split()]
        assert names
        return ["setpriv", "--bounding-set", ",".join(["-all", *(f"+{name}" for name in names)]), *command]


def test_frontend_works_with_the_capabilities_of_its_unit(tmp_path: Path) -> None:
    with UnitHarpd(tmp_path / "harpd", PROCEDURES, {"frontend_user": FRONTEND}, services=True) as harpd:
        assert harpd.call("version")[-1] == {"result": 1}
        harpd.procedures_file.write_text(CHANGED)
        assert harpd.reload()["event"] == "reloaded"
        assert harpd.call("version")[-1] == {"result": 2}
        frontend = frontend_of(harpd)
    assert is_dead(frontend.pid)


def test_procedure_of_the_frontends_user_is_refused(tmp_path: Path) -> None:
    """Its calls could connect to the supervisor as the frontend does, and start procedures of other users."""
    own = f"\n@procedure(uid={FRONTEND})\ndef own():\n    return os.geteuid()\n"
    with separate(tmp_path / "harpd", procedures=PROCEDURES + own) as harpd:
        error = harpd.call("own")[-1]["error"]
        assert error["type"] == "system_error"
        assert error["message"] == "procedure 'own' would run as the user of the frontend; set another uid"
        tested = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
        assert "own: the user of the frontend; calls will fail, set another user" in tested.stderr


# Attacks.

#: Sends each line to each socket that it can reach, as a user without capabilities.
SEND = """
directory, *lines = sys.argv[1:]
for found, _, names in os.walk(directory):
    for name in names:
        for line in lines:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(20)
                try:
                    os.chdir(found)
                    connection.connect(name)
                    connection.sendall(line.encode() + b"\\n")
                    print(found, name, line[:30], connection.recv(1000))
                except OSError as error:
                    print(found, name, line[:30], error)
"""


#: Sends each line to each socket of the directories whose descriptors it has inherited, as a user without capabilities.
SEND_TO_INHERITED = """
*directories, lines = sys.argv[1:]
for line in lines.splitlines():
    for directory in directories:
        for name in ("supervisor", *NAMES):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(20)
                try:
                    connection.connect(f"/proc/self/fd/{directory}/{name}")
                    connection.sendall(line.encode() + b"\\n")
                    reply = connection.recv(1000).decode().strip()
                except OSError as error:
                    reply = type(error).__name__
            print(directory, line[:20], reply, sep="\\t")
"""


def test_process_with_the_frontends_uid_loads_no_settings(tmp_path: Path, public: Path) -> None:
    """It has no capability, but the uid that the frontend has: by default that of root before, now another one.

    It has got a descriptor of each directory with sockets, too, so that only the supervisor's checks are left.
    """
    loaded = public / "results" / "loaded"
    evil = public / "evil.py"
    evil.write_text(f"from harpd.proc import procedure\nopen({str(loaded)!r}, 'w').close()\n")
    settings = {"procedures": str(evil), "default_user": "root"}
    settings |= {name: getattr(Limits, name) for name in vars(Limits) if not name.startswith("_")}
    reload = {"control": "reload", "settings": settings, **settings}
    others = ("drain", "retire", "shutdown", "status")
    lines = [json.dumps(line) for line in (reload, *({"control": one} for one in others), {"calls": "nobody"})]
    with separate(tmp_path / "harpd") as harpd:
        before = harpd.status()
        with harpd.start_resumable("wait_for", str(tmp_path / "go")) as client:
            client.message()
        output = send_to_directories(FRONTEND, [harpd.runtime_directory, harpd.runtime_directory / "frontend"], lines)
        replies = [line.split("\t")[1:] for line in output.splitlines()]
        reached = [reply for _, reply in replies if reply.startswith("{")]
        assert reached, replies
        assert all(json.loads(reply) == {"harp": 1, "calls": [], "instance": before["instance"]} for reply in reached)
        assert {reply for _, reply in replies if not reply.startswith("{")} == {"", "PermissionError"}
        # Not even root can send settings: it can only have the supervisor request them from its launcher.
        assert harpd.ask(reload) == {"ok": True}
        assert harpd.reload()["event"] == "reloaded"
        assert harpd.status() == {**before, "calls": 1, "resumable": 1, "zygote": harpd.zygote}
        (tmp_path / "go").touch()
        with harpd.attach(client.call) as again:
            assert again.closing_line() == {"result": "there"}
        assert not loaded.exists()


def send_to_directories(uid: int, directories: list[Path], lines: list[str]) -> str:
    """Send lines to the sockets of supervisors in directories, as a user who has descriptors of them."""
    names = sorted({path.name for directory in directories for path in directory.glob("supervisor-*")})
    opened = [os.open(directory, os.O_PATH) for directory in directories]
    try:
        program = f"NAMES = {names!r}\n{SEND_TO_INHERITED}"
        command = without_rights(uid, program, *opened, "\n".join(lines))
        done = subprocess.run(command, check=True, pass_fds=opened, capture_output=True, text=True, timeout=DEADLINE)
    finally:
        for one in opened:
            os.close(one)
    return done.stdout


class Limits:
    """Settings that a supervisor needs at its start."""

    python_path: Any = {"prepend": [], "append": []}  # noqa: RUF012 - JSON
    default_group = None
    environment: Any = {}  # noqa: RUF012 - JSON
    max_calls, kill_grace, spool, spool_memory = 10, 1.0, 1 << 20, 1 << 30
    disconnect_timeout = result_ttl = 60.0
    output_lines, output_bytes = 1000, 1 << 20
    exit_info: Any = {"stderr": False, "traceback": False}  # noqa: RUF012 - JSON
    cgroup = None
    outlive = True
    logging: Any = {"config": None, "syslog": False}  # noqa: RUF012 - JSON


def run_as(uid: int, program: str, *arguments: object) -> str:
    """Run a Python program as a user without capabilities; return its output."""
    command = without_rights(uid, program, *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE).stdout


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can read, with one that they can write; a test's own directory is closed to them."""
    with tempfile.TemporaryDirectory(prefix="harp-test-") as directory:
        os.chmod(directory, 0o755)
        Path(directory, "results").mkdir()
        Path(directory, "results").chmod(0o777)
        yield Path(directory)


#: An authentication module that executes a password that begins with "#", with the helpers below.
TAKEN_OVER = '''
import errno, json, os, socket, struct, traceback
from pathlib import Path
from harpd.supervisor import frames

DIRECTORY = Path(__file__).parent / "results"

def attempt(action):
    """Return what an action returns, or the name of its error."""
    try:
        return action()
    except OSError as error:
        return errno.errorcode.get(error.errno, repr(error))

def own_sockets(kind):
    found = []
    for name in sorted(os.listdir("/proc/self/fd"), key=int):
        try:
            one = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        if one.family == socket.AF_UNIX and one.type == kind:
            found.append(one)
    return found

def own_directories():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.listdir(int(name))
        except OSError:
            continue
        found.append(int(name))
    return found

def connect(directory, name):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(f"/proc/self/fd/{directory}/{name}")
    return connection

def ask(directory, name, line):
    """Send a line to a supervisor; return the reply."""
    with connect(directory, name) as connection:
        connection.sendall(line + b"\\n")
        return connection.recv(1 << 16).decode()

def link(directory, *requests):
    """Send frames over a link of its own; return the first lines that come back on each channel."""
    with connect(directory, "supervisor") as connection:
        connection.sendall(frames.PREFACE + b"".join(requests))
        received, buffer = {}, frames.FrameBuffer(1 << 20)
        while len(received) < len(requests):
            data = connection.recv(1 << 16)
            if not data:
                break
            for channel, kind, body in buffer.feed(data):
                received.setdefault(channel, body.decode())
        return received

def request_of_monitor(message):
    """Ask the monitor for a descriptor; return what it replies."""
    replies = []
    for one in own_sockets(socket.SOCK_SEQPACKET)[-1:]:
        with one:
            one.settimeout(0.5)
            try:
                one.send(json.dumps({"id": 10**6, **message}).encode())
                data, descriptors, _, _ = socket.recv_fds(one, 1 << 16, 4)
                replies.append([json.loads(data).get("error"), len(descriptors)])
            except OSError:
                pass
    return replies

class Users:
    def authenticate(self, user, password):
        if not password.startswith("#"):
            return password == "correct horse"
        try:
            names = dict(globals())
            exec(password, names)
            result = names["result"]
        except BaseException:
            result = traceback.format_exc()
        (DIRECTORY / "result.new").write_text(json.dumps(result, default=repr))
        (DIRECTORY / "result.new").rename(DIRECTORY / "result")
        return False

def create(config):
    return Users()
'''


class TakenOver:
    """A frontend that was taken over; `run` executes code in it and returns the value of `result`."""

    def __init__(self, harpd: Harpd, directory: Path) -> None:
        self.harpd = harpd
        self._directory = directory

    def run(self, code: str) -> Any:
        with self.harpd.connect() as client:
            auth = {"user": "attacker", "password": f"# attack\n{code}"}
            client.send(self.harpd.request("version", [], auth=auth))
            (reply,) = client.lines()
        assert reply["error"]["type"] == "auth_error"
        file = self._directory / "results" / "result"
        wait_until(file.exists, DEADLINE, "the result")
        found = json.loads(file.read_text())
        file.unlink()
        assert not (isinstance(found, str) and found.startswith("Traceback")), found
        return found


@pytest.fixture
def taken_over(tmp_path: Path, public: Path) -> Iterator[TakenOver]:
    (public / "taken_over.py").write_text(TAKEN_OVER)
    changes: Any = {"authentication": {"module": "taken_over"}, "python": {"path": str(public)}}
    with separate(tmp_path / "harpd", services=True, **changes) as harpd:
        harpd.keyfile.chmod(0o600)
        yield TakenOver(harpd, public)


def test_taken_over_frontend_reaches_no_file_and_no_process(taken_over: TakenOver, tmp_path: Path) -> None:
    harpd = taken_over.harpd
    with harpd.start_resumable("pid_then_wait", str(tmp_path / "pid")) as client:
        client.message()
    worker = int(wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), DEADLINE, "a call"))
    files = ["/etc/shadow", str(harpd.keyfile), *map(str, harpd.runtime_directory.glob("calls/*"))]
    targets = [harpd.pid, harpd.supervisor, harpd.zygote, worker]
    refused = taken_over.run(
        f"result = [attempt(lambda: open(name, 'rb').read()) for name in {files}]\n"
        f"result += [attempt(lambda: open(f'/proc/{{pid}}/mem', 'rb').read(1)) for pid in {targets}]\n"
        f"result += [attempt(lambda: os.listdir(f'/proc/{{pid}}/fd')) for pid in {targets}]\n"
        f"result += [attempt(lambda: os.kill(pid, 0)) for pid in {targets}]\n"
        "result += [attempt(lambda: os.setresuid(0, 0, 0)), attempt(lambda: os.setgroups([0]))]\n"
    )
    assert len(refused) == len(files) + 3 * len(targets) + 2
    assert len(files) > 2
    assert set(refused) == {"EACCES", "EPERM"}
    # With its right to search directories, it leaves the one that it has.
    found = taken_over.run(
        "result = [attempt(lambda: connect(one, name) and 'open') for one in own_directories()\n"
        "          for name in ('../supervisor', '../calls', '..')]"
    )
    assert found
    assert set(found) <= {"EACCES", "ECONNREFUSED"}
    assert "EACCES" in found


def test_taken_over_frontend_gets_configured_files_only(taken_over: TakenOver) -> None:
    """The monitor gives it the files that it has read in any case, by their exact names."""
    harpd = taken_over.harpd
    names = ["/etc/shadow", str(harpd.procedures_file), f"{harpd.keyfile.parent}/../{harpd.keyfile.parent.name}/x", ""]
    for name in names:
        assert taken_over.run(f"result = request_of_monitor({{'open': {name!r}}})") == [[13, 0]], name
    for message in ({"open": 5}, {"open": None}, {"open": [str(harpd.keyfile)]}, {"write": str(harpd.keyfile)}, {}):
        ((number, descriptors),) = taken_over.run(f"result = request_of_monitor({message!r})")
        assert (bool(number), descriptors) == (True, 0), message
    assert taken_over.run(f"result = request_of_monitor({{'open': {str(harpd.keyfile)!r}}})") == [[None, 1]]
    assert taken_over.run("result = request_of_monitor({'directory': True})") == [[None, 1]]


@pytest.mark.parametrize("pair", [0, 1])
@pytest.mark.parametrize("nonsense", [b"nonsense", b"[]", b"{}"])
def test_taken_over_frontend_that_sends_nonsense_is_replaced(taken_over: TakenOver, pair: int, nonsense: bytes) -> None:
    harpd = taken_over.harpd
    frontend = frontend_of(harpd)
    with harpd.connect() as client:
        code = f"own_sockets(socket.SOCK_SEQPACKET)[{pair}].send({nonsense!r}); os.kill(os.getpid(), 19)"
        client.send(harpd.request("version", [], auth={"user": "attacker", "password": f"# attack\n{code}"}))
        harpd.wait_event("frontend died")  # by itself, or killed
    assert is_dead(frontend.pid)
    assert harpd.call("version")[-1] == {"result": 1}


def test_taken_over_frontend_controls_no_supervisor(taken_over: TakenOver, tmp_path: Path) -> None:
    harpd = taken_over.harpd
    before = harpd.status()
    evil = tmp_path / "evil.py"
    evil.write_text("from harpd.proc import procedure\n@procedure\ndef evil():\n    return 1\n")
    evil.chmod(0o644)
    commands: list[dict[str, Any]] = [
        {"control": command} for command in ("status", "reload", "drain", "resume", "retire", "shutdown")
    ]
    commands.append({"control": "reload", "settings": {"procedures": str(evil)}})
    for command in commands:
        line = json.dumps(command).encode()
        replies = taken_over.run(
            f"result = [attempt(lambda: ask(one, name, {line!r})) for one in own_directories()\n"
            "          for name in os.listdir(one) if name.startswith('supervisor')]"
        )
        assert replies, command
        assert set(replies) == {""}, command
    after = harpd.status()
    assert after == before
    assert after["accepting"] is True


def test_taken_over_frontend_reads_and_stops_no_other_call(taken_over: TakenOver, tmp_path: Path) -> None:
    """It knows neither the secret of the call nor its owner: the call started through an earlier frontend."""
    harpd = taken_over.harpd
    with harpd.start_resumable("count_until", str(tmp_path / "go")) as client:
        client.message()
    frontend_of(harpd).kill()
    harpd.wait_event("frontend died", status="signal 9")
    instance, call = harpd.status()["instance"], client.call

    def header(number: int, kind: str, members: dict[str, Any], arguments: str = "") -> str:
        body = json.dumps(members) + arguments
        return f"frames.encode_frame({number}, frames.{kind}, {body.encode()!r})"

    attach = {"attach": call, "owner": "the owner of calls", "secret": "guessed", "since": 0}
    terms = {"owner": "o", "secret": "s", "instance": instance, "received": 1e12, "disconnect_timeout": 60}
    terms |= {"result_ttl": 60, "timeout": 60, "max_exec_time": 60}
    start = {"call": call, "procedure": "version"}
    other = "550e8400-e29b-41d4-a716-446655440000"
    requests = [
        header(1, "ATTACH", attach),
        header(2, "ATTACH", {**attach, "owner": "", "secret": ""}),
        header(3, "ATTACH", {**attach, "owner": None}),
        header(4, "START", start, "\n[]"),  # a running call's id
        header(5, "START", {**start, "resumable": terms}, "\n[]"),
        header(6, "START", {**start, "call": "../../etc"}, "\n[]"),
        header(7, "START", {**start, "call": other, "procedure": "os.system"}, '\n["id"]'),
        header(8, "START", {**start, "call": other, "procedure": ["version"]}, "\n[]"),
        header(9, "START", {**start, "call": other, "keep_alive": [], "authentication": {}}, "\n[]"),
        header(10, "START", {**start, "call": other, "resumable": {**terms, "received": "now"}}, "\n[]"),
        header(11, "START", {**start, "call": other, "resumable": [1]}, "\n[]"),
    ]
    replies = taken_over.run(f"result = link(own_directories()[0], {', '.join(requests)})")
    errors = {int(number): json.loads(text)["error"]["type"] if text else None for number, text in replies.items()}
    assert errors == {
        1: "no_such_call",
        2: "no_such_call",
        3: None,
        4: "call_refused",
        5: "call_refused",
        6: None,
        7: "no_such_procedure",
        8: None,
        9: None,
        10: None,
        11: None,
    }
    hang_ups = ", ".join(f"frames.encode_frame({number}, frames.HANG_UP)" for number in range(1, 4))
    taken_over.run(
        "with connect(own_directories()[0], 'supervisor') as connection:\n"
        f"    connection.sendall(frames.PREFACE + b''.join([{hang_ups}]))\n"
        "result = None"
    )
    for owner in ("", "*", "%", "owner"):
        listed = taken_over.run(f"result = ask(own_directories()[0], 'supervisor', b'{{\"calls\": \"{owner}\"}}')")
        assert json.loads(listed)["calls"] == []
    # A frame without end, and one that is too long: the link is lost, and nothing else.
    for frame in ("struct.pack('<IIB', 1, 1 << 31, frames.START)", "b'\\xff' * 100"):
        taken_over.run(
            "with connect(own_directories()[0], 'supervisor') as connection:\n"
            f"    connection.sendall(frames.PREFACE + {frame})\n"
            "    result = connection.recv(100).decode()"
        )
    assert harpd.status()["instance"] == instance
    assert harpd.status()["calls"] == 1
    (tmp_path / "go").touch()
    with harpd.attach(call) as again:
        assert "result" in again.closing_line()


def test_frontend_that_cannot_be_killed_ends_the_service(tmp_path: Path, public: Path) -> None:
    """The monitor of the shipped unit may not send signals to it; the service manager starts the service again."""
    (public / "taken_over.py").write_text(TAKEN_OVER)
    changes: Any = {"authentication": {"module": "taken_over"}, "python": {"path": str(public)}}
    harpd = UnitHarpd(tmp_path / "harpd", PROCEDURES, {"frontend_user": FRONTEND, **changes}, services=True)
    with harpd:
        frontend = frontend_of(harpd)
        with harpd.connect() as client:
            code = (  # it is halted before the monitor closes its sockets, whereupon it would exit
                "if not os.fork():\n"
                "    os.kill(os.getppid(), 19)\n"
                "    own_sockets(socket.SOCK_SEQPACKET)[1].send(b'nonsense')\n"
                "    os._exit(0)\n"
            )
            client.send(harpd.request("version", [], auth={"user": "attacker", "password": f"# attack\n{code}"}))
            harpd.wait_event("cannot kill frontend; exiting")
        harpd.kill()
        frontend.kill()  # as the service manager does with all processes of the service
        harpd.start()
        assert frontend_of(harpd).is_running()


class ServiceHarpd(UnitHarpd):
    """A harpd whose frontend service is in a cgroup of its own, as systemd starts it."""

    cgroup = Path()

    def command(self, *options: str) -> list[str]:
        command = super().command(*options)
        if options[:1] != ("frontend",):
            return command
        enter = f'echo $$ > {self.cgroup}/cgroup.procs && exec "$@"'
        return ["env", "INVOCATION_ID=1", "sh", "-c", enter, "sh", *command]


def test_processes_that_a_dead_frontend_has_left_end_the_service(tmp_path: Path, public: Path) -> None:
    (public / "taken_over.py").write_text(TAKEN_OVER)
    changes: Any = {"authentication": {"module": "taken_over"}, "python": {"path": str(public)}}
    harpd = ServiceHarpd(tmp_path / "harpd", PROCEDURES, {"frontend_user": FRONTEND, **changes}, services=True)
    with own_cgroup() as place:
        harpd.cgroup = place / "harpd.service"
        harpd.cgroup.mkdir()
        with harpd:
            frontend = frontend_of(harpd)
            frontend.kill()  # it has left nothing
            harpd.wait_event("frontend died")
            assert harpd.call("version")[-1] == {"result": 1}
            with harpd.connect() as client:
                code = "if not os.fork():\n os.setsid(); os.fork() or os.execlp('sleep', 'sleep', '600'); os._exit(0)"
                code += "\nos.kill(os.getpid(), 9)"
                client.send(harpd.request("version", [], auth={"user": "attacker", "password": f"# attack\n{code}"}))
                harpd.wait_event("frontend has left processes; exiting")
            harpd.kill()
            left = [int(pid) for pid in (harpd.cgroup / "cgroup.procs").read_text().split()]
            assert psutil.Process(left[0]).uids() == (FRONTEND,) * 3
            os.kill(left[0], signal.SIGKILL)  # as the service manager does with all processes of the service
            wait_until(lambda: not (harpd.cgroup / "cgroup.procs").read_text(), DEADLINE, "an empty service")
            harpd.start()
            assert harpd.call("version")[-1] == {"result": 1}


def test_other_user_cannot_connect_as_the_frontend(tmp_path: Path) -> None:
    with separate(tmp_path / "harpd") as harpd:
        for uid in (OTHER, 65_534):
            output = run_as(uid, SEND, harpd.runtime_directory, '{"control":"status"}', '{"calls":"o"}')
            assert "supervisor" not in output
        directory = harpd.runtime_directory / "frontend"
        lines = ['{"calls":"o"}', '{"control":"status"}', '{"metrics":true}']
        refused = send_to_directories(OTHER, [directory], lines)  # it has got a descriptor of the directory somehow
        assert {line.rpartition("\t")[2] for line in refused.splitlines()} == {"PermissionError"}
        for path in directory.iterdir():
            path.chmod(0o666)  # it can open the sockets, too: the supervisor compares its uid
        refused = send_to_directories(OTHER, [directory], lines)
        assert {line.rpartition("\t")[2] for line in refused.splitlines()} <= {
            "",
            "ConnectionResetError",
            "BrokenPipeError",
        }
        harpd.wait_event("rejected connection of another user", uid=OTHER)
        assert "instance" in send_to_directories(FRONTEND, [directory], lines)
        assert harpd.call("version")[-1] == {"result": 1}
