"""Decides the number types of a run from what its workers reported of themselves when they registered."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from miles.precision.number_types import AUTO, NumberTypes, decide, slow_type, slowdown_key
from miles.rpc.gen import controller_pb2

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.services.controller.workers.registry import AttachedWorker
    from miles.services.controller.workers.required_workers import RequiredWorkers

SUMMARY_KEY = "number_types"
"""Key in a job's summary: what was chosen and why."""


def is_open(config: JobConfig) -> bool:
    """Return whether the configuration leaves a type to the run."""
    return AUTO in (config.train.train_dtype, config.rollout.rollout_dtype)


async def choose(config: JobConfig, workers: RequiredWorkers, summary: dict[str, Any]) -> NumberTypes:
    """Decide the types of a run once its trainer and a rollout are attached, and note them in its summary."""
    trainers = await workers.wait_for(controller_pb2.WORKER_KIND_TRAINER) if config.debug.has_trainer else ()
    rollouts = await workers.wait_for(controller_pb2.WORKER_KIND_ROLLOUT) if config.debug.has_engines else ()
    before = summary.get(SUMMARY_KEY, {}).get("rollout_dtype")
    chosen = decide(
        config.train.train_dtype, config.rollout.rollout_dtype, _slowdowns([*trainers, *rollouts], "bfloat16"), before
    )
    summary[SUMMARY_KEY] = {
        "train_dtype": chosen.train_dtype,
        "rollout_dtype": chosen.rollout_dtype,
        "reason": chosen.reason,
    }
    return chosen


def warning_of(worker: AttachedWorker, dtype: str) -> str | None:
    """Return a warning about a worker that is slow in this type; None when it is fast in it."""
    return slow_type(worker.worker_id, dtype, _slowdowns([worker], dtype)[worker.worker_id])


def _slowdowns(workers: Iterable[AttachedWorker], dtype: str) -> dict[str, float | None]:
    return {
        worker.worker_id: json.loads(worker.registration.info_json or "{}").get(slowdown_key(dtype))
        for worker in workers
    }
