"""Drills: the same for the same seed, and able to hit everything in every way."""

from __future__ import annotations

import itertools

import pytest

from miles.launcher.drill.schedule import ChaosSchedule, Strike

SERVICES = ["redis", "controller", "rollout-0", "trainer-0"]


def strikes(seed: int, count: int, services: list[str] = SERVICES) -> list[Strike]:
    schedule = ChaosSchedule(seed, services, 10.0)
    return [schedule.next() for _ in range(count)]


def test_a_seed_fixes_the_schedule() -> None:
    assert strikes(3, 20) == strikes(3, 20, SERVICES[::-1])
    assert strikes(3, 20) != strikes(4, 20)


def test_every_service_is_hit_alone_and_all_are_hit_at_once() -> None:
    blows = list(itertools.chain.from_iterable(strike.blows for strike in strikes(0, 200)))
    alone = {blow.victims[0] for blow in blows if len(blow.victims) == 1}
    assert alone == set(SERVICES)
    assert any(set(blow.victims) == set(SERVICES) for blow in blows)
    assert any(1 < len(blow.victims) < len(SERVICES) for blow in blows)


def test_a_service_is_hit_once_a_blow_and_only_services_are() -> None:
    for strike in strikes(1, 200):
        for blow in strike.blows:
            assert blow.victims
            assert len(set(blow.victims)) == len(blow.victims)
            assert set(blow.victims) <= set(SERVICES)


def test_pauses_have_the_mean_that_was_asked_for() -> None:
    pauses = [strike.pause_s for strike in strikes(2, 5000)]
    assert max(pauses) <= 30.0
    # An exponential of mean 10 that is cut at 30.
    assert sum(pauses) / len(pauses) == pytest.approx(9.5, abs=0.5)


def test_later_blows_follow_while_the_first_is_mended() -> None:
    found = [strike for strike in strikes(5, 100) if len(strike.blows) > 1]
    assert found
    assert all(strike.blows[0].after_s == 0.0 for strike in found)
    assert all(0 <= blow.after_s <= 3.0 for strike in found for blow in strike.blows[1:])
