"""Strict JSON, lean: decoding and encoding of whole values.

The zygote loads this module, and every call's process is forked from the zygote. So it imports little, and no
`typing`. The rules and the decoders of messages are in `harp.protocol.json_text`.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from itertools import accumulate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from harp.protocol.json_text import JSON


#: Maximum nesting of arrays and objects in a line. An interpreter with a lower recursion limit may reject values that
#: are less deep; both daemons raise theirs, so that this limit applies.
MAX_DEPTH = 1000


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


class Raw(bytes):
    """Checked JSON text in UTF-8 without a line feed; it is sent and stored unchanged."""

    __slots__ = ()


class Envelope(dict[str, "Any"]):
    """An object of the protocol, whose members may be `Raw`."""

    __slots__ = ()


def reject_constant(name: str) -> NoReturn:
    """Raise `InvalidJSON` for ``NaN`` and ``Infinity``; for decoders."""
    raise InvalidJSON(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=reject_constant)
#: A string whose escaped quotes were removed.
_STRING = re.compile(rb'"[^"]*"')
_NOT_BRACKETS = bytes(set(range(256)) - set(b'[]{}"'))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord('"'): 0}


def loads(text: bytes | str) -> JSON:
    """Decode one JSON value.

    Args:
        text: the JSON text; bytes are UTF-8 and nothing else.

    Returns:
        The value: dict, list, str, int, float, bool or None.

    Raises:
        InvalidJSON: it is not JSON, not UTF-8, ``NaN`` or ``Infinity``, nested too deep, or a number that this
            interpreter cannot hold.
    """
    checked = decode_checked(text)
    return translate_errors(_DECODER.decode, checked)


def decode_enclosed(line: bytes, opening: bytes) -> tuple[JSON] | None:
    """Return the value of a line that consists of `opening`, a value and a brace; None: decode the line as usual."""
    if not line.startswith(opening) or may_exceed_depth(line):
        return None
    try:
        text = line.decode("utf-8")
        value, end = _DECODER.raw_decode(text, len(opening))
    except (ValueError, RecursionError):
        return None
    return (value,) if text[end:] == "}" else None


def decode_checked(text: bytes | str) -> str:
    """Return the text. Raises `InvalidJSON` if it is not UTF-8 or is nested deeper than MAX_DEPTH."""
    if isinstance(text, str):
        _check_depth(text.encode("utf-8", "surrogatepass"))
        return text
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"not UTF-8 at byte {error.start}") from error
    _check_depth(text)
    return decoded


def may_exceed_depth(text: bytes) -> bool:
    """Return whether there are enough brackets for a nesting deeper than MAX_DEPTH."""
    return len(text) > MAX_DEPTH and text.count(b"[") + text.count(b"{") > MAX_DEPTH


def _check_depth(text: bytes) -> None:
    """Raise `InvalidJSON` for a nesting deeper than MAX_DEPTH. Fast for text with few brackets."""
    if not may_exceed_depth(text):
        return
    # The count is wrong only after the first error of text that is not JSON; no decoder reads further.
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = _STRING.sub(b"", text.translate(None, _NOT_BRACKETS))
    if max(accumulate(map(_STEP.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise InvalidJSON(f"nested deeper than {MAX_DEPTH}")


def translate_errors(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of `json` and turn its exceptions into `InvalidJSON`."""
    try:
        return function(*arguments)
    except InvalidJSON:
        raise
    except json.JSONDecodeError as error:
        raise InvalidJSON(f"{error.msg} at column {error.pos + 1}") from error
    except RecursionError as error:
        raise InvalidJSON("nested too deep for this interpreter") from error
    except ValueError as error:  # an integer with more digits than the interpreter converts
        raise InvalidJSON(str(error)) from error


_CONSTANTS: dict[object, Raw] = {None: Raw(b"null"), True: Raw(b"true"), False: Raw(b"false")}
_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


@lru_cache(maxsize=256)
def _name(key: str) -> bytes:
    """Return the name of a member of an envelope and its colon: the protocol has few names."""
    return _ENCODER.encode(key).encode("ascii") + b":"


def dumps(value: JSON) -> Raw:
    """Write a value as one line of ASCII JSON, without the line feed.

    As in `json`, tuples become arrays, and keys that are int, float, bool or None become strings.

    Args:
        value: any value that has a form in JSON; an `Envelope` may have `Raw` members.

    Raises:
        NotJSON: the value, or a value in it, has no form in JSON; the exception has the position.
    """
    if isinstance(value, Raw):
        return value
    if isinstance(value, Envelope):
        return Raw(b"{" + b",".join([_name(key) + dumps(member) for key, member in value.items()]) + b"}")
    if value is None or value is True or value is False:
        return _CONSTANTS[value]
    try:
        text = _ENCODER.encode(value).encode("ascii")
        _check_depth(text)
        return Raw(text)
    except (TypeError, ValueError, RecursionError) as error:
        path, reason = _find_fault(value) or ("", str(error))
        raise NotJSON(path, reason) from error


def _find_fault(value: JSON) -> tuple[str, str] | None:
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
        elif (reason := _fault_of_scalar(item)) is not None:
            return path, reason
    return None


def _fault_of_scalar(item: JSON) -> str | None:
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
