from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.services.rollout.engines.base import FinishReason, GenerationDelta, GenerationResult
from miles.services.rollout.groups.partial_response import (
    Piece,
    cut_to_limit,
    experts_start,
    extend,
    is_resumable,
    is_rolled_back,
    mask_older_versions,
    merge_partial,
    without_response,
)
from miles.types import Sample, SampleStatus, SpeculativeStats, VersionSpan, check_sample

PROMPT = np.array([5, 6, 7], np.int32)
LAYERS, TOP_K = 2, 2


def fresh() -> Sample:
    return Sample(group_id=1, index=0, prompt="p", label="4", tokens=PROMPT.copy(), metadata={"a": 1})


def experts_of(tokens: np.ndarray) -> np.ndarray:
    """What a model with fixed weights would choose: a function of the prefix, here of the token."""
    rows = tokens[:-1].astype(np.uint8)
    return np.stack([rows + k for k in range(LAYERS * TOP_K)], axis=1).reshape(-1, LAYERS, TOP_K)


def piece_of(
    sample: Sample, token_ids: list[int], versions: list[int], reason: FinishReason, experts: bool = True
) -> Piece:
    """As an engine answers: spans from 0, experts from where the sample's end, one delta a token."""
    spans: list[VersionSpan] = []
    for i, version in enumerate(versions):
        if spans and spans[-1].version == version:
            spans[-1] = VersionSpan(version, spans[-1].start, i + 1)
        else:
            spans.append(VersionSpan(version, i, i + 1))
    whole = np.concatenate([sample.tokens, np.array(token_ids, np.int32)])
    rows = experts_of(whole)[experts_start(sample) :] if experts else None
    result = GenerationResult(reason, tuple(spans), 2, rows, SpeculativeStats(len(token_ids), 2 * len(token_ids), 1))
    piece = Piece()
    for token in token_ids:
        piece.add(GenerationDelta([token], [-0.5 * token]))
    piece.add(GenerationDelta([], [], result))
    return piece


@given(
    tokens=st.lists(st.integers(0, 99), min_size=1, max_size=20),
    data=st.data(),
)
def test_a_response_in_pieces_equals_the_response_in_one(tokens: list[int], data: st.DataObject) -> None:
    versions = sorted(data.draw(st.lists(st.integers(0, 3), min_size=len(tokens), max_size=len(tokens))))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(tokens)), max_size=3)) - {len(tokens)})
    whole = extend(fresh(), piece_of(fresh(), tokens, versions, FinishReason.STOP))
    sample = fresh()
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        reason = FinishReason.STOP if end == len(tokens) else FinishReason.ABORT
        sample = extend(sample, piece_of(sample, tokens[start:end], versions[start:end], reason))
        check_sample(sample)
        assert sample.status is (SampleStatus.COMPLETED if reason is FinishReason.STOP else SampleStatus.PENDING)
    assert sample.speculative == SpeculativeStats(len(tokens), 2 * len(tokens), len({*cuts} - {0}) + 1)
    assert dataclasses.replace(sample, speculative=None) == dataclasses.replace(whole, speculative=None)
    assert whole.response_tokens.tolist() == tokens
    assert whole.rollout_routed_experts is not None
    assert whole.rollout_routed_experts.shape == (len(PROMPT) + len(tokens) - 1, LAYERS, TOP_K)


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (FinishReason.STOP, SampleStatus.COMPLETED),
        (FinishReason.LENGTH, SampleStatus.TRUNCATED),
        (FinishReason.ABORT, SampleStatus.PENDING),
    ],
)
def test_the_reason_decides_the_status(reason: FinishReason, status: SampleStatus) -> None:
    assert extend(fresh(), piece_of(fresh(), [1], [0], reason)).status is status


def test_an_abort_before_the_first_token_leaves_the_sample_as_it_was() -> None:
    result = GenerationResult(FinishReason.ABORT, (), 0, np.zeros((0, LAYERS, TOP_K), np.uint8))
    piece = Piece()
    piece.add(GenerationDelta([], [], result))
    assert extend(fresh(), piece) == fresh()
    partial = extend(fresh(), piece_of(fresh(), [1, 2], [0, 0], FinishReason.ABORT))
    assert extend(partial, piece) == partial


def test_a_loss_mask_grows_with_ones() -> None:
    partial = extend(fresh(), piece_of(fresh(), [1, 2], [0, 0], FinishReason.ABORT))
    partial = dataclasses.replace(partial, loss_mask=np.array([0, 1], np.uint8))
    done = extend(partial, piece_of(partial, [3], [0], FinishReason.STOP))
    assert done.loss_mask is not None
    assert done.loss_mask.tolist() == [0, 1, 1]


def test_a_piece_needs_its_result_and_matching_log_probs() -> None:
    with pytest.raises(ValueError, match="without a result"):
        extend(fresh(), Piece())
    with pytest.raises(ValueError, match="2 tokens but 1"):
        Piece().add(GenerationDelta([1, 2], [0.0]))


