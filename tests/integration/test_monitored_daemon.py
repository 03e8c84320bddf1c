"""The metrics and checks of a running harpcallerd."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import harp
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.scripted import scripted_harpd

HTTP = {"http": {"listen": ["127.0.0.1:0"]}}


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpcallerd]:
    directory = tmp_path_factory.mktemp("d")
    with scripted_harpd(directory) as host:
        settings = {"resumable_calls": False, "audit_file": str(directory / "audit"), **HTTP}
        with Harpcallerd(directory, {"web01": host.port}, settings=settings) as running:
            yield running


def scrape(dispatcher: Harpcallerd) -> dict[tuple[str, ...], float]:
    """Return all samples by name and values of labels."""
    port = dispatcher.events("harpcallerd is serving HTTP")[-1]["port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    families = text_string_to_metric_families(text)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_running_daemon_counts_jobs_requests_and_connections(dispatcher: Harpcallerd) -> None:
    before = scrape(dispatcher)
    rpc = harp.HarpCaller("127.0.0.1", dispatcher.port)
    job = rpc.host("web01").echo(1)
    assert job.get() == [1]
    with pytest.raises(harp.HarpException):
        rpc.job("00000000-0000-0000-0000-000000000000").details()
    dispatcher.listed("list")
    after = scrape(dispatcher)

    def more(*key: str) -> float:
        return after.get(key, 0) - before.get(key, 0)

    assert more("harp_jobs_submitted_total") == more("harp_jobs_ended_total", "returned", "") == 1
    for phase in ("accept", "store", "store_end", "deliver"):
        assert more("harp_job_phase_seconds_count", phase) == 1, phase
    assert more("harp_requests_total", "client", "ok", "call") == 1
    assert more("harp_requests_total", "client", "ok", "get_result") == 1
    assert more("harp_requests_total", "client", "invalid_jobid", "get_details") == 1
    assert more("harp_requests_total", "control", "ok", "list") == 1
    assert more("harp_http_requests_total", "200", "GET", "/metrics") == 1
    assert after["harp_connections", "http"] >= 1
    assert after["harp_connections_limit", "http"] == 1000
    assert more("harp_log_messages_total", "info") > 0
    assert more("harp_audit_entries_total") > 0
    assert after["harp_audit_write_errors_total",] == 0
    wait_until(lambda: scrape(dispatcher)["harp_loop_lag_seconds_count",] > 0, what="a measured delay")
    assert after["harp_request_memory_limit_bytes",] == 256 * 1024 * 1024


def test_failed_reload_is_shown_until_the_next_one(dispatcher: Harpcallerd) -> None:
    good = dispatcher.config_file.read_text()
    try:
        dispatcher.config_file.write_text(good + "max_calls = 0\n")
        assert dispatcher.control("reload").returncode == 1
        assert scrape(dispatcher)["harp_config_reload_success",] == 0
    finally:
        dispatcher.config_file.write_text(good)
    assert dispatcher.control("reload").returncode == 0
    assert scrape(dispatcher)["harp_config_reload_success",] == 1


def test_status_has_the_checks(dispatcher: Harpcallerd) -> None:
    def status() -> dict[str, bool]:
        [item] = [json.loads(line) for line in dispatcher.control("status", "--full").stdout.splitlines()]
        return {check["name"]: check["ok"] for check in item["checks"]}

    wait_until(lambda: all(status().values()), what="a dispatcher that is ready")
    assert status().keys() == {"store", "hosts", "recovery", "serving"}
    dispatcher.wait_event("harpcallerd is ready")


def test_dispatcher_that_is_not_ready_says_why(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\nuntil test -e {tmp_path}/go; do sleep 0.1; done\necho\n")
    script.chmod(0o755)
    settings = {"hosts_file": None, "host_db_script": str(script), **HTTP}
    with Harpcallerd(tmp_path / "d", settings=settings) as dispatcher:
        done = dispatcher.control("status")
        assert (done.returncode, done.stdout) == (0, "harpcallerd is running\n")
        assert "harpcallerd: not ready: hosts: the hosts registry is not loaded yet\n" in done.stderr
        assert not dispatcher.events("harpcallerd is ready")
        (tmp_path / "go").touch()
        dispatcher.wait_event("harpcallerd is ready")


def test_dispatcher_without_http_imports_no_web_package(tmp_path: Path) -> None:
    program = """
import sys
from harpcaller import cli, daemon
from harpcaller.api import control_server
names = {name.partition(".")[0] for name in sys.modules}
print(sorted(names & {"starlette", "uvicorn", "httptools", "prometheus_client"}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
