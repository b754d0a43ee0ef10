"""A draft falls behind a policy that learns, and one that is trained beside it keeps up; all services are real."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from held_rewards import HeldRewards, held_rewards
from serving_cluster import serving, wait_for
from whole_runs import Records

from benchmarks.draft_drift import DRAFT_STEPS, make, settings
from miles.client import MilesClient

STEPS = 9
LEARNT = 7
"""Steps after which the policy hardly moves any more."""
Job = Mapping[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The counting policy, its draft and its prompts."""
    made = tmp_path_factory.mktemp("counting")
    make(made)
    return made


@pytest.fixture(scope="module")
def client(folder: pathlib.Path) -> Iterator[MilesClient]:
    """A client of services for both runs."""
    with serving(folder, folder) as found:
        yield found


@pytest.fixture
def rewards(tmp_path: pathlib.Path) -> Iterator[HeldRewards]:
    """What a job's responses are scored by, in the steps that the test does not hold."""
    with held_rewards(tmp_path, "threes") as found:
        yield found


def submitted(client: MilesClient, folder: pathlib.Path, rewards: HeldRewards, mode: str, **changes: Any) -> Job:
    config = settings(folder, mode, STEPS) | {"name": mode, "lr_decay_iters": LEARNT, **rewards.settings, **changes}
    del config["device"]  # that of the services
    return client.submit(config)


def finished(client: MilesClient, job: Job) -> list[dict[str, Any]]:
    """Metrics of each step, once all are done."""
    wait_for(client, job["id"], lambda job: job["state"] == "succeeded")
    return Records(pathlib.Path(job["config"]["run_dir"])).metrics()


def lengths(steps: list[dict[str, Any]]) -> list[float]:
    """Mean tokens per verification of each step."""
    return [step["rollout/spec_accept_length"] for step in steps]


def release_with_draft(client: MilesClient, job: Job, rewards: HeldRewards, step: int, version: int) -> None:
    """Hold the run in a step, whose responses are generated, until its engine drafts with this version.

    The run does not wait for its draft trainer, which may have no core left to it on a busy machine.
    """

    def served(_: object) -> bool:
        return any((engine["draft_version"] or 0) >= version for engine in client.status(job["id"])["speculation"])

    wait_for(client, job["id"], served)
    rewards.release(step)


def test_a_draft_falls_behind_the_policy_until_a_version_comes_that_was_trained_beside_it(
    client: MilesClient, folder: pathlib.Path, rewards: HeldRewards
) -> None:
    frozen_steps = LEARNT - 1
    rewards.hold(frozen_steps)
    job = submitted(client, folder, rewards, "online", draft_update_interval=frozen_steps)
    release_with_draft(client, job, rewards, frozen_steps, version=1)
    steps = finished(client, job)
    found = lengths(steps)
    assert 2 < found[0] < 1 + DRAFT_STEPS
    assert found[frozen_steps - 1] < 0.6 * found[0]
    assert found[-1] > 0.95 * found[0]
    assert steps[-1]["rollout/raw_reward"] > 4 * steps[0]["rollout/raw_reward"], "the policy has moved"


@pytest.mark.slow
def test_a_draft_that_is_trained_at_every_step_keeps_up_and_changes_no_response(
    client: MilesClient, folder: pathlib.Path, rewards: HeldRewards
) -> None:
    frozen = finished(client, submitted(client, folder, rewards, "frozen"))
    held = range(1, STEPS - 1)
    rewards.hold(*held)
    job = submitted(client, folder, rewards, "online")
    for step in held:
        release_with_draft(client, job, rewards, step, version=step)
    online = finished(client, job)
    assert [step["rollout/raw_reward"] for step in online] == [step["rollout/raw_reward"] for step in frozen]
    first = lengths(frozen)[0]
    assert lengths(frozen)[-1] < 0.6 * first
    assert lengths(online)[0] == pytest.approx(first, rel=0.01)
    assert statistics.mean(lengths(online)) > 0.8 * first
    assert lengths(online)[-1] > 0.95 * first
