"""Which prompt groups may run, which are done, and which the trainer takes next: a pure state machine.

No I/O and no clock. The controller feeds it what happened and carries out what it returns.

A group's life: admitted -> leased -> accepted (queued) -> in training -> consumed, or -> dropped by a filter. A group
whose lease ends without a result is leased again before anything new is admitted.

Versions are counted in training steps, so step t trains the weights of version t. Three rules keep every sample that
is trained on at most `max_staleness` versions old, and waste nothing that was generated:

- **Admit.** A group is begun at version v only while `accepted + running < (max_staleness + v + 1) * batch_size`, with
  everything ever accepted and everything begun and not finished. Its deadline, the last step that may train on it, is
  `v + max_staleness`. So at every moment the groups at hand fit into the steps before their deadlines, taken in order
  of deadline (earliest deadline first is optimal: Jackson 1955; Horn 1974, theorem 2).
- **Overtake.** A step takes the finished groups with the earliest deadlines, and may leave behind a group that is not
  finished as long as those left behind still fit before their deadlines. With `max_staleness` 0 it never may: the steps
  are those of a synchronous run, whatever order groups finish in.
- **Delay.** After a resume from an older checkpoint, a group that was lost with its worker is begun again only when the
  version is back to where its place in the order of groups allows it; so a resume causes no burst of early groups, and
  a synchronous run generates each group with the weights it would have had.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from miles.services.controller.run.group_leases import GroupLease, GroupLeases


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """What one training step consumes."""

    group_ids: tuple[int, ...]
    """Groups to train on, ascending."""
    dropped: tuple[int, ...]
    """Groups dropped since the last step, ascending: the step's checkpoint accounts for them too."""
    staleness: tuple[int, ...]
    """For each group, versions between its oldest token and the weights that are trained on it."""


