"""Keeps the workers that are attached to the controller, and ends the worker leases of silent ones."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable, Sequence

from miles.change_signal import ChangeSignal
from miles.rpc.gen import controller_pb2
from miles.services.controller.workers.report_intervals import report_interval_s
from miles.services.controller.workers.worker_leases import WorkerLeases

_REMEMBERED_S = 600.0
"""How long a lost worker is still shown."""
_SHORTEST_INTERVAL_S = 2.0
"""Between two heartbeats."""
_BEATS_IN_A_LEASE = 4
_LONGEST_TICK_S = 1.5
"""Time between two calls of `expire` beyond this was not spent listening."""


@dataclasses.dataclass(slots=True)
class AttachedWorker:
    """A worker with a worker lease."""

    registration: controller_pb2.WorkerRegistration
    lease_number: int
    heartbeat: controller_pb2.WorkerHeartbeat
    last_seen_unix_ns: int
    lost: asyncio.Event
    """Set when the worker lease ends, for whatever reason."""
    progress_unix_ns: int = 0
    """When its progress or activity last changed."""
    traces: list[controller_pb2.TraceOrder] = dataclasses.field(default_factory=list)
    """What it is to be told at its next heartbeat."""
    worker_id: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.worker_id = self.registration.worker_id  # read for every group; a message makes a new text each time


class WorkerRegistry:
    """Applies the rules of worker leases to live attachments, and wakes those who wait for changes.

    Leases end after a time in which heartbeats could have been read: time in which this process was stopped or too busy
    does not count, because heartbeats of that time are still unread.
    """

    def __init__(self, ttl_s: float = 20.0, first_lease_number: int = 1) -> None:
        """Begin without workers.

        `ttl_s` is how long a worker may be silent. It is for workers that hang, as a process that ends breaks its
        connection at once: on an overloaded machine a healthy one may be silent for seconds. `first_lease_number` is
        above all that were given before a restart of the controller, which are fenced.
        """
        self.first_lease_number = first_lease_number
        self._leases = WorkerLeases(ttl_s, self.first_lease_number)
        self._listened_s, self._ticked_s = 0.0, time.monotonic()
        self._workers: dict[str, AttachedWorker] = {}
        self._by_kind: collections.defaultdict[int, dict[str, AttachedWorker]] = collections.defaultdict(dict)
        self._by_name: dict[int, list[AttachedWorker]] = {}
        """What `alive` returns, until a worker of the kind attaches or is lost."""
        self._by_address: collections.defaultdict[str, dict[str, AttachedWorker]] = collections.defaultdict(dict)
        self._lost: dict[str, AttachedWorker] = {}
        self._times_lost: collections.Counter[str] = collections.Counter()
        self._changed = ChangeSignal()
        self.ttl_s = ttl_s

    def attach(self, registration: controller_pb2.WorkerRegistration) -> AttachedWorker:
        """Attach a worker. An older incarnation under the same name loses its lease."""
        lease = self._leases.register(registration.worker_id, registration.incarnation, self._listened_s)
        known = self._workers.get(registration.worker_id)
        if known is not None and known.lease_number == lease.number:
            return known
        if known is not None:
            known.lost.set()
            self._forget(known)
        worker = AttachedWorker(
            registration, lease.number, controller_pb2.WorkerHeartbeat(), time.time_ns(), asyncio.Event()
        )
        self._workers[worker.worker_id] = self._by_kind[registration.kind][worker.worker_id] = worker
        self._by_address[registration.address][worker.worker_id] = worker
        self._by_name.pop(registration.kind, None)
        self._lost.pop(registration.worker_id, None)
        self._changed.notify()
        return worker

    def beat(self, worker: AttachedWorker, heartbeat: controller_pb2.WorkerHeartbeat) -> bool:
        """Take in a heartbeat; return False when the worker lease has ended and the worker must attach again."""
        if not self._leases.renew(worker.worker_id, worker.lease_number, self._listened_s):
            return False
        worker.last_seen_unix_ns = time.time_ns()
        known = worker.heartbeat
        if (heartbeat.progress, heartbeat.activity) != (known.progress, known.activity) or not worker.progress_unix_ns:
            worker.progress_unix_ns = worker.last_seen_unix_ns
        worker.heartbeat = heartbeat
        return True

    def expire(self) -> list[AttachedWorker]:
        """End expired worker leases; called about once a second."""
        now_s = time.monotonic()
        self._listened_s += min(now_s - self._ticked_s, _LONGEST_TICK_S)
        self._ticked_s = now_s
        expired = [
            worker for lease in self._leases.expire(self._listened_s) if (worker := self._remove(lease.worker_id))
        ]
        if expired:
            self._changed.notify()
        return expired

    def detach(self, worker: AttachedWorker) -> None:
        """End the lease of a worker whose attachment broke."""
        if self._leases.release(worker.worker_id, worker.lease_number):
            self._remove(worker.worker_id)
            self._changed.notify()

    def alive(self, kind: controller_pb2.WorkerKind.ValueType) -> Sequence[AttachedWorker]:
        """Return the attached workers of a kind, by name."""
        if kind not in self._by_name:
            self._by_name[kind] = sorted(self._by_kind[kind].values(), key=lambda worker: worker.worker_id)
        return self._by_name[kind]

    def at(self, address: str) -> list[AttachedWorker]:
        """Return the attached workers that serve at an address."""
        return list(self._by_address[address].values()) if address in self._by_address else []

    def everyone(self) -> list[AttachedWorker]:
        """Return all attached workers, by name."""
        return sorted(self._workers.values(), key=lambda worker: worker.worker_id)

    def recently_lost(self) -> list[AttachedWorker]:
        """Return the workers lost within the last `_REMEMBERED_S` that have not attached again, by name."""
        oldest = time.time_ns() - int(_REMEMBERED_S * 1e9)
        self._lost = {name: worker for name, worker in self._lost.items() if worker.last_seen_unix_ns > oldest}
        return [self._lost[name] for name in sorted(self._lost)]

    def times_lost(self, worker_id: str) -> int:
        """Return how many worker leases of a worker have ended since this process began, a count."""
        return self._times_lost[worker_id]

    def silent_s(self, worker_id: str) -> float:
        """Return for how long an attached worker could have sent a heartbeat and did not, in seconds."""
        lease = self._leases.get(worker_id)
        return 0.0 if lease is None else max(0.0, self._listened_s + self.ttl_s - lease.expires_s)

    @property
    def heartbeat_interval_s(self) -> float:
        """How often each worker is to send a heartbeat, in seconds: several times within its lease."""
        longest_s = self.ttl_s / _BEATS_IN_A_LEASE
        return min(longest_s, report_interval_s(len(self._workers), _SHORTEST_INTERVAL_S))

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when a worker attached or was lost, or after the timeout."""
        await self._changed.wait(timeout_s)

    async def require(
        self,
        kind: controller_pb2.WorkerKind.ValueType,
        what: str,
        deadline_s: float,
        suits: Callable[[AttachedWorker], bool],
    ) -> Sequence[AttachedWorker]:
        """Wait until a worker of a kind that suits is attached; return all of them. `TimeoutError` says `what` was
        waited for."""
        end = time.monotonic() + deadline_s
        while not (found := [worker for worker in self.alive(kind) if suits(worker)]):
            left = end - time.monotonic()
            if left <= 0:
                others = ", ".join(worker.worker_id for worker in self.everyone()) or "no worker"
                raise TimeoutError(f"waited {deadline_s:g} s for {what}; attached: {others}")
            await self.wait_for_change(min(left, 1.0))
        return found

    def _remove(self, worker_id: str) -> AttachedWorker | None:
        worker = self._workers.pop(worker_id, None)
        if worker is not None:
            self._forget(worker)
            worker.lost.set()
            self._lost[worker_id] = worker
            self._times_lost[worker_id] += 1
        return worker

    def _forget(self, worker: AttachedWorker) -> None:
        kind, address = worker.registration.kind, worker.registration.address
        del self._by_kind[kind][worker.worker_id]
        self._by_name.pop(kind, None)
        del self._by_address[address][worker.worker_id]
        if not self._by_address[address]:
            del self._by_address[address]
