"""Kill schedules: the same for the same seed, and able to hit every service in every way."""

from __future__ import annotations

import itertools

import pytest

from miles.launcher.drill.schedule import ChaosSchedule, KillRound

SERVICES = ["redis", "controller", "rollout-0", "trainer-0"]


def rounds(seed: int, count: int, services: list[str] = SERVICES) -> list[KillRound]:
    schedule = ChaosSchedule(seed, services, 10.0)
    return [schedule.next() for _ in range(count)]


def test_a_seed_fixes_the_schedule() -> None:
    assert rounds(3, 20) == rounds(3, 20, SERVICES[::-1])
    assert rounds(3, 20) != rounds(4, 20)


def test_every_service_is_hit_alone_and_all_are_hit_at_once() -> None:
    kills = list(itertools.chain.from_iterable(kill_round.kills for kill_round in rounds(0, 200)))
    alone = {kill.victims[0] for kill in kills if len(kill.victims) == 1}
    assert alone == set(SERVICES)
    assert any(set(kill.victims) == set(SERVICES) for kill in kills)
    assert any(1 < len(kill.victims) < len(SERVICES) for kill in kills)


def test_a_service_is_hit_once_a_kill_and_only_services_are() -> None:
    for kill_round in rounds(1, 200):
        for kill in kill_round.kills:
            assert kill.victims
            assert len(set(kill.victims)) == len(kill.victims)
            assert set(kill.victims) <= set(SERVICES)


def test_pauses_have_the_mean_that_was_asked_for() -> None:
    pauses = [kill_round.pause_s for kill_round in rounds(2, 5000)]
    assert max(pauses) <= 30.0
    # An exponential of mean 10 that is cut at 30.
    assert sum(pauses) / len(pauses) == pytest.approx(9.5, abs=0.5)


def test_later_kills_follow_while_the_first_is_mended() -> None:
    found = [kill_round for kill_round in rounds(5, 100) if len(kill_round.kills) > 1]
    assert found
    assert all(kill_round.kills[0].after_s == 0.0 for kill_round in found)
    assert all(0 <= kill.after_s <= 3.0 for kill_round in found for kill in kill_round.kills[1:])
