"""Dealing samples out to ranks and micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainer_cases import random_groups

from miles.services.trainer.batch.balance import MicroBatchLimits, partition, recut, schedule
from miles.services.trainer.batch.packing import row_count
from miles.types import Sample

SAMPLES: list[Sample] = [sample for group in random_groups(3, range(6)) for sample in group.samples]


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 8))
def test_partition_keeps_every_item_and_spreads_weight(weights: list[int], parts: int) -> None:
    shares = partition(weights, parts)
    assert sorted(i for share in shares for i in share) == list(range(len(weights)))
    assert all(share == sorted(share) for share in shares)
    sums = [sum(weights[i] for i in share) for share in shares]
    assert max(sums) - min(sums) <= max(weights, default=0)


def test_partition_finds_the_even_split_that_greedy_misses() -> None:
    shares = partition([8, 7, 6, 5, 4], 2)
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in share) for share in shares) == [14, 16]


@given(st.sets(st.integers(0, len(SAMPLES) - 1)), st.integers(1, 4), st.integers(5, 80), st.booleans())
def test_every_sample_is_scheduled_once_within_the_limit(
    members: set[int], ranks: int, max_rows: int, share: bool
) -> None:
    indices = sorted(members)
    per_rank = schedule(SAMPLES, indices, ranks, MicroBatchLimits(1, max_rows), share_prompts=share)
    assert len(per_rank) == ranks
    assert len({len(micro_batches) for micro_batches in per_rank}) == 1
    assert sorted(i for micro_batches in per_rank for micro in micro_batches for i in micro) == indices
    for micro in (micro for micro_batches in per_rank for micro in micro_batches):
        assert len(micro) <= 1 or row_count(SAMPLES, micro, share_prompts=share) <= max_rows


def test_padding_counts_where_samples_are_padded() -> None:
    (micro_batches,) = schedule(
        SAMPLES, range(len(SAMPLES)), 1, MicroBatchLimits(1, 40, padded=True), share_prompts=False
    )
    assert sorted(i for micro in micro_batches for i in micro) == list(range(len(SAMPLES)))
    padded = [len(micro) * max(len(SAMPLES[i].tokens) - 1 for i in micro) for micro in micro_batches]
    packed = [row_count(SAMPLES, micro, share_prompts=False) for micro in micro_batches]
    assert max(padded) <= 40
    assert padded != packed


@given(st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_micro_batches_by_samples_hold_at_most_so_many(ranks: int, max_samples: int, share: bool) -> None:
    indices = range(len(SAMPLES))
    per_rank = schedule(SAMPLES, indices, ranks, MicroBatchLimits(max_samples), share_prompts=share)
    assert max(len(micro) for micro_batches in per_rank for micro in micro_batches) <= max_samples


def test_a_share_can_be_cut_again_by_another_limit() -> None:
    per_rank = schedule(SAMPLES, range(len(SAMPLES)), 2, MicroBatchLimits(1, 40), share_prompts=True)
    shares = [[i for micro in micro_batches for i in micro] for micro_batches in per_rank]
    wider = recut(SAMPLES, shares, MicroBatchLimits(1, 400), share_prompts=True)
    assert [sorted(i for micro in micro_batches for i in micro) for micro_batches in wider] == [
        sorted(share) for share in shares
    ]
    assert len(wider[0]) < len(per_rank[0])


@pytest.mark.parametrize("ranks", [2, 3])
def test_shared_prompts_are_split_up_rather_than_leave_a_rank_idle(ranks: int) -> None:
    one_group = [i for i, sample in enumerate(SAMPLES) if sample.group_id == 0]
    per_rank = schedule(SAMPLES, one_group, ranks, MicroBatchLimits(1, 1000), share_prompts=True)
    assert all(any(micro for micro in micro_batches) for micro_batches in per_rank)
