"""What a run prints at its end: the truth table, the counts, and every broken promise with its facts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from chaos.census import Census
from chaos.faults import History
from chaos.ledger import Broken, Entry, Ledger
from chaos.marks import now

#: The seven promises, in short.
PROMISES = (
    "the system did what it must not",
    "no accepted job is lost",
    "a job is running only while a process runs it, and its end is what happened",
    "what was stopped is dead when its stop is confirmed",
    "a stream has no seam",
    "a call starts at most once",
    "values arrive as they were sent",
    "a limit holds",
)
#: How many broken promises are told with all their facts, and lines of the logs for each.
_TOLD, _LINES = 20, 12


def table(ledger: Ledger, census: Census) -> Iterator[str]:
    """The truth table: ends of jobs, and what the marks say of them."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in ledger.entries.values():
        truth = census.truth(entry.order.token)
        if truth.returned:
            mark = "end"
        elif truth.raised:
            mark = "raise"
        else:
            mark = "start only" if truth.starts else "none"
        rows[_end(entry)][mark] += 1
    columns = ("none", "start only", "raise", "end")
    yield f"{'jobs by end, and their last mark:':40}" + "".join(f"{column:>12}" for column in columns)
    for end, row in sorted(rows.items()):
        yield f"    {end:36}" + "".join(f"{row[column] or '.':>12}" for column in columns)


def _end(entry: Entry) -> str:
    if entry.id is None:
        return "(no reply to the submission)"
    end = "(none)" if entry.end is None else str(entry.end)
    return f"{end}, stop {entry.stop}" if entry.stop else end


def counts(ledger: Ledger, history: History) -> Iterator[str]:
    """Jobs by procedure, followers, faults by kind."""
    accepted = [entry for entry in ledger.entries.values() if entry.id is not None]
    followers = [follower for entry in accepted for follower in entry.followers]
    kinds = Counter(entry.order.procedure for entry in accepted)
    records = sum(entry.records or 0 for entry in accepted)
    resumed = sum(follower.resumed for follower in followers)
    yield f"jobs: {len(accepted)} ({_listed(kinds)}); {len(ledger.entries) - len(accepted)} submissions without a job"
    yield f"records: {records}; followers: {len(followers)}, which found no dispatcher {resumed} times"
    yield f"cancels: {sum(entry.cancels > 0 for entry in accepted)}; receipts checked: {ledger.receipts}"
    yield f"faults: {history.done.total()}, {history.missed} more found nothing to strike"
    yield from (f"    {count:4}  {kind}" for kind, count in history.done.most_common())


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())


def broken(ledger: Ledger, history: History, run: Path) -> Iterator[str]:
    """Every broken promise; the first ones with what the logs say of the job."""
    yield f"broken promises: {len(ledger.broken)}"
    for number, count in sorted(Counter(broken.promise for broken in ledger.broken).items()):
        yield f"    {count:4}  {number}. {PROMISES[number]}"
    for found in ledger.broken[:_TOLD]:
        yield from _told(found, ledger, history, run)


def _told(found: Broken, ledger: Ledger, history: History, run: Path) -> Iterator[str]:
    entry = ledger.entries.get(found.token or "")
    yield ""
    yield f"promise {found.promise}: {found.what}"
    if entry is None:
        return
    order = entry.order
    arguments = str(list(order.arguments))[:200]
    yield f"    {entry.id}: {order.procedure} {arguments} on {order.host}, queue {order.queue}, {dict(order.limits)}"
    yield f"    submitted at {entry.submitted:.3f}, ended as {entry.end} ({entry.told or 0:.3f}), stop {entry.stop}"
    until = entry.told or now()
    for fault, begin, end in history.between(entry.submitted, until, order.host):
        yield f"    meanwhile, {begin:.3f} to {end:.3f}: {fault.kind} {fault.host or ''}"
    if entry.id is not None:
        for log in sorted(run.glob("*/*.log")):
            lines = [line for line in log.read_text("utf-8", "replace").splitlines() if entry.id in line]
            yield from (f"    {log.relative_to(run)}: {line[:400]}" for line in lines[-_LINES:])
