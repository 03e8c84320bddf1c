"""The page of a job with 2,000,000 records, in Chromium with a real dispatcher."""

from __future__ import annotations

import time

from playwright.sync_api import expect

from harp.protocol.ends import Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import Records
from harpcaller.store.sqlite import Store
from support.browser import Pages, Site, eventually
from support.job_page import row, visible_numbers
from support.jobs import new_id, new_job

LONG, LONG_RECORDS = new_id(), 2_000_000
_STEP = 20_000


async def seed(store: Store) -> None:
    """Add a job with 2,000,000 records, of which every 100,000th has a needle."""
    now = time.time() - 60
    await store.add_job(new_job(id=LONG, procedure="stream"), now)
    await store.claim_jobs(now, 1, 10)
    for first in range(0, LONG_RECORDS, _STEP):
        values = [Raw(b'{"n": %d}' % number) for number in range(first, first + _STEP)]
        if first % 100_000 == 0:
            values[7] = Raw(b'{"n": %d, "text": "a Needle"}' % (first + 7))
        await store.append_records(LONG, first, Records(tuple(values), (now,) * _STEP))
    await store.finish_job(LONG, Returned(Raw(b"2000000")), now + 9)


def test_long_stream_opens_at_the_linked_record(site: Site, pages: Pages) -> None:
    context = pages.context()
    page = context.new_page()
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url) if "/records?" in request.url else None)
    page.goto(f"{site.url}/jobs/{LONG}#r1500000-1500002")
    expect(row(page, 1_500_000)).to_be_in_viewport()
    expect(row(page, 1_500_000)).to_contain_text('{"n": 1500000}')
    expect(page.locator(".log-row.selected")).to_have_count(3)
    assert len(asked) <= 3, asked  # a page of records, or two
    expect(page.locator(".tab-count")).to_have_text("2,000,000")
    assert page.evaluate("document.querySelectorAll('*').length") < 1500

    page.get_by_role("button", name="Top", exact=True).click()
    expect(row(page, 0)).to_be_in_viewport()
    page.get_by_role("button", name="End", exact=True).click()
    expect(row(page, LONG_RECORDS - 1)).to_be_in_viewport()
    page.evaluate("(log => log.scrollTop = log.scrollHeight / 4)(document.querySelector('.log'))")
    eventually(page, lambda: 490_000 < visible_numbers(page)[0] < 510_000, "a quarter of the way")
    expect(row(page, visible_numbers(page)[5])).to_contain_text(f'{{"n": {visible_numbers(page)[5]}}}')
    page.locator(".log-layer").focus()
    first = visible_numbers(page)[0]
    page.keyboard.press("PageDown")
    eventually(page, lambda: first < visible_numbers(page)[0] < first + 100, "the next screen")
    page.keyboard.press("PageUp")
    eventually(page, lambda: abs(visible_numbers(page)[0] - first) <= 4, "the screen before")


def test_find_counts_all_matches_of_the_stream(site: Site, pages: Pages) -> None:
    page = pages.open(f"/jobs/{LONG}?tab=output&find=needle")
    expect(page.locator(".find-count")).to_have_text("1 of 20")
    expect(row(page, 7)).to_be_in_viewport()
    expect(row(page, 7).locator("mark")).to_have_text("Needle")
    page.locator(".log-layer").focus()
    page.keyboard.press("n")
    expect(page.locator(".find-count")).to_have_text("2 of 20")
    page.keyboard.press("N")
    expect(page.locator(".find-count")).to_have_text("1 of 20")
    page.keyboard.press("N")
    expect(page.locator(".find-count")).to_have_text("20 of 20")
    expect(row(page, 1_900_007)).to_be_in_viewport()
    page.get_by_label("Matches only").check()
    expect(row(page, 7)).to_be_in_viewport()
    expect(row(page, 100_007)).to_be_in_viewport()
    expect(page.locator(".log-row")).to_have_count(20)
