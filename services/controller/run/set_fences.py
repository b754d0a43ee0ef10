"""Fences worker leases: the queue refuses groups that carry an older worker lease number.

`workers.worker_leases` gives each number once. Group leases are fenced apart from that, by their attempt numbers: see
`group_leases`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles.services.controller.clients import deadlines

if TYPE_CHECKING:
    from miles.queue import GroupQueue
    from miles.services.controller.workers.registry import AttachedWorker


async def fence_earlier_leases(queue: GroupQueue, workers: Sequence[AttachedWorker]) -> None:
    """Refuse what earlier processes of these workers may still queue, before these get groups."""
    await queue.fence_all({worker.worker_id: worker.lease_number for worker in workers}, deadline_s=deadlines.FENCE_S)


async def fence_lost_worker(queue: GroupQueue, worker: AttachedWorker) -> None:
    """Refuse what a lost worker may still queue: one that hangs may wake up after others have got its groups."""
    await queue.fence(worker.worker_id, worker.lease_number + 1, deadline_s=deadlines.FENCE_S)


async def fence_earlier_controllers(queue: GroupQueue, first_lease_number: int) -> None:
    """Refuse what workers may still queue under leases from before this start of the controller."""
    await queue.fence("*", first_lease_number)
