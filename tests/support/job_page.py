"""The page of a job, for tests in Chromium."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Locator, Page


def row(page: Page, number: int) -> Locator:
    """Return the row of a record, when its record is there."""
    return page.locator(f'.log-row[data-number="{number}"]:not([data-loading])')


def state(page: Page) -> Locator:
    """Return the state in the header."""
    return page.locator(".job-state")


def visible_numbers(page: Page) -> list[int]:
    """Return the numbers of the rows that are in the window, from its top."""
    numbers: list[int] = page.evaluate(
        """() => {
            const { top, bottom } = document.querySelector(".log-layer").getBoundingClientRect();
            const isSeen = (box) => box.bottom > top + 1 && box.top < bottom - 1;
            return [...document.querySelectorAll(".log-row")]
                .filter((row) => isSeen(row.getBoundingClientRect()))
                .map((row) => Number(row.dataset.number));
        }"""
    )
    return numbers


def append(path: Path, *lines: str) -> None:
    """Append lines to a file that the procedure `tail` reads."""
    with path.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))
