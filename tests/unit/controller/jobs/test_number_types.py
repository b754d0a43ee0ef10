from __future__ import annotations

import json
from typing import Any, cast

import pytest
from config_cases import MINIMAL

from miles.config import ConfigError, JobConfig
from miles.rpc.gen import controller_pb2
from miles.services.controller.jobs.controls import JobControls
from miles.services.controller.jobs.number_types import SUMMARY_KEY, choose, is_open, warning_of
from miles.services.controller.status.run_status import RunStatus
from miles.services.controller.status.worker_activity import WorkerActivities
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry
from miles.services.controller.workers.required_workers import RequiredWorkers

TRAINER, ROLLOUT = controller_pb2.WORKER_KIND_TRAINER, controller_pb2.WORKER_KIND_ROLLOUT


def attach(registry: WorkerRegistry, name: str, kind: Any, **info: float) -> AttachedWorker:
    return registry.attach(
        controller_pb2.WorkerRegistration(
            worker_id=name, kind=kind, address=f"{name}:1", incarnation="1", info_json=json.dumps(info)
        )
    )


def workers_of(registry: WorkerRegistry) -> RequiredWorkers:
    status = RunStatus(WorkerActivities(lambda *_: None), registry, 1)
    return RequiredWorkers(registry, JobControls(), status)


async def test_types_are_those_that_every_worker_is_fast_in_and_are_noted() -> None:
    registry, config = WorkerRegistry(), JobConfig.from_flat(MINIMAL)
    attach(registry, "trainer-0", TRAINER, bfloat16_slowdown=0.4)
    attach(registry, "rollout-0", ROLLOUT)
    attach(registry, "rollout-1", ROLLOUT, bfloat16_slowdown=7.5)
    summary: dict[str, Any] = {}
    chosen = await choose(config, workers_of(registry), summary)
    assert (chosen.train_dtype, chosen.rollout_dtype) == ("float32", "float32")
    assert summary[SUMMARY_KEY] == {
        "train_dtype": "float32",
        "rollout_dtype": "float32",
        "reason": "a bfloat16 matrix product takes 7.5 times as long as a float32 one on rollout-1",
    }
    decided = config.replace(train_dtype=chosen.train_dtype, rollout_dtype=chosen.rollout_dtype)
    assert is_open(config)
    assert not is_open(decided)
    assert decided.with_types("train_dtype", "rollout_dtype") is decided


def test_no_worker_is_built_from_types_that_are_open() -> None:
    with pytest.raises(ConfigError) as refused:
        JobConfig.from_flat(MINIMAL).with_types("train_dtype", "rollout_dtype")
    assert [fault.field for fault in refused.value.faults] == ["train_dtype", "rollout_dtype"]


def test_a_worker_that_is_slow_in_the_chosen_type_is_named() -> None:
    registry = WorkerRegistry()
    slow = attach(registry, "rollout-0", ROLLOUT, bfloat16_slowdown=8.0, float16_slowdown=30.0)
    assert "rollout-0 is slow in bfloat16" in cast("str", warning_of(slow, "bfloat16"))
    assert "takes 30 times as long" in cast("str", warning_of(slow, "float16"))
    assert warning_of(slow, "float32") is None
    assert warning_of(attach(registry, "rollout-1", ROLLOUT), "bfloat16") is None
