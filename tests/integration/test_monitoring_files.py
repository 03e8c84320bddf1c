"""The files of `examples/monitoring`: they parse, and each metric and label in them is in a real scrape."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from harpcaller.metrics import Metrics
from harpcaller.monitoring import Monitor
from harpd.control.metrics import supervisor_families
from support.dispatcher import call, host_line, result, running
from support.scripted import scripted_harpd

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples/monitoring"
PAGE = (ROOT / "docs/monitoring.md").read_text()
#: Metrics that exist only in some situations or in harpd, with their labels; the tests of these find them.
RARE = {
    "up": {"job", "instance"},
    "harp_hosts_refresh_timestamp_seconds": set[str](),
    "harp_host_rtt_seconds": {"host"},
    "harp_host_clock_skew_seconds": {"host"},
    "harp_certificate_expiry_timestamp_seconds": {"file"},
    "harp_store_errors_total": {"verb"},
    "harp_auth_failures_total": {"api"},
    "harp_access_denied_total": {"action"},
    "harp_http_requests_total": {"code", "route", "method"},
    "harp_http_request_seconds_bucket": {"route", "le"},
    "harp_requests_total": {"api", "request", "outcome"},
    "harp_connections": {"api"},
    "harpd_calls_rejected_total": {"supervisor", "type"},
    "harpd_certificate_expiry_timestamp_seconds": {"file"},
}
OF_PROMETHEUS = {"job", "instance"}


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((FILES / "alerts.yml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FILES / "grafana-dashboard.json").read_text())
    return found


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def used(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each metric of an expression with the labels that it is selected by."""
    for name, selectors in re.findall(r"\b(harpd?_\w+|process_\w+|up)\b(?:\{([^}]*)\})?", expression):
        yield name, set(re.findall(r"(\w+)\s*[=!]", re.sub(r'"[^"]*"', '""', selectors)))


async def test_metrics_of_alerts_and_dashboard_exist(
    tmp_path: Path, rules: list[dict[str, Any]], dashboard: dict[str, Any]
) -> None:
    metrics = Metrics()
    with scripted_harpd(tmp_path) as host:
        async with running(tmp_path, host_line(host.port), metrics=metrics) as dispatcher:
            await result(dispatcher, procedure="count", arguments=[3])
            await result(dispatcher, procedure="fail", arguments=["call_died"])
            await dispatcher.cancel(await dispatcher.submit(call("hang"), "test"))
            text = (await Monitor(dispatcher, metrics).scrape()).decode()
    real = {name: labels.copy() for name, labels in RARE.items()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            real.setdefault(sample.name, set()).update(sample.labels)
    for family_of_harpd in supervisor_families([]):
        real.setdefault(family_of_harpd.name, set())
    sources = [rule["expr"] for rule in rules] + [*expressions(dashboard)]
    assert len(sources) > 50
    for expression in sources:
        names = [*used(expression)]
        assert names, expression
        for name, labels in names:
            assert name in real, expression
            assert labels <= real[name] | OF_PROMETHEUS, expression
        by = {label for labels in re.findall(r"\bby \(([^)]*)\)", expression) for label in labels.split(", ")}
        assert by <= set().union(*(real[name] for name, _ in names)) | OF_PROMETHEUS, expression
        assert expression.count("(") == expression.count(")"), expression


def test_each_alert_has_a_runbook(rules: list[dict[str, Any]]) -> None:
    for rule in rules:
        name = rule["alert"]
        assert rule["annotations"]["runbook"] == f"docs/monitoring.md#{name.lower()}"
        part = PAGE.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
        for question in ("**Means:**", "**Look at:**", "**Do:**"):
            assert question in part, name
    explained = re.findall(r"^### (Harp\w+)$", PAGE, re.MULTILINE)
    assert explained == [rule["alert"] for rule in rules]


def test_dashboard_needs_no_plugin_and_one_data_source(dashboard: dict[str, Any]) -> None:
    assert {panel["type"] for panel in dashboard["panels"]} <= {"row", "stat", "timeseries", "bargauge"}
    sources = {panel["datasource"]["uid"] for panel in dashboard["panels"] if "datasource" in panel}
    assert sources == {"${datasource}"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in dashboard["panels"]]
    assert all(x + width <= 24 for x, _, width, _ in places)


def test_scrape_configuration_names_the_alerts() -> None:
    configuration = yaml.safe_load((FILES / "prometheus.yml").read_text())
    assert configuration["rule_files"] == ["alerts.yml"]
    assert {job["job_name"] for job in configuration["scrape_configs"]} == {"harp", "node"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, a program of Prometheus")
def test_promtool_accepts_the_alerts() -> None:
    subprocess.run(["promtool", "check", "rules", str(FILES / "alerts.yml")], check=True)
