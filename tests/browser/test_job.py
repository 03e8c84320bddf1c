"""The page of one job: state, output, result, process and actions, in Chromium with a real dispatcher and harpd."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from harp.protocol.ends import Failed
from harp.protocol.json_text import Raw, dumps
from harpcaller.model.jobs import JobMetadata, StopState
from harpcaller.store.sqlite import Store
from support.browser import PROCEDURES, Pages, Site, eventually, find_axe_violations, running_site
from support.job_page import append, row, state, visible_numbers
from support.jobs import new_id, new_job

HARPD = {"exit_info": {"stderr": True, "traceback": True}}
NAMES = ("web01", "web02")

STUCK = new_id()
_REPORT = {
    "processes": [
        {"pid": 100, "command": "harpd: backup", "signals": ["SIGTERM"], "ended": "SIGTERM"},
        {"pid": 101, "command": "pg_dump orders", "signals": ["SIGTERM", "SIGKILL"], "ended": None},
        {"pid": 102, "command": "gzip", "signals": ["SIGTERM"], "ended": "gone after SIGTERM"},
    ],
    "found": 3,
    "survivors": [{"pid": 101, "command": "pg_dump orders"}],
    "surviving": 1,
    "complete": False,
    "began": 1e9,
    "ended": 1e9 + 5,
}


async def seed(store: Store) -> None:
    """Add a job whose process survives its stop."""
    now = time.time() - 60
    await store.add_job(new_job("gone", id=STUCK, procedure="backup", arguments=Raw(b'["orders"]')), now)
    await store.claim_jobs(now, 1, 10)
    report = JobMetadata(
        stop_report=dumps(_REPORT), stop_request=dumps({"why": "limit", "by": "dispatcher", "at": now})
    )
    end = Failed("timeout", "no message for 600 s")
    await store.finish_job(STUCK, end, now + 9, stop=StopState.FAILED, keep_slot=True, metadata=report)


# The state of the job.


def test_header_follows_the_job_without_a_reload(site: Site, pages: Pages, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, "first")
    job = site.submit("tail", str(path))
    page = pages.open(f"/jobs/{job}")
    expect(state(page)).to_contain_text("running")
    expect(page).to_have_title(re.compile("tail - HARP"))
    icon = page.locator('link[rel="icon"]')
    expect(icon).to_have_attribute("href", re.compile("icon-running.svg"))
    page.evaluate("document.documentElement.dataset.untouched = 'yes'")
    append(path, "end")
    expect(state(page)).to_contain_text("returned")
    expect(icon).to_have_attribute("href", re.compile("icon-returned.svg"))
    expect(page).to_have_title(re.compile("^✓"))
    expect(page.locator("html")).to_have_attribute("data-untouched", "yes")
    expect(page.locator(".job-why")).not_to_be_empty()


def test_all_times_of_a_job_have_one_zone(site: Site, pages: Pages, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, "first")
    job = site.submit("tail", str(path))
    page = pages.open(f"/jobs/{job}", timezone_id="Asia/Kolkata")
    titled = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} UTC\+05:30$")
    for place in (".job-why time", ".job-facts time", ".log-row time"):
        expect(page.locator(place).first).to_have_attribute("title", titled)
    expect(page.locator(".job-why")).to_contain_text(re.compile(r"running on host web01 since \d\d:\d\d:\d\d"))
    append(path, "end")


def test_cancel_from_the_page_shows_the_confirmed_stop(site: Site, pages: Pages) -> None:
    job = site.submit("sleep", 300)
    page = pages.open(f"/jobs/{job}")
    expect(state(page)).to_contain_text("running")
    cancel = page.get_by_role("button", name="Cancel", exact=True)
    cancel.click()
    dialog = page.get_by_role("dialog", name="Cancel this job?")
    expect(dialog).to_contain_text("sleep(300) on web01")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(cancel).to_be_focused()
    cancel.click()
    page.get_by_role("button", name="Cancel the job").click()
    expect(state(page)).to_contain_text("cancelled")
    expect(page.locator(".job-stop")).to_contain_text("Stop confirmed")
    expect(cancel).to_have_attribute("aria-disabled", "true")
    expect(cancel).to_have_attribute("title", "The job has ended.")
    page.get_by_role("tab", name="Process").click()
    expect(page.locator(".processes li[data-pid]").first).to_contain_text("sent SIGTERM")


def test_rerun_keeps_the_arguments_to_the_byte(site: Site, pages: Pages, cookie: str) -> None:
    arguments = b'[1208925819614629174706176,"1.50",1.50,{"b":1,"a":[1e400,0.10]}]'
    with site.system.dispatcher.connect() as client:
        client.send(b'{"harpcaller":1,"host":"web01","procedure":"missing","arguments":%s}\n' % arguments)
        job = client.message()["job_id"]
    page = pages.open(f"/jobs/{job}?tab=arguments")
    shown = page.locator(".payload-text").first
    expect(shown).to_contain_text('1208925819614629174706176,\n  "1.50",\n  1.50,')
    page.get_by_role("button", name="As sent").first.click()
    expect(shown).to_have_text(arguments.decode())
    page.get_by_role("button", name="Tree").first.click()
    expect(page.locator(".json-tree")).to_contain_text("1208925819614629174706176")
    page.get_by_role("button", name="Re-run").first.click()
    dialog = page.get_by_role("dialog", name="Re-run this job")
    expect(dialog.locator("pre")).to_have_text(arguments.decode())
    dialog.get_by_label("Host").fill("web02")
    dialog.get_by_role("button", name="Re-run").click()
    expect(page).not_to_have_url(re.compile(job))
    expect(page.locator(".job-facts")).to_contain_text(f"Re-run of {job[:8]}")
    again = page.url.rpartition("/")[2].partition("?")[0]
    body = site.get(f"/jobs/{again}?payloads=raw", cookie)
    assert b'"arguments":%s' % arguments in body.replace(b'"arguments": ', b'"arguments":')
    assert json.loads(body)["host"] == "web02"


def test_rerun_offers_more_hosts_than_a_page_of_them(site: Site, pages: Pages) -> None:
    job = site.finish("echo")
    others = [f"node{number:03}" for number in range(150)]
    dispatcher, port = site.system.dispatcher, site.system.harpd.port
    dispatcher.set_hosts(dict.fromkeys([*NAMES, *others], port))
    dispatcher.reload()
    try:
        page = pages.open(f"/jobs/{job}")
        page.get_by_role("button", name="Re-run").first.click()
        expect(page.locator("#rerun-hosts option")).to_have_count(len(NAMES) + len(others))
    finally:
        dispatcher.set_hosts(dict.fromkeys(NAMES, port))
        dispatcher.reload()


def test_stop_report_shows_survivors_and_slot_is_released(site: Site, pages: Pages) -> None:
    page = pages.open(f"/jobs/{STUCK}?tab=process")
    expect(page.locator(".job-stop")).to_contain_text("Stop failed")
    survivor = page.locator(".processes .survivor")
    expect(survivor).to_have_count(1)
    expect(survivor).to_contain_text("pg_dump orders")
    expect(survivor).to_contain_text("survives")
    expect(page.locator("#panel")).to_contain_text("3 processes found, 1 surviving")
    page.get_by_role("button", name="Release slot").click()
    page.get_by_role("dialog").get_by_role("button", name="Release the slot").click()
    expect(page.get_by_role("button", name="Release slot")).to_have_count(0)


@pytest.mark.parametrize("kind", ["measured", "without exit info"])
def test_timeline_adds_up_to_the_time_taken(site: Site, pages: Pages, cookie: str, kind: str) -> None:
    job = site.finish("count", 3) if kind == "measured" else STUCK
    page = pages.open(f"/jobs/{job}")
    labels = page.locator(".phase span")
    expect(labels.first).to_be_attached()
    assert labels.evaluate_all("all => all.every((label) => label.scrollWidth <= label.clientWidth)")  # none is cut
    page.locator(".timeline summary").click()
    found: dict[str, float] = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll(".timeline tr[data-seconds]")]
            .map((row) => [row.dataset.phase ?? "total", Number(row.dataset.seconds)]))"""
    )
    times = json.loads(site.get(f"/jobs/{job}", cookie))["time"]
    total = found.pop("total")
    assert total == pytest.approx(times["end"] - times["submit"], abs=1e-5)
    outside = {"accept", "store", "store_end", "deliver"}
    assert sum(seconds for name, seconds in found.items() if name not in outside) == pytest.approx(total, abs=0.002)
    assert ("run" in found) == (kind == "measured")


