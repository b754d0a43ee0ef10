"""A run of which every group is dropped says so, and does not go on for ever."""

from __future__ import annotations

from miles.rpc.gen import rollout_pb2
from miles.services.controller.run.dropped_groups import DroppedGroups

FILTER = "my.filters.check_reward_nonzero_std"
EXAMPLE = rollout_pb2.ScoredExample(prompt="12>", response="7", label="none", rewards=[0.0, 0.0])


def test_people_are_told_of_groups_dropped_in_a_row_at_growing_counts() -> None:
    dropped = DroppedGroups(4, FILTER, 16)
    assert [n for n in range(1, 65) if dropped.drop("zero_std_0", EXAMPLE)] == [8, 16, 32, 64]
    assert dropped.telling
    assert dropped.describe() == (
        f"the last 64 groups were all dropped by {FILTER} (64 of 64 in all): zero_std_0 (64); "
        "e.g. rewards 0, 0 for prompt '12>', response '7', label 'none'"
    )


def test_the_job_fails_with_filter_reason_and_sample_when_so_many_batches_are_dropped() -> None:
    dropped = DroppedGroups(4, FILTER, 2)
    for _ in range(7):
        dropped.drop("zero_std_0", EXAMPLE)
    assert not dropped.too_many
    dropped.drop("zero_std_1", None)
    assert dropped.too_many
    failure = dropped.failure()
    assert all(part in failure for part in (FILTER, "zero_std_0 (7), zero_std_1 (1)", "rewards 0, 0", "'12>'"))
    assert "dynamic_sampling_max_dropped_batches" in failure


def test_a_group_that_is_kept_begins_the_count_again() -> None:
    dropped = DroppedGroups(4, FILTER, 2)
    for _ in range(100):
        for _ in range(7):
            dropped.drop("zero_std_0", EXAMPLE)
        assert not dropped.too_many
        dropped.keep()
        assert not dropped.telling


def test_without_a_limit_dropping_goes_on_and_is_told() -> None:
    dropped = DroppedGroups(1, None, 0)
    told = sum(dropped.drop(f"reason {n}", None) for n in range(1000))
    assert (dropped.too_many, dropped.telling, told) == (False, True, 7)
    assert "other reasons (992)" in dropped.describe()
