from __future__ import annotations

import subprocess

from config_cases import MINIMAL

from miles.addresses import free_port
from miles.config import JobConfig
from miles.launcher.plan import plan_gateway, plan_run, plan_workers


def test_services_get_the_flags_that_they_have() -> None:
    """Every service's own parser accepts the command line that is planned for it."""
    config = JobConfig.from_flat(
        MINIMAL | {"actor_num_gpus_per_node": 2, "rollout_num_workers": 2, "trainer_master_port": free_port()}
    ).resolve("cpu")
    plans = {plan.kind: plan for plan in plan_run(config) if plan.kind != "redis"}
    assert set(plans) == {"controller", "weightsync", "reward", "rollout", "trainer", "gateway"}
    plans |= {plan.kind: plan for plan in plan_workers(config, "127.0.0.1:1")}
    gateway = plan_gateway(config, "127.0.0.1:1")
    assert gateway is not None
    plans["gateway"] = gateway
    for plan in plans.values():
        module = len(plan.command) - 1 - plan.command[::-1].index("-m")
        ran = subprocess.run([*plan.command, "--help"], capture_output=True, text=True, timeout=400)
        assert ran.returncode == 0, ran.stderr
        flags = [word for word in plan.command[module:] if word.startswith("--")]
        assert [flag for flag in flags if flag not in ran.stdout] == []
