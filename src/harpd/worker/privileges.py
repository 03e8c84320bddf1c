"""The user of a call: find the ids that a procedure names, and change to that user irrevocably."""

from __future__ import annotations

import grp
import os
import pwd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from harpd.proc import Identity

#: The group of a user that the system does not know and for whom no group is configured: nogroup, with no rights.
_OVERFLOW_GROUP = 65534


class UserError(Exception):
    """The user or group is unknown, or the change to it failed. The message says which and why."""


def change_user(user: Identity | None, groups: Sequence[Identity] | None) -> None:
    """Change to a user and groups irrevocably, and set the environment and the owner of the output pipes.

    Args:
        user: id or name of the user; None: no change.
        groups: ids or names of groups, the first is primary, all are supplementary. None: a user that the system knows
            gets its own groups; another user id gets group 65534 and no supplementary group.

    Raises:
        UserError: a name is not known, or the system has refused. The process must not continue.
    """
    credentials = resolve_credentials(user, groups)
    uid, entry = credentials.uid, credentials.entry
    if uid is not None:
        # Many shell scripts open these pipes again by name, as /dev/stderr.
        for stream in (1, 2):
            try:
                os.fchown(stream, uid, -1)
            except (OSError, OverflowError):
                break
    drop_privileges(credentials)
    if entry is not None:
        os.environ.update(USER=entry.pw_name, LOGNAME=entry.pw_name, HOME=entry.pw_dir or "/")
    elif uid is not None:  # a user that the system does not know, so the variables are another user's
        os.environ["HOME"] = "/"
        os.environ.pop("USER", None)
        os.environ.pop("LOGNAME", None)


class Credentials:
    """The user and groups of a call. None: those of the daemon.

    Attributes:
        uid: the user id.
        gid: the primary group id.
        groups: the ids of all groups; None if `gid` is None.
        entry: the entry of the user, if the system knows it.
    """

    def __init__(
        self, uid: int | None, gid: int | None, groups: tuple[int, ...] | None, entry: pwd.struct_passwd | None
    ) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.entry = entry


def resolve_credentials(uid: Identity | None, gid: Sequence[Identity] | None) -> Credentials:
    """Return the ids of a user and its groups, see `change_user`. Raises `UserError`: a name is not known."""
    number, entry = _find_user(uid)
    if gid is not None:
        groups = tuple(dict.fromkeys(_group_id(group) for group in gid))
        return Credentials(number, groups[0], groups, entry)
    if entry:
        return Credentials(number, entry.pw_gid, tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)), entry)
    if number is None:
        return Credentials(None, None, None, None)
    return Credentials(number, _OVERFLOW_GROUP, (), None)


def _find_user(uid: Identity | None) -> tuple[int | None, pwd.struct_passwd | None]:
    """Return the user's id, and its entry if the system knows it."""
    if uid is None:
        return None, None
    try:
        entry = pwd.getpwnam(uid) if isinstance(uid, str) else pwd.getpwuid(uid)
    except (KeyError, ValueError) as error:  # ValueError: a character that no name has
        if isinstance(uid, int):
            return uid, None
        if uid.isdecimal():
            return _find_user(int(uid))
        raise UserError(f"unknown user: {uid!r}") from error
    return entry.pw_uid, entry


def _group_id(group: Identity) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError) as error:
        if group.isdecimal():
            return int(group)
        raise UserError(f"unknown group: {group!r}") from error


def drop_privileges(credentials: Credentials) -> None:
    """Change to this user irrevocably, groups first and user last, then verify the result.

    Raises:
        UserError: the system has refused. The process must not continue.
    """
    try:
        if credentials.groups is not None and credentials.gid is not None:
            if set(os.getgroups()) != set(credentials.groups):
                os.setgroups(credentials.groups)
            os.setresgid(credentials.gid, credentials.gid, credentials.gid)
        if credentials.uid is not None:
            os.setresuid(credentials.uid, credentials.uid, credentials.uid)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot change to user {credentials.uid}, group {credentials.gid}: {error}") from error
    if credentials.uid is not None and os.getresuid() != (credentials.uid,) * 3:
        raise UserError(f"change to user {credentials.uid} had no effect")
    if credentials.gid is not None and os.getresgid() != (credentials.gid,) * 3:
        raise UserError(f"change to group {credentials.gid} had no effect")
    if credentials.groups is not None and not set(os.getgroups()) <= {*credentials.groups, credentials.gid}:
        raise UserError(f"change to groups {credentials.groups} had no effect")
