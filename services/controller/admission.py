"""Which prompt groups may run, which are done, and which the trainer takes next: a pure state machine.

No I/O and no clock. The controller feeds it what happened and carries out what it returns.

A group's life: admitted -> leased -> accepted (queued) -> consumed (trained on), or -> dropped by a filter; a lease
that comes back unfinished is leased again before anything new is admitted.

Two rules keep every trained sample at most `max_staleness` versions old:

- a group is admitted only while `accepted + running < (max_staleness + policy_version + 1) * rollout_batch_size`
  (accepted counts every group ever accepted, running those admitted and not finished);
- training step v takes the `rollout_batch_size` smallest ids that are still to be trained on, and waits for them.

The first bounds how many groups are ahead of a newly admitted one, the second lets none overtake it, so it is trained
on at most `max_staleness` steps after its admission.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    """A group in the hands of a worker."""

    worker_id: str
    attempt: int


@dataclasses.dataclass(slots=True)
class Admission:
    """State of one job's prompt groups."""

    batch_size: int
    """Groups per training step."""
    max_staleness: int
    """Versions that may pass between a group's admission and its training step."""
    total_groups: int
    """Groups the job trains on in all."""
    version: int = 0
    """Active policy version."""
    next_id: int = 0
    """Smallest id never admitted."""
    consumed: int = 0
    """Groups trained on so far."""
    pending: set[int] = dataclasses.field(default_factory=set)
    """Admitted, in nobody's hands: leased before anything new is admitted."""
    leases: dict[int, Lease] = dataclasses.field(default_factory=dict)
    """Admitted, being generated."""
    ready: dict[int, int] = dataclasses.field(default_factory=dict)
    """Accepted, not yet trained on: group id -> oldest version among its tokens."""
    dropped: set[int] = dataclasses.field(default_factory=set)
    """Dropped since the last training step."""
    attempts: dict[int, int] = dataclasses.field(default_factory=dict)
    """How often each unfinished group was leased."""

    @classmethod
    def resume(
        cls,
        *,
        batch_size: int,
        max_staleness: int,
        total_groups: int,
        version: int,
        consumed_below: int,
        consumed_ids: Iterable[int],
        ready: dict[int, int],
    ) -> Admission:
        """State after a (re)start, from what the trainer has consumed and what lies in the queue.

        Ids between the two that are in neither were lost with their worker; they are admitted again, in order.
        """
        done = set(consumed_ids)
        unconsumed = {group: oldest for group, oldest in ready.items() if group >= consumed_below and group not in done}
        next_id = max([consumed_below, *(i + 1 for i in done), *(i + 1 for i in unconsumed)])
        known = done | unconsumed.keys()
        return cls(
            batch_size=batch_size,
            max_staleness=max_staleness,
            total_groups=total_groups,
            version=version,
            next_id=next_id,
            consumed=version * batch_size,
            pending={group for group in range(consumed_below, next_id) if group not in known},
            ready=unconsumed,
        )

    @property
    def running(self) -> int:
        """Groups admitted and not finished."""
        return len(self.pending) + len(self.leases)

    @property
    def accepted(self) -> int:
        """Groups ever accepted."""
        return self.consumed + len(self.ready)

    def lease(self, worker_id: str) -> tuple[int, int] | None:
        """Give the next group to a worker: (group id, attempt), or None while the staleness bound forbids it."""
        if self.pending:
            group_id = min(self.pending)
            self.pending.remove(group_id)
        elif self._may_admit():
            group_id = self.next_id
            self.next_id += 1
        else:
            return None
        attempt = self.attempts.get(group_id, 0) + 1
        self.attempts[group_id] = attempt
        self.leases[group_id] = Lease(worker_id, attempt)
        return group_id, attempt

    def _may_admit(self) -> bool:
        ahead = self.accepted + self.running
        return ahead < min((self.max_staleness + self.version + 1) * self.batch_size, self.total_groups)

    def accept(self, group_id: int, attempt: int, oldest_version: int) -> bool:
        """The group is in the queue. False: the result is not from the current lease and must be ignored."""
        if not self._end_lease(group_id, attempt):
            return False
        self.attempts.pop(group_id, None)
        self.ready[group_id] = oldest_version
        return True

    def drop(self, group_id: int, attempt: int) -> bool:
        """A filter or the failure policy removed the group for good. False as for `accept`."""
        if not self._end_lease(group_id, attempt):
            return False
        self.attempts.pop(group_id, None)
        self.dropped.add(group_id)
        return True

    def give_back(self, group_id: int, attempt: int) -> bool:
        """The lease ended without a result; the group will be leased again. False as for `accept`."""
        if not self._end_lease(group_id, attempt):
            return False
        self.pending.add(group_id)
        return True

    def lose_worker(self, worker_id: str) -> list[int]:
        """Take back every group of a worker that is gone; return their ids."""
        lost = [group_id for group_id, lease in self.leases.items() if lease.worker_id == worker_id]
        for group_id in lost:
            del self.leases[group_id]
            self.pending.add(group_id)
        return lost

    def _end_lease(self, group_id: int, attempt: int) -> bool:
        lease = self.leases.get(group_id)
        if lease is None or lease.attempt != attempt:
            return False
        del self.leases[group_id]
        return True

    def next_batch(self) -> list[int] | None:
        """The groups of the next training step in ascending order, or None while one of them is not accepted yet."""
        if len(self.ready) < self.batch_size:
            return None
        batch = sorted(self.ready)[: self.batch_size]
        unfinished = min([*self.pending, *self.leases], default=None)
        if unfinished is not None and unfinished < batch[-1]:
            return None
        return batch

    def train(self, group_ids: Iterable[int]) -> set[int]:
        """A step trained on these groups; return the groups dropped since the last one, which it accounts for too."""
        for group_id in group_ids:
            del self.ready[group_id]
            self.consumed += 1
        dropped, self.dropped = self.dropped, set()
        return dropped

    def activate(self, version: int) -> None:
        """Every engine serves this version from now on."""
        self.version = version

    def staleness(self, group_ids: Iterable[int]) -> list[int]:
        """Versions between each accepted group's oldest token and the policy it will train."""
        return [max(0, self.version - self.ready[group_id]) for group_id in group_ids]