def test_a_piece_whose_routing_was_lost_is_left_out() -> None:
    begun = extend(fresh(), piece_of(fresh(), [1, 2], [0, 0], FinishReason.ABORT), with_experts=True)
    lost = piece_of(begun, [3, 4], [0, 1], FinishReason.ABORT, experts=False)
    assert extend(begun, lost, with_experts=True) == begun
    assert extend(begun, lost).response_length == 4  # nobody wants it


def test_what_can_be_resumed() -> None:
    partial = extend(fresh(), piece_of(fresh(), [1, 2], [0, 0], FinishReason.ABORT))
    assert is_resumable(partial, with_experts=True)
    assert is_resumable(fresh(), with_experts=True)
    assert not is_resumable(dataclasses.replace(partial, rollout_routed_experts=None), with_experts=True)
    assert is_resumable(dataclasses.replace(partial, rollout_routed_experts=None), with_experts=False)
    assert not is_resumable(dataclasses.replace(partial, rollout_log_probs=None), with_experts=False)
    assert not is_resumable(dataclasses.replace(partial, weight_versions=()), with_experts=False)
    assert not is_resumable(dataclasses.replace(partial, status=SampleStatus.FAILED), with_experts=True)


def test_the_stored_response_comes_first_then_the_leased_one_then_none() -> None:
    stored = extend(fresh(), piece_of(fresh(), [1, 2], [0, 0], FinishReason.ABORT))
    leased = dataclasses.replace(
        extend(fresh(), piece_of(fresh(), [1], [0], FinishReason.ABORT)), label="5", metadata={"b": 2}
    )
    merged = merge_partial(leased, stored, with_experts=True)
    assert (merged.response_length, merged.label, merged.metadata) == (2, "5", {"a": 1, "b": 2})
    assert merge_partial(leased, None, with_experts=True).response_length == 1
    other = dataclasses.replace(stored, tokens=stored.tokens + 1)
    assert merge_partial(leased, other, with_experts=True).response_length == 1
    useless = dataclasses.replace(leased, rollout_log_probs=None)
    assert merge_partial(useless, other, with_experts=True) == without_response(useless)


def test_a_finished_stored_response_is_kept_with_its_reward() -> None:
    done = dataclasses.replace(extend(fresh(), piece_of(fresh(), [1], [0], FinishReason.STOP)), reward=1.0)
    merged = merge_partial(fresh(), done, with_experts=True)
    assert (merged.status, merged.reward, merged.response_length) == (SampleStatus.COMPLETED, 1.0, 1)


def test_a_partial_response_at_its_limit_is_truncated() -> None:
    partial = extend(fresh(), piece_of(fresh(), [1, 2], [0, 0], FinishReason.ABORT))
    assert cut_to_limit(partial, 2).status is SampleStatus.TRUNCATED
    assert cut_to_limit(partial, 3).status is SampleStatus.PENDING


def test_without_a_response_nothing_of_it_is_left() -> None:
    done = dataclasses.replace(extend(fresh(), piece_of(fresh(), [1], [0], FinishReason.STOP)), reward=1.0)
    assert without_response(done) == fresh()


def of_versions(*spans: VersionSpan) -> Sample:
    length = spans[-1].end
    tokens = np.concatenate([PROMPT, np.arange(length, dtype=np.int32)])
    return dataclasses.replace(fresh(), tokens=tokens, response_length=length, weight_versions=spans)


def test_tokens_of_older_versions_are_left_out_of_the_loss() -> None:
    masked = mask_older_versions(of_versions(VersionSpan(3, 0, 2), VersionSpan(4, 2, 3), VersionSpan(5, 3, 6)))
    assert masked.loss_mask is not None
    assert masked.loss_mask.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_mask_that_is_there_is_narrowed_and_one_version_needs_none() -> None:
    own = np.array([1, 1, 0, 1], np.uint8)
    sample = dataclasses.replace(of_versions(VersionSpan(3, 0, 1), VersionSpan(4, 1, 4)), loss_mask=own)
    masked = mask_older_versions(sample)
    assert masked.loss_mask is not None
    assert masked.loss_mask.tolist() == [0, 1, 0, 1]
    assert own.tolist() == [1, 1, 0, 1]
    assert mask_older_versions(of_versions(VersionSpan(3, 0, 4))).loss_mask is None


def test_tokens_of_a_version_that_is_gone_are_known() -> None:
    sample = of_versions(VersionSpan(3, 0, 2), VersionSpan(5, 2, 4))
    assert is_rolled_back(sample, 4)
    assert not is_rolled_back(sample, 5)
    assert not is_rolled_back(sample, None)


def test_likeliest_tokens_grow_with_the_response_and_are_needed_to_go_on() -> None:
    sample = fresh()
    for top in ([[4, 5], [6, 7]], [[8, 9], [1]]):
        piece = piece_of(sample, [3, 3], [1, 1], FinishReason.LENGTH)
        piece.top_token_ids = list(top)
        sample = extend(sample, piece)
    assert sample.teacher_tokens is not None
    assert sample.teacher_tokens.tolist() == [[4, 5], [6, 7], [8, 9], [1, -1]]
    check_sample(sample)
    assert is_resumable(sample, with_experts=True, with_top_tokens=True)
    sample.teacher_tokens = None
    assert not is_resumable(sample, with_experts=True, with_top_tokens=True)
    assert without_response(sample).teacher_tokens is None
