"""Where admission stood: found again from the trainer's checkpoint, the queue, and what live workers hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from miles.rpc.gen import trainer_pb2
from miles.services.controller.run.admission import Admission
from miles.services.controller.run.group_table import Lease

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.queue import GroupQueue

_ATTEMPTS_A_LIFE = 1 << 16
"""Leases of one group that one life of the controller can number."""


async def admission_after(
    ready: trainer_pb2.TrainerReady,
    config: JobConfig,
    steps: int,
    queue: GroupQueue,
    first_lease_number: int,
    leases: Mapping[int, Lease],
) -> Admission:
    """Admission for a job of so many `steps` whose trainer is `ready`; `leases` are held by workers of this life.

    Results of workers whose leases are older than `first_lease_number` are refused from now on.
    """
    life = await queue.begin_life()
    await queue.fence("*", first_lease_number)
    queued = {entry.group_id: entry.oldest_version for entry in await queue.outstanding()}
    return Admission.resume(
        batch_size=config.data.rollout_batch_size,
        max_staleness=config.rollout.max_weight_staleness,
        total_groups=config.data.rollout_batch_size * steps,
        version=ready.step,
        consumed_below=ready.consumed_below,
        consumed_ids=ready.consumed_group_ids,
        ready=queued,
        dropped=await queue.dropped(),
        leases=leases,
        window=config.rollout.over_sampling_batch_size or 0,
        first_attempt=life * _ATTEMPTS_A_LIFE + 1,
    )
