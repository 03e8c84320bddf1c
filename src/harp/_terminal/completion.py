"""Completion of command lines in bash, zsh and fish, with jobs and hosts of the dispatcher.

The scripts run ``harp complete-line`` with the words before the cursor. It prints a candidate per line, with a
description after a tab. A candidate has only characters that need no quotes in a shell: a host or a job with another
name could otherwise become a part of a command. If nothing can be completed, nothing is printed, and never an error.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from harp._terminal.lists import FORMATS, JOB_COLUMNS
from harp._terminal.tables import format_time
from harp.client import HarpCaller
from harp.protocol.dispatcher import COUNTED_BY

#: Seconds until the dispatcher must have replied: a person waits with a finger on a key.
DEADLINE = 1.0
#: The number of jobs and hosts that are asked for.
_MOST = 100
_SAFE = re.compile(r"[A-Za-z0-9_.,:@%+=/*-]+", re.ASCII)
_UNPRINTED = re.compile(r"[^\x20-\x7e]")
_MAX_DESCRIPTION = 60  #: Characters.
#: What may follow a key of a filter. Times are examples of their form.
_FILTER_VALUES: Mapping[str, tuple[str, ...]] = {
    "state": ("queued", "running", "returned", "raised", "failed", "cancelled", "open", "ended", "bad"),
    **dict.fromkeys(
        ("from", "to", "ended_from", "ended_to", "started_from", "started_to"),
        ("-1h", "-12h", "-1d", "-7d", "today", "yesterday"),
    ),
    "stop": ("pending", "confirmed", "failed", "unknown"),
    "holds_slot": ("1", "0"),
    **dict.fromkeys(("host", "procedure", "owner", "queue", "end_type", "info", "arguments", "rerun_of", "id"), ()),
}


class Candidate(NamedTuple):
    """A word that can stand at the cursor, and its description."""

    word: str
    description: str = ""


#: Stands for the names of files, which the shell completes itself.
FILES = Candidate(":files")


class Arguments(NamedTuple):
    """The arguments of a command: its positional ones, and its options with the values that each takes.

    An option's value is its metavar; None: it takes no value.
    """

    positional: Sequence[str]
    options: Mapping[str, str | None]


class Program(NamedTuple):
    """What the command line of the program consists of, and how its dispatcher is found."""

    commands: Mapping[str, tuple[str, Arguments]]  #: The help and the arguments of each command.
    common: Mapping[str, str | None]  #: The options of all commands.
    connect: Callable[[Sequence[str]], HarpCaller]  #: Returns the dispatcher that words of a command line name.
    contexts: Callable[[], Iterable[str]]  #: Returns the names of the contexts.


class _Place(NamedTuple):
    """Where the cursor is."""

    command: str | None
    options: Mapping[str, str | None]
    position: int  #: The number of positional arguments before it.
    option: str | None  #: The option whose value is there.


def complete(program: Program, words: Sequence[str]) -> list[Candidate]:
    """Return the candidates for the last word of a command line, which has not the program's name."""
    *before, current = words or [""]
    place = _find_place(program, before)
    try:
        return [] if place is None else list(_matching(current, _values(program, place, before, current)))
    except Exception:  # noqa: BLE001 - a completion has no place for an error
        return []


def _find_place(program: Program, before: Sequence[str]) -> _Place | None:
    """Return the place after these words; None: they are no command line of this program."""
    place = _Place(None, program.common, 0, None)
    for word in before:
        if place.option is not None:
            place = place._replace(option=None)
        elif word.startswith("-") and word != "-":
            if "=" not in word and place.options.get(word) is not None:
                place = place._replace(option=word)
        elif place.command is None:
            if word not in program.commands:
                return None
            options = {**program.common, **program.commands[word][1].options}
            place = _Place(word, options, 0, None)
        else:
            place = place._replace(position=place.position + 1)
    return place


def _values(program: Program, place: _Place, before: Sequence[str], current: str) -> Iterator[Candidate]:
    command = place.command
    if place.option is not None:
        yield from _option_values(program, place, current)
    elif current.startswith("-"):
        yield from map(Candidate, place.options)
    elif command is None:
        yield from (Candidate(name, help) for name, (help, _) in program.commands.items())
    else:
        positional = program.commands[command][1].positional
        kind = positional[place.position] if place.position < len(positional) else positional[-1:] and positional[-1]
        if kind == "words" and command == "jobs":
            yield from _filter(partial(program.connect, before), current)
        elif place.position >= len(positional) and kind != "words":
            return
        elif kind == "host" or (kind == "words" and command == "hosts"):
            yield from _hosts(program.connect(before), current)
        elif kind == "job" or (kind == "words" and command == "show"):
            yield from _jobs(program.connect(before), current)
        elif kind == "shell":
            yield from map(Candidate, SCRIPTS)


