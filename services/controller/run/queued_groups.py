"""Reads the groups of a step from the sample queue, where they stay."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles.services.controller.clients.calls import WorkerLostError
from miles.types import SampleGroup

if TYPE_CHECKING:
    from miles.queue import GroupQueue

_AT_ONCE = 8
"""Groups that are asked for at the same time."""


async def queued_groups(queue: GroupQueue, group_ids: Sequence[int]) -> list[SampleGroup]:
    """Return these groups in this order. Raises WorkerLostError if one is gone: the run is then loaded again."""
    groups: list[SampleGroup] = []
    for start in range(0, len(group_ids), _AT_ONCE):
        part = group_ids[start : start + _AT_ONCE]
        for group_id, found in zip(part, await asyncio.gather(*map(queue.find, part)), strict=True):
            if found is None:
                raise WorkerLostError(f"group {group_id} is not in the sample queue any more")
            groups.append(found[1])
    return groups
