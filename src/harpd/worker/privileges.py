"""The user of a call: find the ids that a procedure names, and change to that user irrevocably."""

from __future__ import annotations

import grp
import os
import pwd

from harpd.worker.environment import user_variables

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from harpd.proc import Identity

#: The group of a user without an entry and without a configured group: nogroup, which has no rights.
_OVERFLOW_GROUP = 65534


class UserError(Exception):
    """The user or group is unknown, or the change to it failed. The message names it and has the reason."""


def change_user(user: Identity | None, groups: Sequence[Identity] | None) -> None:
    """Change to a user and groups irrevocably, and set the environment and the owner of the output pipes.

    The first group is primary, all are supplementary. None: a user with an entry in the user database gets its primary
    group only; another user id gets group 65534 and no supplementary group. Without a user, no user is changed.

    Raises `UserError`: a name is unknown, or the system has refused. The process must not continue.
    """
    uid, gid, group_ids, entry = resolve_credentials(user, groups)
    if uid is not None:
        # Many shell scripts open these pipes again by name, as /dev/stderr.
        for stream in (1, 2):
            try:
                os.fchown(stream, uid, -1)
            except (OSError, OverflowError):
                break
    drop_privileges(uid, gid, group_ids)
    if uid is not None:
        if entry is None:
            os.environ.pop("USER", None)  # of another user
            os.environ.pop("LOGNAME", None)
        os.environ.update(user_variables(entry))


def check_id_is_free(number: int) -> None:
    """Raise `UserError` if a user or a group of the system has this id, which is meant for calls only."""
    for kind, find in (("user", pwd.getpwuid), ("group", grp.getgrgid)):
        try:
            name = find(number)[0]
        except KeyError:
            continue
        raise UserError(f"id {number} of dynamic_uids is that of {kind} {name}; set another range")


def user_id(user: Identity | None) -> int | None:
    """Return the id of a user, by default of this process's; None: the system does not know the name."""
    try:
        return os.geteuid() if user is None else _find_user(user)[0]
    except UserError:
        return None


def is_present_user(user: Identity | None) -> bool:
    """Return whether this process runs as a user already, with no further groups, or without the right to drop them."""
    try:
        uid, gid, _, _ = resolve_credentials(user, None)
    except UserError:
        return False
    if set(os.getresuid()) != {uid}:
        return False
    return uid != 0 or (set(os.getresgid()) == {gid} and set(os.getgroups()) <= {gid})


def resolve_credentials(
    user: Identity | None, groups: Sequence[Identity] | None
) -> tuple[int | None, int | None, tuple[int, ...] | None, pwd.struct_passwd | None]:
    """Return user id, primary group id, ids of all groups, None for the daemon's, and the user's entry if any.

    The arguments are those of `change_user`. Raises `UserError`.
    """
    uid, entry = (None, None) if user is None else _find_user(user)
    if groups is not None:
        group_ids = tuple(dict.fromkeys(_group_id(group) for group in groups))
        return uid, group_ids[0], group_ids, entry
    if entry:
        return uid, entry.pw_gid, (entry.pw_gid,), entry
    return (None, None, None, None) if uid is None else (uid, _OVERFLOW_GROUP, (), None)


def _find_user(user: Identity) -> tuple[int, pwd.struct_passwd | None]:
    """Return the user's id, and its entry if it has one."""
    try:
        entry = pwd.getpwnam(user) if isinstance(user, str) else pwd.getpwuid(user)
    except (KeyError, ValueError) as error:  # ValueError: a character that no name has
        if isinstance(user, int):
            return user, None
        if user.isdecimal():
            return _find_user(int(user))
        raise UserError(f"unknown user: {user!r}") from error
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


def drop_privileges(uid: int | None, gid: int | None, groups: tuple[int, ...] | None) -> None:
    """Change to these ids irrevocably, groups first and user last, and verify that. Raises `UserError`."""
    try:
        if groups is not None and gid is not None:
            if set(os.getgroups()) != set(groups):
                os.setgroups(groups)
            os.setresgid(gid, gid, gid)
        if uid is not None:
            os.setresuid(uid, uid, uid)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot change to user {uid}, group {gid}: {error}") from error
    if uid is not None and os.getresuid() != (uid,) * 3:
        raise UserError(f"change to user {uid} had no effect")
    if gid is not None and os.getresgid() != (gid,) * 3:
        raise UserError(f"change to group {gid} had no effect")
    if groups is not None and not set(os.getgroups()) <= {*groups, gid}:
        raise UserError(f"change to groups {groups} had no effect")
