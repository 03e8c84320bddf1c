"""The console's lists in a real browser: log in, jobs with filters and live rows, queues, hosts, sessions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

import harp
from support.browser import PROCEDURES, Pages, Site, eventually, find_axe_violations, running_site
from support.jobs import new_id

NAMES = ("web01", "quiet01")


@pytest.fixture(scope="module")
def filled(site: Site) -> Site:
    """The system with jobs in several states."""
    for number in range(30):
        site.submit("echo", number)
    site.finish("fail", "no such table: orders")
    site.finish("nothing")
    site.submit("sleep", 600, queue={"name": {"service": "nginx"}, "concurrency": 1})
    site.submit("sleep", 600, queue={"name": {"service": "nginx"}, "concurrency": 1})
    site.finish("echo", "<img src=x onerror=alert(1)>\u202e\u2028 and </script>")
    return site


def rows(page: Page) -> Locator:
    return page.locator("tr[data-job]")


def row(page: Page, job: str) -> Locator:
    return page.locator(f'tr[data-job="{job}"]')


def job_ids(page: Page) -> list[str]:
    return [str(job) for job in rows(page).evaluate_all("(rows) => rows.map((row) => row.dataset.job)")]


def facet(page: Page, name: str, value: str) -> Locator:
    return page.locator(f".facets .facet-{name} li").filter(has=page.get_by_text(value, exact=True)).locator("a").first


# --- the way in ---------------------------------------------------------------------------------------------------


def test_login_link_works_once_and_leaves_the_address(visitor_pages: Pages, site: Site) -> None:
    link = site.login_link().removeprefix(site.url)
    page = visitor_pages.open(link)
    expect(page.get_by_role("heading", name="What needs attention")).to_be_visible()
    assert urlsplit(page.url).path == "/"
    assert "k=" not in page.url
    visitor_pages.allow("401")
    other = visitor_pages.open(link)
    expect(other.get_by_role("alert")).to_contain_text("A link works once")
    assert "k=" not in other.url


def test_login_leads_to_the_page_that_was_asked_for(visitor_pages: Pages, site: Site) -> None:
    visitor_pages.allow("401")
    page = visitor_pages.open("/jobs?state=failed")
    expect(page.get_by_label("Token")).to_be_visible()
    expect(page.get_by_role("navigation")).to_have_count(0)
    page.get_by_label("Token").fill("harp_" + "0" * 43)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("did not work")
    secret = urlsplit(site.login_link()).fragment.partition("=")[2]
    page.context.request.post(
        site.url + "/api/v1/session",
        data={"link": secret},
        headers={"Sec-Fetch-Site": "same-origin", "Origin": site.url},
    )
    page.reload()
    expect(page.locator(".chip")).to_contain_text("failed")


def test_logout_in_one_tab_shows_the_login_in_others(visitor_pages: Pages, site: Site) -> None:
    context = visitor_pages.context()
    first, second = context.new_page(), context.new_page()
    visitor_pages.allow("401")
    first.goto(site.login_link())
    expect(first.get_by_role("navigation").first).to_be_visible()
    second.goto(site.url + "/jobs")
    expect(second.get_by_role("navigation").first).to_be_visible()
    first.get_by_role("button", name="Account and settings").click()
    first.get_by_role("button", name="Log out").click()
    expect(first.get_by_label("Token")).to_be_visible()
    expect(second.get_by_label("Token")).to_be_visible()
    assert "echo" not in second.inner_text("body")


@pytest.mark.parametrize("path", ["/job/0199e9c1-0000-7000-8000-000000000000", "/jobs/1/2", "/docs/none"])
def test_unknown_address_shows_a_page_that_says_so(site: Site, pages: Pages, path: str) -> None:
    pages.allow("404")
    page = pages.context().new_page()
    answer = page.goto(site.url + path)
    assert answer is not None
    assert answer.status == 404
    expect(page.get_by_role("heading", name="There is no such page")).to_be_visible()
    page.get_by_role("main").get_by_role("link", name="Jobs").click()
    expect(page).to_have_url(re.compile("/jobs$"))


def test_unknown_address_answers_programs_with_a_problem(site: Site, pages: Pages) -> None:
    request = pages.context().request
    for path, accept in (("/job/1", "*/*"), ("/job/1", "application/json"), ("/api/v2/jobs", "text/html")):
        answer = request.get(site.url + path, headers={"Accept": accept})
        assert (answer.status, answer.json()["code"]) == (404, "not_found")


# --- the list of jobs ---------------------------------------------------------------------------------------------


def test_job_appears_and_changes_in_place(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs")
    expect(page.locator(".live-live")).to_be_visible()
    job = filled.submit("sleep", 600)
    expect(row(page, job)).to_be_visible()
    expect(row(page, job)).to_contain_text("running")
    place = job_ids(page).index(job)
    filled.system.rpc.job(job).cancel()
    expect(row(page, job)).to_contain_text("cancelled")
    assert job_ids(page).index(job) == place


def test_count_is_a_filter_and_an_address(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs")
    facet(page, "state", "raised").click()
    expect(page).to_have_url(re.compile(r"/jobs\?state=raised$"))
    expect(rows(page).first).to_contain_text("ValueError")
    shown = job_ids(page)
    expect(page.locator(".sum")).to_have_text(f"{len(shown)} job" + ("s" if len(shown) > 1 else ""))
    page.reload()
    expect(rows(page)).to_have_count(len(shown))
    assert job_ids(page) == shown
    facet(page, "state", "failed").click(modifiers=["Control"])
    expect(page).to_have_url(re.compile(r"state=raised,failed$"))
    expect(rows(page).filter(has_text="no_such_procedure")).to_have_count(1)
    facet(page, "procedure", "nothing").click()
    expect(page).to_have_url(re.compile(r"procedure=nothing"))
    expect(rows(page)).to_have_count(1)
    page.get_by_role("link", name="Remove State").click()
    expect(page).to_have_url(re.compile(r"/jobs\?procedure=nothing$"))


def test_back_restores_rows_and_place(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs", viewport={"width": 1280, "height": 500})
    expect(rows(page).nth(12)).to_be_visible()
    page.locator(".list").evaluate("(list) => { list.scrollTop = 300; }")
    target = job_ids(page)[14]
    row(page, target).get_by_role("link").click()
    expect(page).to_have_url(re.compile(target))
    page.go_back()
    expect(row(page, target)).to_be_visible()
    eventually(page, lambda: page.locator(".list").evaluate("(list) => list.scrollTop") == 300, "the place")
    page.go_forward()
    expect(page).to_have_url(re.compile(target))


def test_newer_jobs_wait_while_the_reader_is_down_the_list(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs", viewport={"width": 1280, "height": 500})
    expect(page.locator(".live-live")).to_be_visible()
    expect(rows(page).nth(12)).to_be_visible()
    page.locator(".list").evaluate("(list) => { list.scrollTop = 300; }")
    seen = rows(page).nth(14)
    target = seen.get_attribute("data-job") or ""
    before = row(page, target).bounding_box()
    new = [filled.submit("echo", "newer") for _ in range(3)]
    pill = page.get_by_role("button", name="3 newer jobs")
    expect(pill).to_be_visible()
    assert row(page, target).bounding_box() == before
    pill.click()
    expect(row(page, new[-1])).to_be_visible()
    assert set(new) <= set(job_ids(page)[:3])


def test_rows_that_come_before_the_first_page_stand_in_their_place(pages: Pages, filled: Site, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("first\n")
    running = filled.submit("tail", str(path))
    others = [filled.finish("echo", number) for number in range(2)]
    page = pages.context().new_page()
    held: list[Route] = []
    page.route("**/api/v1/jobs?*", lambda route: held.append(route), times=1)
    page.goto(filled.url + "/jobs")
    expect(page.locator(".live-live")).to_be_visible()
    path.write_text("first\nsecond\n")
    expect(row(page, running)).to_be_visible()
    while held:
        held.pop().continue_()
    for job in others:
        expect(row(page, job)).to_be_visible()
    assert job_ids(page)[:3] == [*reversed(others), running]
    path.write_text("first\nsecond\nend\n")
    expect(row(page, running)).to_contain_text("returned")


def test_row_of_the_keys_stays_through_many_changes(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs")
    expect(page.locator(".live-live")).to_be_visible()
    expect(rows(page).nth(1)).to_be_visible()  # keys go to rows that are there
    page.keyboard.press("j")
    at = page.locator("tr.at")
    expect(at.locator("a").first).to_be_focused()  # from now on, the list holds still
    first = at.get_attribute("data-job") or ""
    page.keyboard.press("j")
    expect(at).not_to_have_attribute("data-job", first)
    expect(at.locator("a").first).to_be_focused()
    job = at.get_attribute("data-job")
    for number in range(40):
        filled.submit("echo", number)
    last = filled.finish("echo", "last")
    expect(page.get_by_role("button", name=re.compile("newer jobs"))).to_be_visible()
    assert row(page, last).count() == 0
    assert at.get_attribute("data-job") == job
    assert page.evaluate("document.activeElement.closest('tr').dataset.job") == job


@pytest.mark.parametrize(
    ("sought", "found"),
    [("procedure:fail", "ValueError"), ("no such table", "ValueError"), ("end_type:no_such_procedure", "nothing")],
)
def test_search_finds_by_words_and_keys(pages: Pages, filled: Site, sought: str, found: str) -> None:
    page = pages.open("/")
    expect(page.get_by_role("searchbox", name="Search jobs")).to_be_visible()
    page.keyboard.press("/")
    page.keyboard.type(sought)
    page.keyboard.press("Enter")
    expect(rows(page)).to_have_count(1)
    expect(rows(page)).to_contain_text(found)


#: Type into the field in the moment in which it is there.
TYPE_AT_ONCE = """\
new MutationObserver((_, observer) => {
  const field = document.querySelector("input[type=search]");
  if (!field) return;
  observer.disconnect();
  field.focus();
  document.execCommand("insertText", false, "procedure:fail");
}).observe(document, { childList: true, subtree: true });
"""


def test_what_is_typed_while_the_page_begins_is_kept(pages: Pages, filled: Site) -> None:
    context = pages.context()
    context.add_init_script(TYPE_AT_ONCE)
    page = context.new_page()
    page.goto(f"{filled.url}/")
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    expect(page.get_by_role("searchbox", name="Search jobs")).to_have_value("procedure:fail")


def test_keys_of_a_search_are_filters_that_counts_show(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs")
    field = page.get_by_role("searchbox", name="Search jobs")
    field.fill('no state:bad procedure:fail "such table"')
    field.press("Enter")
    expect(page).to_have_url(re.compile(r"\?q=no\+%22such\+table%22&state=bad&procedure=fail$"))
    expect(rows(page)).to_have_count(1)
    expect(page.locator(".facet-state li.set")).to_have_text([re.compile("raised"), re.compile("failed")])
    expect(page.get_by_text("1 job", exact=True)).to_be_visible()
    expect(field).to_have_value('no "such table"')
    field.fill("state:raised state:failed owner:token:web")
    field.press("Enter")
    expect(page).to_have_url(re.compile(r"\?q=state:raised\+state:failed\+owner:token:web$"))


def test_search_by_id_opens_the_job_and_by_its_part_finds_it(pages: Pages, filled: Site) -> None:
    job = filled.finish("echo", "sought")
    page = pages.open("/jobs")
    field = page.get_by_role("searchbox", name="Search jobs")
    field.fill(job[:13])
    field.press("Enter")
    expect(row(page, job)).to_be_visible()
    field.fill(job)
    field.press("Enter")
    expect(page).to_have_url(re.compile(f"/jobs/{job}$"))


def test_empty_result_names_the_part_that_excludes_all(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs?state=raised&host=web99")
    expect(page.get_by_role("heading", name="No job fits this filter")).to_be_visible()
    without = page.locator(".empty p").filter(has_text="Host web99")
    expect(without).to_contain_text(re.compile(r"Without Host web99: \d+ jobs?"))
    without.get_by_role("link").click()
    expect(page).to_have_url(re.compile(r"/jobs\?state=raised$"))
    expect(rows(page).first).to_contain_text("raised")


def test_word_that_is_in_arguments_only_can_be_searched_there(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs?q=onerror")
    expect(page.get_by_text("Words are searched for in procedure, host, info")).to_be_visible()
    page.get_by_role("link", name="Search the arguments").click()
    expect(page).to_have_url(re.compile(r"/jobs\?arguments=onerror$"))
    expect(rows(page)).to_have_count(1)


def test_page_names_the_zone_of_its_times(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs?procedure=sleep", timezone_id="Asia/Kolkata")
    zone, time = page.locator(".zone"), rows(page).first.locator("time").first
    expect(zone).to_have_text("UTC+05:30")
    expect(time).to_have_attribute("title", re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} UTC\+05:30$"))
    expect(time).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))
    local = time.inner_text()
    page.get_by_role("button", name="Account and settings").click()
    expect(page.get_by_text("local (UTC+05:30)")).to_be_visible()
    page.get_by_text("UTC", exact=True).last.click()
    expect(zone).to_have_text("UTC")
    expect(time).not_to_have_text(local)
    page.get_by_text("relative").click()
    expect(zone).to_have_count(0)


def test_unknown_filter_is_named(pages: Pages, filled: Site) -> None:
    pages.allow("400")
    page = pages.open("/jobs?stat=failed")
    expect(page.get_by_role("alert")).to_contain_text("stat")
    expect(page.get_by_role("button", name="Try again")).to_have_count(0)
    page.locator(".list").get_by_role("link", name="Clear all filters").click()
    expect(rows(page).first).to_be_visible()


def test_text_of_jobs_is_never_markup(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs?arguments=onerror")
    expect(rows(page)).to_have_count(1)
    expect(rows(page)).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.locator(".list img").count() == 0
    assert "\u202e" not in rows(page).inner_text()


def test_row_menu_copies_and_filters(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs?procedure=fail")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    expect(rows(page).first).to_be_visible()
    job = job_ids(page)[0]
    page.keyboard.press("j")
    expect(page.locator("tr.at a").first).to_be_focused()
    page.keyboard.press("m")
    page.get_by_role("button", name="Copy curl").click()
    expect(page.locator(".notice")).to_contain_text("Copied")
    assert f"/api/v1/jobs/{job}" in page.evaluate("navigator.clipboard.readText()")
    page.keyboard.press("y")
    eventually(page, lambda: page.evaluate("navigator.clipboard.readText()") == f"{filled.url}/jobs/{job}")
    page.keyboard.press("m")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"procedure=fail&host=web01$"))


def test_copied_lines_of_harp_and_python_reach_this_dispatcher(pages: Pages, filled: Site) -> None:
    """The dispatcher of the tests has no default port."""
    job, port = filled.finish("echo", "copied"), filled.system.dispatcher.port
    page = pages.open(f"/jobs/{job}")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copied = {}
    for name in ("harp", "Python"):
        page.get_by_title("Copy as").click()
        page.get_by_role("button", name=f"Copy {name}").click()
        expect(page.locator(".notice").last).to_contain_text(name)
        copied[name] = page.evaluate("navigator.clipboard.readText()")
    assert copied["harp"] == f"harp --dispatcher=127.0.0.1:{port} show {job}"
    assert eval(copied["Python"], {"harp": harp}) == ["copied"]


def test_account_menu_leads_to_the_pages_of_the_http_api(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs")
    page.get_by_role("button", name="Account and settings").click()
    for name, path in ("HTTP API", "/docs"), ("OpenAPI document", "/api/v1/openapi.json"):
        address = page.get_by_role("link", name=name).get_attribute("href")
        assert address == path
        assert page.request.get(filled.url + address).ok


def test_columns_and_theme_are_remembered(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs")
    page.get_by_role("button", name="Columns").click()
    page.get_by_role("checkbox", name="Owner").check()
    expect(page.get_by_role("columnheader", name="Owner")).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Account and settings").click()
    page.locator(".choice").filter(has_text="Theme").get_by_text("dark").click()
    page.reload()
    expect(page.get_by_role("columnheader", name="Owner")).to_be_visible()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_wrong_filter_shows_no_numbers_of_the_one_before(pages: Pages, filled: Site) -> None:
    pages.allow("400")
    page = pages.open("/jobs")
    expect(page.locator(".facet-host .count").first).not_to_be_empty()
    expect(page.locator(".sum")).not_to_be_empty()
    page.get_by_role("searchbox", name="Search jobs").fill("state:runing")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("did you mean running?")
    expect(page.locator(".sum")).to_be_empty()
    expect(page.locator(".facet-host")).to_have_count(0)
    page.get_by_role("link", name="Clear all filters").click()
    expect(page.locator(".facet-host .count").first).not_to_be_empty()


def test_palette_and_key_help_work_by_keys_alone(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs")
    expect(rows(page).first).to_be_visible()
    page.keyboard.press("Control+k")
    page.get_by_role("combobox", name="Go to or do").fill("hosts")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("/hosts$"))
    page.keyboard.press("g")
    page.keyboard.press("j")
    expect(page).to_have_url(re.compile("/jobs$"))
    page.keyboard.press("Control+k")
    page.get_by_role("combobox", name="Go to or do").fill("quiet")  # a host that has no job
    expect(page.get_by_role("option").first).to_have_text("Host quiet01")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("/hosts/quiet01$"))
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_contain_text("Go to Jobs")
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("j")
    expect(page).to_have_url(re.compile("/jobs$"))
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_contain_text("next row")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_keys_alone_lead_from_the_link_to_a_job(visitor_pages: Pages, filled: Site) -> None:
    visitor_pages.allow("401")
    page = visitor_pages.context().new_page()
    page.goto(filled.login_link())
    expect(page.get_by_role("heading", name="What needs attention")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#content")).to_be_focused()
    page.keyboard.press("/")
    page.keyboard.type("state:raised")
    page.keyboard.press("Enter")
    expect(rows(page).first).to_contain_text("ValueError")
    expect(page.locator("#content")).to_be_focused()  # not the field, where keys are text
    page.keyboard.press("j")
    expect(page.locator("tr.at .row-link")).to_be_focused()
    job = page.locator("tr.at").get_attribute("data-job") or ""
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(job))
    expect(page.get_by_role("tablist")).to_be_visible()  # the keys of the job are there
    page.keyboard.press("u")
    expect(row(page, job)).to_be_visible()
    assert "raised" in page.url


def test_single_keys_can_be_switched_off(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs")
    expect(rows(page).first).to_be_visible()
    page.evaluate("localStorage.setItem('harp.keys', 'off')")
    page.reload()
    expect(rows(page).first).to_be_visible()
    page.keyboard.press("?")
    page.keyboard.press("j")
    expect(page.locator("tr.at")).to_have_count(0)
    expect(page.get_by_role("dialog")).to_have_count(0)


# --- other views ----------------------------------------------------------------------------------------------------


def test_overview_leads_to_the_jobs_that_it_counts(pages: Pages, filled: Site) -> None:
    page = pages.open("/")
    link = page.locator(".wrong a").filter(has_text="failed or raised in the last 24 hours")  # so last night counts
    expect(link).to_be_visible()
    link.click()
    expect(rows(page).filter(has_text="ValueError").first).to_be_visible()
    assert "state=bad" in page.url


def test_queue_shows_its_use_and_leads_to_its_jobs(pages: Pages, filled: Site) -> None:
    page = pages.open("/queues")
    queue = page.locator("tbody tr").filter(has_text='{"service": "nginx"}')
    expect(queue).to_contain_text("1 / 1")
    expect(queue).to_contain_text("full")
    queue.get_by_role("link", name="1", exact=True).click()
    expect(rows(page)).to_have_count(1)
    expect(rows(page)).to_contain_text("queued")
    page.go_back()
    page.get_by_role("link", name='{"service": "nginx"}').click()
    expect(page.get_by_role("heading", name='{"service": "nginx"}')).to_be_visible()


def test_host_shows_its_state_and_leads_to_its_jobs(pages: Pages, filled: Site) -> None:
    page = pages.open("/hosts")
    host = page.locator("tbody tr").filter(has_text="web01")
    expect(host).to_contain_text("up")
    host.get_by_role("link", name="web01").click()
    expect(page.get_by_role("heading", name="web01")).to_be_visible()
    page.get_by_role("link", name="Failed or raised").click()
    expect(rows(page).filter(has_text="ValueError").first).to_be_visible()


def test_session_can_be_ended_from_the_list(pages: Pages, site: Site) -> None:
    other = site.log_in("--as", "guest")
    page = pages.open("/sessions")
    guest = page.locator("tbody tr").filter(has_text="guest")
    expect(guest).to_have_count(1)
    guest.get_by_role("button", name="End").click()
    expect(guest).to_have_count(0)
    with pytest.raises(Exception, match="401"):
        site.get("/me", other)


def test_unknown_address_says_so(pages: Pages, site: Site) -> None:
    pages.allow("404")
    page = pages.open("/queues/" + "0" * 32)
    expect(page.get_by_role("alert")).to_contain_text("no such queue")
    page.goto(site.url + "/hosts/nohost")
    expect(page.get_by_role("alert")).to_contain_text("no such host")


# --- streams --------------------------------------------------------------------------------------------------------


def test_seven_tabs_all_load_and_the_later_ones_ask(pages: Pages, filled: Site) -> None:
    context = pages.context()
    tabs = [context.new_page() for _ in range(7)]
    for tab in tabs:
        tab.goto(filled.url + "/jobs")
        expect(rows(tab).first).to_be_visible()
    live = eventually(tabs[0], lambda: _settled(tabs), "the state of all tabs")
    assert live == 4
    tabs[0].close()
    job = filled.finish("echo", "for all tabs")
    for tab in tabs[1:]:
        expect(row(tab, job)).to_be_visible()


def _settled(tabs: list[Page]) -> int:
    counts = [tab.locator(".live-live").count() + 10 * tab.locator(".live-polling").count() for tab in tabs]
    return counts.count(1) if 0 not in counts else 0


def test_paused_page_holds_still_and_catches_up(pages: Pages, filled: Site) -> None:
    page = pages.open("/jobs")
    expect(page.locator(".live-live")).to_be_visible()
    # When this row is there, the page has had the answer to what it asks at the start of the stream.
    expect(row(page, filled.finish("echo", "before the pause"))).to_be_visible()
    page.keyboard.press(".")
    expect(page.locator(".live-paused")).to_be_visible()
    job = filled.finish("echo", "while paused")
    page.wait_for_timeout(600)
    assert row(page, job).count() == 0
    page.keyboard.press(".")
    expect(row(page, job)).to_be_visible()


def test_hidden_tab_lets_go_of_its_stream(pages: Pages, filled: Site) -> None:
    page = pages.context().new_page()
    page.clock.install()
    page.goto(filled.url + "/jobs")
    expect(page.locator(".live-live")).to_be_visible()
    held = "navigator.locks.query().then(({held}) => held.length)"
    assert page.evaluate(held) == 1
    show = """(hidden) => {
        Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(show, True)
    assert page.evaluate(held) == 1
    page.clock.fast_forward(10_000)
    eventually(page, lambda: page.evaluate(held) == 0, "the end of the stream")
    job = filled.finish("echo", "while hidden")
    page.evaluate(show, False)
    expect(row(page, job)).to_be_visible()
    eventually(page, lambda: page.evaluate(held) == 1, "the next stream")


def test_restart_below_a_base_path_shows_a_banner_and_catches_up(browser: Browser, tmp_path: Path) -> None:
    with running_site(tmp_path, PROCEDURES, dispatcher={"http": {"base_path": "/harp"}}) as site:
        with Pages(browser, site) as pages:
            pages.allow("Failed to load resource|net::ERR")
            page = pages.context().new_page()
            page.goto(site.login_link())
            expect(page.get_by_role("heading", name="What needs attention")).to_be_visible()
            page.get_by_role("link", name="Jobs", exact=True).click()
            expect(page).to_have_url(re.compile("/harp/jobs$"))
            expect(page.locator(".live-live")).to_be_visible()
            first = site.finish("echo", 1)
            expect(row(page, first)).to_contain_text("returned")
            site.system.dispatcher.kill()
            expect(page.locator(".banner")).to_contain_text("does not answer since")
            expect(row(page, first)).to_be_visible()
            site.system.dispatcher.start()
            second = site.finish("echo", 2)
            expect(row(page, second)).to_contain_text("returned")
            expect(page.locator(".live-live")).to_be_visible()
            expect(page.locator(".banner")).to_have_count(0)
            # A view without a stream notices it by its requests, and is asked for again.
            page.goto(site.url + "/harp/sessions")
            expect(page.get_by_text("this one")).to_be_visible()
            page.wait_for_timeout(1_500)  # the other views are loaded after a second
            site.system.dispatcher.kill()
            page.get_by_role("link", name="Audit").click()
            expect(page.locator(".banner")).to_be_visible()
            site.system.dispatcher.start()
            expect(page.locator(".banner")).to_have_count(0)
            expect(page.get_by_role("heading", name="The dispatcher keeps no audit file")).to_be_visible()


# --- for everyone -----------------------------------------------------------------------------------------------------

NARROW = {"width": 320, "height": 640}
VIEWS = ["/", "/jobs", "/jobs?host=web99", "/queues", "/hosts", "/hosts/web01", "/sessions", "/audit"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_views_have_no_axe_violation(pages: Pages, filled: Site, theme: str) -> None:
    pages.allow("404")  # the system has no audit file
    context = pages.context(color_scheme=theme)
    page = context.new_page()
    found = []
    for path in VIEWS:
        page.goto(filled.url + path)
        expect(page.locator(".loading")).to_have_count(0)
        expect(page.locator(".page, .jobs").first).to_be_visible()
        page.wait_for_timeout(400)  # what is drawn late is examined, too
        found += [f"{path}: {violation}" for violation in find_axe_violations(page)]
    page.goto(filled.url + "/jobs")
    expect(rows(page).first).to_be_visible()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    found += find_axe_violations(page)
    assert found == []


@pytest.mark.parametrize(
    "options", [{"color_scheme": "light"}, {"color_scheme": "dark"}, {"viewport": NARROW}], ids=str
)
def test_error_states_have_no_axe_violation(browser: Browser, tmp_path: Path, options: dict[str, Any]) -> None:
    found: list[str] = []
    with running_site(tmp_path, PROCEDURES) as site, Pages(browser, site, site.log_in()) as pages:
        pages.allow("40[04]|ERR_|Failed to load resource")
        job = site.finish("echo", 1)
        page = pages.context(**options).new_page()

        def examine(name: str) -> None:
            page.wait_for_timeout(400)  # what is drawn late is examined, too
            found.extend(f"{name}: {violation}" for violation in find_axe_violations(page))

        for path, text in (
            ("/jobs?stat=failed", "stat"),
            (f"/jobs/{new_id()}", "No such job"),
            (f"/queues/{'0' * 32}", "no such queue"),
            ("/hosts/nohost", "no such host"),
            ("/audit?from=someday", "got someday"),
        ):
            page.goto(site.url + path)
            expect(page.locator("#content")).to_contain_text(text)
            examine(path)
        for path in ("/", "/jobs", "/queues", "/hosts", f"/jobs/{job}"):
            page.goto(site.url + path)
            expect(page.locator(".loading")).to_have_count(0)
            expect(page.locator(".page, .jobs, .job").first).to_be_visible()
        site.system.dispatcher.kill()
        since = set[str]()
        for path in ("/jobs", "/queues", "/audit", "/"):
            # The page is there; what it asks for is not answered.
            page.evaluate(
                """(path) => {
                history.pushState(null, "", path);
                dispatchEvent(new PopStateEvent("popstate"));
            }""",
                path,
            )
            expect(page.locator(".banner")).to_contain_text("does not answer since")
            since.add(page.locator(".banner").inner_text())
            examine(f"away, {path}")
        assert len(since) == 1, "it is away since the same time in all views"
        expect(page.get_by_role("alert").first).to_be_visible()
        site.system.dispatcher.start()
    assert found == []


def test_narrow_views_fit_and_have_no_axe_violation(pages: Pages, filled: Site) -> None:
    pages.allow("404")
    page = pages.context(viewport=NARROW, has_touch=True).new_page()
    found = []
    for path in VIEWS:
        page.goto(filled.url + path)
        expect(page.locator(".loading")).to_have_count(0)
        expect(page.locator(".page, .jobs").first).to_be_visible()
        width = page.evaluate(
            "Math.max(document.documentElement.scrollWidth, document.querySelector('main').scrollWidth)"
        )
        assert width <= 320, path
        found += [f"{path}: {violation}" for violation in find_axe_violations(page)]
    assert found == []
    page.goto(filled.url + "/jobs")
    page.get_by_role("button", name="Filters").click()
    page.get_by_role("dialog", name="Filters").get_by_role("link", name=re.compile("^raised")).first.click()
    expect(page).to_have_url(re.compile("state=raised"))


def test_login_page_has_no_axe_violation(visitor_pages: Pages, site: Site) -> None:
    visitor_pages.allow("401")
    page = visitor_pages.open("/jobs")
    expect(page.get_by_label("Token")).to_be_visible()
    assert find_axe_violations(page) == []


def test_views_work_with_reduced_motion_and_forced_colours(pages: Pages, filled: Site) -> None:
    page = pages.context(reduced_motion="reduce", forced_colors="active").new_page()
    page.goto(filled.url + "/jobs")
    expect(rows(page).first).to_be_visible()
    running = page.evaluate("document.getAnimations().filter((one) => one.effect.getTiming().duration > 0).length")
    assert running == 0
    assert find_axe_violations(page, "color-contrast") == []
