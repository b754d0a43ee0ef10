"""A model of everything around admission: engines with half-finished groups, a queue, a trainer that saves."""

from __future__ import annotations

from miles.services.controller.run.admission import Admission, Batch


class World:
    """Drives an admission and asserts its promises at every turn. Tokens are modelled by the versions they are of."""

    def __init__(self, batch_size: int, max_staleness: int, steps: int, narrow: int) -> None:
        """`narrow`: by how many groups the window is smaller than the staleness bound allows; 0 leaves it out."""
        window = max(batch_size, batch_size * (max_staleness + 1) - narrow) if narrow else 0
        self.shape = {
            "batch_size": batch_size,
            "max_staleness": max_staleness,
            "total_groups": batch_size * steps,
            "window": window,
        }
        self.admission = Admission(**self.shape)
        self.lives = 0
        self.held: dict[int, tuple[int, int]] = {}
        """Leased groups: versions of their oldest and newest token."""
        self.kept: dict[int, tuple[int, int]] = {}
        """Half-finished groups in the store."""
        self.queue: dict[int, int] = {}
        """Finished groups: version of the oldest token."""
        self.tombstones: set[int] = set()
        self.steps: list[tuple[int, ...]] = []
        self.covered: list[tuple[int, ...]] = []
        """Dropped groups that each step accounted for."""
        self.saved = 0
        self.batch: Batch | None = None

    # -- workers ------------------------------------------------------------------------------------------------------

    def lease(self, worker: str, ahead: bool) -> bool:
        """A worker asks for a group; its engine may be `ahead`, serving what is being activated already."""
        given = self.admission.lease(worker)
        if given is None:
            return False
        assert self._rank(given[0]) < self._bound(), "begun before its turn"
        version = min(self.admission.version + ahead, self.admission.step)
        oldest, newest = self.kept.get(given[0], (version, version))
        if newest > self.admission.step:
            oldest = version  # what is kept is of weights that were rolled back
        self.held[given[0]] = (oldest, version)
        return True

    def _rank(self, group_id: int) -> int:
        """Groups trained on before it if all were trained on in order."""
        at_hand = {*self.admission.pending, *self.admission.leases, *self.admission.ready, *self.admission.training}
        return self.admission.consumed + sum(other < group_id for other in at_hand)

    def _bound(self) -> int:
        return (self.admission.max_staleness + self.admission.version + 1) * self.admission.batch_size

    def end_lease(self, group_id: int, what: str) -> None:
        """A lease ends: finish, drop, requeue (keeping what there is) or forget (nothing is kept)."""
        attempt = self.admission.leases[group_id].attempt
        oldest, _ = self.held.pop(group_id)
        if what == "finish":
            self.queue.setdefault(group_id, oldest)
            assert self.admission.accept(group_id, attempt, self.queue[group_id])
        elif what == "drop":
            self.tombstones.add(group_id)
            assert self.admission.drop(group_id, attempt)
        else:
            if what == "requeue":
                self.kept[group_id] = (oldest, self.admission.version)
            assert self.admission.requeue(group_id, attempt)
        assert not self.admission.accept(group_id, attempt, 0)
        assert not self.admission.drop(group_id, attempt)
        assert not self.admission.requeue(group_id, attempt)

    def work_on_all_but(self, straggler: int, ahead: bool) -> None:
        """Lease what may be leased and finish it all, but for one group."""
        while self.lease("b", ahead):
            pass
        for i, group_id in enumerate(sorted(self.admission.leases)):
            if i != straggler:
                self.end_lease(group_id, "finish")

    def lose_worker(self, worker: str, put_first: bool) -> None:
        """A worker dies; its first group may have been queued without anybody hearing of it."""
        for i, group_id in enumerate(self.admission.lose_worker(worker)):
            oldest, _ = self.held.pop(group_id)
            if put_first and i == 0:
                self.queue.setdefault(group_id, oldest)

    # -- trainer ------------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """The trainer takes a batch, if there is one."""
        if self.batch is not None:
            return
        self.batch = batch = self.admission.begin_step()
        if batch is None:
            return
        step = len(self.steps)
        assert self.admission.step == step
        assert len(batch.group_ids) == self.admission.batch_size
        assert list(batch.group_ids) == sorted(batch.group_ids)
        for group_id, staleness in zip(batch.group_ids, batch.staleness, strict=True):
            assert staleness == max(0, step - self.queue[group_id])
            assert staleness <= self.admission.max_staleness

    def finish_step(self) -> None:
        """The trainer has trained on it."""
        if self.batch is None:
            return
        self.admission.finish_step(self.batch)
        self.steps.append(self.batch.group_ids)
        self.covered.append(self.batch.dropped)
        self.batch = None

    def publish(self) -> None:
        """The trainer's weights become the active version."""
        self.admission.activate(self.admission.step)

    def save(self) -> None:
        """A checkpoint; what it covers leaves the queue."""
        self.saved = len(self.steps)
        for group_id in self._done():
            self.queue.pop(group_id, None)
            self.tombstones.discard(group_id)

    # -- crashes ------------------------------------------------------------------------------------------------------

    def restart(self, trainer_too: bool, rollouts_too: bool, queue_loses: int) -> None:
        """The controller comes back; trainer and rollouts may have been killed with it, the queue lost its newest."""
        if not rollouts_too:
            self.kept |= self.held
        self.held.clear()
        if not trainer_too:
            self.finish_step()  # a trainer goes on with its step when nobody listens any more
        self.batch = None
        if trainer_too:
            del self.steps[self.saved :], self.covered[self.saved :]
            for group_id in sorted(self.queue)[max(0, len(self.queue) - queue_loses) :]:
                del self.queue[group_id]
        done = self._done()
        below = next(i for i in range(len(done) + 1) if i not in done)
        self.lives += 1
        self.admission = Admission.resume(
            **self.shape,
            version=len(self.steps),
            consumed_below=below,
            consumed_ids={group_id for group_id in done if group_id > below},
            ready=self.queue,
            dropped=self.tombstones,
            first_attempt=self.lives * 1000 + 1,
        )

    # -- promises -----------------------------------------------------------------------------------------------------

    def _done(self) -> set[int]:
        return {group_id for group_ids in (*self.steps, *self.covered) for group_id in group_ids}

    def check(self) -> None:
        """No group is lost, none is in two places, none is trained on twice."""
        admission = self.admission
        trained = [group_id for group_ids in self.steps for group_id in group_ids]
        assert len(trained) == len(set(trained))
        places = [admission.pending, admission.leases, admission.ready, admission.training, admission.dropped]
        everywhere = [group_id for place in places for group_id in place]
        assert len(everywhere) == len(set(everywhere))
        if self.batch is None:
            assert set(everywhere).isdisjoint(self._done())
        assert set(everywhere) | self._done() == set(range(admission.next_id))

    def end(self) -> None:
        """Whatever happened, finishing every lease and publishing every step finishes the job."""
        for _ in range(10_000):
            self.finish_step()
            if self.admission.consumed == self.admission.total_groups:
                return
            self.publish()
            self.work_on_all_but(-1, ahead=False)
            self.begin_step()
        raise AssertionError(f"the job never ends: {self.admission}")
