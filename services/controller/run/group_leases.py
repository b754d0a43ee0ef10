"""Which worker generates which group, under which attempt: pure bookkeeping, by group and by worker.

A group lease is fenced by its attempt number: `end` refuses the result of any attempt but the current one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class GroupLease:
    """A group that a worker generates."""

    worker_id: str
    attempt: int


class GroupLeases(Mapping[int, GroupLease]):
    """Leases by group id. Losing a worker takes time only for the groups that it has."""

    def __init__(self) -> None:
        self._leases: dict[int, GroupLease] = {}
        self._of_worker: dict[str, dict[int, None]] = {}

    def begin(self, group_id: int, lease: GroupLease) -> None:
        """Lease a group that is not leased."""
        self._leases[group_id] = lease
        self._of_worker.setdefault(lease.worker_id, {})[group_id] = None

    def end(self, group_id: int, attempt: int) -> bool:
        """End a group's lease; return False when the group is not leased, or only under another attempt."""
        lease = self._leases.get(group_id)
        if lease is None or lease.attempt != attempt:
            return False
        del self._leases[group_id]
        groups = self._of_worker[lease.worker_id]
        del groups[group_id]
        if not groups:
            del self._of_worker[lease.worker_id]
        return True

    def lose_worker(self, worker_id: str) -> list[int]:
        """End every lease of a worker and return the ids of its groups."""
        lost = list(self._of_worker.pop(worker_id, ()))
        for group_id in lost:
            del self._leases[group_id]
        return lost

    def __getitem__(self, group_id: int) -> GroupLease:
        return self._leases[group_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._leases)

    def __len__(self) -> int:
        return len(self._leases)
