"""The client of a request: its principals, which are the names under which rules and jobs know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Client:
    """The proven identity of a client on one connection."""

    #: Its principals, the strongest proof first: ``token:NAME``, ``cert:SAN``, ``uid:NAME``, ``gid:NAME``, and always
    #: ``anonymous@LISTENER`` as the last one.
    principals: tuple[str, ...]
    listener: str  #: The listening address, as configured: ``127.0.0.1:3502``, ``unix:/PATH``, ``tls:*:3503``.
    peer: str  #: Its address and port, or the user id on a Unix socket; for logs.
    #: Whether the request had `auth`, or the connection has a client certificate. Such a client knows the refusals
    #: ``auth_error``, ``access_denied`` and ``rate_limited``.
    authenticated: bool = False
    roles: tuple[str, ...] = ()  #: The roles that its token or its login has, beside those of the rules file.
    needs_role: bool = False  #: Whether it needs a built-in role for everything while there is no access file.

    @property
    def owner(self) -> str:
        """The principal that owns the client's jobs."""
        return self.principals[0]


#: The client of the control socket, which only the daemon's user can open.
LOCAL_ADMINISTRATOR = Client(("administrator",), "control", "administrator", authenticated=True)
