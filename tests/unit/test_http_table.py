"""The table of operations, and what is made from it."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

from openapi_spec_validator import validate
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from harp.protocol.dispatcher import Call
from harpcaller.http.app import OPERATIONS
from harpcaller.http.openapi import openapi_document, problems_of
from harpcaller.http.problems import CODES
from harpcaller.http.schemas import SCHEMAS
from support.http_docs import DOCS, render


def test_http_pages_are_made_from_the_table() -> None:
    for file, contents in render().items():
        assert file.read_bytes() == contents, "write it with: ./dev run python tests/support/http_docs.py"


def test_http_openapi_document_is_valid() -> None:
    validate(json.loads((DOCS / "openapi.json").read_text()))
    document = openapi_document(OPERATIONS, "/harp")
    assert document["servers"] == [{"url": "/harp/api/v1"}]
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert named <= set(SCHEMAS)
    assert set(SCHEMAS) - named <= {"End"} | named


def test_http_operations_have_ids_that_read_as_verbs() -> None:
    ids = [operation.operation_id for operation in OPERATIONS]
    assert len(set(ids)) == len(ids)
    assert len({(operation.method, operation.path) for operation in OPERATIONS}) == len(ids)
    for operation in OPERATIONS:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)+", operation.operation_id)
        assert all(code in CODES for codes in problems_of(operation).values() for code in codes)
        assert (operation.body is not None) == (operation.method in ("POST", "PUT", "PATCH")), operation.operation_id


def test_http_schema_of_a_call_has_its_members() -> None:
    assert set(SCHEMAS["Call"]["properties"]) == set(Call.__dataclass_fields__)


def test_http_packages_are_imported_only_with_the_section() -> None:
    program = (
        "import sys, harpcaller.daemon, harpcaller.cli\n"
        "found = {'starlette', 'uvicorn', 'httptools', 'prometheus_client'} & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_http_missing_package_is_a_config_error(tmp_path: Path) -> None:
    """A package of the extra that is not installed; it is hidden by a module that cannot be imported."""
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(name='uvicorn')\n")
    file = tmp_path / "harpcaller.toml"
    file.write_text('host_db = "db"\n[http]\n')
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from harpcaller.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "--test", f"--config={file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"{file}: http: expected the packages of the extra web, got no package uvicorn" in done.stderr + done.stdout
    assert "pip install 'harpcaller[web]'" in done.stderr + done.stdout


def test_http_uvicorn_has_the_names_that_the_server_uses() -> None:
    """They are not documented: another version of uvicorn may lack one, or may not call it."""
    of_parser = ("on_message_begin", "on_url", "on_header", "on_headers_complete", "on_body", "on_message_complete")
    methods = ("connection_made", "connection_lost", "data_received", "pause_writing", "resume_writing", "shutdown")
    assert all(
        callable(HttpToolsProtocol.__dict__.get(name))
        for name in (*of_parser, *methods, "_unset_keepalive_if_required", "_start_asgi_task")
    )
    source = inspect.getsource(httptools_impl)
    for attribute in ("pipeline", "cycle", "flow", "parser", "headers", "url", "access_log", "transport"):
        assert f"self.{attribute}" in source
    for attribute in ("response_complete", "response_started", "keep_alive", "disconnected", "message_event"):
        assert f"self.{attribute}" in inspect.getsource(httptools_impl.RequestResponseCycle)
    assert "self.write_paused" in inspect.getsource(FlowControl)