def test_unknown_job_is_told(pages: Pages) -> None:
    pages.allow("404")
    page = pages.open(f"/jobs/{new_id()}")
    expect(page.get_by_role("heading", name="No such job")).to_be_visible()
    assert not find_axe_violations(page)


# How it ended.


def test_exception_shows_its_traceback(site: Site, pages: Pages) -> None:
    job = site.finish("fail", "no such table \u202eorders")
    page = pages.open(f"/jobs/{job}")
    panel = page.locator("#panel")
    expect(panel).to_contain_text("ValueError")
    expect(panel).to_contain_text("no such table \\u202eorders")
    expect(panel.locator("pre.lines")).to_contain_text("Traceback (most recent call last)")


@pytest.mark.parametrize(
    ("kind", "procedure", "arguments", "options", "cause"),
    [
        ("timeout", "sleep", [60], {"timeout": 1}, "No message for timeout seconds"),
        ("no_such_procedure", "missing", [], {}, "the procedures file has no procedure with this name"),
        ("invalid_argument_list", "sleep", [1, 2], {}, "the arguments do not fit the procedure's signature"),
        ("unknown_host", "sleep", [1], {"host": "web99"}, "the registry does not list the host"),
    ],
)
def test_error_shows_its_cause_and_cure(
    site: Site, pages: Pages, kind: str, procedure: str, arguments: list[Any], options: dict[str, Any], cause: str
) -> None:
    job = site.finish(procedure, *arguments, **options)
    page = pages.open(f"/jobs/{job}")
    panel = page.locator("#panel")
    expect(panel.locator(".end-title")).to_contain_text(kind)
    expect(panel.locator(".causes").first).to_contain_text(cause, ignore_case=True)
    expect(panel.locator(".causes").first).to_contain_text("What to do")


