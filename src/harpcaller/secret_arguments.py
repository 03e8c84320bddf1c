"""Secret arguments: encrypted in the store, shown as ``"***"``, masked in what the call returns.

A client marks values of a call's arguments by JSON pointers (RFC 6901). `SecretKeys.seal` replaces each by ``"***"``,
and encrypts it with AES-256-GCM for one job; `SecretKeys.open` returns the arguments that the host receives. The plain
values are in no file of the dispatcher: only in its memory, until the job has ended.

Spec: docs/access.md, Secret arguments.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from harp.protocol.ends import Failed, Raised, Returned
from harp.protocol.harpd import ExitInfo, Message, Record, StopReport
from harp.protocol.json_text import Raw
from harp.protocol.schema import ProtocolError
from harp_daemon.regular_files import open_regular
from harp_daemon.secret_values import (
    MASK,
    MAX_ARGUMENTS,
    MAX_TEXTS,
    find_texts,
    forms_of,
    mask_json,
    mask_texts,
    replace_value,
)
from harp_daemon.settings import ConfigError
from harp_daemon.stable_files import replace_file
from harpcaller.config import Config

_ID_BYTES, _NONCE_BYTES, _KEY_BYTES = 8, 12, 32
#: The mark of harpd, and of the dispatcher, at the end of a long text that is cut.
_CUT = re.compile(r"\.\.\. \((?:\d+ characters, cut at \d+|cut: it had \d+ bytes)\)\Z")


class CannotDecrypt(Exception):
    """The secret arguments of a job cannot be decrypted; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class OpenedArguments:
    """The arguments of a job as the host receives them."""

    arguments: Raw = field(repr=False)
    pointers: tuple[str, ...] = ()  #: JSON pointers to the secret values.
    texts: tuple[bytes, ...] = field(default=(), repr=False)  #: Texts that are masked in what the call sends.


@dataclass(frozen=True, slots=True)
class _Key:
    id: bytes
    value: bytes = field(repr=False)


class SecretKeys:
    """The keys of a key file. The first one encrypts; all decrypt, so that a new key can be added in front."""

    def __init__(self, file: Path, keys: Sequence[_Key]) -> None:
        # Only a dispatcher with a key file needs the package, whose import costs 50 ms.
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self.file = file
        self._first = keys[0]
        self._ciphers = {key.id: AESGCM(key.value) for key in keys}

    def seal(self, job_id: str, arguments: Raw, pointers: Sequence[str]) -> tuple[Raw, bytes]:
        """Return arguments with masks in place of the values at JSON pointers, and the encrypted values.

        Raises `ProtocolError` if a pointer leads to no value, or into another secret value, or above a limit.
        """
        if len(arguments) > MAX_ARGUMENTS:
            raise ProtocolError(f"secrets: arguments with secret values may have at most {MAX_ARGUMENTS} bytes")
        values: dict[str, str] = {}
        masked = arguments
        for pointer in pointers:
            masked, value = replace_value(masked, pointer, MASK)
            values[pointer] = value.decode()
        if any(pointer.startswith(f"{other}/") for pointer in values for other in values):
            raise ProtocolError("secrets: a pointer leads into another secret value")
        if len(find_texts([value.encode() for value in values.values()])) > MAX_TEXTS:
            raise ProtocolError(f"secrets: the secret values have more than {MAX_TEXTS} texts or lines")
        nonce = secrets.token_bytes(_NONCE_BYTES)
        text = json.dumps(values).encode()
        return masked, self._first.id + nonce + self._ciphers[self._first.id].encrypt(nonce, text, job_id.encode())

    def open(self, job_id: str, masked: Raw, sealed: bytes) -> OpenedArguments:
        """Return the arguments of a job with its secret values. Raises `CannotDecrypt`."""
        from cryptography.exceptions import InvalidTag

        key_id, nonce = sealed[:_ID_BYTES], sealed[_ID_BYTES : _ID_BYTES + _NONCE_BYTES]
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise CannotDecrypt(f"{self.file} has no key {key_id.hex()} any more; add it again, after the first line")
        try:
            text = cipher.decrypt(nonce, sealed[_ID_BYTES + _NONCE_BYTES :], job_id.encode())
        except InvalidTag as error:
            raise CannotDecrypt(f"the stored value does not match key {key_id.hex()} of {self.file}") from error
        arguments, values = masked, json.loads(text)
        for pointer, value in values.items():
            arguments, _ = replace_value(arguments, pointer, Raw(value.encode()))
        return OpenedArguments(
            arguments, tuple(values), forms_of(find_texts([value.encode() for value in values.values()]))
        )

    def digest(self, text: bytes) -> bytes:
        """Return a digest of a call's text; nobody without the first key can guess the secret values from it."""
        return hmac.digest(self._first.value, b"digest of a call\0" + text, "sha256")[:16]


