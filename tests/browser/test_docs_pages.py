"""The pages for people in a real browser: their policy, their styles, and what a screen reader needs."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from support.browser import Pages, find_axe_violations


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("path", "heading"), [("/docs", "HTTP API of this dispatcher"), ("/docs/errors", "Errors of")])
def test_docs_page_has_its_styles_and_no_violation(visitor_pages: Pages, path: str, heading: str, scheme: str) -> None:
    page = visitor_pages.open(path)
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    expect(page.get_by_role("heading", level=1)).to_contain_text(heading)
    expect(page.locator("table").first).to_have_css("border-collapse", "collapse")
    assert find_axe_violations(page) == []
    page.set_viewport_size({"width": 320, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
