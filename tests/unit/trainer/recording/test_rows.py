"""Rows of recorded samples have the samples' tokens, shared or not."""

from __future__ import annotations

import numpy as np
import pytest
from trainer_cases import random_groups

from miles.services.trainer.batch.packing import EMPTY, pack
from miles.services.trainer.batch.rollout_batch import in_order
from miles.services.trainer.recording.rows import recorded_rows


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("chosen", [(0,), (3, 5, 6), (15, 2), tuple(range(16))])
def test_rows_are_those_of_the_samples_tokens(share: bool, chosen: tuple[int, ...]) -> None:
    samples = in_order(random_groups(1))
    samples[5].tokens, samples[5].response_length = samples[4].tokens.copy(), samples[4].response_length
    samples[6].tokens = np.concatenate([samples[4].tokens, samples[4].tokens[:3]])
    samples[6].response_length = samples[4].response_length + 3
    micro_batch = pack(samples, range(16), share_prompts=share)
    rows = recorded_rows(micro_batch, {index: number for number, index in enumerate(chosen)})
    assert rows is not None
    expected = [(n, p) for n, index in enumerate(chosen) for p in range(len(samples[index].tokens) - 1)]
    assert sorted(map(tuple, rows.rows_N2.tolist())) == sorted(expected)
    for row, (number, position) in zip(rows.row_N, rows.rows_N2, strict=True):
        assert micro_batch.input_ids_T[row] == samples[chosen[number]].tokens[position]
        assert micro_batch.position_ids_T[row] == position
    responses = [(n, r) for n, index in enumerate(chosen) for r in range(samples[index].response_length)]
    assert sorted(map(tuple, rows.top_rows_M2.tolist())) == sorted(responses)
    for response, (number, count) in zip(rows.response_M, rows.top_rows_M2, strict=True):
        assert micro_batch.targets_R[response] == samples[chosen[number]].response_tokens[count]


def test_there_are_none_without_recorded_samples() -> None:
    samples = in_order(random_groups(1))
    assert recorded_rows(pack(samples, (0, 1), share_prompts=True), {5: 0}) is None
    assert recorded_rows(EMPTY, {5: 0}) is None