# The output.


def test_output_follows_and_only_the_user_thaws_it(site: Site, pages: Pages, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, *(f"line {number}" for number in range(200)))
    job = site.submit("tail", str(path))
    page = pages.open(f"/jobs/{job}")
    expect(row(page, 199)).to_be_in_viewport()
    append(path, "line 200")
    expect(row(page, 200)).to_be_in_viewport()

    page.get_by_role("button", name="Pause").click()
    before = visible_numbers(page)
    append(path, *(f"line {number}" for number in range(201, 400)))
    expect(page.locator(".tab-count")).to_have_text("400")
    assert visible_numbers(page) == before
    expect(page.locator(".log-status")).to_contain_text("Paused at record")
    page.locator(".log-status").get_by_role("button", name="Follow").click()
    expect(row(page, 399)).to_be_in_viewport()

    page.locator(".log-layer").hover()
    page.mouse.wheel(0, -300)
    expect(page.locator(".log-status")).to_contain_text("Paused at record")
    before = visible_numbers(page)
    append(path, *(f"line {number}" for number in range(400, 600)))
    expect(page.locator(".tab-count")).to_have_text("600")
    assert visible_numbers(page) == before
    append(path, "end")
    expect(state(page)).to_contain_text("returned")
    assert visible_numbers(page) == before
    page.keyboard.press("G")
    expect(row(page, 599)).to_be_in_viewport()


def test_find_counts_new_matches_while_the_job_runs(site: Site, pages: Pages, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, "one apple", "one pear")
    job = site.submit("tail", str(path))
    page = pages.open(f"/jobs/{job}")
    page.get_by_label("Find in all records").fill("APPLE")
    page.keyboard.press("Enter")
    expect(page.locator(".find-count")).to_have_text("1 of 1")
    append(path, "two apples", "a pear")
    expect(page.locator(".find-count")).to_have_text("1 of 2")
    append(path, "end")


