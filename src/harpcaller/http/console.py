"""Serve the files of the web console from memory: one page, its modules and its styles.

Rule: nothing here reads a job, a host or a session. The page asks the HTTP API, as any other client does.

Every file lies under `/static/<hash of all files>/`, so that a browser may keep it forever: another version of any
file has another address. The page itself is checked by browsers each time. Files are compressed once, at the start.
"""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from harpcaller.http.modules import join_modules

# Nothing is loaded from elsewhere, nothing is framed, and no text becomes script. The policy `harp` makes one script
# address, the one of the log worker: without it Chromium refuses `new Worker`.
CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "font-src 'self'",
        "connect-src 'self'",
        "worker-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types harp",
    )
)

# Every view of the console is an address of its own; all of them answer with the same page.
PAGES: Final = (
    "/",
    "/jobs",
    "/jobs/{job}",
    "/queues",
    "/queues/{queue}",
    "/hosts",
    "/hosts/{host}",
    "/audit",
    "/sessions",
    "/login",
    "/keys",
)

MEDIA_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}

_STATIC: Final = Path(__file__).parent / "static"
_PAGE: Final = "index.html"
_PLACE: Final = "@STATIC@"  # in the page: where its files are


class StaticFile(NamedTuple):
    """One file of the console, as it is sent."""

    media_type: str
    body: bytes
    compressed: bytes


def read_static_files(directory: Path = _STATIC) -> dict[str, StaticFile]:
    """Return the console's files, by their paths below `directory`; files of other kinds are left out."""
    sources = {path.stem: path.read_text() for path in directory.glob("*.mjs")}
    bodies = {name: text.encode() for name, text in join_modules(sources).items()}
    for path in directory.rglob("*"):
        is_joined = path.suffix == ".mjs" and path.parent == directory
        if path.is_file() and path.suffix in MEDIA_TYPES and not is_joined:
            bodies[path.relative_to(directory).as_posix()] = path.read_bytes()
    return {
        name: StaticFile(MEDIA_TYPES[Path(name).suffix], body, gzip.compress(body, mtime=0))
        for name, body in sorted(bodies.items())
    }


def hash_files(files: dict[str, StaticFile]) -> str:
    """Return 16 hexadecimal digits that change with any name or byte of the files."""
    digest = hashlib.sha256()
    for name, file in files.items():
        digest.update(f"{name}\0{len(file.body)}\0".encode())
        digest.update(file.body)
    return digest.hexdigest()[:16]


def accepts_gzip(request: Request) -> bool:
    """Return whether the client takes gzip: it is named in Accept-Encoding, and not with the weight 0."""
    for coding in request.headers.get("accept-encoding", "").lower().split(","):
        name, _, weight = coding.partition(";")
        if name.strip() in ("gzip", "*"):
            return weight.replace(" ", "").rstrip("0.") != "q="
    return False


class Console:
    """The console's files and page, ready to be sent.

    Args:
        base_path: the beginning of the console's paths in addresses: "" or "/harp". The routes themselves do not
            have it.
    """

    def __init__(self, base_path: str = "") -> None:
        self._base = base_path
        self._files = read_static_files()
        self.version: Final = hash_files(self._files)
        page = self._files.pop(_PAGE).body.replace(_PLACE.encode(), f"{base_path}/static/{self.version}".encode())
        self._page = StaticFile(MEDIA_TYPES[".html"], page, gzip.compress(page, mtime=0))
        self._page_tag = f'"{hashlib.sha256(page).hexdigest()[:16]}"'

    def routes(self) -> list[Route]:
        """Return the routes of all views and files, relative to the base path."""
        pages = [Route(path, self._send_page, methods=["GET"]) for path in PAGES]
        return [*pages, Route("/static/{version}/{name:path}", self._send_file, methods=["GET"])]

    def page(self, request: Request, status: int = 200) -> Response:
        """Return the console's page; with the status 404 it says that the address is unknown."""
        headers = {
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
            "Cache-Control": "no-cache",
            "ETag": self._page_tag,
        }
        if status == 200 and request.headers.get("if-none-match") == self._page_tag:
            return Response(status_code=304, headers=headers)
        return _send(request, self._page, status, headers)

    def find_unknown(self, request: Request) -> Response | None:
        """Return the page for an unknown path that a browser opens; None: it is another client, or asks for a file."""
        first = request.scope["path"].removeprefix(f"{self._base}/").partition("/")[0]
        is_view = request.scope["path"].startswith(f"{self._base}/") and first not in ("api", "static")
        is_opened = request.method in ("GET", "HEAD") and "text/html" in request.headers.get("accept", "")
        return self.page(request, 404) if is_view and is_opened else None

    async def _send_page(self, request: Request) -> Response:
        return self.page(request)

    async def _send_file(self, request: Request) -> Response:
        file = self._files.get(request.path_params["name"])
        # An address of an older version must not get a file of this one: its modules would not fit together.
        if file is None or request.path_params["version"] != self.version:
            return Response("No such file.\n", 404, {"Cache-Control": "no-store"}, "text/plain")
        return _send(request, file, 200, {"Cache-Control": "public, max-age=31536000, immutable"})


def _send(request: Request, file: StaticFile, status: int, headers: dict[str, str]) -> Response:
    """Return the file, compressed if the client takes that."""
    headers = {
        **headers,
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
    }
    if accepts_gzip(request):
        headers["Content-Encoding"] = "gzip"
        return Response(file.compressed, status, headers, file.media_type)
    return Response(file.body, status, headers, file.media_type)
