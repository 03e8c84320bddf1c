"""Strict encoding and decoding of one JSON value, without the modules `json` and `re`.

The zygote loads this module, and every call's process is forked from the zygote: each page of memory that the process
touches is copied for it. `harp.protocol.json_text` has what messages need besides.
"""

from __future__ import annotations

from itertools import accumulate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, NoReturn, TypeAlias

    JSON: TypeAlias = Any  # dict[str, JSON] | list[JSON] | str | int | float | bool | None

#: Maximum nesting of arrays and objects in a line. An interpreter with a lower recursion limit may reject values that
#: are less deep; both daemons raise theirs, so that this limit applies.
MAX_DEPTH = 1000

#: Brackets and quotes of which the depth is counted at once.
_PIECE = 1000
_NOT_BRACKETS = bytes(set(range(256)) - set(b'[]{}"'))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class InvalidJSON(ValueError):
    """Text that is not JSON, or JSON that HARP does not accept. The message has reason and position."""


class NotJSON(ValueError):
    """A value that has no form in JSON.

    Attributes:
        path: the position in the value, for example ``"['hosts'][3]"``; empty for the value itself.
        reason: the reason.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"at {path}: {reason}" if path else reason)
        self.path = path
        self.reason = reason


def reject_constant(name: str) -> NoReturn:
    """Raise `InvalidJSON` for ``NaN`` and ``Infinity``; for decoders."""
    raise InvalidJSON(f"{name} is not JSON")


def _reject_value(value: object) -> NoReturn:
    raise TypeError(type(value).__name__)


class _Options:
    """The options of the C scanner, whose names it prescribes."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(reject_constant)


def _make_codec() -> tuple[Callable[[JSON, bool], Iterable[str]], Callable[[str, int], tuple[JSON, int]]]:
    """Return a function that encodes a value in pieces, and one that decodes the value at an index and returns its end.

    The C part of `json` is made once: for a small value, that takes as long as the encoding. A circular value exceeds
    the recursion limit; the check for it would cost a sixth of the time of a small value.
    """
    try:
        from _json import encode_basestring_ascii, make_encoder, make_scanner
    except ImportError:  # not CPython
        import json

        encoder = json.JSONEncoder(allow_nan=False, check_circular=False, separators=(",", ":"), default=_reject_value)
        return encoder.iterencode, json.JSONDecoder(parse_constant=reject_constant).raw_decode
    encode = make_encoder(None, _reject_value, encode_basestring_ascii, None, ":", ",", False, False, False)
    return encode, make_scanner(_Options())  # type: ignore[arg-type]  # any object will do


_encode_pieces, _scan = _make_codec()


def decode_value(text: bytes) -> JSON:
    """Decode a value, which may be followed by white space; its depth was checked before. Raises `InvalidJSON`."""
    try:
        decoded = text.decode()
        value, end = _scan(decoded, 0)
    except StopIteration as error:
        raise InvalidJSON(f"Expecting value at column {error.value + 1}") from error
    except RecursionError as error:
        raise InvalidJSON("nested too deep for this interpreter") from error
    except SystemError as error:  # Python 3.11 without the module `json`, which has the class of the exception
        raise InvalidJSON("invalid text") from error
    except ValueError as error:  # `InvalidJSON` too; or an integer with more digits than the interpreter converts
        raise InvalidJSON(str(error)) from error
    if decoded[end:].strip(" \t\r\n"):
        raise InvalidJSON(f"Extra data at column {end + 1}")
    return value


def encode_value(value: JSON) -> bytes:
    """Write a value as one line of ASCII JSON, without the line feed.

    As in `json`, tuples become arrays, and keys that are int, float, bool or None become strings.

    Raises:
        NotJSON: the value, or a value in it, has no form in JSON; the exception has the position.
    """
    try:
        text = "".join(_encode_pieces(value, False)).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        path, reason = _find_invalid_part(value) or ("", str(error))
        raise NotJSON(path, reason) from error
    if len(text) > MAX_DEPTH and exceeds_depth(text):
        raise NotJSON("", f"nested deeper than {MAX_DEPTH}")
    return text


def may_exceed_depth(text: bytes) -> bool:
    """Return whether there are enough brackets for a nesting deeper than MAX_DEPTH."""
    return len(text) > MAX_DEPTH and text.count(b"[") + text.count(b"{") > MAX_DEPTH


def exceeds_depth(text: bytes) -> bool:
    """Return whether JSON text is nested deeper than MAX_DEPTH. Fast for text with few brackets."""
    if not may_exceed_depth(text):
        return False
    # The count is wrong only after the first error of text that is not JSON; no decoder reads further.
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = text.translate(None, _NOT_BRACKETS)
    depth, in_string = 0, False
    for at in range(0, len(marks), _PIECE):  # other threads may run between two pieces
        parts = marks[at : at + _PIECE].split(b'"')
        brackets = b"".join(parts[in_string::2])
        in_string ^= not len(parts) % 2
        opened = brackets.count(b"[") + brackets.count(b"{")
        may_exceed = depth + opened > MAX_DEPTH
        if may_exceed and max(accumulate(map(_STEP.__getitem__, brackets), initial=depth)) > MAX_DEPTH:
            return True
        depth += 2 * opened - len(brackets)
    return False


def _find_invalid_part(value: JSON) -> tuple[str, str] | None:
    """Return position and reason of the first part of `value` that has no form in JSON; iterative for deep nesting."""
    stack: list[tuple[JSON, str, int]] = [(value, "", 0)]
    trail: list[int] = []  # ids of the containers around the item
    while stack:
        item, path, depth = stack.pop()
        del trail[depth:]
        if isinstance(item, (dict, list, tuple)):
            if id(item) in trail:
                return path, "contains itself"
            if depth >= MAX_DEPTH:
                return "", f"nested deeper than {MAX_DEPTH}"
            trail.append(id(item))
            children = item.items() if isinstance(item, dict) else enumerate(item)
            for key, child in reversed(list(children)):
                if isinstance(item, dict) and not isinstance(key, (str, int, float, bool, type(None))):
                    return path, f"a key is of type {_type_name(key)}, expected str"
                stack.append((child, f"{path}[{key!r}]", depth + 1))
        elif (reason := _reason_of_scalar(item)) is not None:
            return path, reason
    return None


def _reason_of_scalar(item: JSON) -> str | None:
    if item is None or isinstance(item, (str, bool)):
        return None
    if isinstance(item, float):
        return None if item - item == 0 else f"{item!r} is not a number of JSON"
    if isinstance(item, int):
        try:
            int.__repr__(item)
        except ValueError as error:
            return str(error)
        return None
    return f"type {_type_name(item)} has no form in JSON"


def _type_name(item: object) -> str:
    kind = type(item)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