def test_find_goes_to_the_first_match(site: Site, pages: Pages) -> None:
    job = site.finish("count", 500)
    page = pages.open(f"/jobs/{job}?tab=output#r400")
    expect(row(page, 400)).to_be_in_viewport()
    page.get_by_label("Find in all records").fill("orders_7")
    page.keyboard.press("Enter")
    expect(row(page, 7)).to_be_in_viewport()
    expect(page.locator(".find-count")).to_have_text("1 of 11")
    page.keyboard.press("Enter")
    expect(page.locator(".find-count")).to_have_text("2 of 11")
    page.goto(f"{site.url}/jobs/{job}?tab=output&find=orders_12")
    expect(row(page, 12)).to_be_in_viewport()
    page.goto("about:blank")
    page.goto(f"{site.url}/jobs/{job}?tab=output&find=orders_12#r300")  # the link to a record says more
    expect(page.locator(".find-count")).to_have_text("11")
    expect(row(page, 300)).to_be_in_viewport()


def test_output_view_is_in_the_address_and_downloads(site: Site, pages: Pages, cookie: str) -> None:
    job = site.finish("count", 50)
    context = pages.context()
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(f"{site.url}/jobs/{job}?tab=output")
    row(page, 30).locator(".log-number").click()
    expect(page).to_have_url(re.compile("#r30$"))
    row(page, 33).locator(".log-number").click(modifiers=["Shift"])
    expect(page).to_have_url(re.compile("#r30-33$"))
    expect(page.locator(".log-row.selected")).to_have_count(4)
    page.locator(".log-layer").focus()
    page.keyboard.press("y")
    copied = f"{site.url}/jobs/{job}#r30-33"
    eventually(page, lambda: page.evaluate("navigator.clipboard.readText()") == copied, "the copy")
    page.keyboard.press("w")
    expect(page).to_have_url(re.compile("wrap=1"))
    page.keyboard.press("t")
    expect(page).to_have_url(re.compile("times=rel"))
    expect(row(page, 33).locator("time")).to_have_text(re.compile(r"^[+-][0-9.]+$"))
    page.keyboard.press("t")
    expect(row(page, 33).locator("time")).to_have_count(0)
    page.get_by_role("button", name="Download").click()
    with page.expect_download() as downloaded:
        page.get_by_text("All records, as JSON Lines").click()
    saved = Path(downloaded.value.path()).read_bytes()
    assert saved.count(b'{"packet":') == 50
    assert saved == site.get(f"/jobs/{job}/records?download=1", cookie)


def test_hostile_records_are_shown_as_text(site: Site, pages: Pages) -> None:
    markup = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    values = [
        "\x1b[31mred\x1b[0m plain \x1b]0;title\x07",
        "bidi \u202eevil\u202c \u200b\u2028",
        markup,
        "two\nlines",
        {"<b>": "\u202e"},
    ]
    job = site.finish("emit", *values)
    page = pages.open(f"/jobs/{job}?tab=output")
    expect(row(page, 0).locator(".sgr-1")).to_have_text("red")
    expect(row(page, 0).locator(".log-text")).to_have_text("red plain \\x1b]0;title\\x07")
    expect(row(page, 1).locator(".log-text")).to_have_text("bidi \\u202eevil\\u202c \\u200b\\u2028")
    expect(row(page, 2).locator(".log-text")).to_have_text(markup)
    assert page.locator(".log img, .log script").count() == 0
    assert "\u202e" not in page.locator(".log").inner_text()
    assert row(page, 3).bounding_box()["height"] >= 2 * row(page, 2).bounding_box()["height"]  # type: ignore[index]
    row(page, 4).hover()
    row(page, 4).get_by_role("button", name="Tree of record 4").click()
    expect(row(page, 4).locator(".json-tree")).to_contain_text("<b>")


