"""What people are told of engines that fail to load a version."""

from __future__ import annotations

from miles.rpc.gen import weightsync_pb2
from miles.services.controller.run.load_faults import LoadFaults


def failed(at: int, words: str = "the server died", *, refused: bool = False) -> weightsync_pb2.EngineStatus:
    return weightsync_pb2.EngineStatus(
        engine_id="rollout-0",
        state=weightsync_pb2.ENGINE_STATE_QUARANTINED,
        since_unix_ns=at,
        last_error=words,
        refused=refused,
    )


def test_the_first_failure_is_told_and_then_each_doubling_of_the_count() -> None:
    faults = LoadFaults()
    told = [bool(faults.note(7, failed(at))) for at in range(1, 9)]
    assert told == [True, True, False, True, False, False, False, True]
    assert str(faults) == "rollout-0 has failed 8 times, at last with: the server died"


def test_a_failure_with_other_words_is_told_and_one_that_is_reported_twice_counts_once() -> None:
    faults = LoadFaults()
    first = faults.note(7, failed(1))
    assert first == "rollout-0 could not load version 7 (try 1) and tries again: the server died"
    assert faults.note(7, failed(1)) == ""
    for at in (2, 3):
        faults.note(7, failed(at))
    assert "(try 4) and tries again: out of memory" in faults.note(7, failed(4, "out of memory"))
    assert faults.note(7, failed(5, "out of memory")) == ""


def test_an_engine_that_serves_or_refuses_is_not_waited_for() -> None:
    faults = LoadFaults()
    faults.note(7, failed(1))
    faults.note(
        7, weightsync_pb2.EngineStatus(engine_id="rollout-0", state=weightsync_pb2.ENGINE_STATE_SERVING, version=7)
    )
    assert str(faults) == ""
    assert faults.note(7, failed(2, refused=True)) == ""
    assert str(faults) == ""


def test_a_failure_of_an_earlier_version_does_not_count_for_the_next_one() -> None:
    faults = LoadFaults()
    faults.note(7, failed(1))
    faults.clear()
    assert faults.note(8, failed(1)) == ""
    assert str(faults) == ""
    assert "version 8 (try 1)" in faults.note(8, failed(2))
