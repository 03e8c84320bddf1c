"""Sessions of browsers: logins, and what pages of other sites can do with them, which is nothing.

The foreign pages are on another port of the dispatcher's own address, where the browser sends the cookie, too, and on
another name. Another name of the dispatcher's address stands for a page that has rebound its name.
"""

from __future__ import annotations

import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import BrowserContext, expect

from support.browser import Pages, Site, eventually, find_axe_violations

DISPATCHER = {"http": {"users_file": "users"}}

_CALL = json.dumps({"host": "web01", "procedure": "echo", "arguments": ["foreign"]})

_ATTACK = """async ([api, call, job]) => {
  const outcome = [];
  const attempt = async (path, options) => {
    try {
      const reply = await fetch(api + path, { credentials: "include", ...options });
      outcome.push([path, reply.type, reply.status, await reply.text()]);
    } catch (error) {
      outcome.push([path, "failed"]);
    }
  };
  const json = { "Content-Type": "application/json" };
  for (const mode of ["cors", "no-cors"]) {
    await attempt("/jobs", { method: "POST", mode, body: call });
    await attempt("/jobs", { method: "POST", mode, body: new URLSearchParams({ call }) });
    await attempt(`/jobs/${job}/cancel`, { method: "POST", mode, body: "{}" });
    await attempt("/session", { method: "POST", mode, body: '{"link": "x"}' });
    await attempt("/jobs", { mode });
    await attempt("/me", { mode });
  }
  await attempt("/jobs", { method: "POST", headers: json, body: call });
  await attempt("/session", { method: "DELETE" });
  navigator.sendBeacon(api + "/jobs", call);
  return outcome;
}"""


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<!doctype html><title>foreign</title><body>foreign"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def foreign_port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield int(server.server_port)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def context(visitor_pages: Pages, site: Site) -> BrowserContext:
    """A context of a person who has logged in by a link, with the cookie as the dispatcher sets it."""
    visitor_pages.allow(".")  # the foreign pages cause errors
    context = visitor_pages.context()
    page = context.new_page()
    page.goto(site.login_link())
    expect(page.get_by_role("navigation").first).to_be_visible()
    [cookie] = context.cookies()
    assert (cookie.get("name"), cookie.get("sameSite"), cookie.get("httpOnly")) == ("harp", "Strict", True)
    return context


def test_person_logs_in_by_name_and_password(site: Site, visitor_pages: Pages) -> None:
    hashing = ["openssl", "passwd", "-6", "open sesame"]
    hashed = subprocess.run(hashing, check=True, capture_output=True, text=True).stdout.strip()
    users = site.directory / "users"
    users.touch(0o600)
    users.write_text(f"alice:{hashed}:viewer\n")
    visitor_pages.allow("401")  # of the first request, and of the wrong password
    page = visitor_pages.open("/jobs")
    page.get_by_label("Name").fill("alice")
    page.get_by_label("password").last.fill("friend")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_be_visible()
    assert find_axe_violations(page) == []
    page.get_by_label("password").last.fill("open sesame")
    page.keyboard.press("Enter")
    expect(page.get_by_role("navigation").first).to_be_visible()
    assert page.url.endswith("/jobs")


def refusals(site: Site) -> list[str]:
    return [event["code"] for event in site.system.dispatcher.events("HTTP request refused") if "code" in event]


def jobs_of(site: Site, context: BrowserContext) -> list[str]:
    reply = context.request.get(f"{site.url}/api/v1/jobs?limit=500")
    assert reply.ok, "the person is still logged in"
    return [job["job"] for job in reply.json()["jobs"]]


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_foreign_page_submits_cancels_and_reads_nothing(
    site: Site, context: BrowserContext, foreign_port: int, name: str
) -> None:
    job = site.submit("sleep", 600)
    before, seen = jobs_of(site, context), len(refusals(site))
    page = context.new_page()
    page.goto(f"http://{name}:{foreign_port}/")
    outcome = page.evaluate(_ATTACK, [f"{site.url}/api/v1", _CALL, job])
    assert len(outcome) == 14
    for path, kind, *read in outcome:
        assert kind == "failed" or (kind == "opaque" and read == [0, ""]), (path, kind, read)
    page.set_content(
        f'<form method=post enctype="text/plain" action="{site.url}/api/v1/jobs">'
        f"<input name='{_CALL[:-1]}, \"info\": \"' value='\"}}'><button>send</button></form>"
    )
    with page.expect_navigation():
        page.get_by_role("button").click()
    assert '"code":"cross_origin"' in page.content().replace(" ", "") or "auth_error" in page.content()
    arrived = refusals(site)[seen:]
    assert "cross_origin" in arrived, "the browser has sent the requests"
    assert jobs_of(site, context) == before
    state = context.request.get(f"{site.url}/api/v1/jobs/{job}").json()["state"]
    assert state in ("queued", "running")


def test_foreign_page_cannot_frame_the_console(site: Site, context: BrowserContext, foreign_port: int) -> None:
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{foreign_port}/")
    page.set_content(f'<iframe src="{site.url}/jobs"></iframe>')
    frame = eventually(page, lambda: page.frames[1:], "the frame")[0]
    eventually(page, lambda: frame.url.startswith("chrome-error:"), "the refusal of the frame")


def test_page_that_has_rebound_its_name_is_refused(site: Site, context: BrowserContext) -> None:
    """Browsers resolve each name below localhost to 127.0.0.1."""
    port = urlsplit(site.url).port
    page = context.new_page()
    for path in ("/", "/jobs", "/api/v1/me", "/api/v1/openapi.json"):
        reply = page.goto(f"http://evil.localhost:{port}{path}")
        assert reply is not None
        assert reply.status == 421


def test_link_in_a_foreign_page_opens_the_console(site: Site, context: BrowserContext, foreign_port: int) -> None:
    """The cookie is not sent with the first request, so the page must do without it."""
    page = context.new_page()
    page.goto(f"http://localhost:{foreign_port}/")
    page.set_content(f'<a href="{site.url}/jobs">jobs</a>')
    page.get_by_role("link").click()
    expect(page.get_by_role("navigation").first).to_be_visible()
    expect(page.get_by_label("token", exact=False)).to_have_count(0)
