"""Who is measured: how each is started, what of the works it does, and what it puts on stable storage when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bench.processes import Client
from bench.works import Sizes

__all__ = ["OURS", "Contender", "Place"]

#: The contender whose figures are divided by those of the others.
OURS = "HARP"


@dataclass(frozen=True)
class Place:
    """Where a contender works for a run.

    Attributes:
        directory: its own and empty.
        shared: a directory that stays from run to run.
        peers: the Python that has the peers' packages; None: there is none.
        sizes: how much is measured.
    """

    directory: Path
    shared: Path
    peers: Path | None
    sizes: Sizes


#: Starts what a contender needs, gives its client, and ends all.
Serve = Callable[[Place], AbstractContextManager[Client]]


@dataclass(frozen=True)
class Contender:
    """One way to do the works of a part.

    Attributes:
        name: for tables.
        durability: what is synced when.
        works: the works that it does, and what they are called in its client.
        serve: starts it.
        ours: whether it is ours.
        losing: whether it can lose what it has accepted, when the machine dies.
    """

    name: str
    durability: str
    works: Mapping[str, str]
    serve: Serve
    ours: bool = False
    losing: bool = False
