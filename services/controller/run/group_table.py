"""Which worker has which group: pure bookkeeping, by group and by worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    """A group in the hands of a worker."""

    worker_id: str
    attempt: int


class HeldGroups(Mapping[int, Lease]):
    """Leases by group id. Losing a worker takes time only for the groups that it has."""

    def __init__(self) -> None:
        self._leases: dict[int, Lease] = {}
        self._of_worker: dict[str, dict[int, None]] = {}

    def begin(self, group_id: int, lease: Lease) -> None:
        """A worker gets a group that nobody has."""
        self._leases[group_id] = lease
        self._of_worker.setdefault(lease.worker_id, {})[group_id] = None

    def end(self, group_id: int, attempt: int) -> bool:
        """Take a group out of its worker's hands; False when nobody has it, or only under another attempt."""
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
        """Take back every group that a worker has; returns their ids."""
        lost = list(self._of_worker.pop(worker_id, ()))
        for group_id in lost:
            del self._leases[group_id]
        return lost

    def __getitem__(self, group_id: int) -> Lease:
        return self._leases[group_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._leases)

    def __len__(self) -> int:
        return len(self._leases)
