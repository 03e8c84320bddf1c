"""Sessions of browsers, and the one-time links that begin them.

A browser has a cookie with 256 random bits. The file has their SHA-256, so that a reader of the file has no session. It
is a file of its own, beside the jobs, and not a table of the store: a backup of the store must not bring back sessions
that have ended, and logging in must not wait for jobs. One JSON object per line; each change replaces the whole file.
What changes with every request, the time of the last use, is written at most once a minute.

Links are in memory only: each is valid once, for 5 minutes. No error and no log event contains a secret or a digest.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from harpcaller.access import AuthError
from harpcaller.access.tokens import Name, Time, Token, TokenError, TokenStore, check_name, read_private, write_private
from harpcaller.access.users import User, Users

log = logging.getLogger(__name__)

LOGIN = "user:"  #: The beginning of the principal of a session that no token began.
LINK_SECONDS = 300.0  #: Seconds for which a one-time link is valid.
_MAX_LINKS, _MAX_SESSIONS = 100, 1000  #: Beyond these numbers, the oldest ones end.
_MAX_OF_PRINCIPAL = 50  #: The same for each principal, so that one client does not end the sessions of others.
_WRITE_USES_EVERY = 60.0  #: Seconds between two writes of the last uses.
_MAX_AGENT = 200  #: Maximum characters of the name of a browser.
_MAX_SECRET = 100  #: Longer texts are no secret of ours.

Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Link(NamedTuple):
    """Whose session a one-time link begins; `expires` is the time until which it can be used, in monotonic seconds."""

    name: str
    roles: tuple[str, ...]
    seconds: float | None  # of the session; None: `session_age`
    expires: float


class Session(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is stored of a session. Times are Unix seconds."""

    id: Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]  #: Its public name.
    sha256: Digest  #: Of the secret in the cookie.
    principal: str  #: `user:NAME`, or the principal of its token.
    created: Time
    seen: Time  #: The last use.
    expires: Time
    roles: tuple[Name, ...] = ()  #: Those of the link; a session of a token has the present roles of the token.
    token: Name | None = None  #: The token by which it began, and with which it ends.
    token_sha256: Digest | None = None  #: Another token of the same name does not continue the session.
    user_sha256: Digest | None = None  #: Of the line of the user by whose password it began, and with which it ends.
    agent: str = ""  #: What the browser calls itself.
    address: str = ""  #: The address at the login.

    def __repr__(self) -> str:
        return f"Session({self.id!r}, {self.principal!r})"


_decoder = msgspec.json.Decoder(Session)


