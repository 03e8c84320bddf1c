"""What operators watch in the console beside jobs: hosts that go down and return, and who has done what."""

from __future__ import annotations

import re
import time
from datetime import timedelta

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from support.browser import Pages, Site, find_axe_violations, free_port

DISPATCHER = {"audit_file": "audit.jsonl", "tokens_file": "tokens"}
CANCEL = """(job) => fetch(`/api/v1/jobs/${job}/cancel`, {
    method: "POST", headers: {"Content-Type": "application/json"}, body: "{}",
}).then((answer) => answer.status)"""


def entries(page: Page, *texts: str) -> Locator:
    """Return the rows of a table that have these texts."""
    found = page.locator("tbody tr")
    for text in texts:
        found = found.filter(has_text=text)
    return found


@pytest.fixture(scope="module")
def watched(browser: Browser, site: Site) -> Site:
    """The site after an operator has cancelled a job in the console, and a viewer has tried to."""
    job, other = site.submit("sleep", 300), site.submit("sleep", 300)
    with Pages(browser, site, site.log_in("--as=alice", "--role=operator")) as pages:
        page = pages.open(f"/jobs/{job}")
        page.get_by_role("button", name="Cancel", exact=True).click()
        page.get_by_role("button", name="Cancel the job").click()
        expect(page.locator(".job-state")).to_contain_text("cancelled")
    with Pages(browser, site, site.log_in("--as=bob", "--role=viewer")) as pages:
        pages.allow("403")
        page = pages.open("/jobs")
        expect(entries(page, "sleep").first).to_be_visible()
        assert page.evaluate(CANCEL, other) == 403
    return site


def test_audit_shows_what_each_person_has_done(watched: Site, pages: Pages) -> None:
    page = pages.open("/audit")
    expect(page.get_by_text("chain whole")).to_be_visible()
    cancelled = entries(page, "user:alice", "cancel", "allowed")
    expect(cancelled).to_have_count(1)
    expect(cancelled).to_contain_text(re.compile(r"sleep on web01 [0-9a-f]{8}"))
    refused = entries(page, "user:bob", "cancel")
    expect(refused).to_have_count(1)
    expect(refused).to_contain_text("denied")
    page.get_by_role("link", name="user:bob").first.click()
    expect(page).to_have_url(re.compile(r"/audit\?principal=user:bob$"))
    expect(entries(page)).to_have_count(2)  # the login, too
    page.get_by_label("Decision").select_option("denied")
    page.get_by_role("button", name="Filter").click()
    expect(page).to_have_url(re.compile(r"principal=user(:|%3A)bob&decision=denied$"))
    expect(entries(page)).to_have_count(1)
    entries(page).locator("a.mono").click()
    expect(page.locator(".job-state")).to_contain_text("running")
    page.goto(f"{watched.url}/audit?principal=user:nobody")
    expect(page.get_by_role("heading", name="No entry fits")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 320])
def test_filled_audit_fits_and_has_no_axe_violation(watched: Site, pages: Pages, scheme: str, width: int) -> None:
    page = pages.open("/audit", color_scheme=scheme, viewport={"width": width, "height": 800})
    expect(entries(page, "user:alice", "cancel", "allowed")).to_be_visible()
    assert find_axe_violations(page) == []
    if width == 320:
        assert page.evaluate("document.querySelector('main').scrollWidth") <= 320


def test_host_that_goes_down_and_returns_is_seen_without_a_reload(site: Site, pages: Pages) -> None:
    dispatcher, port = site.system.dispatcher, site.system.harpd.port
    dispatcher.set_hosts({"web01": port, "web02": free_port()})
    dispatcher.reload()
    page = pages.open("/hosts")
    host = entries(page, "web02")
    expect(host).to_contain_text("not known yet")
    job = site.system.rpc.host("web02", start_within=300).echo(1)
    expect(host).to_contain_text(re.compile(r"down.*since.*Connection refused", re.DOTALL))
    expect(host.get_by_role("link", name="1", exact=True)).to_be_visible()
    dispatcher.set_hosts({"web01": port, "web02": port})
    dispatcher.reload()
    expect(host).to_contain_text(re.compile(r"web02\s*up"))
    expect(host).not_to_contain_text("refused")
    assert job.result(wait=True) == [1]


def test_host_warns_of_its_certificate_and_its_clock(site: Site, pages: Pages) -> None:
    site.finish("echo", 1)
    page = pages.context().new_page()

    def differ(route: Route) -> None:
        """Let the host's clock be behind, which no host of a test can be."""
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "clock_skew": -75.5})

    page.route("**/api/v1/hosts/web01", differ)
    page.goto(f"{site.url}/hosts/web01")
    expect(page.get_by_text("1 min 15 s behind")).to_be_visible()
    page.goto(f"{site.url}/hosts")
    expect(entries(page, "web01")).to_contain_text("up")
    expect(page.get_by_text("certificate ends soon")).to_have_count(0)
    page.clock.set_fixed_time(time.time() + timedelta(days=360).total_seconds())
    page.reload()
    expect(entries(page, "web01").get_by_text("certificate ends soon")).to_be_visible()


def test_token_logs_in_and_shows_what_it_may_see(site: Site, visitor_pages: Pages) -> None:
    visitor_pages.allow("401")
    made = site.system.dispatcher.control("token", "add", "eye", "--role=viewer")
    page = visitor_pages.open("/queues")
    page.get_by_label("Token or password").fill("harp_" + "x" * 43)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("That did not work.")
    page.get_by_label("Token or password").fill(made.stdout.strip())
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Queues", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="token:eye")).to_be_visible()
    expect(page.get_by_role("navigation", name="Views").get_by_role("link")).to_have_text(
        ["Overview", "Jobs", "Queues", "Hosts"]
    )