def mask_message(message: Message, texts: Sequence[bytes]) -> Message:
    """Return a message of a host in which each of these texts is masked."""
    match message:
        case Returned(result):
            return Returned(mask_json(Raw(result), texts))
        case Raised() | Failed():
            data = None if message.data is None else mask_json(Raw(message.data), texts)
            names = {"type": _mask_string(message.type, texts)} if isinstance(message, Raised) else {}
            return replace(message, message=_mask_string(message.message, texts), data=data, **names)
        case ExitInfo(data) | StopReport(data):
            return type(message)(mask_json(Raw(data), texts, with_names=False))
        case Record(data):
            return Record(mask_json(Raw(data), texts))
    return message


def mask_records(records: list[bytes], texts: Sequence[bytes]) -> list[bytes]:
    """Return records in which each of these texts is masked; many small ones cost as little as their bytes."""
    if not texts:
        return records
    joined = Raw(b"\n".join(records))
    masked = mask_json(joined, texts)
    return records if masked is joined else masked.split(b"\n")


def _mask_string(text: str, texts: Sequence[bytes]) -> str:
    masked = mask_texts(text.encode("utf-8", "surrogatepass"), texts).decode("utf-8", "surrogatepass")
    if (mark := _CUT.search(masked)) is not None:  # it may be cut within a text that is masked
        masked = masked[: max(0, mark.start() - max(map(len, texts)) + 1)] + mark[0]
    return masked


# The key file.


def read_key_file(config: Config) -> SecretKeys | None:
    """Return the keys of a configuration, None without a key file. Raises `ConfigError`."""
    if config.secrets_key_file is None:
        return None
    try:
        return load_keys(config.secrets_key_file)
    except ConfigError as error:
        raise ConfigError(f"{config.file}: secrets_key_file: {error}") from error


def load_keys(file: Path) -> SecretKeys:
    """Read a key file: a line ``ID KEY`` for each key, hexadecimal and Base64. Raises `ConfigError`."""
    keys: dict[bytes, _Key] = {}
    try:
        descriptor = open_regular(file, os.O_NOFOLLOW)
        with open(descriptor, encoding="ascii") as opened:
            status = os.fstat(descriptor)
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(f"{file}: others may read it; run: chmod 600 {file}")
            lines = opened.read().splitlines()
    except UnicodeError as error:
        raise ConfigError(f"{file}: not a file of keys: not ASCII") from error
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            key = _parse_key(line)
            if key is None:
                raise ConfigError(f"{file}:{number}: expected ID KEY, as harpcallerd secrets-key writes them")
            if key.id in keys:
                raise ConfigError(f"{file}:{number}: key {key.id.hex()} is repeated; remove one of its lines")
            keys[key.id] = key
    if not keys:
        raise ConfigError(f"{file}: has no key; run: harpcallerd secrets-key {file}")
    try:
        return SecretKeys(file, list(keys.values()))
    except ImportError as error:
        raise ConfigError(f"{file}: needs the package cryptography; run: pip install 'harpcaller[secrets]'") from error


def add_key(file: Path) -> str:
    """Add a new key in front of those of a key file, which is created if it does not exist; return the key's id.

    Raises `ConfigError` if the file is not one of keys, and `OSError`.
    """
    lines = ""
    if file.exists():
        load_keys(file)
        lines = file.read_text("ascii")
    key_id = secrets.token_hex(_ID_BYTES)

    def keep_owner(descriptor: int) -> None:
        if file.exists():
            status = file.stat()
            os.fchown(descriptor, status.st_uid, status.st_gid)

    text = f"{key_id} {base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode()}\n{lines}"
    replace_file(file, text.encode("ascii"), prepare=keep_owner)
    return key_id


def _parse_key(line: str) -> _Key | None:
    try:
        id_text, value_text = line.split()
        key = _Key(bytes.fromhex(id_text), base64.b64decode(value_text, validate=True))
    except (ValueError, binascii.Error):
        return None
    return key if (len(key.id), len(key.value)) == (_ID_BYTES, _KEY_BYTES) else None
