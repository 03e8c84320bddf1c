"""Text of peers on a terminal: control characters could change what the reader sees, or what the terminal does."""

from __future__ import annotations

import re
from typing import TextIO

#: Control characters but tab and line feed, and characters that change the direction of text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escape_controls(text: str) -> str:
    r"""Return a text with each control character as ``\uXXXX``, which is also its form in JSON."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def print_escaped(text: object, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a text of a peer as `print` does, with escaped control characters. Raises OSError."""
    print(escape_controls(str(text)), file=file, flush=flush)
