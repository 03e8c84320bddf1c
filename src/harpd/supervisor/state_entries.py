"""Entries of a state file: the state of one call each, with a checksum. Pure: nothing here opens a file.

A damaged entry is rejected alone: the others of its file stay valid.

Spec: docs/state-file.md, Entries.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from harp.protocol.json_text import InvalidJSON, Raw, dumps, loads
from harpd.processes.cgroup import Cgroup
from harpd.processes.cookie import cookie_for
from harpd.processes.process_tree import CallTree

#: The version of the format. File names end in it, so that a supervisor reads no file of another version.
VERSION = 1
#: Bytes of an entry: one page of memory, which the kernel writes in one piece.
ENTRY_SIZE = 4096
#: A call's id is an entry of the environment and the name of a cgroup. The frontend uses UUIDs.
CALL_ID = re.compile(r"[0-9A-Za-z-]{1,36}")

_ENTRY = re.compile(rb"([RES]) ([0-9a-f]{8}) ([^\n]*)\n")


class Purpose(Enum):
    """What a later supervisor has to do for a call."""

    STOP_AND_REPORT = b"R"
    ONLY_REPORT = b"E"
    ONLY_STOP = b"S"


class InvalidEntry(ValueError):
    """An entry that is damaged, or that no supervisor has written. The message has the reason."""


@dataclass(frozen=True, slots=True)
class CallState:
    """The state of a call, as a later supervisor finds it.

    Attributes:
        tree: its processes.
        session: the members of its resumable session, not checked; None: it is connection-bound.
    """

    tree: CallTree
    session: Mapping[str, Any] | None


def encode_state(call_id: str, boot: str, tree: CallTree, session: Raw | None) -> bytes:
    """Return the content of a call's entry. Processes are identified until the next boot, so it has the boot id."""
    cgroup = b"" if tree.cgroup is None else b',"cgroup":%b' % dumps(tree.cgroup.path)
    resumable = b"" if session is None else b',"resumable":%b' % session
    head = f'{{"call":"{call_id}","boot":"{boot}","pid":{tree.pid},"start":{tree.start}'
    return b"%b%b%b}" % (head.encode(), cgroup, resumable)


def decode_state(content: bytes, boot: str) -> tuple[str, CallState] | None:
    """Return the id and the state of a call; None if it is from another boot. Raises `InvalidEntry`."""
    try:
        members = loads(content)
        call_id, pid, start, cgroup = members["call"], members["pid"], members["start"], members.get("cgroup")
        valid = type(pid) is int and type(start) is int and pid > 1 and start >= 0 and CALL_ID.fullmatch(call_id)
        # Its own cgroup and no other one: all processes in it are killed.
        if not valid or not (cgroup is None or cgroup.endswith(f"/call-{call_id}")):
            raise InvalidEntry("it does not describe a call")
        if members["boot"] != boot:
            return None
    except (InvalidJSON, KeyError, TypeError, AttributeError) as error:
        raise InvalidEntry(f"it does not describe a call: {error!r}") from error
    tree = CallTree(pid, start, cookie_for(call_id), None if cgroup is None else Cgroup(cgroup))
    return call_id, CallState(tree, members.get("resumable"))


def encode_entry(purpose: Purpose, content: bytes) -> bytes:
    """Return the bytes of an entry, of which there are at most `ENTRY_SIZE`."""
    letter = purpose.value
    return b"%b %08x %b\n" % (letter, zlib.crc32(content, zlib.crc32(letter)), content)


def decode_entry(data: bytes) -> tuple[Purpose, bytes] | None:
    """Return purpose and content of an entry; None if it is not in use. Raises `InvalidEntry`."""
    if not data or data.startswith(b"\0"):
        return None
    found = _ENTRY.match(data)
    if found is None:
        raise InvalidEntry("it is not an entry")
    purpose, checksum, content = found.groups()
    if int(checksum, 16) != zlib.crc32(content, zlib.crc32(purpose)):
        raise InvalidEntry("the checksum is wrong")
    return Purpose(purpose), content
