"""What the launcher has people start on other hosts."""

from __future__ import annotations

import shlex

import pytest
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.launcher.elsewhere import command_line, plan_elsewhere
from miles.launcher.plan import plan_workers
from miles.services.rollout.__main__ import parse_flags

SEVERAL = {"host": "10.0.0.1", "actor_num_nodes": 3, "actor_num_gpus_per_node": 2, "trainer_master_port": 7001}
ROLLOUTS = {"rollout_num_workers": 3, "rollout_workers_elsewhere": 2}


def config(**changes: object) -> JobConfig:
    return JobConfig.from_flat(MINIMAL | {"rollout_batch_size": 12} | changes).resolve("cpu")


def test_one_machine_needs_no_other() -> None:
    assert plan_elsewhere(config(), "127.0.0.1:7000") == []


def test_every_other_node_and_rollout_has_a_command() -> None:
    plans = plan_elsewhere(config(**SEVERAL, **ROLLOUTS), "10.0.0.1:7000")
    names = [plan.name for plan in plans]
    assert names == [
        *("the trainer's node 1 of 3", "the trainer's node 2 of 3", "rollout-1, on any host", "rollout-2, on any host")
    ]
    for rank in (1, 2):
        words = plans[rank - 1].command
        assert words[:2] == ("miles", "trainer-node")
        assert words[words.index("--node-rank") + 1] == str(rank)
        assert words[words.index("--master") + 1] == "10.0.0.1:7001"
        assert words[words.index("--controller") + 1] == "10.0.0.1:7000"
    flags = parse_flags(plans[2].command[3:])
    assert (flags.worker_id, flags.listen, flags.controller) == ("rollout-1", "0.0.0.0:0", "10.0.0.1:7000")


def test_this_machine_runs_node_0_and_the_other_rollouts() -> None:
    plans = {plan.name: plan for plan in plan_workers(config(**SEVERAL, **ROLLOUTS), "10.0.0.1:7000")}
    assert set(plans) == {"weightsync", "reward-0", "rollout-0", "trainer-0"}
    words = shlex.join(plans["trainer-0"].command)
    assert "--nnodes 3 --node-rank 0 --nproc-per-node 2 --master-addr 10.0.0.1 --master-port 7001" in words


@pytest.mark.parametrize("shown", [True, False])
def test_commands_set_what_the_job_wants_without_its_secrets(shown: bool) -> None:
    plan = plan_elsewhere(config(**SEVERAL, train_env_vars={"TOKEN": "a b"}), "10.0.0.1:7000")[0]
    line = command_line(plan, () if shown else {"TOKEN"})
    assert line.startswith("TOKEN='a b' miles trainer-node" if shown else "TOKEN=")
    assert shown == ("a b" in line)


def test_ipv6_hosts_keep_their_brackets() -> None:
    plans = plan_elsewhere(config(**SEVERAL | {"host": "fd00::1"}, **ROLLOUTS), "[fd00::1]:7000")
    assert plans[0].command[plans[0].command.index("--master") + 1] == "[fd00::1]:7001"
    assert "[::]:0" in plans[-1].command