def _option_values(program: Program, place: _Place, current: str) -> Iterator[Candidate]:
    option = place.option or ""
    if place.options[option] == "FILE":
        yield FILES
    elif option == "--context":
        yield from map(Candidate, program.contexts())
    elif option == "--format":
        yield from map(Candidate, FORMATS)
    elif option == "--count":
        yield from map(Candidate, COUNTED_BY)
    elif option == "--columns":
        start = current.rpartition(",")[0]
        yield from (Candidate(f"{start},{name}" if start else name) for name in JOB_COLUMNS)


def _hosts(caller: HarpCaller, current: str, prefix: str = "") -> Iterator[Candidate]:
    for host in caller.hosts(current, limit=_MOST):
        yield Candidate(prefix + host.name, host.state)


def _jobs(caller: HarpCaller, current: str) -> Iterator[Candidate]:
    now = time.time()
    is_id = len(current) >= 8 and not set(current.lower()) - set("0123456789abcdef-")
    for job in caller.jobs(f"id:{current}" if is_id else "", limit=_MOST):
        about = f"{job.state} {job.procedure} on {job.host}, {format_time(job.submitted, now)}"
        yield Candidate(job.id, about)


def _filter(connect: Callable[[], HarpCaller], current: str) -> Iterator[Candidate]:
    key, colon, value = current.partition(":")
    if not colon:
        yield from (Candidate(f"{name}:") for name in _FILTER_VALUES)
        return
    start = value.rpartition(",")[0]
    prefix = f"{key}:{start}," if start else f"{key}:"
    if key == "host":
        yield from _hosts(connect(), value.rpartition(",")[2], prefix)
    elif key in ("procedure", "owner", "end_type"):
        for counted in connect().count_jobs(by=key, most=1000).by.get(key, ()):
            yield Candidate(f"{prefix}{counted.value}", f"{counted.count}{'+' if counted.more else ''} jobs")
    else:
        yield from (Candidate(prefix + each) for each in _FILTER_VALUES.get(key, ()))


def _matching(current: str, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    for word, description in candidates:
        if word is FILES.word or (word.startswith(current) and _SAFE.fullmatch(word)):
            yield Candidate(word, _UNPRINTED.sub("?", description)[:_MAX_DESCRIPTION])


def print_lines(shell: str, words: Sequence[str], candidates: Iterable[Candidate]) -> Iterator[str]:
    """Yield the lines for a shell. bash takes a colon and an equals sign for the end of a word."""
    current = words[-1] if words else ""
    known = max(current.rfind(":"), current.rfind("=")) + 1 if shell == "bash" else 0
    for candidate in candidates:
        if candidate == FILES:
            yield FILES.word
        else:
            word, description = candidate
            yield word[known:] if shell == "bash" else f"{word}\t{description}"


_BASH = r"""# Completion of harp for bash. Put this into ~/.bashrc:  eval "$(harp completion bash)"
_harp_complete() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$' \t\n'
    local -a words
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    mapfile -t COMPREPLY < <("${words[0]}" complete-line bash -- "${words[@]:1}" 2>/dev/null)
    if [[ ${COMPREPLY[0]} == :files ]]; then
        COMPREPLY=()
        compopt -o default
    elif [[ ${COMPREPLY[0]} == *: ]]; then
        compopt -o nospace
    fi
}
complete -F _harp_complete harp
"""

_ZSH = r"""#compdef harp
# Completion of harp for zsh. Put this into ~/.zshrc, after compinit:  eval "$(harp completion zsh)"
_harp_complete() {
    local -a lines candidates shown
    local line
    lines=("${(@f)$("${words[1]}" complete-line zsh -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    for line in "${lines[@]}"; do
        [[ -n $line ]] || continue
        candidates+=("${line%%$'\t'*}")
        shown+=("${line%%$'\t'*}  ${line#*$'\t'}")
    done
    if [[ ${candidates[1]} == :files ]]; then
        _files
    elif [[ ${candidates[1]} == *: ]]; then
        compadd -Q -S '' -- "${candidates[@]}"
    else
        compadd -Q -l -d shown -- "${candidates[@]}"
    fi
}
compdef _harp_complete harp
"""

_FISH = r"""# Completion of harp for fish. Save this as ~/.config/fish/completions/harp.fish
function __harp_complete
    set -l words (commandline -opc) (commandline -ct)
    command $words[1] complete-line fish -- $words[2..-1] 2>/dev/null | string match -v :files
end
complete -c harp -f -a '(__harp_complete)'
complete -c harp -l ca-file -r -F
complete -c harp -l certfile -r -F
complete -c harp -l keyfile -r -F
complete -c harp -l token-file -r -F
"""

#: The scripts by shell.
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def caller_with_deadline(arguments: dict[str, Any]) -> HarpCaller:
    """Return a client that gives up after `DEADLINE`."""
    return HarpCaller(**{**arguments, "request_timeout": DEADLINE, "reconnect": 0.0, "keep_alive": False})
