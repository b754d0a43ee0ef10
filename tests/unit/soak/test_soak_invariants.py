"""The checkers of a soak find what they are for, and nothing in what is right."""

from __future__ import annotations

import json
import pathlib

import pytest
from soak.figures import Reading, Trend, read_csv, slope_within, table, trends
from soak.invariants import bounds, isolation, leftovers, outcome, progress, services, steps, streams
from soak.recipes import RECIPES, Places, body, marker, mentions

GOOD, BAD = RECIPES["sync"], RECIPES["broken-model"]


@pytest.mark.parametrize(
    ("recipe", "state", "error", "asked", "right"),
    [
        (GOOD, "succeeded", "", set(), True),
        (GOOD, "failed", "no reward", set(), False),
        (GOOD, "stopped", "", {"stop"}, True),
        (GOOD, "stopped", "", {"cancel"}, False),
        (GOOD, "cancelled", "", set(), False),
        (BAD, "failed", "the model in /m/broken-model cannot be read", set(), True),
        (BAD, "failed", "unexpected error", set(), False),
        (BAD, "succeeded", "", set(), False),
        (BAD, "cancelled", "", {"cancel"}, True),
        (RECIPES["broken-folder"], "succeeded", "", set(), True),
    ],
)
def test_jobs_may_end_as_expected_or_asked_for(
    recipe: object, state: str, error: str, asked: set[str], right: bool
) -> None:
    assert (not outcome.outcome_faults(recipe, state, error, asked)) == right  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "taken", "ended", "right"),
    [
        ([0, 1, 2], 3, True, True),
        ([0, 1, 2], 2, False, True),
        ([], 0, True, True),
        ([0, 2], 3, False, False),
        ([0, 1, 1, 2], 3, False, False),
        ([1, 0], 2, False, False),
        ([0, 1], 3, True, False),
    ],
)
def test_steps_count_without_gap_or_repetition(found: list[int], taken: int, ended: bool, right: bool) -> None:
    assert (not steps.step_faults(found, taken, ended=ended)) == right


def test_a_sample_is_trained_on_once() -> None:
    assert not steps.group_faults([(0, 7, 0), (0, 7, 1), (1, 8, 0)])
    assert "(7, 1)" in steps.group_faults([(0, 7, 1), (1, 7, 1)])[0]


def test_a_text_that_mentions_another_job_is_found() -> None:
    own = "soak-004-sync-1f0c2a9b is saved in runs/soak-004-sync"
    assert not isolation.text_faults(4, "log", own)
    assert "[5]" in isolation.text_faults(4, "log", f"{own}\nsoak-005-lora-00000000 too")[0]
    assert mentions(own) == {4}
    assert not isolation.text_faults(4, "an event", "waiting for 1 job: soak-005-lora-00000000 runs now; no bound")


def test_prompts_of_another_job_are_found() -> None:
    assert not isolation.sample_faults(12, [{"prompt": "01234>"}])
    assert isolation.sample_faults(12, [{"prompt": "01234>"}, {"prompt": "01311>"}])


def test_events_that_repeat_or_are_of_another_job_are_found() -> None:
    first, second = json.dumps({"type": "log", "id": "10-0"}), json.dumps({"type": "log", "id": "10-1"})
    end = json.dumps({"type": "end"})
    assert not isolation.event_faults(1, [first, second, end])
    assert isolation.event_faults(1, [first, second, first])
    assert isolation.event_faults(1, [json.dumps({"type": "log", "id": "11-0", "text": "soak-002-sync"})])


def test_keys_of_no_job_and_keys_without_an_end_are_found() -> None:
    own = ["miles:jobs", "miles:job:soak-001-sync-aa", "miles:soak-001-sync-aa:events"]
    assert not isolation.key_faults(own, ["soak-001-sync-aa"])
    assert isolation.key_faults([*own, "miles:soak-002-sync-bb:groups"], ["soak-001-sync-aa"])
    assert not leftovers.key_faults("a", {"miles:a:events": -1, "miles:a:fences": 100})
    assert leftovers.key_faults("a", {"miles:a:groups": -1})


def test_shared_memory_of_ended_jobs_and_old_strays_are_found() -> None:
    assert not leftovers.shared_memory_faults(["miles-weights-x-b_policy-v1-2"], ["a"])
    assert leftovers.shared_memory_faults(["miles-weights-x-job7_policy-v1-2"], ["job7"])
    strays = leftovers.Strays(60)
    assert not strays.observe(0, {5: "reward"})
    assert not strays.observe(50, {5: "reward", 6: "trainer"})
    assert strays.observe(70, {5: "reward", 6: "trainer"}) == ["process 5 outlived its service by 60 s: reward"]
    assert not strays.observe(90, {})


