"""When people are told of a wait, and in which words."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from miles.services.controller.status.waits import Wait, WaitLog, merged, sentence, wait_from_proto

REWARD = Wait("reward service 'mine' at host:1", "Connection refused", 1000.0, 180.0, "its group is retried", 12)


def told(log: WaitLog, waits: list[Wait], now_s: float) -> list[str]:
    log.note(waits, now_s)
    return list(log.news(now_s))


def test_a_wait_is_told_when_it_gets_old_and_again_at_growing_intervals() -> None:
    log, wait = WaitLog(), Wait("a trainer worker to attach", limit_s=300.0, ending="the job fails")
    moments = [second for second in range(300) if told(log, [wait], 1000.0 + second)]
    assert moments == [5, 15, 45, 135]


def test_a_wait_that_belongs_to_the_work_is_told_later() -> None:
    log, wait = WaitLog(), Wait("4 groups", patience_s=60.0)
    assert [second for second in range(100) if told(log, [wait], 1000.0 + second)] == [60]


def test_the_end_of_a_wait_is_told_if_the_wait_was() -> None:
    log = WaitLog()
    told(log, [Wait("a"), Wait("b")], 1000.0)
    told(log, [Wait("a")], 1004.0)
    assert told(log, [Wait("a")], 1006.0) == ["waiting for a for 6 s"]
    assert told(log, [], 1007.0) == ["no longer waiting for a (it took 7 s)"]
    assert told(log, [], 1008.0) == []


def test_a_wait_keeps_its_beginning_while_its_detail_changes() -> None:
    log = WaitLog()
    log.note([Wait("the trainer", "reading")], 1000.0)
    log.note([Wait("the trainer", "building")], 1009.0)
    [wait] = log.waits
    assert (wait.since_s, wait.detail) == (1000.0, "building")
    log.note([], 1010.0)
    log.note([Wait("the trainer")], 1011.0)
    assert log.waits[0].since_s == 1011.0


def test_a_sentence_says_since_when_for_how_many_why_and_how_it_ends() -> None:
    assert sentence(REWARD, 1060.0) == (
        "reward service 'mine' at host:1 for 60 s (12 samples waiting): Connection refused; gives up in 2 min: "
        "its group is retried"
    )
    endless = Wait("a rollout worker", since_s=1000.0, ending="no bound: start one, or stop the job")
    assert sentence(endless, 9000.0) == "a rollout worker for 2.2 h; no bound: start one, or stop the job"


def test_a_wait_is_the_same_after_the_wire() -> None:
    assert wait_from_proto(REWARD.to_proto()) == REWARD
    unbounded = dataclasses.replace(REWARD, limit_s=None)
    assert wait_from_proto(unbounded.to_proto()) == unbounded


def test_what_several_workers_wait_for_is_one_wait() -> None:
    later = dataclasses.replace(REWARD, since_s=1200.0, samples=3, detail="")
    [joined] = merged([later, REWARD])
    assert (joined.samples, joined.since_s, joined.detail) == (15, 1000.0, "Connection refused")


@given(st.lists(st.sampled_from("abc"), max_size=40), st.floats(0.5, 20.0))
def test_nobody_is_told_of_an_end_without_the_beginning(steps: list[str], pace_s: float) -> None:
    log, open_waits = WaitLog(), set[str]()
    for number, what in enumerate(steps):
        for line in told(log, [Wait(what)], 1000.0 + number * pace_s):
            name = line.split(" for ")[1].split()[0]
            if line.startswith("no longer"):
                assert name in open_waits
                open_waits.remove(name)
            else:
                open_waits.add(name)
