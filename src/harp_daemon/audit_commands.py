"""The commands ``audit verify``, ``audit search`` and ``audit tail`` of both daemons; they need no running daemon."""

from __future__ import annotations

import argparse
import re
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from harp_daemon.audit_file import Position, format_time
from harp_daemon.audit_reading import search, verify

_FIELDS = ("principal", "job", "host", "procedure", "action", "decision")
_FIRST = ("entry", "time", "previous", "action", "decision")
_UNITS = {"m": 60, "h": 3600, "d": 86400}
_POLL_INTERVAL = 0.5  #: Seconds between two looks for more entries.

_EXAMPLES = """\
examples:
  {program} audit verify                        prove that no entry was changed, dropped, inserted or moved
  {program} audit search --host=web07 --procedure=restart_nginx --since=7d
                                                who has called it, and how it ended
  {program} audit tail --lines=20 --follow      the last entries, and those that follow

exit status: 0 success, 1 failure (verify: the entries are not complete), 2 wrong usage
"""


def add_commands(parser: argparse.ArgumentParser, program: str) -> None:
    """Add the commands to the parser of ``audit``. The program calls `run` with their arguments and the file."""
    parser.epilog = _EXAMPLES.format(program=program)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="question", metavar="QUESTION", required=True)

    def add(name: str, answer: Callable[[Namespace, Path], int], help: str) -> Callable[..., argparse.Action]:
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        command.set_defaults(answer=answer)
        command.add_argument("--config", metavar="PATH", type=Path, default=argparse.SUPPRESS, help="the daemon's file")
        command.add_argument("--file", metavar="FILE", type=Path, help="the audit file (default: that of --config)")
        return command.add_argument

    option = add("verify", _verify, "prove that no entry was changed, dropped, inserted or moved")
    option("--known", metavar="ENTRY:HASH", type=_position, help="an entry of an earlier report, which must be there")
    option = add("search", _search, "show the entries whose fields match; also of rotated and compressed files")
    for name in _FIELDS:
        option(f"--{name}", metavar="GLOB", help=f"only entries with this {name}")
    option(
        "--since", metavar="TIME", type=_time, help="only later entries: 30m, 12h, 7d, 2026-11-29 or 2026-11-29T10:00"
    )
    option("--json", action="store_true", help="print the entries as they are in the file")
    option = add("tail", _tail, "show the last entries")
    option("--lines", metavar="N", type=int, default=10, help="how many (default: %(default)s)")
    option("--follow", action="store_true", help="wait for further entries")
    option("--json", action="store_true", help="print the entries as they are in the file")


def run(parsed: Namespace, path: Path) -> int:
    """Run a command on an audit file; return the exit status. Raises OSError."""
    return int(parsed.answer(parsed, path))


def _verify(parsed: Namespace, path: Path) -> int:
    report = verify(path, parsed.known)
    for problem in report.problems:
        print(f"{path.name}: {problem}", file=sys.stderr)
    for note in report.notes:
        print(f"note: {note}")
    if report.problems:
        return 1
    if not report.first:
        print("there are no entries")
        return 0
    print(f"complete: entries {report.first} to {report.last.entry}, the last of {report.last_time}")
    print(f"store this elsewhere, for --known: {report.last.entry}:{report.last.hash}")
    return 0


def _search(parsed: Namespace, path: Path) -> int:
    globs = {name: getattr(parsed, name) for name in _FIELDS if getattr(parsed, name) is not None}
    _print(search(path, globs, parsed.since), parsed.json)
    return 0


def _tail(parsed: Namespace, path: Path) -> int:
    last = deque(search(path, {}, None), maxlen=max(0, parsed.lines))
    _print(last, parsed.json)
    shown = max((int(entry["entry"]) for entry, _ in last), default=0)
    while parsed.follow:
        sys.stdout.flush()
        time.sleep(_POLL_INTERVAL)
        more = [(entry, line) for entry, line in search(path, {}, None) if entry["entry"] > shown]
        _print(more, parsed.json)
        shown = max((int(entry["entry"]) for entry, _ in more), default=shown)
    return 0


def _print(entries: Iterable[tuple[Mapping[str, Any], bytes]], as_json: bool) -> None:
    for entry, line in entries:
        # The file has no character beyond ASCII; a file that was tampered with may have.
        print(_escape(line.decode("ascii", "backslashreplace") if as_json else _describe(entry)))


def _describe(entry: Mapping[str, Any]) -> str:
    fields = " ".join(f"{key}={_show(value)}" for key, value in entry.items() if key not in _FIRST)
    return f"{entry.get('time')} {entry.get('action')} {entry.get('decision', '')} {fields}"


def _show(value: object) -> str:
    text = str(value)
    return text if re.fullmatch(r"[!-~]+", text) else repr(text)


def _escape(text: str) -> str:
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _position(text: str) -> Position:
    found = re.fullmatch(r"(\d{1,18}):([0-9a-f]{64})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected ENTRY:HASH, as verify prints it, got {text!r}")
    return Position(int(found[1]), found[2])


def _time(text: str) -> str:
    if found := re.fullmatch(r"(\d{1,6})([mhd])", text):
        return format_time(time.time() - int(found[1]) * _UNITS[found[2]])
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2})?)?", text):
        return text
    raise argparse.ArgumentTypeError(f"expected a time (UTC) such as 12h, 7d, 2026-11-29, got {text!r}")
