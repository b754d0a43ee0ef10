"""Which rows the head computes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from miles.services.trainer.backends.fsdp.model.scored_rows import MAX_TOKENS, MIN_ROWS, scored_rows


@given(st.lists(st.integers(0, 30), max_size=60))
def test_every_token_is_found_at_the_row_that_predicts_it(logit_rows: list[int]) -> None:
    logit_rows_R = np.array(logit_rows, np.int64)
    targets_R = np.arange(100, 100 + len(logit_rows), dtype=np.int64)
    scored = scored_rows(logit_rows_R, targets_R)
    assert scored.tokens_UM.ravel()[scored.place_R].tolist() == targets_R.tolist()
    assert scored.rows_U[scored.row_R].tolist() == logit_rows
    assert (scored.place_R // scored.tokens_UM.shape[1]).tolist() == scored.row_R.tolist()
    assert len(scored.rows_U) == len(scored.tokens_UM)
    assert np.count_nonzero(scored.tokens_UM) == len(logit_rows)


def test_a_row_is_computed_once_for_several_tokens() -> None:
    rows = np.repeat(np.arange(20), 3)
    assert scored_rows(rows, rows).rows_U.tolist() == list(range(20))
    assert scored_rows(rows, rows).tokens_UM.shape == (20, 3)


def test_a_row_of_very_many_tokens_is_computed_again_rather_than_widen_all_rows() -> None:
    rows = np.array([5] * (3 * MAX_TOKENS + 1) + list(range(20, 40)))
    scored = scored_rows(rows, rows)
    assert scored.tokens_UM.shape == (24, MAX_TOKENS)
    assert scored.rows_U.tolist() == [5] * 4 + list(range(20, 40))


def test_few_rows_are_padded_to_as_many_as_round_alike() -> None:
    scored = scored_rows(np.array([7, 3, 7]), np.array([1, 2, 3]))
    assert scored.rows_U.tolist() == [3] + [7] * (MIN_ROWS - 1)
    assert scored.tokens_UM[:3].tolist() == [[2, 0], [1, 3], [0, 0]]
