"""The ground of the browser tests sees each error of a page, and axe finds what it should."""

from __future__ import annotations

import hashlib
import http.server
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from playwright.sync_api import Browser

from support.browser import Pages, Site, eventually, find_axe_violations

_POLICY = "default-src 'self'; script-src 'self'; require-trusted-types-for 'script'; trusted-types 'none'"
_SCRIPTS = {
    "/good.js": "console.log('fine')",
    "/console.js": "console.error('one error')",
    "/exception.js": "undefined_function()",
    "/rejection.js": "Promise.reject(new Error('nobody handles it'))",
    "/policy.js": "document.body.innerHTML = '<b>text</b>'",
    "/inline.js": "document.body.setAttribute('onclick', 'alert(1)')",
    "/foreign.js": "fetch('http://127.0.0.2:9/').catch(() => null)",
    "/missing.js": None,
}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        script = _SCRIPTS.get(self.path)
        if script is not None:
            body, kind = script, "text/javascript"
        elif self.path.endswith(".js"):
            self.send_error(404)
            return
        else:
            kind = "text/html"
            body = '<!doctype html><title>x</title><link rel=icon href="/good.js"><body>text<img src="/good.js">'
            body += f"<script type=module src=/{self.path[1:]}.js></script>"
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    server = _Server(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield Site(cast(Any, None), f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("name", [path[1:-3] for path in _SCRIPTS])
def test_pages_with_an_error_fail_their_test(browser: Browser, site: Site, name: str) -> None:
    pages = Pages(browser, site)
    with pages:
        page = pages.open(f"/{name}")
        if name == "good":
            found = {violation.partition(":")[0] for violation in find_axe_violations(page, "region")}
            assert {"html-has-lang", "image-alt"} <= found
            assert "region" not in found
        else:
            eventually(page, pages.unexpected, f"the problem of {name}")
            with pytest.raises(AssertionError):
                pages.__exit__(None, None, None)
        pages.allow(".")


def test_vendored_axe_is_the_published_file() -> None:
    directory = Path(__file__).parent / "vendor"
    table = tomllib.loads((directory / "VENDOR.toml").read_text())
    for entry in table.values():
        assert hashlib.sha256((directory / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
