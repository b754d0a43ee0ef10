"""What a job waits for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.services.controller.jobs.resources import Supply, lacking

ENOUGH = Supply(rollouts=1, weightsyncs=1, trainer_ranks=(1,), rewards=(("math", "exact_match"),))


def flat(**changes: Any) -> dict[str, Any]:
    return JobConfig.from_flat(MINIMAL | changes).resolve("cpu").to_flat()


def test_a_job_runs_when_all_it_asks_for_is_there() -> None:
    assert lacking(flat(), ENOUGH) == ""
    assert lacking(flat(), dataclasses.replace(ENOUGH, trainer_ranks=(4, 0), rewards=((),))) == ""


@pytest.mark.parametrize(
    ("changes", "supply", "reason"),
    [
        ({}, {"rollouts": 0}, "1 rollout workers (0 attached)"),
        ({"rollout_num_workers": 3}, {}, "3 rollout workers (1 attached)"),
        ({}, {"trainer_ranks": ()}, "a trainer of 1 ranks (no trainer attached)"),
        ({"actor_num_gpus_per_node": 2}, {}, "a trainer of 2 ranks (1 attached)"),
        (
            {"actor_num_nodes": 3, "host": "10.0.0.1", "rollout_batch_size": 3},
            {"trainer_nodes": (2,)},
            "a trainer of 3 ranks (1 attached; node 1 of 3 not there: start `miles trainer-node` as the launcher "
            "printed it)",
        ),
        ({}, {"weightsyncs": 0}, "a weight-sync service"),
        ({}, {"rewards": (("exact_match",),)}, "a reward worker that serves math"),
        ({}, {"rewards": ()}, "a reward worker that serves math"),
        (
            {"rollout_num_workers": 2},
            {"weightsyncs": 0},
            "2 rollout workers (1 attached); a weight-sync service",
        ),
    ],
)
def test_a_job_says_what_it_waits_for(changes: dict[str, Any], supply: dict[str, Any], reason: str) -> None:
    assert lacking(flat(**changes), dataclasses.replace(ENOUGH, **supply)) == reason


def test_while_services_start_only_a_reward_that_will_not_come_is_missed() -> None:
    assert lacking(flat(), Supply(), starting_up=True) == ""
    custom = flat(rm_type=None, custom_rm_path="my.rewards.total")
    missing = lacking(custom, Supply(rewards=(("math",),)), starting_up=True)
    assert missing.startswith("a reward worker that serves my.rewards.total (give miles serve --custom-rm-path")
    assert lacking(custom, Supply(rewards=(("total",),)), starting_up=True) == ""


def test_nodes_that_a_person_starts_are_missed_at_once() -> None:
    nodes = flat(actor_num_nodes=3, host="10.0.0.1", rollout_batch_size=3)
    assert "nodes 1, 2 of 3 not there" in lacking(nodes, Supply(), starting_up=True)


def test_a_job_with_reward_services_of_its_own_needs_no_worker_for_them() -> None:
    own = flat(rm_type=None, reward_service=["default=h:1"])
    assert lacking(own, dataclasses.replace(ENOUGH, rewards=())) == ""
