"""Tokens: secret texts by which clients prove who they are, and the file of their digests.

A token is ``harp_NAME_SECRET``: the name, and 256 random bits in hexadecimal. The file has the SHA-256 of these bits,
so that a reader of the file cannot use a token. It has one JSON object per line. It is replaced as a whole, under a
lock on a file beside it, by the daemon and by its control program alike.

No error and no log event contains a token or a digest.

Spec: docs/access.md, Tokens.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from harp_daemon.stable_files import replace_file

log = logging.getLogger(__name__)

T = TypeVar("T")

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  #: The form of the names of tokens and roles.
_NAME = re.compile(NAME, re.ASCII)
_TOKEN = re.compile(rf"harp_({NAME})_([0-9a-f]{{64}})", re.ASCII)
_LOCK_TIMEOUT, _LOCK_INTERVAL = 5.0, 0.02  # seconds
_MAX_FILE = 16 * 1024 * 1024  # bytes

Name = Annotated[str, Meta(pattern=rf"^{NAME}\Z")]
Time = Annotated[float, Meta(ge=0, le=1e11)]


class TokenError(Exception):
    """A tokens file that cannot be used or changed. The message is one line with the file and the reason."""


class Token(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is stored of a token. Times are Unix seconds."""

    name: Name
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    created: Time
    roles: tuple[Name, ...] = ()
    expires: Time | None = None  #: None: never.
    last_used: Time | None = None  #: None: not yet.

    def __repr__(self) -> str:
        return f"Token({self.name!r}, ...)"


Tokens = dict[str, Token]
_decoder = msgspec.json.Decoder(Token)


def check_name(kind: str, name: str) -> str:
    """Return the name of a token or a role. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{kind}: expected 1 to 64 letters, digits, dots, hyphens and underscores, got {name[:80]!r}")
    return name


def parse_token(text: str) -> tuple[str, str] | None:
    """Return the name in a token and the digest of its secret; None: the text is not a token."""
    match = _TOKEN.fullmatch(text)
    return None if match is None else (match[1], sha256(bytes.fromhex(match[2])).hexdigest())


def new_token(name: str, roles: Sequence[str] = (), expires: float | None = None) -> tuple[str, Token]:
    """Return a new token: its text, and what is stored of it. Raises ValueError for an invalid name or time."""
    check_name("the token's name", name)
    for role in roles:
        check_name("role", role)
    now = time.time()
    if expires is not None and not now < expires <= 1e11:
        raise ValueError("expires: expected a time in the future")
    secret = secrets.token_bytes(32)
    digest, own_roles = sha256(secret).hexdigest(), tuple(dict.fromkeys(roles))
    stored = Token(name=name, sha256=digest, created=int(now), roles=own_roles, expires=expires)
    return f"harp_{name}_{secret.hex()}", stored


# The file.


def read_tokens(file: Path) -> Tokens:
    """Return the tokens of a file, by name; none if it does not exist. Raises `TokenError`."""
    return _parse(file, read_private(file))


def read_private(file: Path) -> bytes:
    """Return the contents of a file of secrets, which are empty if it does not exist. Raises `TokenError`.

    The file must be private: a regular file of this user or of root, which no other user can read or write.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    except OSError as error:
        hint = "; it must not be a symbolic link" if file.is_symlink() else ""
        raise TokenError(f"{file}: {error.strerror}{hint}") from error
    try:
        _check_private(file, os.fstat(descriptor))
        with open(descriptor, "rb", closefd=False) as opened:
            text = opened.read(_MAX_FILE + 1)
    finally:
        os.close(descriptor)
    if len(text) > _MAX_FILE:
        raise TokenError(f"{file}: expected at most {_MAX_FILE} bytes")
    return text


def _check_private(file: Path, status: os.stat_result) -> None:
    owners = {0, os.geteuid()}
    if os.geteuid() == 0:
        owners.add(file.parent.stat().st_uid)  # root administrates the file of the daemon's user
    if not stat.S_ISREG(status.st_mode):
        raise TokenError(f"{file}: expected a regular file")
    if status.st_uid not in owners:
        raise TokenError(f"{file}: expected a file of this user or of root, got one of uid {status.st_uid}")
    if status.st_mode & 0o077:
        raise TokenError(f"{file}: expected mode 0600, got {stat.S_IMODE(status.st_mode):04o}; chmod 600 {file}")


def _parse(file: Path, text: bytes) -> Tokens:
    if text and not text.endswith(b"\n"):
        raise TokenError(f"{file}: it ends in the middle of a line")
    found: Tokens = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            token = _decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            # Not the error of the decoder: it may quote the line.
            raise TokenError(f"{file}: line {number}: expected a token, as `harpcallerd token` writes it") from error
        if token.name in found:
            raise TokenError(f"{file}: line {number}: a second token {token.name}")
        found[token.name] = token
    return found


