"""A long list of jobs: it asks for pages as the reader goes on, and draws only what can be seen.

With HARP_LONG=1 the list holds as many rows as it may, 100,000, and the time of a jump is measured. That takes minutes
and a quiet machine.
"""

from __future__ import annotations

import os
import re
import time

import pytest
from playwright.sync_api import Page, expect

from harp.protocol.ends import Failed
from harp.protocol.json_text import Raw
from harpcaller.store.sqlite import Store
from support.browser import Pages, Site, eventually
from support.jobs import new_job

IS_LONG = os.environ.get("HARP_LONG") == "1"
pytestmark = pytest.mark.timeout(900 if IS_LONG else 240)

JOBS, HELD = (101_000, 100_000) if IS_LONG else (25_000, 5_000)
STEP = 1_000
#: Places of the jobs that a search finds, from the newest on: a page of a list looks at 10,000 jobs.
FOUND = (5, 14_000, 14_001)
FOUND_LATE = 22_000


async def seed(store: Store) -> None:
    """Add jobs that have ended, one in a millisecond; the newest is the last one."""
    start = time.time() - 3600
    for first in range(0, JOBS, STEP):
        jobs = []
        for place in range(JOBS - 1 - first, JOBS - 1 - first - STEP, -1):
            text = b"a rare word" if place in FOUND else b"a late word" if place == FOUND_LATE else b"usual"
            arguments = Raw(b'[%d, "%s"]' % (place, text))
            jobs.append(new_job(procedure="backup", arguments=arguments, end=Failed("unknown_host", "no such host")))
        await store.add_jobs(jobs, start + first / 1000)


def row(page: Page, place: int) -> None:
    """Expect that the row of a job is seen."""
    expect(page.locator("tr[data-job]").filter(has_text=f"({place}, ")).to_be_in_viewport()


def go_on(page: Page, asked: list[str]) -> None:
    """Let the search go on; wait for its next part."""
    count = len(asked)
    page.get_by_role("button", name="Go on searching").click()
    eventually(page, lambda: len(asked) > count)
    expect(page.locator(".foot, .empty")).to_contain_text(re.compile(r"Searched back to|That is all\."))


def open_search(pages: Pages, site: Site, text: str) -> tuple[Page, list[str]]:
    """Open the list of the jobs whose arguments have a text; also return the requests for it."""
    page = pages.context().new_page()
    asked: list[str] = []
    page.on("requestfinished", lambda request: asked.append(request.url) if "/api/v1/jobs?" in request.url else None)
    page.goto(f"{site.url}/jobs?arguments={text}")
    return page, asked


def test_search_goes_on_when_the_reader_asks(site: Site, pages: Pages) -> None:
    page, asked = open_search(pages, site, "rare+word")
    rows = page.locator("tr[data-job]")
    expect(rows).to_have_count(1)
    expect(page.locator(".foot")).to_contain_text("Searched back to")
    assert len(asked) <= 2, (
        "the next part is searched when the reader asks"
    )  # the list, and once more at the first event
    while not page.get_by_text("That is all.").count():
        go_on(page, asked)
    expect(rows).to_have_count(3)
    assert [place for place in FOUND if page.get_by_text(f"({place}, ").count()] == [*FOUND]


def test_search_without_a_match_so_far_can_go_on(site: Site, pages: Pages) -> None:
    page, asked = open_search(pages, site, "late+word")
    expect(page.get_by_role("heading", name="Nothing found so far")).to_be_visible()
    while page.get_by_role("heading", name="Nothing found so far").count():
        expect(page.locator(".empty")).to_contain_text("Searched back to")
        go_on(page, asked)
    expect(page.locator("tr[data-job]")).to_have_count(1)
    row(page, FOUND_LATE)


def hold_all(page: Page) -> None:
    """Go to the end of the list, and again, until it holds enough rows."""
    shown = page.locator(".foot span").first
    expect(shown).to_have_text(re.compile(r"\d+ rows"))
    while int((text := shown.inner_text()).partition(" ")[0].replace(",", "")) < HELD:
        page.keyboard.press("End")
        expect(shown).not_to_have_text(text)


JUMP = """async (places) => {
    const list = document.querySelector(".list");
    const drawn = [];
    const next = () => new Promise(requestAnimationFrame);
    for (const place of places) {
        const begin = performance.now();
        list.scrollTop = place * (list.scrollHeight - list.clientHeight);
        await next();
        await next();
        const { top, bottom } = list.getBoundingClientRect();
        const rows = [...document.querySelectorAll("tr[data-job]")].map((row) => row.getBoundingClientRect());
        const covered = rows.length > 0 && rows[0].top <= top + 60 && rows.at(-1).bottom >= bottom - 1;
        drawn.push([performance.now() - begin, covered, document.querySelectorAll("*").length]);
    }
    return drawn;
}"""


def test_long_list_draws_only_what_is_seen(site: Site, pages: Pages) -> None:
    page = pages.context().new_page()
    asked: list[str] = []
    page.goto(f"{site.url}/jobs")
    hold_all(page)
    if IS_LONG:
        expect(page.locator(".foot")).to_contain_text("The page holds 100,000 rows. Narrow the filter to see others.")
    page.on("request", lambda request: asked.append(request.url) if "/api/v1/jobs?" in request.url else None)
    places = [0.5, 0.123, 0.9, 0, 0.25, 0.75]  # the end would ask for the next page
    for milliseconds, covered, nodes in page.evaluate(JUMP, places):
        assert covered, "the window is full of rows two frames after the jump"
        assert nodes < 1_500
        print(f"{milliseconds:.0f} ms, {nodes} nodes")
        if IS_LONG:
            assert milliseconds < 100
    assert page.locator("tr[data-job]").count() <= 100
    assert not asked, "rows that are held are not asked for again"
    expect(page.locator("table.rows")).to_have_attribute("aria-rowcount", "-1")
    page.keyboard.press("Home")
    row(page, 0)
