"""The console and EventSource behind proxies: one that cuts streams, and nginx with a base path and with buffers."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from support.browser import PROCEDURES, Pages, Site, eventually, free_port, running_site
from support.cutting_proxy import cutting
from support.job_page import append, row, state
from support.nginx import running_nginx

#: What Chromium reports when a connection ends early, or nobody listens.
BROKEN = r"net::ERR_|503"

CUTS = 8
#: Bytes until a cut, of which a line of the page has about 80.
LONGEST = 6_000

#: Cuts of the streams of all event sources of a page. A browser waits a second after each, so several sources share
#: them; with HARP_LONG=1, all are of one.
SOURCE_CUTS, KILLS = 100, 3
SOURCES = 1 if os.environ.get("HARP_LONG") == "1" else 5
#: The least and most bytes until a cut. The head of an answer has fewer than the least, and EventSource takes a head
#: that was cut for a refusal, and ends itself.
HEAD, SOURCE_LONGEST = 1_000, 2_500
#: Lines that are written at once, and milliseconds between them: some seconds' lines for each source that was cut.
LINES, PAUSE = 10, 100

FOLLOW = """([path, number]) => {
    window.seen = Array.from({ length: number }, () => {
        const seen = { records: [], ends: [], opened: 0, source: new EventSource(path) };
        seen.source.addEventListener("record", ({ data, lastEventId }) => {
            const record = JSON.parse(data);
            seen.records.push([record.packet, Number(lastEventId), record.data]);
        });
        seen.source.addEventListener("end", ({ data }) => seen.ends.push(data));
        seen.source.addEventListener("open", () => seen.opened++);
        return seen;
    });
}"""


def port_of(site: Site) -> int:
    port = urlsplit(site.url).port
    assert port is not None
    return port


@pytest.mark.timeout(480)
def test_event_source_continues_through_cuts_and_kills(browser: Browser, tmp_path: Path) -> None:
    path, number, kills = tmp_path / "lines", 0, 0
    path.touch()
    with (
        running_site(tmp_path / "site", PROCEDURES) as site,
        cutting(port_of(site), b"text/event-stream", SOURCE_CUTS, SOURCE_LONGEST, HEAD) as proxy,
        Pages(browser, Site(site.system, f"http://127.0.0.1:{proxy.port}"), site.log_in()) as pages,
    ):
        pages.allow(BROKEN)
        job = site.submit("tail", str(path))
        page = pages.open("/sessions")  # a view without a stream of its own
        expect(page.get_by_text("this one")).to_be_visible()
        page.evaluate(FOLLOW, [f"/api/v1/jobs/{job}/records?follow=1&since=0", SOURCES])

        def write_until_cut() -> bool:
            nonlocal number, kills
            append(path, *(f"line {number + each}" for each in range(LINES)))
            number += LINES
            if kills < KILLS and proxy.cuts >= SOURCE_CUTS * (kills + 1) // (KILLS + 1):
                site.system.dispatcher.restart(kill=True)
                kills += 1
            page.wait_for_timeout(PAUSE)
            return proxy.cuts >= SOURCE_CUTS  # two may be cut at once

        eventually(page, write_until_cut, f"{SOURCE_CUTS} cuts", 60_000)
        append(path, "end")
        eventually(page, lambda: page.evaluate("seen.every(({ ends }) => ends.length)"), "the end of the job", 60_000)
        for records in page.evaluate("seen.map(({ records }) => records)"):
            assert records == [[each, each, f"line {each}"] for each in range(number)]
        assert kills == KILLS
        assert page.evaluate("seen.map(({ opened }) => opened).reduce((a, b) => a + b)") >= SOURCE_CUTS + SOURCES
        # A browser asks again when a stream ends. The answer is that there is no more.
        closed = "seen.every(({ source }) => source.readyState == EventSource.CLOSED)"
        eventually(page, lambda: page.evaluate(closed), "the ends of the sources")
        assert page.evaluate("seen.every(({ ends }) => ends.length == 1)")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("longest", [14, LONGEST], ids=["within the status line", "anywhere"])
def test_console_shows_all_through_cuts_and_a_kill(browser: Browser, tmp_path: Path, longest: int) -> None:
    path = tmp_path / "lines"
    append(path, *(f"line {number}" for number in range(50)))
    with (
        running_site(tmp_path / "site", PROCEDURES) as site,
        cutting(port_of(site), b"/api/v1/", CUTS, longest) as proxy,
        Pages(browser, Site(site.system, f"http://127.0.0.1:{proxy.port}"), site.log_in()) as pages,
    ):
        pages.allow(BROKEN)
        job = site.submit("tail", str(path))
        context = pages.context()
        output, jobs = context.new_page(), context.new_page()
        output.goto(f"http://127.0.0.1:{proxy.port}/jobs/{job}?tab=output")
        jobs.goto(f"http://127.0.0.1:{proxy.port}/jobs")
        ids = [job]
        for part in range(5):
            append(path, *(f"line {number}" for number in range(50 + 10 * part, 60 + 10 * part)))
            ids.append(site.submit("echo", part))
            if part == 2:
                site.system.dispatcher.kill()
                site.system.dispatcher.start()
            jobs.wait_for_timeout(500)
        for each in reversed(ids):
            expect(jobs.locator(f'tr[data-job="{each}"]')).to_be_visible(timeout=60_000)
        assert jobs.locator("tr[data-job]").evaluate_all("(rows) => rows.map((row) => row.dataset.job)") == ids[::-1]
        append(path, "end")
        expect(state(output)).to_contain_text("returned", timeout=60_000)
        expect(output.locator(".tab-count")).to_have_text("100")
        expect(row(output, 99)).to_be_in_viewport()
        numbers = [int(text.removeprefix("line ")) for text in output.locator(".log-text").all_inner_texts()]
        assert numbers == list(range(numbers[0], 100))
        assert proxy.cuts > 3


def follow_live(page: Page, site: Site, path: Path) -> None:
    """Expect that the list of jobs and the output of a job follow what happens."""
    job = site.submit("tail", str(path))
    expect(page.locator(f'tr[data-job="{job}"]')).to_contain_text("running", timeout=60_000)
    page.locator(f'tr[data-job="{job}"] a').first.click()
    expect(row(page, 0)).to_be_in_viewport()
    append(path, "one more")
    expect(row(page, 1)).to_be_in_viewport(timeout=60_000)
    append(path, "end")
    expect(state(page)).to_contain_text("returned", timeout=60_000)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("is_held_back", [False, True])
def test_console_works_behind_nginx_with_buffers(browser: Browser, tmp_path: Path, is_held_back: bool) -> None:
    """Streams ask nginx not to hold them back; a proxy that does so in spite of that makes the page ask every 5 s."""
    path = tmp_path / "lines"
    append(path, "first")
    more = "proxy_ignore_headers X-Accel-Buffering;" if is_held_back else ""
    port = free_port()
    with (
        running_site(tmp_path / "site", PROCEDURES, dispatcher={"http": {"base_path": "/harp"}}) as site,
        running_nginx(tmp_path / "nginx", port, port_of(site), "/harp", more),
        Pages(browser, Site(site.system, f"http://127.0.0.1:{port}")) as pages,
    ):
        pages.allow("401")  # of the first request
        page = pages.context().new_page()
        page.goto(site.login_link().replace(site.url, f"http://127.0.0.1:{port}"))
        expect(page.get_by_role("heading", name="What needs attention")).to_be_visible()
        page.get_by_role("link", name="Jobs", exact=True).click()
        expect(page).to_have_url(re.compile("/harp/jobs$"))
        expect(page.locator(".live-polling" if is_held_back else ".live-live")).to_be_visible(timeout=30_000)
        follow_live(page, site, path)
        page.reload()
        expect(state(page)).to_contain_text("returned")
