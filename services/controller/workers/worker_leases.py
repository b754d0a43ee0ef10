"""Worker leases: which worker is alive, under which lease number, until when. Pure: the caller brings the time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(slots=True)
class WorkerLease:
    """One worker's lease."""

    worker_id: str
    incarnation: str
    number: int
    expires_s: float


class WorkerLeases:
    """Leases by worker. A number is never given twice, so results under an older one can be refused."""

    def __init__(self, ttl_s: float, first_number: int = 1) -> None:
        self.ttl_s = ttl_s
        self._next_number = first_number
        self._leases: dict[str, WorkerLease] = {}

    def register(self, worker_id: str, incarnation: str, now_s: float) -> WorkerLease:
        """Give a worker a lease. The same incarnation keeps a live one; another one gets a new number."""
        lease = self._leases.get(worker_id)
        if lease is None or lease.incarnation != incarnation or lease.expires_s <= now_s:
            lease = WorkerLease(worker_id, incarnation, self._next_number, now_s + self.ttl_s)
            self._next_number += 1
            self._leases[worker_id] = lease
        lease.expires_s = now_s + self.ttl_s
        return lease

    def renew(self, worker_id: str, number: int, now_s: float) -> bool:
        """Renew a lease on a heartbeat; return False when it is not the worker's current one or has expired."""
        lease = self._leases.get(worker_id)
        if lease is None or lease.number != number or lease.expires_s <= now_s:
            return False
        lease.expires_s = now_s + self.ttl_s
        return True

    def release(self, worker_id: str, number: int) -> bool:
        """End the lease of a worker that leaves; return False when it was not its current one."""
        lease = self._leases.get(worker_id)
        if lease is None or lease.number != number:
            return False
        del self._leases[worker_id]
        return True

    def expire(self, now_s: float) -> list[WorkerLease]:
        """Remove and return the expired leases."""
        expired = [lease for lease in self._leases.values() if lease.expires_s <= now_s]
        for lease in expired:
            del self._leases[lease.worker_id]
        return expired

    def get(self, worker_id: str) -> WorkerLease | None:
        """Return the worker's lease, expired or not."""
        return self._leases.get(worker_id)

    def __iter__(self) -> Iterator[WorkerLease]:
        return iter(list(self._leases.values()))
