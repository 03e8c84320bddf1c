"""Job ids: UUIDs that ascend in the order of submission, only for speed (docs/decisions/0016)."""

from __future__ import annotations

import re
from os import urandom
from struct import unpack

_FORM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


def new_job_id(now: float) -> str:
    """Return a new job id; `now` is Unix seconds."""
    return new_job_ids(now, 1)[0]


def new_job_ids(now: float, count: int) -> list[str]:
    """Return UUIDs of version 7 (RFC 9562, section 6.2, method 3): the time in 1/4096 ms, and 62 random bits.

    They ascend: each has the next time.
    """
    first = int(now * 4096_000)
    stamps = [f"{time & (1 << 60) - 1:015x}" for time in range(first, first + count)]
    tails = [f"{0b10 << 62 | random >> 2:016x}" for random in unpack(f">{count}Q", urandom(8 * count))]
    return [
        f"{stamp[:8]}-{stamp[8:12]}-7{stamp[12:]}-{tail[:4]}-{tail[4:]}"
        for stamp, tail in zip(stamps, tails, strict=True)
    ]


def is_job_id(text: str) -> bool:
    """Return whether a text has the form of a job id: a UUID of any version, because older ids have version 4."""
    return _FORM.fullmatch(text) is not None
