"""Stands in for the trainer in a run that only generates: a step takes its groups out of the sample queue.

How far the run has got is kept in the job's summary, so that a resumed run goes on there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miles.rpc.gen import trainer_pb2
from miles.services.controller.clients.calls import WorkerFailedError
from miles.services.controller.jobs.saved_steps import GENERATED_ONLY
from miles.services.controller.run.queued_groups import queued_groups
from miles.telemetry.rollout_metrics import rollout_metrics

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.queue import GroupQueue
    from miles.services.controller.jobs.history import JobHistory


class NoTrainer:
    """See `TrainerClient`, in whose place it stands."""

    def __init__(self, queue: GroupQueue, history: JobHistory, config: JobConfig) -> None:
        self.stage = ""
        self.loading_since_s: float | None = None
        self.worker_id = "no trainer"
        self.lost = False
        self._queue = queue
        self._history = history
        self._reward_key = config.reward.reward_key
        self._with_pass_rates = config.telemetry.log_passrate

    async def aclose(self) -> None:
        """It has no connection."""

    async def start_job(self) -> trainer_pb2.TrainerReady:
        """Return where the run stands."""
        at = self._history.summary.get(GENERATED_ONLY, {})
        return trainer_pb2.TrainerReady(
            step=at.get("step", 0),
            loaded_step=at.get("step", 0),
            consumed_below=at.get("consumed_below", 0),
            consumed_group_ids=at.get("consumed_group_ids", ()),
        )

    async def train(
        self, step: int, group_ids: Sequence[int] = (), dropped: Sequence[int] = ()
    ) -> trainer_pb2.TrainDone:
        """Take the groups out of the queue; a crash in between takes them out again."""
        at = self._history.summary.get(GENERATED_ONLY, {})
        if step < at.get("step", 0):
            raise WorkerFailedError(f"the metrics of step {step} were not kept")
        groups = await queued_groups(self._queue, group_ids)
        metrics = rollout_metrics(groups, self._reward_key, with_pass_rates=self._with_pass_rates)
        consumed = [*group_ids, *dropped]
        self._history.summary[GENERATED_ONLY] = _after(at, step + 1, consumed)
        await self._history.save()
        await self._queue.acknowledge(consumed)
        return trainer_pb2.TrainDone(step=step, metrics=metrics, group_ids=group_ids)

    async def abandon(self, step: int) -> bool:
        """A step takes no time that would be worth it."""
        return False

    async def export(self, version: int) -> trainer_pb2.ExportResponse:
        raise WorkerFailedError(f"version {version} cannot be exported: debug_rollout_only has no trainer")

    async def release_memory(self, *, state: bool) -> trainer_pb2.TrainerReleaseMemoryResponse:
        """It holds nothing."""
        return trainer_pb2.TrainerReleaseMemoryResponse()

    async def save(self, export_hf: bool, in_background: bool) -> trainer_pb2.SaveCheckpointResponse:
        raise WorkerFailedError("no checkpoint can be saved: debug_rollout_only has no trainer")


def _after(at: dict[str, Any], step: int, group_ids: Sequence[int]) -> dict[str, Any]:
    """Return where a run stands after a step that has consumed these groups too."""
    below, consumed = at.get("consumed_below", 0), {*at.get("consumed_group_ids", ()), *group_ids}
    while below in consumed:
        consumed.remove(below)
        below += 1
    return {"step": step, "consumed_below": below, "consumed_group_ids": sorted(consumed)}
