"""The page of a job whose output comes fast, for a minute. It measures, so it runs on request only: HARP_LONG=1."""

from __future__ import annotations

import os
from typing import Any

import pytest
from playwright.sync_api import expect

from support.browser import PROCEDURES as USUAL
from support.browser import Pages, Site

pytestmark = [
    pytest.mark.skipif(os.environ.get("HARP_LONG") != "1", reason="takes minutes and a quiet machine: HARP_LONG=1"),
    pytest.mark.timeout(300),
]

PROCEDURES = (
    USUAL
    + """
@streaming_procedure(timeout=600)
def paced(rate, seconds):
    begin, number = time.monotonic(), 0
    while number < rate * seconds:
        due = min(rate * seconds, int((time.monotonic() - begin) * rate))
        while number < due:
            yield {"number": number, "text": "a record of usual length"}
            number += 1
        time.sleep(0.005)
"""
)

_MEASURE = """
async (seconds) => {
    const tasks = [], frames = [];
    const observer = new PerformanceObserver((list) => tasks.push(...list.getEntries().map((entry) => entry.duration)));
    observer.observe({ type: "longtask" });
    let last = performance.now(), isMeasuring = true;
    const step = (now) => {
        frames.push(now - last);
        last = now;
        if (isMeasuring) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
    isMeasuring = false;
    observer.disconnect();
    frames.sort((a, b) => a - b);
    const p99 = frames[Math.floor(frames.length * 0.99)];
    return { longest: Math.max(0, ...tasks), p99, heap: performance.memory.usedJSHeapSize };
}
"""


@pytest.mark.parametrize(("rate", "seconds"), [(10_000, 60), (50_000, 10)])
def test_page_stays_smooth_at_a_high_rate(site: Site, pages: Pages, rate: int, seconds: int) -> None:
    job = site.submit("paced", rate, seconds)
    page = pages.open(f"/jobs/{job}?tab=output")
    expect(page.locator(".log-status")).to_contain_text("Following")
    measured: dict[str, Any] = page.evaluate(_MEASURE, seconds - 5)
    print(f"{rate}/s: {measured}")
    expect(page.locator(".job-state")).to_contain_text("returned", timeout=120_000)
    expect(page.locator(".tab-count")).to_have_text(f"{rate * seconds:,}")
    expect(page.locator(f'.log-row[data-number="{rate * seconds - 1}"]')).to_be_in_viewport()
    assert measured["heap"] < 200e6
    if rate == 10_000:
        assert measured["longest"] < 100
        assert measured["p99"] < 34
