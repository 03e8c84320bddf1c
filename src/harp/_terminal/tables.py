"""Tables and pages on a terminal, in colour if the package `rich` is installed; otherwise and in files as plain text.

A layout is computed once for both: lines of spans, each with the name of a style. No text is markup.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple, TextIO

from harp.protocol.printing import escape_controls

#: The names of styles, and what they are in `rich`.
STYLES = {
    "": "",
    "title": "bold",
    "dim": "dim",
    "good": "green",
    "bad": "bold red",
    "busy": "cyan",
    "waiting": "yellow",
    "off": "magenta",
}
#: The styles of states: of jobs, and of hosts.
OF_STATE = {
    "returned": "good",
    "running": "busy",
    "queued": "waiting",
    "cancelled": "off",
    "raised": "bad",
    "failed": "bad",
    "up": "good",
    "down": "bad",
}
_GAP = "  "
#: Characters: a flexible column is not narrower.
MIN_FLEXIBLE = 12
_CUT = "…"
#: Control sequences that every terminal of today has.
_OTHER_SCREEN, _USUAL_SCREEN, _HOME = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l", "\x1b[H"
_CLEAR_REST_OF_LINE, _CLEAR_REST_OF_SCREEN = "\x1b[K", "\x1b[J"


class Span(NamedTuple):
    """A text with a style."""

    text: str
    style: str = ""


Line = Sequence[Span]


class Column(NamedTuple):
    """A column: its title, whether it is aligned to the right, and whether its texts may be cut."""

    title: str
    right: bool = False
    flexible: bool = False


def one_line(text: str) -> str:
    """Return a text of a peer as one harmless line: control characters, tabs and line feeds are escaped."""
    return escape_controls(text).replace("\n", "\\n").replace("\t", "\\t")


def width_of(text: str) -> int:
    """Return the number of cells that a text has on a terminal."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return len(text) + wide - sum(unicodedata.combining(each) != 0 or each in "\u200b\u200d\ufeff" for each in text)


def cut(text: str, width: int) -> str:
    """Return a text of at most this width; a cut one ends with an ellipsis."""
    if width_of(text) <= width:
        return text
    taken, found = 0, []
    for character in text:
        taken += width_of(character)
        if taken > width - 1:
            break
        found.append(character)
    return "".join(found) + _CUT


def lay_out(
    columns: Sequence[Column], rows: Sequence[Sequence[Span]], width: int | None, least: int = MIN_FLEXIBLE
) -> list[Line]:
    """Return the lines of a table; with a `width`, flexible columns are cut to it, but not below `least`."""
    rows = [[Span(one_line(cell.text), cell.style) for cell in row] for row in rows]
    widths = [
        max([width_of(column.title), *(width_of(row[index].text) for row in rows)])
        for index, column in enumerate(columns)
    ]
    if width is not None:
        _shrink(columns, widths, width - len(_GAP) * (len(columns) - 1), least)
    titles = [Span(column.title, "title") for column in columns]
    return [_line(columns, row, widths) for row in (titles, *rows)]


def _shrink(columns: Sequence[Column], widths: list[int], width: int, least: int) -> None:
    """Make the widest flexible column narrower until all fit, or all have their minimum."""
    flexible = [index for index, column in enumerate(columns) if column.flexible]
    while sum(widths) > width and flexible:
        widest = max(flexible, key=widths.__getitem__)
        if widths[widest] <= least:
            return
        widths[widest] -= 1


def _line(columns: Sequence[Column], cells: Sequence[Span], widths: Sequence[int]) -> Line:
    spans: list[Span] = []
    for index, (column, cell, width) in enumerate(zip(columns, cells, widths, strict=True)):
        text = cut(cell.text, width) if column.flexible else cell.text
        space = " " * (width - width_of(text))
        if index:
            spans.append(Span(_GAP))
        if column.right and space:
            spans.append(Span(space))
        spans.append(Span(text, cell.style))
        if not column.right and index < len(columns) - 1:
            spans.append(Span(space))
    return spans


# Output.


class Screen:
    """Standard output: whether it is a terminal, how wide it is, and lines with styles on it."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = sys.stdout if file is None else file
        self.is_terminal = self._file.isatty()
        #: Whether the terminal can be drawn on again.
        self.can_redraw = self.is_terminal and os.environ.get("TERM", "dumb") != "dumb"
        self._console = _console(self._file) if self.is_terminal else None

    @property
    def size(self) -> tuple[int, int] | None:
        """The columns and lines of the terminal; None: it is not one."""
        found = shutil.get_terminal_size()
        return (found.columns, found.lines) if self.is_terminal else None

    @property
    def width(self) -> int | None:
        """The columns of the terminal; None: it is not one."""
        return None if self.size is None else self.size[0]

    def print(self, lines: Iterable[Line], end: str = "\n") -> None:
        """Print lines, each with this end. Raises OSError."""
        for line in lines:
            if self._console is None:
                self._file.write("".join(span.text for span in line).rstrip() + end)
            else:
                self._console.print(_text(line), soft_wrap=True, end=end)
        self._file.flush()

    def print_json(self, values: Iterable[Any], is_array: bool = False) -> None:
        """Print values as JSON Lines as they come, or as one array. Raises OSError."""
        texts: Iterable[str] = (escape_controls(json.dumps(value)) for value in values)
        if is_array:
            texts = [f"[{', '.join(texts)}]"]
        for text in texts:
            self._file.write(text + "\n")
            self._file.flush()

    @contextmanager
    def redrawn(self) -> Iterator[Callable[[Sequence[Line]], None]]:
        """Provide a function that replaces the whole screen by lines; at the end, the terminal shows what it did."""

        def redraw(lines: Sequence[Line]) -> None:
            self._file.write(_HOME)
            self.print(lines[:-1], _CLEAR_REST_OF_LINE + "\n")
            self.print(lines[-1:], _CLEAR_REST_OF_SCREEN)

        self._file.write(_OTHER_SCREEN)
        try:
            yield redraw
        finally:
            self._file.write(_USUAL_SCREEN)
            self._file.flush()


def _console(file: TextIO) -> Any:
    """Return a console of `rich`; None: it is not installed."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _text(line: Line) -> Any:
    from rich.text import Text

    return Text.assemble(*[(span.text, STYLES[span.style]) for span in line], end="")


# Times.


def format_time(seconds: float | None, now: float, is_short: bool = True) -> str:
    """Return local time: the time of today, or else the date with the time; long ones have the time of each day."""
    if seconds is None:
        return ""
    try:
        at, today = datetime.fromtimestamp(seconds), datetime.fromtimestamp(now)
    except (OverflowError, OSError, ValueError):
        return "?"
    if not is_short:
        return f"{at:%Y-%m-%d %H:%M:%S}"
    if at.date() == today.date():
        return f"{at:%H:%M:%S}"
    return f"{at:%m-%d %H:%M}" if at.year == today.year else f"{at:%Y-%m-%d}"


def format_duration(seconds: float | None) -> str:
    """Return a duration as 0.25s, 12s, 4m12s, 3h05m or 2d04h."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{max(0.0, seconds):.2f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, days = minutes // 60, minutes // 1440
    if not minutes:
        return f"{rest}s"
    if not hours:
        return f"{minutes}m{rest:02}s"
    return f"{hours}h{minutes % 60:02}m" if not days else f"{days}d{hours % 24:02}h"
