"""Workers that are attached to the controller."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
from collections.abc import Sequence

from miles.rpc.gen import controller_pb2
from miles.services.controller.workers.worker_leases import LeaseTable

_REMEMBERED_S = 600.0
"""How long a worker that was lost is still shown."""
_LONGEST_TICK_S = 1.5
"""Time between two calls of `expire` beyond this was spent on something else than listening."""


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
    """Applies the lease rules to live attachments and tells those who wait about changes.

    Leases end after a time in which heartbeats could have been heard: what the process spent stopped, or busy with one
    thing, does not count, for the heartbeats of that time have not been read yet.
    """

    def __init__(self, ttl_s: float = 20.0, first_lease_number: int = 1) -> None:
        """How long workers may be silent, and above which lease numbers to begin.

        `ttl_s` is for workers that hang, as a process that ends breaks its connection at once: with many times more
        work than cores, one may be silent for seconds and still be well. `first_lease_number`: above all that were
        given before a restart of the controller, whose results end.
        """
        self.first_lease_number = first_lease_number
        self._leases = LeaseTable(ttl_s, self.first_lease_number)
        self._listened_s, self._ticked_s = 0.0, time.monotonic()
        self._workers: dict[str, AttachedWorker] = {}
        self._by_kind: collections.defaultdict[int, dict[str, AttachedWorker]] = collections.defaultdict(dict)
        self._by_name: dict[int, list[AttachedWorker]] = {}
        """What `alive` answers, until a worker of the kind comes or goes."""
        self._by_address: collections.defaultdict[str, dict[str, AttachedWorker]] = collections.defaultdict(dict)
        self._gone: dict[str, AttachedWorker] = {}
        self._changed = asyncio.Event()
        self.ttl_s = ttl_s

    def attach(self, registration: controller_pb2.WorkerRegistration) -> AttachedWorker:
        """A worker registered. An older incarnation under the same name is fenced."""
        lease = self._leases.register(registration.worker_id, registration.incarnation, self._listened_s)
        known = self._workers.get(registration.worker_id)
        if known is not None and known.lease_number == lease.number:
            return known
        if known is not None:
            known.lost.set()
            self._drop(known)
        worker = AttachedWorker(
            registration, lease.number, controller_pb2.WorkerHeartbeat(), time.time_ns(), asyncio.Event()
        )
        self._workers[worker.worker_id] = self._by_kind[registration.kind][worker.worker_id] = worker
        self._by_address[registration.address][worker.worker_id] = worker
        self._by_name.pop(registration.kind, None)
        self._gone.pop(registration.worker_id, None)
        self._notify()
        return worker

    def beat(self, worker: AttachedWorker, heartbeat: controller_pb2.WorkerHeartbeat) -> bool:
        """A heartbeat came; False when the lease is over and the worker must attach again."""
        if not self._leases.renew(worker.worker_id, worker.lease_number, self._listened_s):
            return False
        worker.last_seen_unix_ns = time.time_ns()
        known = worker.heartbeat
        if (heartbeat.progress, heartbeat.activity) != (known.progress, known.activity) or not worker.progress_unix_ns:
            worker.progress_unix_ns = worker.last_seen_unix_ns
        worker.heartbeat = heartbeat
        return True

    def expire(self) -> list[AttachedWorker]:
        """End the leases whose time is over; called about once a second."""
        now_s = time.monotonic()
        self._listened_s += min(now_s - self._ticked_s, _LONGEST_TICK_S)
        self._ticked_s = now_s
        gone = [worker for lease in self._leases.expire(self._listened_s) if (worker := self._remove(lease.worker_id))]
        if gone:
            self._notify()
        return gone

    def detach(self, worker: AttachedWorker) -> None:
        """The worker's attachment broke: it is gone until it attaches again."""
        if self._leases.release(worker.worker_id, worker.lease_number):
            self._remove(worker.worker_id)
            self._notify()

    def alive(self, kind: controller_pb2.WorkerKind.ValueType) -> Sequence[AttachedWorker]:
        """Workers of a kind that hold a lease, by name."""
        if kind not in self._by_name:
            self._by_name[kind] = sorted(self._by_kind[kind].values(), key=lambda worker: worker.worker_id)
        return self._by_name[kind]

    def at(self, address: str) -> list[AttachedWorker]:
        """Workers that hold a lease and serve at an address."""
        return list(self._by_address[address].values()) if address in self._by_address else []

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
    ) -> Sequence[AttachedWorker]:
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
            self._drop(worker)
            worker.lost.set()
            self._gone[worker_id] = worker
        return worker

    def _drop(self, worker: AttachedWorker) -> None:
        kind, address = worker.registration.kind, worker.registration.address
        del self._by_kind[kind][worker.worker_id]
        self._by_name.pop(kind, None)
        del self._by_address[address][worker.worker_id]
        if not self._by_address[address]:
            del self._by_address[address]

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
