"""Who can change or read a file, by owners and modes: what sshd calls StrictModes.

A file is as safe as the directories above it: a user who can write to one of them can put another file in its place.
Access control lists count as far as they show in the mode of the group.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def describe_writer(path: Path) -> str | None:
    """Return how another user could change what a path names, and what to do; None: nobody could.

    Root, and the user of this process, may write. A missing file is checked by its directories.
    """
    absolute = Path(os.path.abspath(path))
    real = Path(os.path.realpath(path))
    for one in dict.fromkeys((*reversed(absolute.parents), absolute, *reversed(real.parents), real)):
        try:
            status = one.lstat()
        except OSError:
            continue
        if status.st_uid not in (0, os.geteuid()):
            return f"{one}: owned by user {status.st_uid}, who can change it; change the owner to root"
        if _is_writable(status):
            return f"{one}: other users can write to it; run: chmod go-w {one}"
    return None


def _is_writable(status: os.stat_result) -> bool:
    if stat.S_ISLNK(status.st_mode) or (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        return False  # a link has no mode; in such a directory, only the owner of an entry can replace it
    # The group of another user than root is usually a private one, and root's group has no other members.
    by_group = os.geteuid() == 0 and status.st_gid != 0 and status.st_mode & stat.S_IWGRP
    return bool(by_group or status.st_mode & stat.S_IWOTH)


def describe_reader(path: Path) -> str | None:
    """Return a warning and what to do if every user can read a file; otherwise None."""
    try:
        readable = path.stat().st_mode & stat.S_IROTH
    except OSError:
        return None
    return f"{path}: every user can read it; run: chmod o-rwx {path}" if readable else None
