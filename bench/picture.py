"""The picture of the results as SVG: how many times faster or slower HARP is than each peer, on one logarithmic scale.

Each row of the picture has HARP's figure. Of jobs and records, it shows the peers that sync what they acknowledge, and
the best of the others; of calls, the three best. The colours are readable on white and on black.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any
from xml.sax.saxutils import escape

from bench.results import OURS, Entry, figure

#: Rows that are shown, in this order.
PICTURED = ("fresh-16", "kept-16", "reused-16", "jobs", "reused-jobs", "submit-16", "latency-p50", "long-stream")

_TEXT, _FASTER, _SLOWER = "#7d8590", "#2f81f7", "#d29922"
#: Pixels: width, left end of the scale and of the words beside it; heights of a title, a line and the head.
_WIDTH, _SCALE, _WORDS, _TITLE, _LINE, _HEAD = 860, 200, 745, 22, 17, 40
#: The least and the greatest ratio on the scale; a greater one is cut.
_LEAST, _GREATEST = 0.03, 100.0


def draw(document: Mapping[str, Any]) -> str:
    """Return the picture of a document that `bench.results.write` writes."""
    parts: list[str] = []
    height = _HEAD
    for key in PICTURED:
        ours, shown = _chosen([entry for entry in document["rows"] if entry["row"] == key])
        if ours is None or not shown:
            continue
        parts.append(_text(0, height + 16, f"{ours['title']}: {figure(ours['median'])} {ours['unit']}", weight="bold"))
        height += _TITLE
        for entry in shown:
            parts += _bar(entry, height)
            height += _LINE
    title = "HARP and its peers on the same work: how many times faster or slower HARP is"
    marks = [("10 x slower", 0.1), ("equal", 1.0), ("10 x faster", 10.0), ("100 x", 100.0)]
    axis = [
        part
        for words, ratio in marks
        for part in (
            f'<path d="M{_x(ratio):.0f} {_HEAD - 4}V{height}" stroke="{_TEXT}" opacity="0.4"/>',
            _text(_x(ratio), _HEAD - 8, words, anchor="middle"),
        )
    ]
    size = f'viewBox="0 0 {_WIDTH} {height + 6}" width="{_WIDTH}" height="{height + 6}"'
    font = 'font-family="system-ui, sans-serif" font-size="13"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img" aria-label="{title}">'
    note = "* synced to disk before it is acknowledged, as HARP's jobs and records are; thin line: range of the runs"
    return "\n".join([head, f"<title>{title}</title>", _text(0, 14, note), *axis, *parts, "</svg>\n"])


def _chosen(entries: Sequence[Entry]) -> tuple[Entry | None, list[Entry]]:
    """Return HARP's entry of a row, and those of the peers that are shown."""
    ours = next((entry for entry in entries if entry["contender"] == OURS), None)
    peers = [entry for entry in entries if "ratio" in entry and not entry["contender"].startswith("F")]
    others = [entry for entry in peers if not entry["durable"]]
    shown = others[: 1 if len(others) < len(peers) else 3]
    return ours, [entry for entry in peers if entry["durable"] or entry in shown]


def _bar(entry: Entry, y: int) -> list[str]:
    ratios = (entry[key] for key in ("ratio", "ratio_min", "ratio_max"))
    faster, *ends = (1 / ratio if entry["less_is_better"] else ratio for ratio in ratios)
    left, right = sorted((_x(1.0), _x(faster)))
    words = f"{figure(faster)} x faster" if faster >= 1 else f"{figure(1 / faster)} x slower"
    name = entry["contender"] + (" *" if entry["durable"] else "")
    colour = _FASTER if faster >= 1 else _SLOWER
    begin, end = sorted(map(_x, ends))
    return [
        _text(_SCALE - 8, y + 13, name, anchor="end"),
        f'<rect x="{left:.1f}" y="{y + 4}" width="{max(right - left, 1):.1f}" height="{_LINE - 6}" fill="{colour}"/>',
        f'<path d="M{begin:.1f} {y + 9.5}H{end:.1f}" stroke="{_TEXT}"/>',
        _text(_WORDS, y + 13, words),
    ]


def _x(ratio: float) -> float:
    """Return the place of a ratio on the scale, in pixels."""
    share = log10(min(max(ratio, _LEAST), _GREATEST) / _LEAST) / log10(_GREATEST / _LEAST)
    return _SCALE + share * (_WORDS - _SCALE - 12)


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" fill="{_TEXT}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
