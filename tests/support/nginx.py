"""nginx in front of the dispatcher's HTTP API."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.deadline import wait_until

#: As an administrator would write it, with the usual buffers and compression.
_CONFIGURATION = """
daemon off;
master_process off;
pid {directory}/pid;
error_log {directory}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    gzip on;
    gzip_types application/json application/jsonl text/event-stream;
    server {{
        listen 127.0.0.1:{port};
        location {path}/ {{
            proxy_pass http://127.0.0.1:{target};
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
            proxy_buffering on;
            {more}
        }}
    }}
}}
"""


def find_nginx() -> str | None:
    """Return the path of the system's nginx, or of the one that `./dev test` has unpacked; None: there is none."""
    unpacked = str(Path(sys.prefix, "nginx/usr/sbin/nginx"))
    for name in ("nginx", "/usr/sbin/nginx", unpacked):
        program = shutil.which(name)
        # An unpacked program may lack a library of the system.
        if program is not None and not subprocess.run([program, "-v"], capture_output=True, check=False).returncode:
            return program
    return None


@contextmanager
def running_nginx(directory: Path, port: int, target: int, path: str, more: str = "") -> Iterator[None]:
    """Run nginx with one location; skip the test if there is no nginx.

    Args:
        directory: for its files.
        port: where it listens, on 127.0.0.1.
        target: the port of the dispatcher.
        path: the beginning of the paths that it passes on.
        more: directives of the location.
    """
    program = find_nginx()
    if program is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx)")
    directory.mkdir()
    file = directory / "nginx.conf"
    file.write_text(_CONFIGURATION.format(directory=directory, port=port, target=target, path=path, more=more))
    # Without -e, which versions before 1.19.5 do not know; they report that they cannot use their usual log.
    process = subprocess.Popen([program, "-p", str(directory), "-c", str(file)])
    try:
        wait_until(lambda: (directory / "pid").exists() or process.poll() is not None, what="nginx")
        assert process.poll() is None, (directory / "error.log").read_text()
        yield
    finally:
        process.terminate()
        process.wait()