@dataclasses.dataclass(slots=True)
class Admission:
    """State of one job's prompt groups."""

    batch_size: int
    """Groups per training step."""
    max_staleness: int
    """Versions that may pass between a group's first token and its training step."""
    total_groups: int
    """Groups the job trains on in all."""
    window: int = 0
    """Groups begun and not trained on yet, at most; 0 means as many as the staleness bound allows."""
    version: int = 0
    """Active policy version."""
    next_id: int = 0
    """Smallest id never admitted."""
    consumed: int = 0
    """Groups trained on so far."""
    first_attempt: int = 1
    """Number of a group's first lease; a later life of the controller chooses a higher one."""
    leases: GroupLeases = dataclasses.field(default_factory=GroupLeases)
    """Admitted, being generated."""
    ready: dict[int, int] = dataclasses.field(default_factory=dict)
    """Accepted, not yet in training: group id -> oldest version among its tokens."""
    training: frozenset[int] = frozenset()
    """Handed to the trainer, not yet consumed."""
    dropped: set[int] = dataclasses.field(default_factory=set)
    """Dropped, and not yet accounted for by a training step."""
    _pending: list[int] = dataclasses.field(default_factory=list)
    """A heap: admitted and not leased; leased before anything new is admitted."""
    _not_before: dict[int, int] = dataclasses.field(default_factory=dict)
    """Version before which a pending group must not be begun, for groups that are delayed."""
    _deadlines: dict[int, int] = dataclasses.field(default_factory=dict)
    """Last step that may train on a group, for every group admitted and not in training."""
    _unfinished: Counter[int] = dataclasses.field(default_factory=Counter)
    """Groups pending or leased, by deadline."""
    _finished: Counter[int] = dataclasses.field(default_factory=Counter)
    """Groups ready, by deadline."""
    _attempts: dict[int, int] = dataclasses.field(default_factory=dict)
    """Number of each unfinished group's last lease."""

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
        ready: Mapping[int, int],
        dropped: Collection[int] = (),
        leases: Mapping[int, GroupLease] | None = None,
        window: int = 0,
        first_attempt: int = 1,
    ) -> Admission:
        """Return the state after a (re)start, from what the trainer has consumed and what lies in the queue.

        `version` is the number of steps that the trainer's checkpoint covers; `ready` and `dropped` are what the queue
        knows, and `leases` what live workers still run. What the checkpoint covers is left out of all three. Other
        ids were lost with their worker; they are begun again, in order.
        """
        done = set(consumed_ids)
        left = {g: oldest for g, oldest in ready.items() if g >= consumed_below and g not in done}
        dropped_ids = {g for g in dropped if g >= consumed_below and g not in done}
        known = done | left.keys() | dropped_ids
        leased = {g: lease for g, lease in (leases or {}).items() if g >= consumed_below and g not in known}
        admission = cls(
            batch_size=batch_size,
            max_staleness=max_staleness,
            total_groups=total_groups,
            window=window,
            version=version,
            next_id=max([consumed_below, *(g + 1 for g in known | leased.keys())]),
            consumed=version * batch_size,
            first_attempt=first_attempt,
            dropped=dropped_ids,
        )
        rank = admission.consumed
        for group_id in range(consumed_below, admission.next_id):
            if group_id in left:
                admission.ready[group_id] = left[group_id]
                # Where it stands in the order of groups gives a deadline that always holds; its tokens may give more.
                deadline = max(rank // batch_size, left[group_id] + max_staleness)
                admission._deadlines[group_id] = deadline
                admission._finished[deadline] += 1
            elif group_id in leased:
                admission.leases.begin(group_id, leased[group_id])
                admission._attempts[group_id] = leased[group_id].attempt
                admission._set_deadline(group_id, rank // batch_size)
            elif group_id not in known:
                step = rank // batch_size
                admission._add_pending(group_id, deadline=step)
                if step - max_staleness > version:
                    admission._not_before[group_id] = step - max_staleness
            else:
                continue
            rank += 1
        return admission

    # -- questions ----------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> frozenset[int]:
        """Groups admitted and not leased."""
        return frozenset(self._pending)

    @property
    def running(self) -> int:
        """Groups admitted and not finished."""
        return len(self._pending) + len(self.leases)

    @property
    def accepted(self) -> int:
        """Groups ever accepted."""
        return self.consumed + len(self.training) + len(self.ready)

    @property
    def step(self) -> int:
        """The next training step, which is the version of the weights it trains."""
        return self.consumed // self.batch_size

    # -- leases -------------------------------------------------------------------------------------------------------

    def lease(self, worker_id: str) -> tuple[int, int] | None:
        """Lease the next group to a worker: (group id, attempt), or None while the rules forbid it."""
        if self._pending:
            if self._not_before and self._not_before.get(self._pending[0], 0) > self.version:
                return None  # later ids have to wait for as long or longer
            group_id = heapq.heappop(self._pending)
            self._not_before.pop(group_id, None)
        elif self._may_admit():
            group_id = self.next_id
            self.next_id += 1
            self._set_deadline(group_id, self.version + self.max_staleness)
        else:
            return None
        attempt = self._attempts.get(group_id, self.first_attempt - 1) + 1
        self._attempts[group_id] = attempt
        self.leases.begin(group_id, GroupLease(worker_id, attempt))
        return group_id, attempt

    def _may_admit(self) -> bool:
        ahead = self.accepted + self.running
        bound = min((self.max_staleness + self.version + 1) * self.batch_size, self.total_groups)
        return ahead < bound and (not self.window or ahead < self.consumed + self.window)

    def accept(self, group_id: int, attempt: int, oldest_version: int) -> bool:
        """Take in a group that is queued; return False for a result of an older lease, which must be ignored."""
        if not self.leases.end(group_id, attempt):
            return False
        self._attempts.pop(group_id, None)
        deadline = self._deadlines[group_id]
        self._unfinished[deadline] -= 1
        # The engine may have been ahead of what this side knew when the group was leased.
        deadline = self._deadlines[group_id] = max(deadline, oldest_version + self.max_staleness)
        self._finished[deadline] += 1
        self.ready[group_id] = oldest_version
        return True

    def drop(self, group_id: int, attempt: int) -> bool:
        """Drop a group for good, for a filter or after failures. False as for `accept`."""
        if not self.leases.end(group_id, attempt):
            return False
        self._attempts.pop(group_id, None)
        self._unfinished[self._deadlines.pop(group_id)] -= 1
        self.dropped.add(group_id)
        return True

    def requeue(self, group_id: int, attempt: int) -> bool:
        """End a lease without a result; the group will be leased again. False as for `accept`."""
        if not self.leases.end(group_id, attempt):
            return False
        heapq.heappush(self._pending, group_id)
        return True

    def lose_worker(self, worker_id: str) -> list[int]:
        """End every lease of a lost worker and return the ids of its groups, which will be leased again."""
        lost = self.leases.lose_worker(worker_id)
        for group_id in lost:
            heapq.heappush(self._pending, group_id)
        return lost

    # -- training -----------------------------------------------------------------------------------------------------

    @property
    def may_begin_step(self) -> bool:
        """Whether enough groups are finished for a step, and none is under way; takes no time."""
        return not self.training and len(self.ready) >= self.batch_size

    def begin_step(self) -> Batch | None:
        """Return the next step's groups for the trainer, or None while it has to wait for one of them."""
        if not self.may_begin_step or not self._may_leave_unfinished_behind():
            return None
        earliest = heapq.nsmallest(
            self.batch_size, self.ready, key=lambda group_id: (self._deadlines[group_id], group_id)
        )
        group_ids = tuple(sorted(earliest))
        staleness = tuple(max(0, self.step - self.ready.pop(group_id)) for group_id in group_ids)
        for group_id in group_ids:
            self._finished[self._deadlines.pop(group_id)] -= 1
        self.training = frozenset(group_ids)
        return Batch(group_ids, tuple(sorted(self.dropped)), staleness)

    def _may_leave_unfinished_behind(self) -> bool:
        """Return whether unfinished groups stay in time after a step on the finished ones with the earliest deadlines.

        Only unfinished groups count: waiting for them helps, and waiting for finished ones does not.
        """
        taken, ahead, following = self.batch_size, 0, self.step + 1
        for deadline in sorted(self._unfinished.keys() | self._finished.keys()):
            finished = self._finished[deadline]
            now = min(taken, finished)
            taken -= now
            ahead += finished - now + self._unfinished[deadline]
            if self._unfinished[deadline] and following + (ahead - 1) // self.batch_size > deadline:
                return False
        return True

    def finish_step(self, batch: Batch) -> None:
        """The trainer has consumed a batch."""
        self.consumed += len(batch.group_ids)
        self.training = frozenset()
        self.dropped.difference_update(batch.dropped)
        for counts in (self._unfinished, self._finished):
            for deadline in [deadline for deadline, count in counts.items() if not count]:
                del counts[deadline]

    def activate(self, version: int) -> None:
        """Every engine serves this version from now on."""
        self.version = version

    # -- bookkeeping --------------------------------------------------------------------------------------------------

    def _add_pending(self, group_id: int, deadline: int) -> None:
        heapq.heappush(self._pending, group_id)
        self._set_deadline(group_id, deadline)

    def _set_deadline(self, group_id: int, deadline: int) -> None:
        self._deadlines[group_id] = deadline
        self._unfinished[deadline] += 1
