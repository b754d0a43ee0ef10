"""The web page as the gateway serves it: complete, closed to the outside, and with a key where one is needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from browser import accessibility_faults, chromium, page
from gateway_stack import Stack
from playwright.sync_api import Browser, expect

from miles.gateway.page import FOLDER

expect.set_options(timeout=120_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_the_page_is_served_whole_and_loads_nothing_from_elsewhere(http: httpx.Client) -> None:
    index = http.get("/")
    assert index.headers["content-type"].startswith("text/html")
    assert "unsafe" not in index.headers["content-security-policy"]
    assert index.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|https?://", index.text)
    types = {".js": "javascript", ".css": "text/css", ".svg": "image/svg+xml", ".woff2": "font"}
    served = [path for path in FOLDER.rglob("*") if path.suffix in types]
    assert len(served) > 20
    for path in served:
        answer = http.get(f"/static/{path.relative_to(FOLDER)}")
        assert answer.status_code == 200
        assert types[path.suffix] in answer.headers["content-type"], path
        assert answer.content == path.read_bytes()
        assert answer.headers["cache-control"] == "no-cache"
        unchanged = http.get(answer.url.path, headers={"If-None-Match": answer.headers["etag"]})
        assert unchanged.status_code == 304


def test_modules_of_the_page_name_files_that_there_are() -> None:
    for path in (FOLDER / "js").glob("*.js"):
        for name in re.findall(r"from \"(\.[^\"]+)\"", path.read_text(encoding="utf-8")):
            assert (path.parent / name).is_file(), f"{path.name} loads {name}"


@pytest.mark.parametrize("path", ["/static/../page.py", "/static/%2e%2e/page.py", "/static/none.js", "/static/"])
def test_nothing_but_the_page_is_served(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 404


def test_a_key_is_asked_for_kept_in_the_tab_and_sent_in_a_header_only(
    stack: Stack, browser: Browser, waiting_job: dict[str, Any]
) -> None:
    with page(browser, stack.keyed.address) as tab:
        requested: list[str] = []
        tab.on("request", lambda request: requested.append(request.url))
        tab.goto("/")
        dialog = tab.get_by_role("dialog", name="API key")
        dialog.get_by_label("Key").fill("wrong")
        dialog.get_by_role("button", name="Use this key").click()
        expect(dialog).to_contain_text("the key is wrong")
        assert accessibility_faults(tab) == []
        dialog.get_by_label("Key").fill(stack.keys["alice"])
        dialog.get_by_role("button", name="Use this key").click()
        tab.get_by_role("link", name=waiting_job["name"], exact=True).first.click()
        expect(tab.locator(".now")).to_contain_text("ahead of it")
        with tab.expect_response(lambda answer: answer.url.endswith("/events")) as events:
            tab.reload()
        assert events.value.status == 200
        expect(tab.locator(".head .badge")).to_have_text("queued")
        tab.get_by_role("button", name="Cancel").click()
        tab.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
        expect(tab.locator(".toast")).to_contain_text("may only act on jobs it submitted")
        assert tab.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert not any(stack.keys["alice"] in url or "wrong" in url for url in requested)


def test_the_page_says_when_the_gateway_is_away_and_goes_on_by_itself(
    stack: Stack, browser: Browser, submit: Callable[..., dict[str, Any]]
) -> None:
    submit(name="seen")
    with page(browser, stack.local.address) as tab:
        tab.goto("/")
        expect(tab.locator("#connection")).to_have_text("live")
        stack.local.stop()
        try:
            expect(tab.locator("#connection")).to_have_text("gateway or controller away")
            expect(tab.get_by_role("link", name="seen", exact=True).first).to_be_visible()
        finally:
            stack.local.start()
        expect(tab.locator("#connection")).to_have_text("live")
