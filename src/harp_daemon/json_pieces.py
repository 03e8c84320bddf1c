"""The check of a long JSON text in short steps, which also finds the members of its object or array.

Theory of operation. msgspec checks a text in one step, during which no other thread runs: 16 MiB can take seconds. So
the text is cut into pieces of at most `_PIECE` bytes, behind a bracket, comma or colon, or within a string. Each piece
is completed: the brackets and quotes that are open at its start are written in front of it, and the end has what closes
those that are open there. The text is valid if, and only if, all of its completed pieces are.

White space is cut anywhere. A number cannot be cut: the piece is longer if it has to be, and a number of more than
`_MAX_NUMBER` bytes is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import Enum

import msgspec

from harp.protocol.json_text import MAX_LINE_DEPTH, InvalidJSON

#: Bytes of a piece: about 0.15 ms, and seldom more than 0.5 ms.
_PIECE = 16 * 1024
_MAX_NUMBER = 32 * 1024
#: How often pairs of brackets are removed together, instead of one by one.
_ROUNDS = 3
_SPACE, _SPACES = b" \t\r\n", (b" ", b"\t", b"\r", b"\n")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STRUCTURE = re.compile(rb"[][{},:]")
_OPENING, _CLOSING, _ARRAY = b"[{", b"]}", ord("[")
_CLOSED_BY = bytes.maketrans(b"[{", b"]}")
#: What is open at a cut: the last character outside of strings (nothing after a complete value), or that the cut is
#: within the name or the value of a member, or behind its name.
_NAME, _VALUE, _NAMED = b"n", b"v", b"d"
#: The texts in front of a piece, in which a complete value is an empty string, and behind it.
_BEFORE_IN_OBJECT = {b"": b'{"":""', b",": b'{"":0,', b"{": b"{", b":": b'{"":'}
_BEFORE_IN_OBJECT |= {_NAME: b'{"', _VALUE: b'{"":"', _NAMED: b'{""'}
_BEFORE_IN_ARRAY = {b"": b'[""', b",": b"[0,", b"[": b"[", _VALUE: b'["'}
_BEHIND_IN_OBJECT = {b"": b"}", b",": b'"":0}', b"{": b"}", b":": b"0}", _NAME: b'":0}', _VALUE: b'"}', _NAMED: b":0}"}
_BEHIND_IN_ARRAY = {b"": b"]", b",": b"0]", b"[": b"]", _VALUE: b'"]'}


def _continue() -> None:
    pass


#: Called after each piece by the thread that checks a text; a daemon replaces it.
between_pieces: Callable[[], None] = _continue

_check = msgspec.json.Decoder(msgspec.Raw).decode


def find_parts(text: bytes, is_checked: bool = False) -> Iterator[tuple[int, int]]:
    """Yield start and end of each part of an object or array: what is between its brackets and commas.

    Unless the text was checked before, each piece is checked before its parts are yielded. An empty object has one
    part, of white space. Raises `InvalidJSON`, perhaps after the last part.
    """
    stack = bytearray()  # the open brackets
    opened = b""
    start = first = len(text) - len(text.lstrip(_SPACE))
    part = start + 1
    while start < len(text):
        before = _before(stack, opened) if start > first else b""
        end, masked, last, kind = _cut(text, start, opened)
        depth, lowest = len(stack), _follow(stack, masked)
        if kind is _Cut.STRUCTURE:
            opened = last if last not in (b"]", b"}") else b""
        elif kind is not _Cut.SPACE and (opened not in (_NAME, _VALUE) or last):
            last = last or opened
            opened = _NAME if last == b"{" or (last == b"," and stack[-1:] == b"{") else _VALUE
        if kind is _Cut.TOKEN:
            opened = _NAMED if opened == _NAME else b""
        if not is_checked:
            _check_piece(before, text[start:end], _behind(stack, opened), start)
        if lowest <= 1:
            for found in _STRUCTURE.finditer(masked):
                character = found[0]
                if character in _OPENING:
                    depth += 1
                elif character in _CLOSING:
                    depth -= 1
                if (depth == 1 and character == b",") or (depth == 0 and character in _CLOSING):
                    at = start + found.start()
                    yield part, at
                    part = at + 1
        start = end
        between_pieces()
    if stack or opened:
        raise InvalidJSON("the text is truncated")


class _Cut(Enum):
    """Where a piece ends."""

    STRUCTURE = "behind a bracket, comma or colon"
    STRING = "in a string"
    TOKEN = "behind a string or another value"  # noqa: S105
    SPACE = "in white space; the piece has nothing else"


def _cut(text: bytes, start: int, opened: bytes, size: int | None = None) -> tuple[int, bytes, bytes, _Cut]:
    """Return the end of the piece from `start` on, and the piece, with other characters in its strings.

    Also the last character of its structure, in front of the string at its end; and where it ends.
    """
    size = size or _PIECE
    piece = text[start : start + size]
    is_last = start + len(piece) == len(text)
    if b"\\" in piece:
        piece = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    begins_in_string = opened in (_NAME, _VALUE)
    parts = piece.split(b'"')
    for index in range(not begins_in_string, len(parts), 2):
        parts[index] = b"_" * len(parts[index])
    masked = b'"'.join(parts)
    in_string = begins_in_string is (len(parts) % 2 == 1)
    if in_string:
        outside = masked[: len(masked) - len(parts[-1]) - 1] if len(parts) > 1 else b""
        end = len(piece) if is_last else _end_of_characters(piece, len(parts[-1]))
        return start + end, masked[:end], outside.rstrip(_SPACE)[-1:], _Cut.STRING
    at = max(map(masked.rfind, (b",", b"]", b"}", b"[", b"{", b":")))
    if is_last:
        return len(text), masked, masked[at : at + 1] if at >= 0 else opened, _Cut.STRUCTURE
    if at >= 0:
        return start + at + 1, masked[: at + 1], masked[at : at + 1], _Cut.STRUCTURE
    if begins_in_string and parts[0]:
        return start + len(parts[0]), parts[0], b"", _Cut.STRING
    length = len(piece)
    if not piece.endswith((b'"', *_SPACES)):  # in a number, true, false or null
        length = max(map(piece.rfind, _SPACES)) + 1
        if not length and size <= _MAX_NUMBER:
            return _cut(text, start, opened, _MAX_NUMBER + 1)
        if not length:
            raise InvalidJSON(f"more than {_MAX_NUMBER} bytes of a number at byte {start + 1}")
    token = len(piece[:length].rstrip(_SPACE))
    return (start + token, masked[:token], b"", _Cut.TOKEN) if token else (start + length, b"", b"", _Cut.SPACE)


def _end_of_characters(piece: bytes, length: int) -> int:
    """Return the length of a piece without an incomplete character or escape of the string at its end.

    `length`: of this string.
    """
    escape = piece.rfind(b"\\", len(piece) - min(6, length))
    if escape >= 0:
        return escape
    end = len(piece)
    while piece[end - 1] & 0xC0 == 0x80 and end > len(piece) - 4:
        end -= 1
    return end - (piece[end - 1] >= 0xC0)


def _follow(stack: bytearray, masked: bytes) -> int:
    """Update the open brackets by those of a piece; return the smallest number of open ones."""
    lowest = len(stack)
    brackets = masked.translate(None, _NOT_BRACKETS)
    for _ in range(_ROUNDS):  # most of them enclose nothing but such pairs
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    for bracket in brackets:
        if bracket in _OPENING:
            stack.append(bracket)
            if len(stack) > MAX_LINE_DEPTH:
                raise InvalidJSON(f"nested deeper than {MAX_LINE_DEPTH}")
        elif stack:
            stack.pop()
            if len(stack) < lowest:
                lowest = len(stack)
        else:
            raise InvalidJSON("a bracket closes nothing")
    return lowest


def _before(stack: bytearray, opened: bytes) -> bytes:
    """Return the text in front of a piece at whose start this is open."""
    if not stack:
        return b'""'
    outer = b"".join([b"[" if bracket == _ARRAY else b'{"":' for bracket in stack[:-1]])
    return outer + (_BEFORE_IN_ARRAY if stack[-1] == _ARRAY else _BEFORE_IN_OBJECT).get(opened, b"")


def _behind(stack: bytearray, opened: bytes) -> bytes:
    """Return the text behind a piece at whose end this is open."""
    if not stack:
        return b""
    inner = (_BEHIND_IN_ARRAY if stack[-1] == _ARRAY else _BEHIND_IN_OBJECT).get(opened, b"")
    return inner + stack[-2::-1].translate(_CLOSED_BY)


def _check_piece(before: bytes, piece: bytes, behind: bytes, start: int) -> None:
    """Raise `InvalidJSON` if the completed piece is invalid."""
    try:
        if not piece.isascii():
            piece.decode()
        # msgspec rejects the escapes of lone surrogates.
        _check(b"%b%b%b" % (before, piece.replace(rb"\ud", rb"\u0").replace(rb"\uD", rb"\u0"), behind))
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"not UTF-8 at byte {start + error.start}") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        reason = str(error).partition(" (byte ")[0]
        raise InvalidJSON(f"{reason} in the {len(piece)} bytes from byte {start} on") from error
