"""Tokens of responses that lie across the ends of a measurement."""

from __future__ import annotations

import pytest

from benchmarks.gpu.draft_pool import Ended, while_most_run


@pytest.mark.parametrize(
    ("start", "end", "tokens"),
    [(0.0, 10.0, 200.0), (2.0, 4.0, 100.0), (3.0, 9.0, 100.0), (5.0, 9.0, 0.0), (0.0, 1.0, 0.0)],
)
def test_tokens_count_by_the_share_of_their_time_that_is_measured(start: float, end: float, tokens: float) -> None:
    assert Ended(began=1.0, ended=5.0, tokens=200).tokens_between(start, end) == tokens


def test_a_batch_counts_until_a_quarter_of_it_has_ended() -> None:
    batch = [Ended(began=0.0, ended=ended, tokens=100) for ended in (2.0, 4.0, 5.0, 8.0)]
    assert while_most_run(batch) == (100 + 100 + 80 + 50, 4.0)


def test_a_batch_of_one_counts_whole() -> None:
    assert while_most_run([Ended(began=1.0, ended=5.0, tokens=200)]) == (200, 4.0)
