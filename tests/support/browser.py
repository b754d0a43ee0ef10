"""A real Chromium that tests drive, and the accessibility checks that they run in it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

ARTIFACTS = pathlib.Path(__file__).resolve().parents[2] / "test-artifacts"
"""Where screenshots are left for people to look at."""
AXE = pathlib.Path(__file__).with_name("axe") / "axe.min.js"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; a test that finds none fails and says how to get one."""
    found = os.environ.get("CHROMIUM") or next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail("there is no Chromium: run tools/get_chromium.sh, apt-get install chromium, or set CHROMIUM=PATH")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def page(browser: Browser, url: str, *, theme: str = "light", width: int = 1440) -> Iterator[Page]:
    """A tab of its own. Fails when a script of the page fails, or when the browser refuses something of it."""
    context = browser.new_context(
        base_url=url, color_scheme=theme, reduced_motion="reduce", viewport={"width": width, "height": 900}
    )
    tab = context.new_page()
    tab.set_default_timeout(120_000)
    troubles: list[str] = []
    tab.on("pageerror", lambda error: troubles.append(str(error)))

    def note(message: ConsoleMessage) -> None:
        # Chromium also reports each answer that is an error; the page shows those to its user.
        if message.type == "error" and "Failed to load resource" not in message.text:
            troubles.append(message.text)

    tab.on("console", note)
    tab.on("request", lambda request: troubles.append(request.url) if not _local(request.url, url) else None)
    try:
        yield tab
        assert troubles == []
    finally:
        context.close()


def _local(requested: str, url: str) -> bool:
    return requested.startswith((url, "data:", "blob:"))


def screenshot(tab: Page, name: str) -> None:
    """Leave a picture of the whole page in the artifacts."""
    ARTIFACTS.mkdir(exist_ok=True)
    tab.screenshot(path=ARTIFACTS / f"{name}.png", full_page=True)


def accessibility_faults(tab: Page) -> list[str]:
    """What axe-core finds wrong with the page as it is shown now."""
    # Evaluated by the debugger, which the page's content security policy does not bind.
    tab.evaluate(AXE.read_text(encoding="utf-8"))
    run = "standards => axe.run(document, {runOnly: standards})"
    violations: list[dict[str, Any]] = tab.evaluate(run, _STANDARDS)["violations"]
    return [f"{found['id']}: {found['help']}: {node['html'][:200]}" for found in violations for node in found["nodes"]]
