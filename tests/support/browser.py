"""Pages in a real Chromium that fail their test on any error of the console: see `tests/browser/conftest.py`.

with running_site(tmp_path) as site, running_browser() as browser, Pages(browser, site) as pages:
    page = pages.open("/jobs")
    expect(page.get_by_role("table")).to_be_visible()

Never use `wait_for_function`: the content security policy forbids it. Use locators and `expect`, or `eventually`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Page,
    Playwright,
    Request,
    sync_playwright,
)

from harpcaller.store.sqlite import Store, open_store
from support.system import System, running

T = TypeVar("T")

#: Milliseconds until an action or an expectation fails.
DEADLINE = 20_000

_AXE = Path(__file__).parents[1] / "browser" / "vendor" / "axe.min.js"
_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

#: Reports what the console of the browser does not: violations of the policy, with the place.
_REPORT_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) => console.error(
  `policy violation: ${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`));
"""

#: The procedures file of a site, unless a test has its own.
PROCEDURES = """
import os, signal, subprocess, sys, time
from harpd.proc import Result, procedure, streaming_procedure

@procedure
def echo(*values):
    return list(values)

@procedure
def fail(text):
    raise ValueError(text)

@procedure(timeout=600)
def sleep(seconds):
    time.sleep(seconds)

@streaming_procedure(timeout=600)
def count(number, pause=0.0):
    for index in range(number):
        yield {"index": index, "table": f"orders_{index}"}
        if pause:
            time.sleep(pause)
    yield Result(number)

@streaming_procedure(timeout=600)
def emit(*values):
    for value in values:
        yield value

@streaming_procedure(timeout=600)
def repeat(text, number):
    yield text * number
    yield "after"

@streaming_procedure(timeout=600)
def tail(path):
    '''Yield the lines of a file, also those that are added, until the line "end".'''
    with open(path) as file:
        while True:
            line = file.readline()
            if line == "end\\n":
                return
            if line:
                yield line.rstrip("\\n")
            else:
                time.sleep(0.01)
"""


def find_chromium(playwright: Playwright) -> str | None:
    """Return the path of the system's Chromium, else of the build that `./dev test` installs on Ubuntu, or None.

    Ubuntu's own is a snap, which cannot use the files of tests.
    """
    system, own = shutil.which("chromium"), playwright.chromium.executable_path
    if system is not None and not system.startswith("/snap/"):
        return system
    return own if os.access(own, os.X_OK) else None