def test_ends_of_services_that_the_soak_did_not_cause_are_found() -> None:
    killed = "WARNING  trainer-0 ended with signal SIGKILL; restarting it in 0.5 s\n"
    assert not services.end_faults(killed, {"trainer-0": 1})
    assert services.end_faults(killed, {"rollout-0": 1})
    assert services.end_faults(killed + killed, {"trainer-0": 1})
    own = "controller ended with exit code 1 (unexpected error); restarting it in 0.5 s"
    assert services.end_faults(own, {"controller": 5}) == [
        "controller ended with exit code 1 (unexpected error), by itself"
    ]


def test_time_without_progress_counts_only_while_all_services_are_well() -> None:
    followed = progress.Progress()
    assert followed.observe(1, 0, ("running", 0), calm=True) == 0
    assert followed.observe(1, 30, ("running", 0), calm=True) == 30
    assert followed.observe(1, 40, ("running", 0), calm=False) == 0
    assert followed.observe(1, 45, ("running", 0), calm=True) == 5
    assert followed.observe(1, 50, ("running", 1), calm=True) == 0


def test_a_watcher_must_have_every_event_once_and_in_order() -> None:
    assert not streams.stream_faults(["1-0", "1-1"], ["1-0", "1-1"])
    for watched in (["1-0"], ["1-1", "1-0"], ["1-0", "1-0", "1-1"]):
        assert streams.stream_faults(watched, ["1-0", "1-1"])


def test_what_a_job_waits_for_is_read_from_the_text_and_the_list() -> None:
    assert progress.explanation({"waiting_for": "the user"}) == "the user"
    assert progress.explanation({"waiting_for": "", "waits": []}) == ""
    assert "reward" in progress.explanation({"waiting_for": "", "waits": [{"what": "reward"}]})


def readings(values: list[float], process: str = "gateway", pid: int = 1) -> list[Reading]:
    return [Reading(30.0 * i, process, pid, value, value, 10, 4) for i, value in enumerate(values)]


def test_a_slope_is_one_within_lives() -> None:
    growing = [(30.0 * i, 100 + i, 1) for i in range(20)]
    assert slope_within(growing) == pytest.approx(1 / 30)
    restarted = [(30.0 * i, 10 if i < 10 else 500, 1 if i < 10 else 2) for i in range(20)]
    assert slope_within(restarted) == pytest.approx(0)


def test_growth_from_the_second_quarter_to_the_last_is_found() -> None:
    flat, steep = trends(readings([100.0] * 40)), trends(readings([100.0 + 10 * i for i in range(40)]))
    assert not bounds.growth_faults(flat)
    assert [fault.split(":")[0] for fault in bounds.growth_faults(steep)] == ["gateway", "gateway"]
    assert "| gateway | memory, MB | 1 | 100.0 |" in table(flat)


def test_a_trend_of_a_worker_is_no_fault() -> None:
    trend = Trend("trainer-0", "rss_mb", 1, 1.0, 1.0, 1.0, 1.0, 1e6, 1e6)
    assert not bounds.growth_faults([trend])


def test_readings_of_a_csv_are_those_that_were_written(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "figures.csv"
    path.write_text(
        "at_s,process,pid,rss_mb,memory_mb,files,threads,keys\n5.0,redis,7,1.5,2.5,3,4,9\n", encoding="utf-8"
    )
    assert read_csv(path) == [Reading(5.0, "redis", 7, 1.5, 2.5, 3, 4, 9)]


@pytest.mark.parametrize("kind", sorted(RECIPES))
def test_the_prompts_of_a_job_carry_its_marker(tmp_path: pathlib.Path, kind: str) -> None:
    places = Places(tmp_path / "m", tmp_path / "b", tmp_path / "runs", tmp_path / "prompts", "127.0.0.1:1")
    config = body(42, kind, places)
    assert mentions(config["run_dir"]) == {42}
    if kind != "missing-file":
        lines = pathlib.Path(config["prompt_data"]).read_text(encoding="utf-8").splitlines()
        assert all(json.loads(line)["prompt"].startswith(marker(42)) for line in lines)
