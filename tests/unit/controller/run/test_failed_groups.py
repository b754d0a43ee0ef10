"""Failed groups are retried a few times, then dropped; a job whose groups all fail ends."""

from __future__ import annotations

from miles.services.controller.run.failed_groups import FailedGroups


def test_a_group_is_retried_four_times() -> None:
    failed = FailedGroups()
    assert [failed.may_retry(7, retryable=True) for _ in range(5)] == [True] * 4 + [False]
    assert failed.may_retry(8, retryable=True), "each group has its own count"


def test_a_failure_that_cannot_be_retried_is_not() -> None:
    assert not FailedGroups().may_retry(7, retryable=False)


def test_a_group_that_finished_starts_over() -> None:
    failed = FailedGroups()
    for _ in range(4):
        failed.may_retry(7, retryable=True)
    failed.finish(7)
    assert failed.may_retry(7, retryable=True)


def test_failures_in_a_row_are_described_until_a_group_finishes() -> None:
    failed = FailedGroups()
    for group_id in range(4):
        assert failed.describe() == ""
        failed.may_retry(group_id, retryable=True, error=f"no answer for {group_id}")
    assert failed.describe() == "the last 4 attempts at groups failed, the last with: no answer for 3"
    failed.finish(9)
    assert failed.describe() == ""


def test_the_job_fails_after_many_drops_in_a_row() -> None:
    failed = FailedGroups()
    assert not any(failed.drop(group_id) for group_id in range(31))
    failed.accept()
    assert [failed.drop(group_id) for group_id in range(32)] == [False] * 31 + [True]
    assert failed.dropped_in_a_row == 32
