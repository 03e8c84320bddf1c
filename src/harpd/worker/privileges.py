"""Taking a user: which ids a procedure asks for, and becoming that user for good."""

from __future__ import annotations

import grp
import os
import pwd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Credentials", "UserError", "drop_privileges", "resolve_credentials"]

#: The group of a user that the system does not know when none is asked for: nobody's, and none of root's.
_OVERFLOW_GROUP = 65534


class UserError(Exception):
    """The user or group is unknown, or can't be taken. The message says which and why."""


class Credentials:
    """Whom a call runs as. None: as the daemon itself.

    Attributes:
        uid: the user's number.
        gid: the primary group's number.
        groups: all groups' numbers; None with `gid` None.
        name: the user's name, if the system knows it.
        home: the user's home directory, if known.
    """

    __slots__ = ("gid", "groups", "home", "name", "uid")

    def __init__(
        self,
        uid: int | None,
        gid: int | None,
        groups: tuple[int, ...] | None,
        name: str | None = None,
        home: str | None = None,
    ) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.name = name
        self.home = home


def resolve_credentials(uid: int | str | None, gid: Sequence[int | str] | None) -> Credentials:
    """Find the numbers.

    Args:
        uid: number or name of the user, None: unchanged.
        gid: numbers or names of groups, the first is primary, all are supplementary. None: a user that the system
            knows has its own groups; a number that it does not know has none but 65534.

    Raises:
        UserError: a name is not known.
    """
    number, entry = _find_user(uid)
    name, home = (entry.pw_name, entry.pw_dir) if entry else (None, None)
    if gid is not None:
        groups = tuple(dict.fromkeys(_group_number(group) for group in gid))
        return Credentials(number, groups[0], groups, name, home)
    if entry:
        return Credentials(number, entry.pw_gid, tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)), name, home)
    if number is None:
        return Credentials(None, None, None)
    return Credentials(number, _OVERFLOW_GROUP, ())


def _find_user(uid: int | str | None) -> tuple[int | None, pwd.struct_passwd | None]:
    """The user's number, and its entry if the system knows it."""
    if uid is None:
        return None, None
    try:
        entry = pwd.getpwnam(uid) if isinstance(uid, str) else pwd.getpwuid(uid)
    except (KeyError, ValueError) as error:  # the latter: no name has such characters
        if isinstance(uid, int):
            return uid, None
        if uid.isdecimal():
            return _find_user(int(uid))
        raise UserError(f"no user is called {uid!r}") from error
    return entry.pw_uid, entry


def _group_number(group: int | str) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError) as error:
        if group.isdecimal():
            return int(group)
        raise UserError(f"no group is called {group!r}") from error


def drop_privileges(account: Credentials) -> None:
    """Become the account, for good: groups first, user last, then look whether it is so.

    Raises:
        UserError: the system refused. The process must not go on.
    """
    try:
        if account.groups is not None and account.gid is not None:
            if set(os.getgroups()) != set(account.groups):
                os.setgroups(account.groups)
            os.setresgid(account.gid, account.gid, account.gid)
        if account.uid is not None:
            os.setresuid(account.uid, account.uid, account.uid)
    except (OSError, OverflowError) as error:
        raise UserError(f"can't become user {account.uid}, group {account.gid}: {error}") from error
    if account.uid is not None and os.getresuid() != (account.uid,) * 3:
        raise UserError(f"user {account.uid} was not taken")
    if account.gid is not None and os.getresgid() != (account.gid,) * 3:
        raise UserError(f"group {account.gid} was not taken")
    if account.groups is not None and not set(os.getgroups()) <= {*account.groups, account.gid}:
        raise UserError(f"the groups {account.groups} were not taken")