@dataclass(frozen=True)
class Site:
    """A running system whose dispatcher has the HTTP API and the console."""

    system: System
    url: str  # without a slash at its end

    @property
    def directory(self) -> Path:
        """The directory of the dispatcher's files."""
        return self.system.dispatcher.directory

    def submit(self, procedure: str, *arguments: Any, host: str = "web01", **options: Any) -> str:
        """Submit a job; return its id."""
        return self.system.dispatcher.submit(host, procedure, *arguments, **options)

    def finish(self, procedure: str, *arguments: Any, host: str = "web01", **options: Any) -> str:
        """Submit a job and wait for its end; return its id."""
        job = self.submit(procedure, *arguments, host=host, **options)
        self.system.dispatcher.ask(get_result=job, wait=True)
        return job

    def login_link(self, *options: str) -> str:
        """Return a new link with which one can log in once."""
        done = self.system.dispatcher.control("web-login", *options)
        assert done.returncode == 0, done.stderr
        found = re.search(r"https?://\S+", done.stdout)
        assert found, done.stdout
        return found[0]

    def log_in(self, *options: str) -> str:
        """Log in by a link, without a browser; return the cookie, `name=value`."""
        secret = urlsplit(self.login_link(*options)).fragment.partition("=")[2]
        headers = {"Content-Type": "application/json", "Origin": self.url, "Sec-Fetch-Site": "same-origin"}
        body = json.dumps({"link": secret}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/api/v1/session", body, headers)) as reply:
            return str(reply.headers["Set-Cookie"]).partition(";")[0]

    def get(self, path: str, cookie: str) -> bytes:
        """Return the body of a resource of the API."""
        request = urllib.request.Request(f"{self.url}/api/v1{path}", headers={"Cookie": cookie})
        with urllib.request.urlopen(request) as reply:
            return bytes(reply.read())


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running_site(
    directory: Path,
    procedures: str,
    harpd: Mapping[str, Any] | None = None,
    dispatcher: Mapping[str, Any] | None = None,
    names: tuple[str, ...] = ("web01",),
    seed: Callable[[Store], Awaitable[None]] | None = None,
) -> Iterator[Site]:
    """Run a system whose dispatcher has the HTTP API; the arguments are those of `support.system.running`.

    `seed` adds jobs to the store before the dispatcher starts.
    """
    if seed is not None:
        with ThreadPoolExecutor(1) as pool:  # this thread has Playwright's loop
            pool.submit(asyncio.run, _seed(directory / "harpcallerd" / "jobs", seed)).result()
    port = free_port()
    section = {"listen": [f"127.0.0.1:{port}"], **(dispatcher or {}).get("http", {})}
    with running(directory, procedures, harpd, {**(dispatcher or {}), "http": section}, names) as system:
        yield Site(system, f"http://127.0.0.1:{port}")


async def _seed(directory: Path, seed: Callable[[Store], Awaitable[None]]) -> None:
    store = await open_store(directory)
    try:
        await seed(store)
    finally:
        await store.close()


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Run Chromium; skip the test if there is none."""
    # A place is reached at once, not in a time that depends on the machine.
    options = ["--disable-dev-shm-usage", "--disable-smooth-scrolling"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        program = find_chromium(playwright)
        if program is None:
            pytest.skip("Chromium is not installed (Debian: apt-get install --no-install-recommends chromium)")
        browser = playwright.chromium.launch(executable_path=program, args=options)
        try:
            yield browser
        finally:
            browser.close()


class Pages:
    """The pages of one test. At the end they are closed, and the test fails if one had an error.

    Args:
        browser: the browser.
        site: the site; a request to another one is an error.
        cookie: of a session, as `Site.log_in` returns it; None: the pages are not logged in.
    """

    def __init__(self, browser: Browser, site: Site, cookie: str | None = None) -> None:
        self.problems: list[str] = []
        self._browser = browser
        self._site = site
        self._cookie = cookie
        self._allowed: list[re.Pattern[str]] = []
        self._contexts: list[BrowserContext] = []

    def allow(self, pattern: str) -> None:
        """Accept console errors that this regular expression matches: those that the test causes."""
        self._allowed.append(re.compile(pattern))

    def context(self, **options: Any) -> BrowserContext:
        """Make a context with its own cookies; the options are Playwright's: `color_scheme`, `viewport`."""
        usual = {"viewport": {"width": 1280, "height": 800}, "locale": "en-GB", "timezone_id": "UTC"}
        context = self._browser.new_context(**{**usual, **options})
        self._contexts.append(context)
        context.set_default_timeout(DEADLINE)
        context.add_init_script(_REPORT_VIOLATIONS)
        context.on("console", self._on_console)
        context.on("weberror", lambda event: self.problems.append(f"uncaught: {event.error}"))
        context.on("request", self._on_request)
        if self._cookie is not None:
            name, _, value = self._cookie.partition("=")
            context.add_cookies([{"name": name, "value": value, "url": self._site.url}])
        return context

    def open(self, path: str = "/", **options: Any) -> Page:
        """Open a page of the site in a new context."""
        page = self.context(**options).new_page()
        page.goto(self._site.url + path)
        return page

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "assert"):
            self.problems.append(f"console: {message.text} ({message.location.get('url')})")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self._site.url + "/", "blob:" + self._site.url, "data:")):
            self.problems.append(f"foreign request: {request.url}")

    def unexpected(self) -> list[str]:
        """Return the errors so far that the test does not allow."""
        return [text for text in self.problems if not any(pattern.search(text) for pattern in self._allowed)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for context in self._contexts:
            try:
                context.close()
            except Error as problem:  # the browser has died, which is the test's failure
                self.problems.append(str(problem))
        found = self.unexpected()
        if found and isinstance(error, Exception):
            error.add_note("errors of the pages:\n" + "\n".join(found))
        assert kind is not None or not found, "\n".join(found)


def find_axe_violations(page: Page, *excluded: str, only: Sequence[str] = ()) -> list[str]:
    """Examine a page by axe-core; return the violations, one line for each.

    Args:
        page: the page.
        excluded: names of rules that are not checked.
        only: names of the only rules that are checked; empty: all.
    """
    page.evaluate(_AXE.read_text())
    options: dict[str, Any] = {"resultTypes": ["violations"]}
    options["runOnly"] = {"type": "rule", "values": list(only)} if only else {"type": "tag", "values": _TAGS}
    options["rules"] = {name: {"enabled": False} for name in excluded}
    found = page.evaluate("(options) => axe.run(document, options)", options)
    return [
        f"{violation['id']}: {violation['help']}: {node['target']}: {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


def eventually(page: Page, predicate: Callable[[], T], what: str = "the condition", deadline: float = DEADLINE) -> T:
    """Return the predicate's first true value; the page's events go on meanwhile. `deadline` is in milliseconds."""
    waited = 0.0
    while not (value := predicate()):
        assert waited < deadline, f"{what} did not come true within {deadline / 1000} s"
        page.wait_for_timeout(20)
        waited += 20
    return value
