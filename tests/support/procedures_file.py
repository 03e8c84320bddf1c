"""What tests write to procedures files.

with Harpd(tmp_path, PROCEDURES + MORE) as harpd: ...
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["BROKEN", "CHANGED", "PROCEDURES"]

#: The text of `support.procedures`.
PROCEDURES = Path(__file__).with_name("procedures.py").read_text()

#: The same with another `version`.
CHANGED = PROCEDURES.replace("VERSION = 1\n", "VERSION = 2\n")

#: What cannot be loaded.
BROKEN = "raise RuntimeError('broken on purpose')\n"
