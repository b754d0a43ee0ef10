"""Makes the metrics of one training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from miles.services.controller.run.admission import Batch


@dataclasses.dataclass(frozen=True, slots=True)
class StepTimes:
    """How long the parts of a step took, in seconds."""

    waited_s: float
    """Waiting for the step's groups."""
    train_s: float
    update_s: float
    """Publishing, as far as the trainer waited for it."""
    step_s: float
    """From the end of the step before."""


def step_metrics(
    trained: Mapping[str, float],
    batch: Batch,
    queue_size: int,
    times: StepTimes,
    trainer_world_size: int,
    has_versions: bool,
) -> dict[str, float]:
    """Return what the trainer measured (`trained`), with staleness, queue and times of the step.

    Without a trainer there are no versions that a sample could be behind (`has_versions`).
    """
    staleness = {
        "rollout/fully_async/avg_staleness": sum(batch.staleness) / len(batch.staleness),
        "rollout/fully_async/max_staleness": max(batch.staleness),
    }
    return {
        **trained,
        "rollout/fully_async/queue_size": queue_size,
        **(staleness if has_versions else {}),
        "rollout/dropped_groups": len(batch.dropped),
        "perf/rollout_time": times.waited_s,
        "perf/train_wait_time": times.waited_s,
        "perf/actor_train_time": times.train_s,
        "perf/update_weights_time": times.update_s,
        "perf/step_time": times.step_s,
        "perf/tokens_per_gpu_per_sec": trained[RESPONSE_TOKENS] / times.step_s / trainer_world_size,
    }


RESPONSE_TOKENS = "rollout/response_tokens"
"""A metric that every training step has."""
