"""Rows of a micro-batch over the ranks of a layout."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from trainer_cases import random_groups

from miles.services.trainer.backends.megatron.parallel.rows import PADDING, LocalRows, local_rows, padded_rows
from miles.services.trainer.batch.packing import EMPTY, MicroBatch, pack
from miles.services.trainer.batch.rollout_batch import in_order


def cut(micro_batch: MicroBatch, size: int, multiple: int) -> list[LocalRows]:
    return [local_rows(micro_batch, context_rank=r, context_size=size, multiple_of=multiple) for r in range(size)]


@given(
    seed=st.integers(0, 2**16),
    chosen=st.lists(st.integers(0, 15), min_size=1, max_size=6, unique=True),
    size=st.sampled_from([1, 2, 4]),
    multiple=st.sampled_from([1, 2, 8]),
)
def test_ranks_hold_every_row_and_predict_every_response_token_once(
    seed: int, chosen: list[int], size: int, multiple: int
) -> None:
    micro_batch = pack(in_order(random_groups(seed)), chosen, share_prompts=False)
    parts = cut(micro_batch, size, multiple)
    sources = np.concatenate([part.sources_L for part in parts])
    assert sorted(sources[sources != PADDING]) == list(range(micro_batch.num_rows))
    assert sorted(np.concatenate([part.responses for part in parts])) == list(range(len(micro_batch.targets_R)))
    for part in parts:
        assert len(part.sources_L) % multiple == 0
        assert part.cu_seqlens[-1] == len(part.sources_L) * size
        assert np.array_equal(part.sources_L[part.logit_rows], micro_batch.logit_rows_R[part.responses])
        present = part.sources_L != PADDING
        assert np.array_equal(part.input_ids_L[present], micro_batch.input_ids_T[part.sources_L[present]])
        assert np.array_equal(part.position_ids_L[present], micro_batch.position_ids_T[part.sources_L[present]])


@given(
    seed=st.integers(0, 2**16),
    chosen=st.lists(st.integers(0, 15), min_size=1, max_size=6, unique=True),
    multiple=st.sampled_from([1, 2, 8]),
)
def test_padded_samples_lie_side_by_side(seed: int, chosen: list[int], multiple: int) -> None:
    micro_batch = pack(in_order(random_groups(seed)), chosen, share_prompts=False)
    rows = padded_rows(micro_batch, multiple_of=multiple)
    assert rows.columns == len(chosen)
    assert rows.max_seqlen % multiple == 0
    by_sample = rows.sources_L.reshape(rows.max_seqlen, -1).T
    for segment, sources in zip(micro_batch.segments, by_sample, strict=True):
        assert sources[: segment.rows].tolist() == list(range(segment.start, segment.end))
        assert set(sources[segment.rows :]) <= {PADDING}
    assert rows.responses.tolist() == list(range(len(micro_batch.targets_R)))
    assert np.array_equal(rows.sources_L[rows.logit_rows], micro_batch.logit_rows_R)
    assert np.array_equal(rows.position_ids_L.reshape(rows.max_seqlen, -1).max(axis=1)[:1], [0])


def test_a_sequence_is_dealt_out_from_both_ends() -> None:
    samples = in_order(random_groups(0))
    longest = max(range(16), key=lambda i: len(samples[i].tokens))
    micro_batch = pack(samples, [longest], share_prompts=False)
    parts = cut(micro_batch, 2, 1)
    chunk = len(parts[0].sources_L) // 2
    assert parts[0].sources_L[:chunk].tolist() == list(range(chunk))
    assert parts[1].sources_L[: 2 * chunk][0] == chunk
    assert len(parts[0].sources_L) == len(parts[1].sources_L)


def test_a_rank_without_work_still_has_rows() -> None:
    assert len(padded_rows(EMPTY, multiple_of=4).sources_L) == 4
    for part in cut(EMPTY, 2, 2):
        assert len(part.sources_L) == 4
        assert len(part.logit_rows) == 0
