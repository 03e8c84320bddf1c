"""Fair shares of what a host stores for dispatchers: nobody can use up the part of the others.

An *account* is a user and, of this user, an owner: the id that a dispatcher gives itself. While there is room, an
account may use it all, so a host with one dispatcher has no other limit than before. When the limit is reached, an
account may still add until it has its share: each user has an equal part of the limit, and each owner an equal part of
its user's. An owner id is an invention of its user. So more owners take from their own user only, and a user with many
of them has at most twice its share.

The total can exceed the limit: by the shares of users who come later, which are smaller the more there are.
"""

from __future__ import annotations

from typing import NamedTuple


class Account(NamedTuple):
    """Who uses something."""

    user: str
    owner: str  # empty: the call is connection-bound


class FairShares:
    """Amounts by account."""

    def __init__(self) -> None:
        self.total = 0
        self._amounts: dict[str, dict[str, int]] = {}  # by user and owner; above 0
        self._users: dict[str, int] = {}  # the sums by user

    def add(self, account: Account, amount: int) -> None:
        """Add to the amount of an account; a negative one frees it."""
        user, owner = account
        self.total += amount
        owners = self._amounts.setdefault(user, {})
        owners[owner] = owners.get(owner, 0) + amount
        self._users[user] = self._users.get(user, 0) + amount
        if not owners[owner]:
            del owners[owner]
            if not owners:
                del self._amounts[user], self._users[user]

    def may_add(self, account: Account, limit: int) -> bool:
        """Return whether an account may add more: there is room below the limit, or it is below its share."""
        if self.total < limit:
            return True
        user, owner = account
        share = limit // (len(self._users) + (user not in self._users))
        amount = self._users.get(user, 0)
        if amount < share:
            return True
        owners = self._amounts.get(user, {})
        return amount < 2 * share and owners.get(owner, 0) < share // (len(owners) + (owner not in owners))