def test_record_of_ten_megabytes_opens_whole(site: Site, pages: Pages) -> None:
    job = site.finish("repeat", "0123456789", 1_000_000)
    page = pages.open(f"/jobs/{job}?tab=output")
    expect(row(page, 1)).to_contain_text("after")
    assert len(row(page, 0).locator(".log-text").inner_text()) <= 4001
    row(page, 0).get_by_role("button", name="Show all 10.0 MB of record 0").click()
    dialog = page.get_by_role("dialog", name="Record 0")
    expect(dialog).to_contain_text("10.0 MB", timeout=60_000)
    length = dialog.locator("pre").evaluate("(element) => element.textContent.length")
    assert length == 10_000_002
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)


def test_fast_stream_is_followed_without_a_gap(site: Site, pages: Pages) -> None:
    job = site.submit("count", 100_000)
    page = pages.open(f"/jobs/{job}?tab=output")
    expect(page.locator(".tab-count")).to_have_text("100,000", timeout=60_000)
    expect(state(page)).to_contain_text("returned", timeout=60_000)
    expect(row(page, 99_999)).to_be_in_viewport()
    page.locator(".log-layer").focus()
    page.keyboard.press("Home")
    expect(row(page, 0)).to_contain_text('"index":0')


def test_restart_of_the_dispatcher_leaves_no_gap(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, *(f"line {number}" for number in range(20)))
    with running_site(tmp_path / "site", PROCEDURES) as site, Pages(browser, site, site.log_in()) as pages:
        pages.allow("ERR_CONNECTION_REFUSED|ERR_INCOMPLETE_CHUNKED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE|503")
        pages.allow("ERR_SOCKET_NOT_CONNECTED")
        job = site.submit("tail", str(path))
        page = pages.open(f"/jobs/{job}")
        expect(row(page, 19)).to_be_in_viewport()
        site.system.dispatcher.kill()
        append(path, *(f"line {number}" for number in range(20, 30)))
        expect(page.locator(".banner")).to_contain_text("does not answer")
        site.system.dispatcher.start()
        expect(row(page, 29)).to_be_in_viewport(timeout=60_000)
        append(path, "line 30", "end")
        expect(state(page)).to_contain_text("returned", timeout=60_000)
        expect(page.locator(".banner")).to_have_count(0)
        shown = page.locator(".log-text").all_inner_texts()
        numbers = [int(text.removeprefix("line ")) for text in shown]
        assert numbers == list(range(numbers[0], 31))


def test_job_that_ends_before_events_come_again_leaves_no_banner(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, "line 0")
    with running_site(tmp_path / "site", PROCEDURES) as site, Pages(browser, site, site.log_in()) as pages:
        pages.allow("ERR_CONNECTION_REFUSED|ERR_INCOMPLETE_CHUNKED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE|503")
        pages.allow("ERR_FAILED|ERR_SOCKET_NOT_CONNECTED")
        page = pages.open(f"/jobs/{site.submit('tail', str(path))}")
        expect(row(page, 0)).to_be_in_viewport()
        page.route("**/api/v1/events?*", lambda route: route.abort())
        site.system.dispatcher.kill()
        expect(page.locator(".banner")).to_contain_text("does not answer")
        site.system.dispatcher.start()
        append(path, "line 1", "end")
        expect(state(page)).to_contain_text("returned", timeout=60_000)
        expect(page.locator(".banner")).to_have_count(0)


