"""The picture of the results as SVG: a panel for each row, a bar for each contender, HARP's in colour.

Greys and blue are readable on white and on black; the background is transparent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from bench.results import OURS, Entry, figure

#: Rows that have a panel, in this order.
PICTURED = ("fresh-16", "kept-16", "reused-16", "long-stream", "jobs", "reused-jobs", "submit-16", "latency-p50")

_TEXT, _OURS, _OTHERS = "#7d8590", "#2f81f7", "#8b949e99"
#: Pixels: of a column, of the names and of the figures beside the bars, of a line and of a panel's head and foot.
_COLUMN, _NAMES, _FIGURES, _LINE, _HEAD, _FOOT, _MARGIN = 450, 175, 105, 14, 17, 8, 10


def draw(document: Mapping[str, Any]) -> str:
    """Return the picture of a document that `bench.results.write` writes."""
    panels = [[entry for entry in document["rows"] if entry["row"] == row] for row in PICTURED]
    heights = [20, 20]
    parts: list[str] = []
    for entries in filter(None, panels):
        column = heights.index(min(heights))
        parts += _panel(entries, _MARGIN + column * (_COLUMN + _MARGIN), heights[column])
        heights[column] += _HEAD + _LINE * len(entries) + _FOOT
    width, height = 2 * _COLUMN + 3 * _MARGIN, max(heights)
    title = "HARP and its peers on the same work"
    note = "blue: HARP; hollow: not synced to disk; in brackets: HARP's figure divided by this one"
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    font = 'font-family="system-ui, sans-serif" font-size="11"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img" aria-label="{title}">'
    return "\n".join([head, f"<title>{title}</title>", _text(_MARGIN, 12, note), *parts, "</svg>\n"])


def _panel(entries: Sequence[Entry], x: int, y: int) -> list[str]:
    first = entries[0]
    unit = first["unit"] + (", less is better" if first["less_is_better"] else "")
    parts = [_text(x, y + 12, f"{first['title']} ({unit})", weight="bold")]
    scale = (_COLUMN - _NAMES - _FIGURES) / max(entry["max"] for entry in entries)
    left = x + _NAMES
    for number, entry in enumerate(entries):
        top = y + _HEAD + _LINE * number
        colour, middle = _OURS if entry["contender"] == OURS else _OTHERS, top + _LINE / 2
        paint = f'fill="{colour if entry["durable"] else "none"}" stroke="{colour}"'
        start, end = (left + scale * entry[key] for key in ("min", "max"))
        ratio = f" ({figure(entry['ratio'])} x)" if "ratio" in entry else ""
        parts += [
            _text(left - 6, middle + 4, entry["contender"], anchor="end"),
            f'<rect x="{left}" y="{top + 2}" width="{scale * entry["median"]:.1f}" height="{_LINE - 4}" {paint}/>',
            f'<path d="M{start:.1f} {middle}H{end:.1f}" stroke="{_TEXT}"/>',
            _text(end + 6, middle + 4, figure(entry["median"]) + ratio),
        ]
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" fill="{_TEXT}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
