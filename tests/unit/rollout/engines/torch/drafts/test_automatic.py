"""Drafts are on where they pay and off where they do not, by what steps measure: on an engine of made-up speed."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from miles.services.rollout.engines.torch.drafts.acceptance import Acceptance
from miles.services.rollout.engines.torch.drafts.automatic import INTERVAL, Automatic, Measured


@dataclasses.dataclass
class Engine:
    """Requests that decode; a draft lengthens a step by `cost` of it, and is accepted with `rate` behind another."""

    cost: float
    rate: float
    noise: float = 0.0
    random: random.Random = dataclasses.field(default_factory=lambda: random.Random(0))
    seconds: float = 0.0
    tokens: int = 0
    drafted: int = 0
    """Steps with drafts."""

    def step(self, automatic: Automatic, requests: int) -> int:
        steps = automatic.steps(requests)
        accepted = []
        for _ in range(requests):
            kept = 0
            while kept < steps and self.random.random() < self.rate:
                kept += 1
            accepted.append(kept)
        seconds = (1 + self.cost * steps) * (1 + self.random.uniform(-self.noise, self.noise))
        automatic.note(Measured(steps, seconds, [steps] * requests, accepted))
        self.seconds += seconds
        self.tokens += requests + sum(accepted)
        self.drafted += steps > 0
        return steps

    def run(self, automatic: Automatic, count: int, requests: int = 16) -> list[int]:
        return [self.step(automatic, requests) for _ in range(count)]


@pytest.mark.parametrize("requests", [1, 3, 16, 100])
def test_drafts_that_do_not_pay_are_turned_off_and_hardly_tried(requests: int) -> None:
    automatic = Automatic(4)
    engine = Engine(cost=0.4, rate=0.05)
    engine.run(automatic, 200, requests)
    assert automatic.decided_steps == 0
    assert 0 < automatic.speedup < 0.9
    assert "do not pay" in automatic.reason
    before = engine.seconds
    engine.run(automatic, 4000, requests)
    assert engine.seconds - before < 4000 * 1.06


def test_drafts_that_pay_stay_on_at_the_configured_steps() -> None:
    automatic = Automatic(3)
    engine = Engine(cost=0.05, rate=0.8)
    steps = engine.run(automatic, 4000)
    assert automatic.decided_steps == 3
    assert automatic.reason == ""
    assert automatic.speedup == pytest.approx((1 + 0.8 + 0.64 + 0.512) / 1.15, rel=0.1)
    assert steps.count(0) < 4000 * 0.06
    assert set(steps) == {0, 3}


def test_drafts_that_have_become_better_are_turned_on_again() -> None:
    automatic = Automatic(4)
    engine = Engine(cost=0.2, rate=0.0)
    engine.run(automatic, 1000)
    assert automatic.decided_steps == 0
    engine.rate = 0.9
    automatic.versions_changed()
    engine.run(automatic, (INTERVAL + 4) * 8)
    assert automatic.decided_steps > 0
    assert automatic.speedup > 1.5


def test_without_a_new_version_they_are_tried_again_too() -> None:
    automatic = Automatic(4)
    engine = Engine(cost=0.2, rate=0.0)
    engine.run(automatic, 5000)
    engine.rate = 0.9
    engine.run(automatic, 8000)
    assert automatic.decided_steps > 0


def test_drafts_that_have_become_worse_are_turned_off() -> None:
    automatic = Automatic(4)
    engine = Engine(cost=0.2, rate=0.9)
    engine.run(automatic, 1000)
    assert automatic.decided_steps == 4
    engine.rate = 0.0
    automatic.versions_changed()
    engine.run(automatic, 600)
    assert automatic.decided_steps == 0


@pytest.mark.parametrize(("cost", "rate", "least", "most"), [(0.3, 0.6, 1, 2), (0.1, 0.7, 2, 5), (0.01, 0.95, 7, 7)])
def test_steps_follow_what_is_accepted_within_their_bound(cost: float, rate: float, least: int, most: int) -> None:
    automatic = Automatic(7)
    engine = Engine(cost=cost, rate=rate)
    steps = engine.run(automatic, 3000)
    assert least <= automatic.decided_steps <= most
    assert max(steps) <= 7
    assert (automatic.reason == "") == (automatic.decided_steps == 7)


def test_each_batch_size_has_a_decision_of_its_own() -> None:
    """A small batch leaves room for drafts, a large one does not."""
    automatic = Automatic(4)
    small, large = Engine(cost=0.05, rate=0.7), Engine(cost=0.9, rate=0.7)
    for _ in range(30):
        small.run(automatic, 40, 2)
        large.run(automatic, 40, 64)
    assert automatic.decided_steps == 0
    small.run(automatic, 1, 2)
    assert automatic.decided_steps > 0
    assert automatic.steps(1) > 0, "sizes that were never seen follow the nearest"
    assert automatic.steps(500) == 0


@pytest.mark.parametrize("seed", range(4))
def test_noise_does_not_turn_drafts_on_and_off(seed: int) -> None:
    """Drafts that neither pay nor cost, measured with noise: decisions are few, and none costs much."""
    automatic = Automatic(2)
    engine = Engine(cost=0.25, rate=0.4, noise=0.2, random=random.Random(seed))
    decisions = []
    for _ in range(20_000):
        engine.step(automatic, 8)
        decisions.append(automatic.decided_steps > 0)
    changes = sum(before != after for before, after in itertools.pairwise(decisions))
    assert changes <= 12
    assert engine.tokens / engine.seconds > 8 * 0.97


def test_one_slow_step_decides_nothing() -> None:
    automatic = Automatic(3)
    engine = Engine(cost=0.05, rate=0.5)
    for _ in range(3000):
        if engine.random.random() < 0.02:
            automatic.note(Measured(automatic.steps(8), 50.0, [automatic.steps(8)] * 8, [0] * 8))
        engine.step(automatic, 8)
        assert automatic.decided_steps > 0


def test_reading_the_decision_changes_nothing() -> None:
    automatic = Automatic(3)
    assert (automatic.decided_steps, automatic.reason, automatic.speedup) == (3, "", 0.0)


def test_acceptance_of_positions_that_were_not_tried_goes_on_as_before() -> None:
    acceptance = Acceptance()
    acceptance.note(4, [2, 2, 2, 2], [2, 1, 1, 0])
    assert acceptance.drafts(2) == pytest.approx(2)
    assert acceptance.tokens(2) == pytest.approx(1 + 3 / 4 + 1 / 4)
    assert acceptance.tokens(3) == pytest.approx(2 + 1 / 12)
    assert acceptance.best_steps(4, cost=0.0) == 4
    assert acceptance.best_steps(4, cost=0.3) == 1
    acceptance.forget()
    assert acceptance.tokens(4) == 1
