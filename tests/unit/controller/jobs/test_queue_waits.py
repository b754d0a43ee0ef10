"""What queued jobs wait for, and when their histories say so."""

from __future__ import annotations

from miles.services.controller.jobs.queue_waits import QueueWaits, waits_in_queue


def test_a_job_names_the_workers_that_it_lacks_and_the_jobs_before_it() -> None:
    lack, ahead = waits_in_queue("a trainer of 2 ranks (1 attached)", 2, "sums-1")
    assert lack.what == "a trainer of 2 ranks (1 attached)"
    assert (ahead.what, ahead.detail) == ("2 jobs ahead of it", "sums-1 runs now")
    assert all("no bound" in wait.ending for wait in (lack, ahead))
    assert waits_in_queue("", 0, "") == []


def test_histories_say_within_seconds_what_is_lacking() -> None:
    queue = QueueWaits()
    told: dict[str, list[int]] = {}
    for second in range(20):
        waits = {"a": waits_in_queue("a reward worker", 0, ""), "b": waits_in_queue("", 1, "a")}
        for job_id, _ in queue.note(waits, 1000.0 + second):
            told.setdefault(job_id, []).append(second)
    assert told == {"a": [3, 13], "b": [5, 15]}


def test_a_job_that_left_the_queue_waits_for_nothing() -> None:
    queue = QueueWaits()
    list(queue.note({"a": waits_in_queue("a reward worker", 0, "")}, 1000.0))
    assert [wait.what for wait in queue.of("a")] == ["a reward worker"]
    list(queue.note({}, 1001.0))
    assert queue.of("a") == ()