class Sessions:
    """The sessions of a dispatcher, and its one-time links.

    `idle` and `age` return the maximum seconds of a session without a request, and in all. `tokens` returns the tokens
    in use, `users` the users with passwords; None: there are none. `wall` is the wall clock.
    """

    def __init__(
        self,
        file: Path,
        idle: Callable[[], float],
        age: Callable[[], float],
        tokens: Callable[[], TokenStore | None],
        wall: Callable[[], float] = time.time,
        users: Callable[[], Users | None] = lambda: None,
    ) -> None:
        self.file = file
        self._idle, self._age, self._tokens, self._users, self._wall = idle, age, tokens, users, wall
        self._links: dict[str, Link] = {}  # by digest, the oldest first
        self._sessions: dict[str, Session] = {}  # by digest, the oldest first
        self._lock = asyncio.Lock()
        self._changes = self._written = 0
        self._used_at: float | None = None  # monotonic time of the first use that is not in the file
        self._writing: asyncio.Task[None] | None = None
        try:
            for line in read_private(file).splitlines():
                session = _decoder.decode(line)
                self._sessions[session.sha256] = session
        except (TokenError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            # A file that cannot be used ends the sessions, not the dispatcher. The decoder's error may quote the line.
            reason = str(error) if isinstance(error, TokenError) else "expected a session in each line"
            log.error("cannot read sessions; all have ended", extra={"file": str(file), "reason": reason})
            self._sessions.clear()

    # Links.

    def add_link(self, name: str, roles: tuple[str, ...] = (), seconds: float | None = None) -> str:
        """Return the secret of a new one-time link. Raises ValueError for an invalid name or role."""
        check_name("the name of a login", name)
        for role in roles:
            check_name("role", role)
        secret = secrets.token_urlsafe(32)
        self._links[_digest(secret)] = Link(name, roles, seconds, time.monotonic() + LINK_SECONDS)
        if len(self._links) > _MAX_LINKS:
            del self._links[next(iter(self._links))]
        return secret

    def take_link(self, secret: str) -> Link:
        """Return whose link a secret is, which is not valid any more. Raises `AuthError`."""
        link = self._links.pop(_digest(secret), None) if len(secret) <= _MAX_SECRET else None
        if link is None or time.monotonic() > link.expires:
            raise AuthError("the link is not valid: it was used, or is older than 5 minutes; make another one")
        return link

    # Sessions.

    async def begin(
        self,
        principal: str,
        roles: tuple[str, ...] = (),
        *,
        seconds: float | None = None,
        token: Token | None = None,
        user: User | None = None,
        agent: str = "",
        address: str = "",
    ) -> tuple[str, Session]:
        """Begin a session; return the secret for the cookie, and the session. It also ends with its token or user."""
        secret, now = secrets.token_urlsafe(32), self._wall()
        session = Session(
            id=secrets.token_hex(8),
            sha256=_digest(secret),
            principal=principal,
            roles=roles,
            created=now,
            seen=now,
            expires=now + min(seconds or self._age(), self._age()),
            token=None if token is None else token.name,
            token_sha256=None if token is None else token.sha256,
            user_sha256=None if user is None else user.sha256,
            agent=agent[:_MAX_AGENT],
            address=address,
        )
        self._sessions[session.sha256] = session
        self._remove_ended()
        own = [each for each in self._sessions.values() if each.principal == principal]
        for excess, most in (own, _MAX_OF_PRINCIPAL), (list(self._sessions.values()), _MAX_SESSIONS):
            for ended in sorted(excess, key=lambda each: each.seen)[: max(0, len(excess) - most)]:
                self._sessions.pop(ended.sha256, None)
        await self._write()
        return secret, session

    def find(self, secret: str) -> Session | None:
        """Return the session of a cookie, and note its use; None if it does not exist or has ended."""
        session = self._sessions.get(_digest(secret)) if len(secret) <= _MAX_SECRET else None
        if session is None or not self.is_current(session):
            return None
        self._sessions[session.sha256] = session = msgspec.structs.replace(session, seen=self._wall())
        self._note_use()
        return session

    def is_current(self, session: Session) -> bool:
        """Return whether a session has not ended: by its age, without use, by a logout, or with its token or user."""
        present, now = self._sessions.get(session.sha256), self._wall()
        if present is None or now >= present.expires or now - present.seen >= self._idle():
            return False
        if present.user_sha256 is not None and not self._has_user(present):
            return False
        return present.token is None or self.get_token(present) is not None

    def _has_user(self, session: Session) -> bool:
        users = self._users()
        user = None if users is None else users.get(session.principal.removeprefix(LOGIN))
        return user is not None and user.sha256 == session.user_sha256

    def get_token(self, session: Session) -> Token | None:
        """Return the present token of a session; None: it has none, or it was revoked, or has expired."""
        tokens = self._tokens()
        if tokens is None or session.token is None or session.token_sha256 is None:
            return None
        return tokens.get(session.token, session.token_sha256)

    def list(self) -> list[Session]:
        """Return the sessions that have not ended, the oldest first."""
        return [session for session in self._sessions.values() if self.is_current(session)]

    async def end(self, session_id: str) -> bool:
        """End a session; return False if no session has this id."""
        for digest, session in list(self._sessions.items()):
            if session.id == session_id:
                del self._sessions[digest]
                await self._write()
                return True
        return False

    async def aclose(self) -> None:
        """Write the last uses of sessions."""
        if self._writing is not None:
            await self._writing
        if self._used_at is not None:
            await self._write()

    # The file.

    def _remove_ended(self) -> None:
        ended = [digest for digest, session in self._sessions.items() if not self.is_current(session)]
        for digest in ended:
            del self._sessions[digest]

    def _note_use(self) -> None:
        now = time.monotonic()
        if self._used_at is None:
            self._used_at = now
        is_writing = self._writing is not None and not self._writing.done()
        if now - self._used_at >= _WRITE_USES_EVERY and not is_writing:
            self._remove_ended()
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        """Write all sessions. If that fails, they last until the dispatcher stops, and the log says so."""
        self._changes += 1
        change = self._changes
        async with self._lock:
            if self._written >= change:
                return  # the write of another change had this one
            self._written, self._used_at = self._changes, None
            text = b"".join(msgspec.json.encode(session) + b"\n" for session in self._sessions.values())
            try:
                await asyncio.to_thread(write_private, self.file, text)
            except OSError as error:
                self._written = 0
                log.error("cannot write sessions", extra={"file": str(self.file), "reason": error.strerror})


def _digest(secret: str) -> str:
    return sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
