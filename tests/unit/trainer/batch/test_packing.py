"""Samples to micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.services.trainer.batch.packing import EMPTY, MicroBatch, Segment, pack, row_count
from miles.types import Sample


def sample(group_id: int, index: int, prompt: list[int], response: list[int]) -> Sample:
    return Sample(
        group_id=group_id,
        index=index,
        prompt="p",
        tokens=np.array([*prompt, *response], np.int32),
        response_length=len(response),
    )


@st.composite
def rollouts(draw: st.DrawFn) -> list[Sample]:
    """Up to 4 groups of up to 4 samples; within a group prompts are mostly, but not always, the same."""
    samples = []
    for group_id in range(draw(st.integers(1, 4))):
        prompts = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=2))
        for index in range(draw(st.integers(1, 4))):
            response = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
            samples.append(sample(group_id, index, prompts[draw(st.integers(0, len(prompts) - 1))], response))
    return samples


def visible_rows(micro_batch: MicroBatch, row: int) -> list[int]:
    """Rows that a row may attend to, oldest first."""
    (segment,) = [s for s in micro_batch.segments if s.start <= row < s.end]
    return [int(seen) for seen in segment.seen_rows() if seen <= row]


@given(rollouts(), st.booleans())
def test_every_prediction_sees_exactly_its_own_sample_up_to_it(samples: list[Sample], share: bool) -> None:
    micro_batch = pack(samples, range(len(samples)), share_prompts=share)
    assert micro_batch.num_rows == row_count(samples, range(len(samples)), share_prompts=share)
    assert micro_batch.samples == tuple(range(len(samples)))
    for number, index in enumerate(micro_batch.samples):
        tokens, prompt_length = samples[index].tokens, samples[index].prompt_length
        for offset in range(samples[index].response_length):
            at = micro_batch.cu_responses[number] + offset
            seen = visible_rows(micro_batch, int(micro_batch.logit_rows_R[at]))
            assert micro_batch.input_ids_T[seen].tolist() == tokens[: prompt_length + offset].tolist()
            assert micro_batch.position_ids_T[seen].tolist() == list(range(prompt_length + offset))
            assert micro_batch.targets_R[at] == tokens[prompt_length + offset]


@given(rollouts())
def test_every_row_names_the_token_it_came_from(samples: list[Sample]) -> None:
    micro_batch = pack(samples, range(len(samples)), share_prompts=True)
    for token, (index, position) in zip(micro_batch.input_ids_T, micro_batch.row_sources_T, strict=True):
        assert samples[index].tokens[position] == token


def test_a_group_holds_its_prompt_once() -> None:
    samples = [sample(0, 0, [1, 2, 3], [4, 5]), sample(0, 1, [1, 2, 3], [6]), sample(0, 2, [1, 2, 3], [7, 8, 9])]
    shared = pack(samples, (0, 1, 2), share_prompts=True)
    assert shared.input_ids_T.tolist() == [1, 2, 3, 4, 7, 8]
    assert shared.position_ids_T.tolist() == [0, 1, 2, 3, 3, 4]
    assert shared.segments == (Segment(0, 4), Segment(4, 6, ((0, 3),)))
    assert shared.logit_rows_R.tolist() == [2, 3, 2, 2, 4, 5]
    plain = pack(samples, (0, 1, 2), share_prompts=False)
    assert plain.input_ids_T.tolist() == [1, 2, 3, 4, 1, 2, 3, 1, 2, 3, 7, 8]


def test_equal_prompts_of_different_groups_are_kept_apart() -> None:
    samples = [sample(0, 0, [1, 2], [4]), sample(1, 0, [1, 2], [4])]
    assert pack(samples, (0, 1), share_prompts=True).num_rows == 4


def test_responses_that_begin_alike_hold_what_they_have_in_common_once() -> None:
    responses = [[4, 5, 6, 7], [4, 5, 8, 9], [4, 5, 8, 1, 2], [4, 5, 6, 7]]
    packed = pack(
        [sample(0, i, [1, 2], response) for i, response in enumerate(responses)], range(4), share_prompts=True
    )
    assert packed.input_ids_T.tolist() == [1, 2, 4, 5, 6, 8, 1]
    assert packed.segments == (Segment(0, 5), Segment(5, 6, ((0, 4),)), Segment(6, 7, ((0, 4), (5, 6))))
    assert packed.logit_rows_R.tolist() == [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 5, 6, 1, 2, 3, 4]
    assert packed.targets_R.tolist() == [token for response in responses for token in response]


@given(rollouts())
def test_no_row_is_computed_twice_in_a_group(samples: list[Sample]) -> None:
    prefixes = {(s.group_id, tuple(s.tokens[: i + 1])) for s in samples for i in range(len(s.tokens) - 1)}
    assert row_count(samples, range(len(samples)), share_prompts=True) == len(prefixes)


def test_rows_that_were_routed_differently_are_not_shared() -> None:
    samples = [sample(0, index, [1, 2, 3], [4, 5]) for index in range(3)]
    for one in samples:
        one.rollout_routed_experts = np.zeros((4, 2, 1), np.uint8)
        one.rollout_routed_experts[3] = one.index  # the response's routing may differ
    assert pack(samples, (0, 1, 2), share_prompts=True).num_rows == 3 + 3
    assert samples[1].rollout_routed_experts is not None
    samples[1].rollout_routed_experts[2, 1] = 1
    packed = pack(samples, (0, 1, 2), share_prompts=True)
    assert packed.row_sources_T.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert row_count(samples, (0, 1, 2), share_prompts=True) == packed.num_rows
    samples[1].rollout_routed_experts = None
    assert pack(samples, (0, 1, 2), share_prompts=True).num_rows == 4 + 4 + 1


def test_nothing_packs_into_the_empty_micro_batch() -> None:
    assert pack([], (), share_prompts=True) is EMPTY
    assert EMPTY.is_empty


@pytest.mark.parametrize(("prompt", "response"), [([], [1]), ([1], [])])
def test_a_sample_without_prompt_or_response_is_refused(prompt: list[int], response: list[int]) -> None:
    with pytest.raises(ValueError, match="sample 3 of group 7"):
        pack([sample(7, 3, prompt, response)], (0,), share_prompts=True)
