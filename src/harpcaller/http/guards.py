"""What a request must have so that no foreign web page can have caused it. Pure: no clock, no input or output.

A browser sends cookies, certificates and the requests of any page to every address that it can reach. Three checks:

- `Host` is a name of this dispatcher. Otherwise any page could give its own name the address 127.0.0.1, and its
  scripts would be of the same origin as this API (DNS rebinding).
- A request that may change something, and whose client has not sent a token, comes from a page of this dispatcher: the
  browser says so in `Sec-Fetch-Site`, or in `Origin` where it sends the former to no plain address. A request with a
  cookie needs one of the two; without a cookie, a program that is no browser has neither.
- The body of a POST is JSON, which a form of another page cannot send; it can send no other unsafe method.

A login is checked in the same way: a foreign page must not log a person in as somebody else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from ipaddress import ip_address

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})  #: They change nothing.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?", re.ASCII)
_OWN_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class WrongHost(Exception):
    """A request for another host. The message is for the client."""


class CrossOrigin(Exception):
    """A request that a page of another origin may have caused. The message is for the client."""


def check_host(values: Collection[str], names: Collection[str], local_address: str | None) -> None:
    """Check the values of `Host`. Raises `WrongHost`. A client without it is no browser: health checks often have none.

    `names` are those of the dispatcher beside the local ones; `local_address` is the address that the connection
    arrived at. The port does not matter: it may be that of a tunnel.
    """
    if not values:
        return
    match = _HOST.fullmatch(next(iter(values))) if len(values) == 1 else None
    if match is None:
        raise WrongHost("Host: expected one name of this dispatcher, got another number of them, or another form")
    name = match[1].strip("[]").lower().rstrip(".")
    if name in _OWN_NAMES or name in names or _is_same_address(name, local_address):
        return
    raise WrongHost(f"Host: expected a name of this dispatcher, got {name[:255]}; add it to http.hosts")


def _is_same_address(name: str, address: str | None) -> bool:
    try:
        return address is not None and ip_address(name) == ip_address(address.partition("%")[0])
    except ValueError:
        return False


def check_origin(method: str, scheme: str, headers: Mapping[str, str], has_cookie: bool) -> None:
    """Check where a request without a token comes from. Raises `CrossOrigin`."""
    if method in SAFE_METHODS:
        return
    site, origin, host = headers.get("sec-fetch-site"), headers.get("origin"), headers.get("host", "")
    if site is not None:
        is_own = site == "same-origin"
    elif origin is not None:
        is_own = origin.lower() == f"{scheme}://{host}".lower()
    else:
        is_own = not has_cookie
    if not is_own:
        raise CrossOrigin("the request does not come from a page of this dispatcher; a program sends a token instead")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and kind != "application/json" and (has_cookie or site is not None or origin is not None):
        raise CrossOrigin(f"Content-Type: expected application/json, got {kind[:100] or 'none'}")
