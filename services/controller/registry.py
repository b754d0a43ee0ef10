"""Workers that are attached to the controller."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time

from miles.rpc.gen import controller_pb2
from miles.services.controller.leases import LeaseTable

_REMEMBERED_S = 600.0
"""How long a worker that was lost is still shown."""


@dataclasses.dataclass(slots=True)
class AttachedWorker:
    """A worker that holds a live lease."""

    registration: controller_pb2.WorkerRegistration
    lease_number: int
    heartbeat: controller_pb2.WorkerHeartbeat
    last_seen_unix_ns: int
    lost: asyncio.Event
    """Set when the lease ends, for whatever reason."""
    progress_unix_ns: int = 0
    """When its progress or activity last changed."""

    @property
    def worker_id(self) -> str:
        return self.registration.worker_id


class WorkerRegistry:
    """Applies the lease rules to live attachments and tells those who wait about changes."""

    def __init__(self, ttl_s: float = 6.0) -> None:
        # Numbers start at the clock, so that those given before a restart of the controller stay smaller.
        self.first_lease_number = time.time_ns() // 1_000_000
        self._leases = LeaseTable(ttl_s, self.first_lease_number)
        self._workers: dict[str, AttachedWorker] = {}
        self._by_kind: collections.defaultdict[int, dict[str, AttachedWorker]] = collections.defaultdict(dict)
        self._gone: dict[str, AttachedWorker] = {}
        self._changed = asyncio.Event()
        self.ttl_s = ttl_s

    def attach(self, registration: controller_pb2.WorkerRegistration) -> AttachedWorker:
        """A worker registered. An older incarnation under the same name is fenced."""
        lease = self._leases.register(registration.worker_id, registration.incarnation, time.monotonic())
        known = self._workers.get(registration.worker_id)
        if known is not None and known.lease_number == lease.number:
            return known
        if known is not None:
            known.lost.set()
            self._by_kind[known.registration.kind].pop(registration.worker_id)
        worker = AttachedWorker(
            registration, lease.number, controller_pb2.WorkerHeartbeat(), time.time_ns(), asyncio.Event()
        )
        self._workers[registration.worker_id] = self._by_kind[registration.kind][registration.worker_id] = worker
        self._gone.pop(registration.worker_id, None)
        self._notify()
        return worker

    def beat(self, worker: AttachedWorker, heartbeat: controller_pb2.WorkerHeartbeat) -> bool:
        """A heartbeat came; False when the lease is over and the worker must attach again."""
        if not self._leases.renew(worker.worker_id, worker.lease_number, time.monotonic()):
            return False
        worker.last_seen_unix_ns = time.time_ns()
        known = worker.heartbeat
        if (heartbeat.progress, heartbeat.activity) != (known.progress, known.activity) or not worker.progress_unix_ns:
            worker.progress_unix_ns = worker.last_seen_unix_ns
        worker.heartbeat = heartbeat
        return True

    def expire(self) -> list[AttachedWorker]:
        """End the leases whose time is over; called about once a second."""
        gone = [worker for lease in self._leases.expire(time.monotonic()) if (worker := self._remove(lease.worker_id))]
        if gone:
            self._notify()
        return gone

    def detach(self, worker: AttachedWorker) -> None:
        """The worker's attachment broke: it is gone until it attaches again."""
        if self._leases.release(worker.worker_id, worker.lease_number):
            self._remove(worker.worker_id)
            self._notify()

    def alive(self, kind: controller_pb2.WorkerKind.ValueType) -> list[AttachedWorker]:
        """Workers of a kind that hold a lease, by name."""
        return sorted(self._by_kind[kind].values(), key=lambda worker: worker.worker_id)

    def everyone(self) -> list[AttachedWorker]:
        """All workers that hold a lease, by name."""
        return sorted(self._workers.values(), key=lambda worker: worker.worker_id)

    def lost_lately(self) -> list[AttachedWorker]:
        """Workers whose lease ended within the last `_REMEMBERED_S` and that have not come back, by name."""
        oldest = time.time_ns() - int(_REMEMBERED_S * 1e9)
        self._gone = {name: worker for name, worker in self._gone.items() if worker.last_seen_unix_ns > oldest}
        return [self._gone[name] for name in sorted(self._gone)]

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when a worker came or went, or after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    async def require(
        self, kind: controller_pb2.WorkerKind.ValueType, count: int, deadline_s: float
    ) -> list[AttachedWorker]:
        """Wait until `count` workers of a kind are attached; `TimeoutError` says how many were."""
        end = time.monotonic() + deadline_s
        while len(found := self.alive(kind)) < count:
            left = end - time.monotonic()
            if left <= 0:
                name = controller_pb2.WorkerKind.Name(kind).removeprefix("WORKER_KIND_").lower()
                raise TimeoutError(f"waited {deadline_s:g} s for {count} {name} worker(s); {len(found)} attached")
            await self.wait_for_change(min(left, 1.0))
        return found

    def _remove(self, worker_id: str) -> AttachedWorker | None:
        worker = self._workers.pop(worker_id, None)
        if worker is not None:
            self._by_kind[worker.registration.kind].pop(worker_id)
            worker.lost.set()
            self._gone[worker_id] = worker
        return worker

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
