"""A dispatcher with its HTTP API in the event loop of the test, and requests to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec

from harp_daemon.memory_quota import MemoryQuota
from harpcaller.access.identities import Identities
from harpcaller.access.tokens import add_token
from harpcaller.acting import ActingAs
from harpcaller.config import Address, HTTPSettings
from harpcaller.dispatcher import Dispatcher
from harpcaller.health import Health
from harpcaller.http.starting import HTTPAPI
from harpcaller.listening import listen
from harpcaller.metrics import Metrics
from harpcaller.monitoring import Monitor, MonitorSettings
from support.dispatcher import running

#: The client with the token ``admin`` may do everything, others may use their own jobs.
RULES = """\
[[rule]]
who = ["token:admin"]
allow = ["call", "read", "cancel", "list", "manage", "admin"]
jobs = "any"

[[rule]]
who = ["token:*"]
allow = ["call", "read", "cancel", "list"]
"""


@dataclass
class RunningAPI:
    """A dispatcher, its HTTP API, and a client with a token."""

    dispatcher: Dispatcher
    api: HTTPAPI
    port: int  #: Of the first listening address; 0: it is a Unix socket.
    token: str
    directory: Path
    client: httpx.AsyncClient
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def authorization(self) -> str:
        """The header of a request with the token, with its line end."""
        return f"Authorization: Bearer {self.token}\r\n"

    def headers_of(self, name: str, *roles: str) -> dict[str, str]:
        """Return the headers of a client with a token of its own; without roles, it is an administrator."""
        if name not in self.tokens:
            self.tokens[name] = add_token(self.directory / "tokens", name, roles or ("admin",))[0]
        return {"Authorization": f"Bearer {self.tokens[name]}"}

    def refresh(self) -> None:
        """Read changed files of tokens and certificates, as the client API does several times in a second."""
        self.api.service.identities().refresh()

    async def send(self, data: bytes, seconds: float = 20.0) -> bytes:
        """Send bytes on a connection of its own; return all that comes until its end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            async with asyncio.timeout(seconds):
                return await reader.read()
        finally:
            writer.close()


@asynccontextmanager
async def running_api(
    directory: Path, *lines: str, http: HTTPSettings | None = None, rules: str | None = RULES, **settings: Any
) -> AsyncIterator[RunningAPI]:
    """Run a dispatcher with its HTTP API on a free port of 127.0.0.1; `lines` are those of its hosts file."""
    if rules is not None:
        settings["access_file"] = directory / "access.toml"
        settings["access_file"].write_text(rules)
    http = http or HTTPSettings()
    if http.listen == HTTPSettings().listen:
        http = msgspec.structs.replace(http, listen=(Address("127.0.0.1", 0),))
    if http.requests_per_client == HTTPSettings().requests_per_client:
        http = msgspec.structs.replace(http, requests_per_client=1_000_000)  # a test is faster than any client
    token, _ = add_token(directory / "tokens", "admin", ["admin"])
    settings = {"tokens_file": directory / "tokens", "file": directory / "harpcaller.toml", **settings}
    metrics = Metrics()
    async with running(directory, *lines, http=http, metrics=metrics, **settings) as dispatcher:
        identities = Identities(dispatcher.config)
        memory = MemoryQuota(dispatcher.config.request_memory)
        shown = MonitorSettings(http.metrics_hosts, http.metrics_queues, gauges_age=0.0)
        monitor = Monitor(dispatcher, metrics, settings=lambda: shown)
        of_api = partial(ActingAs, dispatcher), lambda: dispatcher.config, lambda: identities, memory
        api = HTTPAPI(*of_api, monitor, Health(dispatcher), metrics)
        listeners = listen(dispatcher.config, "http.listen", http.listen)
        path = listeners[0].path
        port = 0 if path is not None else listeners[0].socket.getsockname()[1]
        transport = None if path is None else httpx.AsyncHTTPTransport(uds=str(path))
        async with aclosing(api):
            api.serve(listeners)
            headers = {"Authorization": f"Bearer {token}"}
            base = f"http://127.0.0.1:{port}" if port else "http://localhost"
            url = f"{base}{http.base_path}/api/v1"
            async with httpx.AsyncClient(base_url=url, headers=headers, transport=transport, timeout=30) as client:
                yield RunningAPI(dispatcher, api, port, token, directory, client, {"admin": token})
