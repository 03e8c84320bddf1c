"""The chaos run and the failpoint run are part of every test run, and each sabotage is detected.

Each has a fixed seed and a random one, which is printed with the rest of a failed run: repeat it with `--seed`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from chaos.disturbances import rewrite_in_pieces
from chaos.kills import kills
from chaos.proxy import Mode, Proxy
from chaos.schedule import Kind, schedule

TESTS = Path(__file__).parents[1]
HOSTS = ("web1", "web2", "web3")


def chaos(*options: str) -> tuple[int, str]:
    """Run `./dev chaos`; return its exit status and its output."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "chaos", *options],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGTERM)  # so that it ends its processes
        process.communicate()
        raise
    return process.returncode, printed


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--minutes", "0.5", "--seed", "20260"), id="fixed seed"),
        pytest.param(("--minutes", "0.5"), id="random seed"),
    ],
)
def test_chaos_faults_break_no_promise(tmp_path: Path, options: tuple[str, ...]) -> None:
    status, printed = chaos(*options, "--keep-logs", str(tmp_path / "run"))
    assert status == 0, printed
    assert "broken promises: 0" in printed


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "options", [pytest.param(("--seed", "5"), id="fixed seed"), pytest.param((), id="random seed")]
)
def test_chaos_kills_break_no_promise(tmp_path: Path, options: tuple[str, ...]) -> None:
    status, printed = chaos("--kills", "25", *options, "--keep-logs", str(tmp_path / "run"))
    assert status == 0, printed
    assert "faults: 25;" in printed
    assert "broken promises: 0" in printed


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("sabotage", "promise"),
    [
        ("drop-record", "4. a stream has"),
        ("start-twice", "5. a call starts"),
        ("leak-slot", "7. a limit holds"),
        ("forget-request", "8. submissions with one"),
    ],
)
def test_chaos_sabotage_is_detected(tmp_path: Path, sabotage: str, promise: str) -> None:
    options = ("--minutes", "0.15", "--seed", "3", "--keep-logs", str(tmp_path / "run"))
    status, printed = chaos("--sabotage", sabotage, *options)
    assert status == 1, printed
    assert promise in printed, printed


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("sabotage", "seed", "fact"),
    [
        # Each seed has the fault, long enough and alone, within its first seconds.
        ("half-hosts", "105", "but its host is known"),
        ("block-on-log", "324", "dispatcher does not reply while nobody reads its log"),
    ],
)
def test_chaos_sabotage_under_its_fault_is_detected(tmp_path: Path, sabotage: str, seed: str, fact: str) -> None:
    options = ("--minutes", "0.2", "--seed", seed, "--keep-logs", str(tmp_path / "run"))
    status, printed = chaos("--sabotage", sabotage, *options)
    assert status == 1, printed
    assert fact in printed, printed


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("sabotage", "fact"),
    [
        ("start-twice", "5. a call starts"),
        ("orphan", "promise 3: process"),
        ("wrong-kill", "the unrelated process"),
    ],
)
def test_chaos_sabotage_among_kills_is_detected(tmp_path: Path, sabotage: str, fact: str) -> None:
    options = ("--kills", "12", "--seed", "3", "--keep-logs", str(tmp_path / "run"))
    status, printed = chaos("--sabotage", sabotage, *options)
    assert status == 1, printed
    assert fact in printed, printed


def test_chaos_kills_same_seed_gives_same_kills() -> None:
    def first(seed: int, lane: str) -> list[object]:
        return list(islice(kills(seed, lane, HOSTS), 100))

    assert first(7, "web1") == first(7, "web1")
    assert first(7, "web1") != first(8, "web1")
    assert {kill.kind for kill in islice(kills(7, "dispatcher", HOSTS), 100)} == {"kill dispatcher"}


def test_chaos_schedule_same_seed_gives_same_schedule() -> None:
    assert schedule(7, 600, HOSTS) == schedule(7, 600, HOSTS)
    assert schedule(7, 600, HOSTS) != schedule(8, 600, HOSTS)


@pytest.mark.parametrize("seed", range(10))
def test_chaos_schedule_of_ten_minutes_has_all_kinds(seed: int) -> None:
    faults = schedule(seed, 600, HOSTS)
    assert len(faults) >= 250
    assert {fault.kind for fault in faults} == {*Kind, *Mode} - {Mode.PASS}
    assert all(fault.seconds <= 32 for fault in faults)


async def test_chaos_proxy_of_overlapping_faults_listens_once() -> None:
    async def accepts() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        except ConnectionRefusedError:
            return False
        writer.close()
        await writer.wait_closed()
        return True

    proxy = Proxy(1, "seed")  # nothing listens on its target
    try:
        await proxy.set(Mode.REFUSE)
        assert not await accepts()
        await asyncio.gather(proxy.set(Mode.PASS), proxy.set(Mode.STALLED))
        assert await accepts()
        await asyncio.gather(proxy.set(Mode.REFUSE), proxy.set(Mode.PASS), proxy.set(Mode.REFUSE))
        assert not await accepts()
    finally:
        await proxy.set(Mode.PASS)
        await proxy.close()


@pytest.mark.parametrize("choice", [number / 20 for number in range(20)])
async def test_chaos_rewritten_file_is_cut_in_a_line_until_the_end(tmp_path: Path, choice: float) -> None:
    """A file that ends after a line is not certainly incomplete: the dispatcher may use it."""
    lines = [f'{{"hostname": "web{number}"}}\n' for number in range(3)]
    text = "".join(lines).encode()
    file = tmp_path / "hosts"
    file.write_bytes(text)
    seen = set()
    task = asyncio.create_task(rewrite_in_pieces(file, text, 0.1, choice))
    while not task.done():
        seen.add(file.read_bytes())
        await asyncio.sleep(0.001)
    assert file.read_bytes() == text
    whole = [text.startswith(part) and not part.endswith((b"\n", b"}")) for part in seen - {text}]
    assert all(whole), seen
    assert len(task.result()) >= 2