def change_tokens(file: Path, change: Callable[[Tokens], T]) -> T:
    """Change the tokens of a file; return what `change` returns. May block. Raises `TokenError`, and what it raises."""
    try:
        with _locked(file):
            tokens = read_tokens(file)
            before = dict(tokens)
            outcome = change(tokens)
            if tokens != before:
                write_private(file, b"".join(msgspec.json.encode(token) + b"\n" for token in tokens.values()))
            return outcome
    except OSError as error:
        raise TokenError(f"{file}: {error.strerror or error}") from error


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of a tokens file: a private file, which no other user can open and lock."""
    lock = file.with_name(file.name + ".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _keep_owner(descriptor, file)
        end = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TokenError(f"{file}: another process has held its lock for {_LOCK_TIMEOUT:g} s") from None
                time.sleep(_LOCK_INTERVAL)
        yield
    finally:
        os.close(descriptor)


def write_private(file: Path, text: bytes) -> None:
    """Replace a file of secrets as a whole, on stable storage. Raises OSError."""
    replace_file(file, text, prepare=lambda descriptor: _keep_owner(descriptor, file))


def _keep_owner(descriptor: int, file: Path) -> None:
    """Give a file that root makes to the owner of the tokens file, or of its directory: the daemon must read it."""
    if os.geteuid() == 0:
        try:
            status = file.lstat()
        except FileNotFoundError:
            status = file.parent.stat()
        os.fchown(descriptor, status.st_uid, status.st_gid)


def add_token(file: Path, name: str, roles: Sequence[str] = (), expires: float | None = None) -> tuple[str, Token]:
    """Add a token to a file; return its text and what is stored. Raises `TokenError`, ValueError."""
    text, token = new_token(name, roles, expires)

    def add(tokens: Tokens) -> None:
        if name in tokens:
            raise ValueError(f"a token {name} exists; revoke it first, or choose another name")
        tokens[name] = token

    change_tokens(file, add)
    return text, token


def revoke_token(file: Path, name: str) -> bool:
    """Remove a token from a file; return False if no token has this name. Raises `TokenError`."""
    return change_tokens(file, lambda tokens: tokens.pop(name, None) is not None)


def describe_token(token: Token) -> dict[str, object]:
    """Return what a list shows of a token."""
    times = {"created": token.created, "expires": token.expires, "last_used": token.last_used}
    return {"name": token.name, "roles": list(token.roles), **times}


# The tokens of a running daemon.


class TokenStore:
    """The tokens of a file, which is read again when it has changed. Raises `TokenError` if it cannot be used."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._identity = identify_file(file)
        self._tokens = read_tokens(file)
        self._used: dict[str, float] = {}  # the last uses that are not in the file yet
        self._error: str | None = None

    def refresh(self) -> None:
        """Read the file if it has changed. If it cannot be used, the tokens stay as they are, and the log says so."""
        identity = identify_file(self.file)
        if identity == self._identity:
            return
        self._identity = identity
        try:
            self._tokens = read_tokens(self.file)
        except (TokenError, OSError) as error:
            log.error("cannot use changed file", extra={"file": str(self.file), "error": str(error)})

    def find(self, name: str, digest: str) -> Token | None:
        """Return a token by its name and its digest, unless it has expired. It looks at the file if it is unknown."""
        if name not in self._tokens:
            self.refresh()  # it was added a moment ago
        token = self._tokens.get(name)
        is_equal = compare_digest(digest, token.sha256 if token else "0" * 64)
        if token is None or not is_equal or not self.is_current(token):
            return None
        return token

    def is_current(self, token: Token) -> bool:
        """Return whether a token that was found before has been neither revoked nor changed, and has not expired."""
        present = self._tokens.get(token.name)
        if present is not token and (present is None or (present.sha256, present.roles) != (token.sha256, token.roles)):
            return False
        return present.expires is None or time.time() < present.expires

    def get(self, name: str, digest: str) -> Token | None:
        """Return the present token of this name that has this digest, unless it has expired."""
        token = self._tokens.get(name)
        return token if token is not None and token.sha256 == digest and self.is_current(token) else None

    def record_use(self, token: Token) -> None:
        """Note that a token was used now."""
        self._used[token.name] = int(time.time())

    def list(self) -> list[Token]:
        """Return the tokens with their last uses."""
        return [_with_use(token, self._used) for token in self._tokens.values()]

    def write_uses(self) -> None:
        """Write the last uses to the file. May block."""
        if not self._used:
            return
        used = dict(self._used)

        def change(tokens: Tokens) -> None:
            tokens |= {name: _with_use(token, used) for name, token in tokens.items()}

        try:
            change_tokens(self.file, change)
        except TokenError as error:
            if str(error) != self._error:  # once
                self._error = str(error)
                log.warning("cannot write last uses of tokens", extra={"reason": self._error})
            return
        self._error = None
        for name, last in used.items():
            if self._used[name] == last:
                del self._used[name]


def _with_use(token: Token, used: dict[str, float]) -> Token:
    last = used.get(token.name)
    return token if last is None else msgspec.structs.replace(token, last_used=max(last, token.last_used or 0))


def identify_file(file: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is changed or replaced; None if there is no file."""
    with suppress(OSError):
        status = os.lstat(file)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_mode, status.st_uid
    return None
