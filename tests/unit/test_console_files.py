"""The console's files: what is vendored, how much it is, how it is sent, and what its modules may contain."""

import hashlib
import re
import tomllib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from starlette.applications import Starlette

import harpcaller.http.console as console_module
from harpcaller.http.console import CONTENT_SECURITY_POLICY, Console, read_static_files

STATIC = Path(console_module.__file__).parent / "static"
VENDOR = STATIC / "vendor"
VENDORED = tomllib.loads((VENDOR / "VENDOR.toml").read_text())["file"]
OWN = sorted(path for path in STATIC.glob("*.mjs"))


SENT = read_static_files()


def size(names: Iterable[str]) -> int:
    return sum(len(SENT[name].compressed) for name in names)


class Client(NamedTuple):
    http: httpx.AsyncClient
    version: str


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    console = Console("/harp")
    transport = httpx.ASGITransport(app=Starlette(routes=console.routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield Client(client, console.version)


@pytest.mark.parametrize("entry", VENDORED, ids=lambda entry: entry["name"])
def test_vendored_file_has_the_noted_hash_and_licence(entry: dict[str, str]) -> None:
    body = (VENDOR / entry["name"]).read_bytes()
    assert hashlib.sha256(body).hexdigest() == entry["sha256"]
    original = body.replace(b'from"./preact.mjs"', b'from"preact"') if "change" in entry else body
    assert hashlib.sha256(original).hexdigest() == entry["source_sha256"]
    assert "copyright" in (VENDOR / entry["licence_file"]).read_text().lower()


def test_vendored_files_are_all_noted() -> None:
    named = {entry["name"] for entry in VENDORED} | {entry["licence_file"] for entry in VENDORED}
    assert named | {"VENDOR.toml"} == {path.name for path in VENDOR.iterdir()}


FRAME = {"theme.js", "app.mjs", "vendor/preact.mjs", "vendor/hooks.mjs", "vendor/htm.mjs"}


def test_frame_and_login_load_at_most_30_kilobytes() -> None:
    assert size(FRAME) <= 30_000


def test_all_scripts_and_styles_stay_within_their_budget() -> None:
    scripts = {name for name in SENT if name.endswith("js")}
    assert scripts == FRAME | {"views.mjs", "log-worker.mjs"}
    assert size(scripts) <= 60_000
    assert size(name for name in SENT if name.endswith(".css")) <= 12_000


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_console_module_makes_no_markup_and_asks_no_other_origin(path: Path) -> None:
    source = path.read_text()
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "dangerouslySetInnerHTML",
        "eval(",
        "new Function",
    ):
        assert forbidden not in source
    assert not re.findall(r"https?://(?!www\.w3\.org/)\w", re.sub(r"^\s*//.*$", "", source, flags=re.MULTILINE))
    for imported in re.findall(r"""from "([^"]+)\"""", source):
        assert (path.parent / imported).is_file(), imported


async def test_page_names_its_files_and_has_the_policy(client: Client) -> None:
    for path in ("/", "/jobs", "/jobs/0199e9c1-0000-7000-8000-000000000000", "/hosts/web%2F1", "/login"):
        answer = await client.http.get(path)
        assert answer.status_code == (404 if "%2F" in path else 200)
    answer = await client.http.get("/")
    assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert answer.headers["cache-control"] == "no-cache"
    assert f"/harp/static/{client.version}/app.mjs" in answer.text
    assert "@STATIC@" not in answer.text
    again = await client.http.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_file_is_sent_compressed_and_immutable(client: Client) -> None:
    address = f"/static/{client.version}/app.mjs"
    answer = await client.http.get(address, headers={"Accept-Encoding": "gzip"})
    assert answer.content == SENT["app.mjs"].body
    assert answer.headers["content-encoding"] == "gzip"
    assert "immutable" in answer.headers["cache-control"]
    assert answer.headers["content-type"].startswith("text/javascript")
    for coding in ("identity", "gzip;q=0", "br"):
        plain = await client.http.get(address, headers={"Accept-Encoding": coding})
        assert "content-encoding" not in plain.headers
        assert plain.content == answer.content


@pytest.mark.parametrize("name", ["%2e%2e/console.py", "index.html", "vendor/VENDOR.toml", "", "none"])
async def test_file_that_is_not_the_consoles_is_refused(client: Client, name: str) -> None:
    assert (await client.http.get(f"/static/{client.version}/{name}")).status_code == 404


async def test_file_of_another_version_is_refused(client: Client) -> None:
    answer = await client.http.get("/static/0123456789abcdef/app.mjs")
    assert answer.status_code == 404
    assert answer.headers["cache-control"] == "no-store"
