"""What rules and audit cost: CPU of a job without both, with rules, and with rules and audit, in one run.

Each of the three has a dispatcher and a harpd. They run the same jobs in turn, and each turn begins with another one: a
slow period of the machine affects all of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from random import sample
from statistics import mean, median
from typing import Any

from bench.harp_client import connect_queue
from bench.load import SETTINGS, Figures, jobs
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd

#: The procedures file of HARP.
_PROCEDURES = Path(__file__).with_name("procedures.py")
#: Six rules. The last one decides, and has a limit.
_RULES = """\
[roles]
operators = ["token:alice", "token:bob", "cert:*.ops.example.net"]

[[rule]]
who = ["role:operators"]
allow = ["call", "read", "cancel", "list", "manage"]
jobs = "any"

[[rule]]
who = ["token:shop"]
allow = ["call", "read"]
hosts = ["web*"]
procedures = ["clear_*", "restart_nginx"]

[[rule]]
who = ["*"]
deny = ["call"]
hosts = ["web*", "db*"]
procedures = ["reboot", "shutdown_*"]

[[rule]]
who = ["token:backup"]
allow = ["call"]
queues = [{ service = "backup" }]

[[rule]]
who = ["cert:monitor.example.net"]
allow = ["read", "list"]
jobs = "any"

[[rule]]
who = ["anonymous@127.*"]
allow = ["call", "read", "cancel"]
hosts = ["web*"]
procedures = ["echo", "reused_*"]
queued = 100_000
"""
#: What each of the three has.
_KINDS = {"plain": (False, False), "rules": (True, False), "audit": (True, True)}


@contextmanager
def _running(directory: Path, has_rules: bool, has_audit: bool) -> Iterator[tuple[int, dict[str, int]]]:
    """Run a dispatcher and a harpd; yield the port of the dispatcher, and the processes of both by name."""
    settings: dict[str, Any] = {"log_level": "info"}
    harpd = Harpd(
        directory / "harpd",
        _PROCEDURES.read_text(),
        {"audit_file": str(directory / "harpd.jsonl")} if has_audit else {},
    )
    harpd.logging_file.write_text(harpd.logging_file.read_text().replace("DEBUG", "INFO"))
    if has_rules:
        file = directory / "access.toml"
        file.write_text(_RULES)
        settings["access_file"] = str(file)
    if has_audit:
        settings["audit_file"] = str(directory / "dispatcher.jsonl")
    with harpd:
        settings["ca_file"] = str(harpd.ca_file)
        credentials = (harpd.user, harpd.password)
        with Harpcallerd(directory / "dispatcher", {"web01": harpd.port}, credentials, settings) as dispatcher:
            pids = {"dispatcher": dispatcher.pid, "frontend": harpd.pid, "supervisor": harpd.supervisor}
            yield dispatcher.port, {**pids, "zygote": harpd.zygote, "workers": -harpd.zygote}


def access(clients: int, count: int, turns: int) -> Figures:
    """Run jobs on each of the three in turn.

    Args:
        clients: number of clients that share the jobs of a turn.
        count: number of these jobs.
        turns: how often each of the three has its turn, after one that is not counted.

    Returns:
        ``plain``: CPU ms of dispatcher and harpd for a job without rules and audit, the median over the turns;
        ``rules`` and ``audit``: that with rules, and with rules and audit, divided by it; ``audit-dispatcher``: the
        same of the dispatcher alone. What is added is the mean of the differences in a turn, without the smallest and
        the largest of them, a quarter: two turns of the same kind can differ by more than is looked for.
    """
    directory = Path(tempfile.mkdtemp(prefix="access", dir=SETTINGS["directory"]))
    spent: dict[str, list[Figures]] = {kind: [] for kind in _KINDS}
    with ExitStack() as stack:
        order = sample([*_KINDS], len(_KINDS))  # also of their starts: those of the first are often a little faster
        running = {kind: stack.enter_context(_running(directory / kind, *_KINDS[kind])) for kind in order}
        for turn in range(turns + 1):
            for kind in order:
                port, SETTINGS["pids"] = running[kind]
                figures = jobs(partial(connect_queue, port=port), clients, count)
                if turn:
                    spent[kind].append({name: figures[f"cpu {name}"] for name in SETTINGS["pids"]})
            order = [*order[1:], order[0]]

    def ratio(kind: str, *processes: str) -> float:
        turns = zip(spent[kind], spent["plain"], strict=True)
        pairs = [(_sum(one, processes), _sum(plain, processes)) for one, plain in turns]
        added = sorted(one - plain for one, plain in pairs)
        cut = len(added) // 8
        return 1 + mean(added[cut : len(added) - cut]) / median(plain for _, plain in pairs)

    every = [*spent["plain"][0]]
    found = {kind: ratio(kind, *every) for kind in ("rules", "audit")}
    found["audit-dispatcher"] = ratio("audit", "dispatcher")
    for kind, of_turns in spent.items():
        found |= {f"cpu {name}, {kind}": median(one[name] for one in of_turns) for name in every}
    return {**found, "plain": median(_sum(one, every) for one in spent["plain"])}


def _sum(figures: Figures, processes: list[str] | tuple[str, ...]) -> float:
    return sum(figures[name] for name in processes)


FUNCTIONS = {"access": access}
