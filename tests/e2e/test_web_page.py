"""The web page in a real browser, on real services: a job watched, opened to its tokens, cancelled; a job submitted."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
from collections.abc import Iterator

import pytest
from browser import accessibility_faults, chromium, page, screenshot
from playwright.sync_api import Browser, Page, expect
from serving_cluster import config, serving, wait_for

from miles.client import MilesClient

expect.set_options(timeout=120_000)
VIEWS = ["", "/queue", "/samples", "/events", "/logs", "/config"]
DRAFTS = {"rollout_backend": "torch", "sglang_speculative_algorithm": "NGRAM", "sglang_speculative_num_draft_tokens": 4}


@pytest.fixture(scope="module")
def client(tiny_dense: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilesClient]:
    """A client of `miles serve`, which all tests here share."""
    with serving(tmp_path_factory.mktemp("serve"), tiny_dense) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def submit_by_curl(url: str, body: dict[str, object]) -> str:
    """Submit a job as a user does in a shell; returns its id."""
    command = ["curl", "--silent", "--show-error", "--fail-with-body", "--data", json.dumps(body)]
    command += ["--header", "Content-Type: application/json", f"{url}/v1/jobs"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return str(json.loads(answer.stdout)["id"])


def newest_step(tab: Page, chart: str) -> int:
    """The step to which a curve is drawn, as the page tells those who do not see it; -1 before the first."""
    label = tab.locator(f"#chart-{chart} .plot").get_attribute("aria-label") or ""
    found = re.search(r"at step (\d+): ", label)
    return int(found[1]) if found else -1


def wait_for_step(tab: Page, chart: str, step: int) -> None:
    script = """([chart, step]) => {
        const label = document.querySelector(`#chart-${chart} .plot`)?.getAttribute("aria-label") ?? "";
        return Number(/at step (\\d+): /.exec(label)?.[1] ?? -1) >= step;
    }"""
    tab.wait_for_function(script, arg=[chart, step], timeout=400_000)


def test_a_job_from_curl_is_watched_opened_to_its_tokens_and_cancelled(
    client: MilesClient, browser: Browser, tiny_dense: pathlib.Path
) -> None:
    sampling = {"rollout_batch_size": 8, "n_samples_per_prompt": 8, "max_weight_staleness": 1}
    training = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 4096, "observe_training_entropy": True}
    alarm = {"draft_acceptance_alarm": 100.0}  # drafts that nobody can reach
    job_id = submit_by_curl(
        client.url, config(tiny_dense, name="watched", num_rollout=500, **sampling, **training, **DRAFTS, **alarm)
    )
    with page(browser, client.url) as tab:
        tab.goto("/")
        tab.get_by_role("link", name="watched", exact=True).click()
        expect(tab.get_by_role("heading", name="watched")).to_be_visible()
        wait_for_step(tab, "reward", 2)
        seen = newest_step(tab, "reward")
        wait_for_step(tab, "reward", seen + 2)
        for chart in ("kl", "difference", "entropy", "staleness", "speed", "time", "acceptance"):
            assert newest_step(tab, chart) >= seen
        expect(tab.locator("#timeline .lane-name")).to_have_text(["trainer-0", "rollout-0", "reward-0", "weightsync"])
        expect(tab.locator("#timeline rect.a-train").first).to_be_attached()
        chosen = "The trainer computes in float32, engines in float32: the trainer follows rollout_dtype."
        expect(tab.locator("#number-types")).to_have_text(chosen)
        screenshot(tab, "job-light")
        tab.get_by_role("tab", name="Queue and versions").click()
        expect(tab.get_by_role("row", name=re.compile("rollout-0 policy serving"))).to_be_visible()
        drafts = tab.get_by_role("region", name="Speculative decoding", exact=True)
        expect(drafts.get_by_role("row", name=re.compile(r"rollout-0 – (3|2|1|off) [1-4]\.\d\d "))).to_be_visible()
        expect(drafts.get_by_role("row", name=re.compile(r"\d+ – [1-4]\.\d\d [\d.]+ % [\d,]+")).first).to_be_visible()
        screenshot(tab, "queue-light")
        tab.get_by_role("tab", name="Events").click()
        expect(tab.locator("ol.events")).to_contain_text("at or below draft_acceptance_alarm = 100")
        tab.get_by_role("tab", name="Samples").click()
        tab.get_by_label("Step", exact=True).fill("1")
        tab.get_by_role("button", name="Show").click()
        expect(tab.locator("table.samples tbody tr")).to_have_count(32)
        screenshot(tab, "samples-light")
        tab.locator("table.samples tbody a").nth(3).click()
        expect(tab.get_by_role("heading", name=re.compile(r"Sample 3 of group \d+, step 1"))).to_be_visible()
        tab.get_by_role("button", name="Advantage").click()
        tokens = tab.locator(".tokens")
        tokens.focus()
        tokens.press("ArrowRight")
        expect(tab.locator(".token-facts")).to_contain_text("advantage")
        screenshot(tab, "sample-light")
        tab.get_by_role("button", name="Pause").click()
        expect(tab.locator(".head .badge")).to_have_text("paused")
        expect(tab.locator(".now")).to_contain_text("the user to resume the job")
        tab.get_by_role("button", name="Resume").click()
        expect(tab.locator(".head .badge")).to_have_text("running")
        tab.get_by_role("button", name="Cancel").click()
        tab.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
        expect(tab.locator(".head .badge")).to_have_text("cancelled")
    job = client.job(job_id)
    assert job["state"] == "cancelled"
    assert all(each["accept_length"] >= 1 for each in job["summary"]["acceptance"])
    assert client.versions(job_id)["acceptance"] == job["summary"]["acceptance"]
    with page(browser, client.url, theme="dark") as tab:
        tab.goto(f"/#/jobs/{job_id}")
        wait_for_step(tab, "reward", seen)
        expect(tab.locator("#timeline rect.a-train").first).to_be_attached()
        screenshot(tab, "job-dark")


@pytest.mark.parametrize(("theme", "width"), [("light", 1440), ("dark", 360)])
def test_every_view_is_accessible_and_fits(
    client: MilesClient, browser: Browser, tiny_dense: pathlib.Path, theme: str, width: int
) -> None:
    job_id = client.submit(config(tiny_dense, name="short", num_rollout=2, **DRAFTS), idempotency_key="short")["id"]
    wait_for(client, job_id, lambda job: job["state"] == "succeeded")
    sample = next(iter(client.samples(job_id)))
    one = f"/samples/{sample['step']}/{sample['group_id']}/{sample['index']}"
    with page(browser, client.url, theme=theme, width=width) as tab:
        for view in ["jobs", "workers", "submit", *(f"jobs/{job_id}{part}" for part in [*VIEWS, one])]:
            tab.goto(f"/#/{view}")
            tab.wait_for_load_state("networkidle")
            assert accessibility_faults(tab) == [], view
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, view
            if view == f"jobs/{job_id}":
                screenshot(tab, f"ended-{theme}-{width}")


def as_text(settings: dict[str, object]) -> str:
    """Settings as a config file has them."""
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items())


def test_the_form_shows_each_fault_beside_its_field_and_submits_what_has_none(
    client: MilesClient, browser: Browser, tiny_dense: pathlib.Path
) -> None:
    good = config(tiny_dense, name="typed", num_rollout=1)
    with page(browser, client.url) as tab:
        tab.goto("/#/submit")
        editor = tab.get_by_label("Configuration", exact=True)
        editor.fill(as_text(good) + "lr: -1\n")
        expect(tab.get_by_role("heading", name="1 fault")).to_be_visible()  # lr is given twice
        editor.fill(as_text({**good, "lr": -1, "no_such": 3}))
        expect(tab.get_by_role("heading", name="2 faults")).to_be_visible()
        expect(tab.locator("#fault-lr")).to_contain_text("it must be at least 0")
        expect(tab.locator(".gutter .bad")).to_have_count(2)
        screenshot(tab, "submit-light")
        tab.get_by_label("lr", exact=True).fill("0.001")
        tab.get_by_label("lr", exact=True).press("Tab")
        expect(tab.get_by_role("heading", name="1 fault")).to_be_visible()
        editor.fill(editor.input_value().replace("no_such: 3\n", ""))
        expect(tab.get_by_role("heading", name="No faults")).to_be_visible()
        tab.get_by_role("button", name="Submit the job").click()
        expect(tab.get_by_role("heading", name="typed")).to_be_visible()
        job_id = tab.url.rpartition("/")[2]
    assert wait_for(client, job_id, lambda job: job["state"] == "succeeded")["config"]["lr"] == 0.001


def test_everything_can_be_reached_with_the_keyboard(client: MilesClient, browser: Browser) -> None:
    with page(browser, client.url) as tab:
        tab.goto("/")
        expect(tab.get_by_role("heading", name="Jobs")).to_be_visible()
        tab.keyboard.press("Tab")
        expect(tab.get_by_role("link", name="Skip to content")).to_be_focused()
        tab.keyboard.press("Enter")
        expect(tab.locator("main")).to_be_focused()
        tab.keyboard.press("g")
        tab.keyboard.press("w")
        expect(tab.get_by_role("heading", name="Workers")).to_be_visible()
        tab.keyboard.press("?")
        expect(tab.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
        tab.keyboard.press("Escape")
        expect(tab.get_by_role("dialog")).to_have_count(0)
        tab.keyboard.press("t")
        expect(tab.locator("html")).to_have_attribute("data-theme", "dark")
        tab.reload()
        expect(tab.locator("html")).to_have_attribute("data-theme", "dark")
