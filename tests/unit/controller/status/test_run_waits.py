"""What a run waits for, from what its parts know."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from miles.services.controller.status.run_waits import (
    EvaluationFacts,
    LoadingWorker,
    RolloutFacts,
    RunFacts,
    waits_of,
)
from miles.services.controller.status.waits import UNUSUAL_S, Wait

NOW = 1000.0
WORKING = RolloutFacts("rollout-0", connected=True, capacity=4)
COLLECTING = RunFacts(
    "collecting", "4 of 4 groups of step 0", NOW, NOW, rollouts=(WORKING,), wanted_rollouts=1, lease_s=20.0
)


def run(**changes: Any) -> list[Wait]:
    return waits_of(dataclasses.replace(COLLECTING, **changes))


def test_a_run_that_works_waits_for_its_groups_alone() -> None:
    [wait] = run()
    assert (wait.what, wait.patience_s > UNUSUAL_S) == ("4 of 4 groups of step 0", True)
    assert wait.ending == "no bound: stop the job"


def test_a_worker_that_is_stopped_is_named_before_its_lease_ends() -> None:
    silent, _ = run(silent_s={"rollout-0": 7.0, "trainer-0": 1.0})
    assert silent.what == "a heartbeat of rollout-0"
    assert (silent.since_s, silent.gives_up_s, silent.patience_s) == (NOW - 7.0, NOW + 13.0, 0.0)


@pytest.mark.parametrize(
    ("rollouts", "lost", "what", "detail"),
    [
        ((), {"rollout-0": 3}, "a rollout worker to attach (0 of 2)", "lost: rollout-0 3 times"),
        ((), {}, "a rollout worker to attach (0 of 2)", "it has not attached"),
        ((WORKING,), {}, "1 more rollout worker (1 of 2 attached)", "it has not attached"),
    ],
)
def test_a_rollout_that_is_not_there_is_named(
    rollouts: tuple[RolloutFacts, ...], lost: dict[str, int], what: str, detail: str
) -> None:
    wait = run(rollouts=rollouts, lost=lost, wanted_rollouts=2)[0]
    assert (wait.what, wait.detail) == (what, detail)
    assert wait.ending.startswith("no bound")


def test_workers_that_load_say_what_they_do() -> None:
    loading = (LoadingWorker("trainer-0", "building the model", NOW), LoadingWorker("rollout-0", "", NOW))
    waits = run(phase="loading", waiting_for="the trainer to load the model", loading=loading)
    assert [(wait.what, wait.detail) for wait in waits[:2]] == [
        ("trainer-0 to load the job", "building the model"),
        ("rollout-0 to load the job", "it has not answered yet"),
    ]
    assert all(wait.ending for wait in waits)


def test_of_many_workers_that_load_or_are_silent_one_speaks_for_all() -> None:
    loading = tuple(LoadingWorker(f"rollout-{i}", "downloading", NOW - i) for i in range(9))
    silent, load, *_ = run(loading=loading, silent_s={f"rollout-{i}": 7.0 + i for i in range(9)})
    assert (silent.what, silent.since_s) == ("heartbeats of workers", NOW - 15)
    assert silent.detail.startswith("9 of them")
    assert (load.what, load.detail) == ("workers to load the job", "9 of them; rollout-8: downloading")


def test_a_reward_service_that_rollouts_wait_for_is_one_wait_with_all_samples() -> None:
    reward = Wait("reward service 'default' at h:1", "Connection refused", NOW, 180.0, "", samples=4)
    rollouts = tuple(RolloutFacts(f"rollout-{i}", connected=True, capacity=4, waits=(reward,)) for i in range(2))
    wait = run(rollouts=rollouts)[0]
    assert (wait.what, wait.samples) == ("reward service 'default' at h:1", 8)


def test_groups_that_are_all_dropped_are_said_with_the_bound() -> None:
    assert run(dropped="all dropped", dropped_limit=64)[0].ending == "the job fails at 64 dropped groups in a row"
    assert run(dropped="all dropped", dropped_limit=0)[0].ending.startswith("no bound")


def test_an_evaluation_says_how_far_it_is_and_what_fails() -> None:
    wait = run(evaluation=EvaluationFacts(3, 2, 8, "no answer"))[0]
    assert wait.what == "the evaluation of version 3"
    assert wait.detail == "2 of 8 prompts are done; the last failure: no answer"


def test_engines_that_cannot_serve_or_load_are_named() -> None:
    quarantined = RolloutFacts("rollout-0", connected=True, out_of_routing="checksum differs")
    first, second, *_ = run(rollouts=(quarantined,), load_faults="rollout-0 has failed 2 times")
    assert (first.what, first.detail) == ("rollout-0 to serve verified weights", "checksum differs")
    assert second.detail == "rollout-0 has failed 2 times"


def test_engines_that_do_not_serve_the_newest_version_are_named() -> None:
    wait = run(version=4, engines_behind="rollout-1 (prefetched version 3)")[0]
    assert (wait.what, wait.detail) == ("engines to load version 4", "rollout-1 (prefetched version 3)")
    assert wait.limit_s is not None


def test_groups_that_all_fail_are_said() -> None:
    assert run(failing="the last 9 attempts failed")[0].detail == "the last 9 attempts failed"


@pytest.mark.parametrize(
    "phase",
    [
        *("starting", "loading", "recovering", "collecting", "training", "publishing", "evaluating", "saving"),
        *("paused", "ending", "gathering"),
    ],
)
def test_every_phase_has_a_bound_or_says_how_to_end_it(phase: str) -> None:
    wait = run(phase=phase, waiting_for="something")[-1]
    assert wait.ending
    assert wait.limit_s is not None or "no bound" in wait.ending or phase == "training"