def test_hidden_tab_releases_its_stream(site: Site, pages: Pages, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, "line 0")
    job = site.submit("tail", str(path))
    context = pages.context()
    page = context.new_page()
    opened: list[str] = []
    ended: list[str] = []
    context.on("request", lambda request: opened.append(request.url) if "follow=1" in request.url else None)
    context.on("requestfailed", lambda request: ended.append(request.url) if "follow=1" in request.url else None)
    page.clock.install()
    page.goto(f"{site.url}/jobs/{job}")
    expect(row(page, 0)).to_be_in_viewport()
    eventually(page, lambda: opened, "the stream")
    assert (len(opened), len(ended)) == (1, 0)
    hide = """(hidden) => {
        Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(hide, True)
    page.clock.fast_forward(11_000)
    eventually(page, lambda: ended, "the end of the stream")
    append(path, "line 1")
    page.evaluate(hide, False)
    expect(row(page, 1)).to_be_in_viewport()
    eventually(page, lambda: len(opened) == 2, "the next stream")
    append(path, "end")


# Keyboard, sizes, accessibility.


def test_page_works_by_keyboard_alone(site: Site, pages: Pages) -> None:
    job = site.submit("sleep", 300)
    page = pages.open(f"/jobs/{job}")
    expect(state(page)).to_contain_text("running")
    for key, name in enumerate(("Output", "Result", "Arguments", "Process", "Details"), 1):
        page.keyboard.press(str(key))
        expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
    expect(page.locator(".payload-text")).to_contain_text('"procedure": "sleep"')
    page.get_by_role("tab", name="Details").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Output")).to_be_focused()
    page.keyboard.press("c")
    expect(page.get_by_role("dialog")).to_be_visible()
    for _ in range(10):
        if page.evaluate("document.activeElement.textContent") == "Cancel the job":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(state(page)).to_contain_text("cancelled")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_job_page_has_no_accessibility_violations(site: Site, pages: Pages, theme: str, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, *(f"line {number}" for number in range(100)), "\x1b[33mwarn\x1b[0m \u202e")
    running = site.submit("tail", str(path))
    empty = site.finish("echo")
    raised = site.finish("fail", "no")
    failed = site.finish("missing")
    counted = site.finish("count", 10)
    rules = ["color-contrast"] if theme == "dark" else []  # a theme changes nothing else
    page = pages.open(f"/jobs/{running}", color_scheme=theme)
    expect(row(page, 100)).to_be_in_viewport()
    found = {"running": find_axe_violations(page, only=rules)}
    page.keyboard.press("c")
    expect(page.get_by_role("dialog")).to_be_visible()
    found["dialog"] = find_axe_violations(page, only=rules)
    for name, place, text in (
        ("empty", f"{empty}?tab=output", "no records"),
        ("result", f"{empty}?tab=result", "Formatted"),
        ("raised", raised, "Traceback"),
        ("failed", failed, "What to do"),
        ("process", f"{STUCK}?tab=process", "pg_dump"),
        ("arguments", f"{STUCK}?tab=arguments", "orders"),
        ("search", f"{counted}?tab=output&find=orders_7&only=1&wrap=1", "orders_7"),
    ):
        page.goto(f"{site.url}/jobs/{place}")
        expect(page.locator("#panel")).to_contain_text(text)
        if name == "failed":
            page.locator(".timeline summary").click()
        found[name] = find_axe_violations(page, only=rules)
    append(path, "end")
    assert {name: violations for name, violations in found.items() if violations} == {}


def test_job_page_fits_a_narrow_screen(site: Site, pages: Pages) -> None:
    job = site.finish("count", 30)
    page = pages.open(f"/jobs/{job}?tab=output", viewport={"width": 320, "height": 640}, has_touch=True)
    expect(row(page, 29)).to_be_attached()
    assert page.evaluate("document.querySelector('#content').scrollWidth") <= 320
    assert not find_axe_violations(page)
    for button in page.locator(".job-actions > button, .job-actions > .menu > button, .tabs button").all():
        assert button.bounding_box()["height"] >= 43  # type: ignore[index]


def test_job_page_works_in_forced_colours_without_motion(site: Site, pages: Pages) -> None:
    job = site.finish("count", 3)
    page = pages.open(f"/jobs/{job}?tab=output", forced_colors="active", reduced_motion="reduce")
    expect(row(page, 2)).to_be_in_viewport()
    assert not find_axe_violations(page, "color-contrast")


def test_viewer_sees_disabled_actions_with_reasons(browser: Browser, site: Site) -> None:
    job = site.submit("sleep", 300)
    with Pages(browser, site, site.log_in("--role=viewer")) as pages:
        page = pages.open(f"/jobs/{job}")
        cancel = page.get_by_role("button", name="Cancel", exact=True)
        expect(cancel).to_have_attribute("aria-disabled", "true")
        expect(cancel).to_have_attribute("title", re.compile("no right to cancel"))
        cancel.click(force=True)
        expect(page.get_by_role("dialog")).to_have_count(0)
    site.system.dispatcher.ask(cancel=job)
