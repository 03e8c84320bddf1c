"""A real dispatcher with its console, a real harpd and Chromium, shared by the tests of one module.

A test opens pages by `pages.open(path)`, logged in as an administrator. It fails on any error in the browser's console,
violation of the content security policy, uncaught exception, unhandled rejection or request to another site.
A module may define `PROCEDURES` (text), `HARPD` and `DISPATCHER` (changes to the configurations), `NAMES` (of the host)
and `seed` (a coroutine function that adds jobs to the store before the dispatcher starts).

The fixtures end with their module, because Playwright's loop would disturb tests that are coroutines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from support.browser import DEADLINE, PROCEDURES, Pages, Site, running_browser, running_site

expect.set_options(timeout=DEADLINE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium."""
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def site(browser: Browser, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The system; it needs the browser, so that a machine without one starts nothing."""
    module: Any = request.module
    with running_site(
        tmp_path_factory.mktemp("site"),
        getattr(module, "PROCEDURES", PROCEDURES),
        getattr(module, "HARPD", None),
        getattr(module, "DISPATCHER", None),
        getattr(module, "NAMES", ("web01",)),
        getattr(module, "seed", None),
    ) as site:
        yield site


@pytest.fixture(scope="module")
def cookie(site: Site) -> str:
    """The cookie of an administrator's session."""
    return site.log_in()


@pytest.fixture
def pages(browser: Browser, site: Site, cookie: str) -> Iterator[Pages]:
    """The pages of the test, logged in."""
    with Pages(browser, site, cookie) as pages:
        yield pages


@pytest.fixture
def visitor_pages(browser: Browser, site: Site) -> Iterator[Pages]:
    """The pages of the test, not logged in."""
    with Pages(browser, site) as pages:
        yield pages
