"""The pictures of the console in docs/images: `./dev run python tests/support/screenshots.py` takes them anew.

They show a real system: a night of backups, of which one has failed as in the demo, a deployment that waits in a
queue, and a host that cannot be reached.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect

import harp
from support.browser import Pages, free_port, running_browser, running_site

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SIZE = {"width": 1200, "height": 640}

PROCEDURES = """
import sqlite3
import time
from harpd.proc import Result, procedure, streaming_procedure

@procedure(timeout=60)
def clear_cache(site):
    return {"site": site, "files": 312}

@procedure(timeout=600)
def deploy(version):
    time.sleep(300)

@streaming_procedure
def backup(file):
    for table in ("accounts", "addresses", "invoices", "payments"):
        yield {"table": table, "state": "reading"}
        time.sleep(0.2)
        if (file, table) == ("/srv/customers.sqlite", "invoices"):
            raise sqlite3.DatabaseError("database disk image is malformed")
        yield {"table": table, "state": "saved", "rows": sum(map(ord, file + table))}
    yield Result({"directory": f"{file}.backup", "tables": 4})
"""


def main() -> None:
    """Take the pictures."""
    IMAGES.mkdir(exist_ok=True)
    hosts = ("web01", "web02", "db01", "db02", "db03", "db04")
    with (
        tempfile.TemporaryDirectory() as name,
        running_site(Path(name), PROCEDURES, names=hosts) as site,
        running_browser() as browser,
    ):
        known = dict.fromkeys(hosts, site.system.harpd.port)
        site.system.dispatcher.set_hosts({**known, "web03": free_port()})
        site.system.dispatcher.reload()
        failed = run_jobs(site.system.rpc)
        with Pages(browser, site, site.log_in("--as=alice")) as pages:
            for picture, path, shown in (
                ("overview", "/", "backup"),
                ("jobs", "/jobs", "DatabaseError"),
                ("job", f"/jobs/{failed}", "invoices"),
                ("queues", "/queues", "deploy"),
                ("hosts", "/hosts", "down"),
            ):
                take(pages.open(path, viewport=SIZE), picture, shown)


def run_jobs(rpc: harp.HarpCaller) -> str:
    """Submit the jobs; return the id of the failed backup when all have ended, or wait."""
    databases = {"db01": "orders", "db02": "customers", "db03": "articles", "db04": "tickets"}
    calls = [harp.Call("web01", "clear_cache", (site,)) for site in ("blog", "shop", "docs")]
    calls += [
        harp.Call(host, "backup", (f"/srv/{database}.sqlite",), queue={"backup": host}, info={"cron": "nightly"})
        for host, database in databases.items()
    ]
    ended = rpc.submit_many(calls)
    waiting = [harp.Call(host, "deploy", ("2.7.1",), queue={"deploy": "web"}) for host in ("web01", "web02")]
    rpc.submit_many([*waiting, harp.Call("web03", "clear_cache", ("blog",), start_within=600)])
    for job in ended:
        job.result(wait=True)
    return ended[4].id()


def take(page: Page, picture: str, shown: str) -> None:
    """Take a picture of a page that shows a text."""
    expect(page.get_by_text(re.compile(shown)).first).to_be_visible()
    page.wait_for_load_state("networkidle") if picture == "job" else page.wait_for_timeout(1000)
    page.screenshot(path=IMAGES / f"{picture}.png")


if __name__ == "__main__":
    main()
