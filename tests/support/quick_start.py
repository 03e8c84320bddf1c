"""The README's quick start, read from the README's text: steps, commands, and files that are copied by hand."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["CopiedFiles", "QuickStart", "Step", "read_quick_start"]

_SECTION = re.compile(r"^## Two servers of your own.*?\n(.*?)^## ", re.MULTILINE | re.DOTALL)
_STEP = re.compile(r"^\*\*\d+\. .+?, on (?:(both)|`(\w+)`)", re.MULTILINE)
_SERVER = re.compile(r"`dispatcher` and `(\w+)` \(([\d.]+)\)")
_COPY = re.compile(r"Copy `(\S+)` and `(\S+)` to `(\w+)` as `(\S+)`\s+and `(\S+)`\s+\(mode (\d+)\)")


@dataclass(frozen=True)
class Step:
    """A step: on which machines, and its commands, each on one line."""

    machines: tuple[str, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class CopiedFiles:
    """Files that the reader copies by hand from the machine of the step to another: pairs of source and target."""

    target: str
    files: tuple[tuple[str, str], ...]
    mode: str


@dataclass(frozen=True)
class QuickStart:
    """The quick start.

    Attributes:
        server: the name of the machine that runs harpd.
        address: its address.
        renewal: the command that renews the certificate.
        reload: the command that the server needs after its certificate was renewed.
        steps: all steps, in order.
        copied: the files that are copied by hand after step 2.
    """

    server: str
    address: str
    renewal: str
    reload: str
    steps: tuple[Step, ...]
    copied: CopiedFiles


def read_quick_start(text: str) -> QuickStart:
    """Read the quick start from the README's text. Raises AssertionError where the text is not as expected."""
    section = _SECTION.search(text)
    assert section is not None, "the README has no quick start"
    body = section[1]
    server = _SERVER.search(body)
    assert server is not None, "the quick start does not name the server and its address"
    copied = _COPY.search(" ".join(body.split()))
    assert copied is not None, "the quick start does not tell which files to copy"
    renewal = re.search(r"run `(.+?)`, copy the new `\S+`, and `(.+?)`", " ".join(body.split()))
    assert renewal is not None, "the quick start does not tell how to renew the certificate"
    source1, source2, target, target1, target2, mode = copied.groups()
    begins = list(_STEP.finditer(body))
    ends = [begin.start() for begin in begins[1:]] + [len(body)]
    assert len(begins) == body.count("\n**"), "a step of the quick start does not tell its machine"
    steps = []
    for begin, end in zip(begins, ends, strict=True):
        machines = ("dispatcher", server[1]) if begin[1] else (begin[2],)
        steps.append(Step(machines, _commands(body[begin.end() : end])))
    files = CopiedFiles(target, ((source1, target1), (source2, target2)), mode)
    return QuickStart(server[1], server[2], renewal[1], renewal[2], tuple(steps), files)


def _commands(text: str) -> tuple[str, ...]:
    """Return the commands of the indented blocks; a line that ends with a backslash continues in the next one."""
    lines = "".join(f"{line[4:]}\n" for line in text.splitlines() if line.startswith("    "))
    return tuple(filter(None, lines.replace("\\\n", "").split("\n")))  # as the shell joins them
