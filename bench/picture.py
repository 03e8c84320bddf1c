"""The picture of a run: for each row a bar for each contender, ours in colour, with the least and the most of its runs.

SVG, written by hand: text and shapes are in greys and a blue that are readable on white and on black, the ground is
transparent.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from xml.sax.saxutils import escape

from bench.figures import Line, Results
from bench.table import figure, times
from bench.works import Row

__all__ = ["draw"]

_TEXT, _FAINT, _OURS, _THEIRS, _SPREAD = "#7d8590", "#7d859055", "#2f81f7", "#8b949e99", "#7d8590"

#: Pixels.
_WIDTH, _LEFT, _RIGHT = 860, 275, 165
_BAR, _GAP, _HEAD, _FOOT, _MARGIN = 14, 6, 26, 18, 12


def draw(rows: Sequence[Row], results: Results, ours: str, title: str, losing: Collection[str] = ()) -> str:
    """The picture as SVG.

    Args:
        rows: what is shown, from above; those without figures are not.
        results: what was measured.
        ours: the contender that is ours.
        title: a line above everything.
        losing: contenders that can lose what they have accepted: their bars are hollow.
    """
    parts: list[str] = []
    y = 2 * _MARGIN + 12
    for row in rows:
        lines = list(results.lines(row, ours))
        if lines:
            y = _panel(parts, row, lines, ours, losing, y)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" height="{y}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label={_quoted(title)}>'
    )
    legend = _text(
        _WIDTH - _MARGIN, 22, "in brackets: ours/theirs; hollow: can lose what it has accepted", anchor="end"
    )
    above = [f"<title>{escape(title)}</title>", _text(_MARGIN, 22, title, size=14), legend]
    return "\n".join([head, *above, *parts, "</svg>\n"])


def _panel(parts: list[str], row: Row, lines: Sequence[Line], ours: str, losing: Collection[str], y: int) -> int:
    """Draw a row; return where the next begins."""
    better = "less is better" if row.less else "more is better"
    parts.append(_text(_MARGIN, y + 16, row.title, weight="bold"))
    parts.append(_text(_WIDTH - _MARGIN, y + 16, f"{row.unit}, {better}", anchor="end"))
    y += _HEAD
    scale = (_WIDTH - _LEFT - _RIGHT) / max(max(line.spread.most for line in lines), 1e-9)
    for line in lines:
        middle = y + _BAR / 2
        spread = line.spread
        colour = _OURS if line.contender == ours else _THEIRS
        parts.append(
            _text(_LEFT - 8, middle + 4, line.contender, anchor="end", colour=colour if colour == _OURS else _TEXT)
        )
        parts.append(_box(_LEFT, y, max(1.0, spread.median * scale), colour, hollow=line.contender in losing))
        parts.append(_line(_LEFT + spread.least * scale, _LEFT + spread.most * scale, middle))
        ratio = f"  ({times(line.ratio)})" if line.ratio else ""
        parts.append(_text(_LEFT + spread.most * scale + 8, middle + 4, f"{figure(spread.median)}{ratio}"))
        y += _BAR + _GAP
    parts.append(f'<path d="M{_LEFT} {y - _GAP + 3}V{y - len(lines) * (_BAR + _GAP) - 3}" stroke="{_FAINT}"/>')
    return y + _FOOT


def _quoted(text: str) -> str:
    return '"' + escape(text, {'"': "&quot;"}) + '"'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", colour: str = _TEXT, size: int = 12
) -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" font-size="{size}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, colour: str, *, hollow: bool) -> str:
    paint = f'fill="none" stroke="{colour}"' if hollow else f'fill="{colour}" stroke="{colour}"'
    return f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2" {paint}/>'


def _line(x1: float, x2: float, y: float) -> str:
    ends = "".join(f"M{x:.1f} {y - 3:.1f}V{y + 3:.1f}" for x in (x1, x2))
    return f'<path d="M{x1:.1f} {y:.1f}H{x2:.1f}{ends}" stroke="{_SPREAD}" fill="none"/>'
