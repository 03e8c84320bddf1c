"""Job ids: UUIDs in the order of submission, as precisely as the clock allows.

The store finds a job by its id in an index. Consecutive ids are neighbours there, so a new id goes to the page of the
last one, however many there are: see docs/decisions/0016. Nothing relies on their order.
"""

from __future__ import annotations

import re
import secrets

_FORM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)

# The resolution of the time in an id: 1/4096 of a millisecond.
_PARTS = 4096 * 1000
_STAMP_BITS = 60
_VARIANT = 0b10 << 62
_RANDOM_BITS = 62


def new_job_id(now: float) -> str:
    """Return a new job id: a UUID of version 7 (RFC 9562, with the finer clock of its section 6.2, method 3).

    Args:
        now: Unix seconds with fractions.

    Returns:
        The lower-case text form. 62 bits are random, so two ids of the same time differ.
    """
    stamp = int(now * _PARTS) & (1 << _STAMP_BITS) - 1
    text = f"{stamp >> 12:012x}7{stamp & 0xFFF:03x}{_VARIANT | secrets.randbits(_RANDOM_BITS):016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def is_job_id(text: str) -> bool:
    """Return whether a text has the form of a job id. A UUID of any version has it: older ids are of version 4."""
    return _FORM.fullmatch(text) is not None
