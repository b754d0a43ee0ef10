"""What admission promises, under random interleavings of workers, trainer, queue, and crashes of each."""

from __future__ import annotations

import random

import pytest
from admission_world import World
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

OUTCOMES = ["finish", "finish", "finish", "drop", "requeue", "forget"]


class Run(RuleBasedStateMachine):
    """Hypothesis chooses what happens next."""

    world: World | None = None

    @initialize(
        batch_size=st.integers(1, 3), max_staleness=st.integers(0, 3), steps=st.integers(1, 6), narrow=st.integers(0, 3)
    )
    def begin(self, batch_size: int, max_staleness: int, steps: int, narrow: int) -> None:
        self.world = World(batch_size, max_staleness, steps, narrow)

    @rule(worker=st.sampled_from("abc"), ahead=st.booleans())
    def lease(self, worker: str, ahead: bool) -> None:
        self.world.lease(worker, ahead)

    @precondition(lambda self: self.world.admission.leases)
    @rule(data=st.data(), what=st.sampled_from(OUTCOMES))
    def end_lease(self, data: st.DataObject, what: str) -> None:
        self.world.end_lease(data.draw(st.sampled_from(sorted(self.world.admission.leases))), what)

    @rule(ahead=st.booleans(), straggler=st.integers(0, 8))
    def work_on_all_but_one(self, ahead: bool, straggler: int) -> None:
        self.world.work_on_all_but(straggler, ahead)

    @rule(worker=st.sampled_from("abc"), put_first=st.booleans())
    def lose_worker(self, worker: str, put_first: bool) -> None:
        self.world.lose_worker(worker, put_first)

    @rule()
    def begin_step(self) -> None:
        self.world.begin_step()

    @rule()
    def finish_step(self) -> None:
        self.world.finish_step()

    @rule()
    def publish(self) -> None:
        self.world.publish()

    @rule()
    def save(self) -> None:
        self.world.save()

    @rule(trainer_too=st.booleans(), rollouts_too=st.booleans(), queue_loses=st.integers(0, 1))
    def restart(self, trainer_too: bool, rollouts_too: bool, queue_loses: int) -> None:
        self.world.restart(trainer_too, rollouts_too, queue_loses)

    @invariant()
    def promises_hold(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        if self.world is not None:
            self.world.end()


TestRun = Run.TestCase
TestRun.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(60))
def test_long_random_walks_keep_every_promise(seed: int) -> None:
    """Longer than what hypothesis draws: several checkpoints, and crashes far behind the newest step."""
    rng = random.Random(seed)
    world = World(rng.randint(1, 4), rng.randint(0, 4), rng.randint(5, 30), rng.choice([0, 0, 1, 3]))

    def end_a_lease() -> None:
        if world.admission.leases:
            world.end_lease(rng.choice(sorted(world.admission.leases)), rng.choice(OUTCOMES))

    actions = {
        lambda: world.lease(rng.choice("abc"), rng.random() < 0.3): 10,
        end_a_lease: 10,
        lambda: world.work_on_all_but(rng.randint(0, 8), rng.random() < 0.3): 3,
        lambda: world.lose_worker(rng.choice("abc"), rng.random() < 0.5): 1,
        world.begin_step: 6,
        world.finish_step: 6,
        world.publish: 4,
        world.save: 1,
        lambda: world.restart(rng.random() < 0.5, rng.random() < 0.5, rng.randint(0, 2)): 0.5,
    }
    for action in rng.choices(list(actions), weights=list(actions.values()), k=400):
        action()
        world.check()
    world.end()
