"""Rollouts are spread over reward workers, each always to the same one."""

from __future__ import annotations

import pytest

from miles.config.sections.reward import RewardConfig
from miles.services.controller.jobs.controls import JobControls
from miles.services.controller.status.run_status import RunStatus
from miles.services.controller.status.worker_activity import WorkerActivities
from miles.services.controller.workers.registry import WorkerRegistry
from miles.services.controller.workers.required_workers import RequiredWorkers
from miles.services.controller.workers.reward_addresses import RewardAddresses


def test_rollouts_are_spread_over_the_built_in_workers() -> None:
    addresses = RewardAddresses({"judge": "far:9"}, ("a:1", "b:2"))
    found = [addresses.of(f"rollout-{i}") for i in range(4)]
    assert [each["default"] for each in found] == ["a:1", "b:2", "a:1", "b:2"]
    assert all(each["judge"] == "far:9" for each in found)


def test_a_name_without_a_number_has_its_worker_too() -> None:
    addresses = RewardAddresses({}, ("a:1", "b:2"))
    assert addresses.of("left")["default"] in ("a:1", "b:2")
    assert addresses.of("left") == addresses.of("left")


def test_a_users_own_default_serves_all() -> None:
    assert RewardAddresses({"default": "own:1"}).of("rollout-3") == {"default": "own:1"}


@pytest.mark.parametrize("name", ["default", "mine"])
async def test_a_job_that_only_its_users_services_score_waits_for_no_reward_worker(name: str) -> None:
    registry = WorkerRegistry()
    status = RunStatus(WorkerActivities(lambda *_: None), registry, 1)
    workers = RequiredWorkers(registry, JobControls(), status)
    addresses = await workers.reward_addresses(RewardConfig(reward_service=(f"{name}=own:1",)))
    assert addresses.of("rollout-0") == {name: "own:1"}
