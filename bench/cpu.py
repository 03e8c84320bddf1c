"""What a call costs in CPU, process by process: the most telling of all figures where every core is busy.

The kernel counts for each process, and for the children that it has waited for: a call's process is counted with its
zygote's, a client's with the client program's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from bench.clients import Missing
from bench.ours import client_program, daemons, settings
from bench.processes import Client
from bench.works import Sizes

__all__ = ["PROCESSES", "costs", "table"]

#: Who uses CPU, in the order of the table.
PROCESSES = ("client", "dispatcher", "gate", "warden", "zygote", "calls")


def table(directory: Path, sizes: Sizes) -> Iterator[str]:
    """Make calls of each kind, and say what each call cost.

    Args:
        directory: where the daemons work.
        sizes: for how long, and how many jobs.
    """
    directory.mkdir()
    seconds = {"seconds": sizes.seconds}
    # The deadline of a work is its own; how many calls there were is a figure of it, or was asked for.
    kinds = (
        ("direct, a connection for each call", "fresh", {"clients": 1, **seconds}),
        ("direct, a kept connection", "kept", {"clients": 1, **seconds}),
        ("direct, a kept connection, 16 clients", "kept", {"clients": 16, **seconds}),
        ("jobs, 4 clients", "jobs", {"clients": 4, "jobs": sizes.jobs}),
    )
    with daemons(directory) as (harpd, harpcallerd):
        assert harpcallerd is not None
        with client_program("harp_client", directory, settings(harpd, harpcallerd)) as client:
            pids = {
                "client": client.pid,
                "dispatcher": harpcallerd.pid,
                "gate": harpd.pid,
                "warden": harpd.warden,
                "zygote": harpd.zygote,
            }
            widest = max(len(title) for title, _, _ in kinds)
            yield "CPU of a call, by process"
            yield f"  {'':{widest}}" + "".join(f"{name:>12}" for name in (*PROCESSES, "all")) + "   ms"
            for title, work, arguments in kinds:
                try:
                    found = costs(client, pids, work, sizes.deadline, arguments)
                except Missing as lack:
                    yield f"  {title:{widest}}  {lack}"
                else:
                    values = (*(found[name] for name in PROCESSES), sum(found.values()))
                    yield f"  {title:{widest}}" + "".join(f"{value:12.3f}" for value in values)
            yield ""


def costs(
    client: Client, pids: Mapping[str, int], work: str, deadline: float, arguments: Mapping[str, float]
) -> dict[str, float]:
    """Have calls made; return what each of `PROCESSES` used for one, in milliseconds.

    Args:
        client: makes them.
        pids: the processes, but for the calls' own.
        work: its name in the client program.
        deadline: seconds that it may take.
        arguments: what the work is given.

    Raises:
        Missing: the client can't do it.
    """
    before = _spent(pids)
    figures = client.ask(work, deadline, **arguments)
    after = _spent(pids)
    return {name: 1000 * (after[name] - before[name]) / figures["count"] for name in PROCESSES}


def _spent(pids: Mapping[str, int]) -> dict[str, float]:
    """CPU seconds of each of `PROCESSES`, the user's and the system's."""
    times = {name: psutil.Process(pid).cpu_times() for name, pid in pids.items()}
    spent = {name: found.user + found.system for name, found in times.items()}
    ended = {name: found.children_user + found.children_system for name, found in times.items()}
    return {**spent, "client": spent["client"] + ended["client"], "calls": ended["zygote"]}
