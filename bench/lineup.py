"""Who takes part in what, ours first."""

from __future__ import annotations

from bench import alone, ours, theirs
from bench.contenders import Contender

__all__ = ["LINEUP"]

#: The contenders of each part.
LINEUP: dict[str, tuple[Contender, ...]] = {
    "direct": (ours.DIRECT, *theirs.DIRECT),
    "jobs": (ours.JOBS, *theirs.JOBS),
    "stream": (ours.STREAM, *theirs.STREAM),
    "store": (alone.STORE,),
    "start": (alone.START,),
    "wide": (alone.WIDE,),
    "depth": (alone.DEPTH,),
    "sustained": (alone.SUSTAINED,),
}
