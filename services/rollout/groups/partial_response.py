"""Pure functions on partial responses: joining pieces, resuming, cutting and masking."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from miles.distillation.token_choice import NO_TOKEN
from miles.services.rollout.engines.base import FinishReason, GenerationDelta, GenerationResult
from miles.services.rollout.engines.joining import add_speculative, join_experts, join_spans
from miles.types import PrefixCacheStats, Sample, SampleStatus

_STATUS = {
    FinishReason.STOP: SampleStatus.COMPLETED,
    FinishReason.LENGTH: SampleStatus.TRUNCATED,
    FinishReason.ABORT: SampleStatus.PENDING,
}

FINISHED = (SampleStatus.COMPLETED, SampleStatus.TRUNCATED)
"""Statuses of a response that has ended."""
ENDED = (*FINISHED, SampleStatus.FAILED)
"""Statuses of a sample that is not generated any further; a FAILED one is not scored either."""


class Piece:
    """The output of one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.top_token_ids: list[Sequence[int]] = []
        self.result: GenerationResult | None = None

    def add(self, delta: GenerationDelta) -> None:
        """Append a delta. Raises ValueError when its tokens and log-probabilities differ in number."""
        if len(delta.token_ids) != len(delta.log_probs):
            raise ValueError(f"a delta has {len(delta.token_ids)} tokens but {len(delta.log_probs)} log-probabilities")
        self.token_ids.extend(delta.token_ids)
        self.log_probs.extend(delta.log_probs)
        self.top_token_ids.extend(delta.top_token_ids)
        if delta.result is not None:
            self.result = delta.result


def extend(sample: Sample, piece: Piece, *, with_experts: bool = False) -> Sample:
    """The sample with a finished piece appended; the response text is left for the caller to decode.

    After an aborted piece the sample is PENDING, to be resumed. Experts recorded earlier are kept, because a resumed
    request recomputes them, perhaps with later weights that were not sampled from; so the piece holds only the experts
    of positions from `experts_start` on. An aborted piece of which the engine lost them, although they are wanted
    (`with_experts`), is left out: the response goes on from what was recorded.
    Raises ValueError for a piece without a result.
    """
    result = piece.result
    if result is None:
        raise ValueError(f"the engine ended the response of sample {sample.index} without a result")
    lost = with_experts and result.routed_experts is None
    if result.reason is FinishReason.ABORT and (lost or not piece.token_ids):
        return dataclasses.replace(sample, status=SampleStatus.PENDING)
    new_tokens = np.asarray(piece.token_ids, np.int32)
    new_log_probs = np.asarray(piece.log_probs, np.float32)
    before, mask = sample.rollout_log_probs, sample.loss_mask
    return dataclasses.replace(
        sample,
        tokens=np.concatenate([sample.tokens, new_tokens]),
        response_length=sample.response_length + len(new_tokens),
        rollout_log_probs=new_log_probs if before is None else np.concatenate([before, new_log_probs]),
        rollout_routed_experts=join_experts(sample.rollout_routed_experts, result.routed_experts),
        speculative=add_speculative(sample.speculative, result.speculative),
        weight_versions=join_spans(sample.weight_versions, result.weight_versions, sample.response_length),
        loss_mask=None if mask is None else np.concatenate([mask, np.ones(len(new_tokens), np.uint8)]),
        teacher_tokens=_with_top_tokens(sample.teacher_tokens, piece.top_token_ids),
        status=_STATUS[result.reason],
        prefix_cache=PrefixCacheStats(min(result.cached_prompt_tokens, sample.prompt_length), sample.prompt_length),
    )


def _with_top_tokens(
    before: npt.NDArray[np.int32] | None, rows: Sequence[Sequence[int]]
) -> npt.NDArray[np.int32] | None:
    """Append the likeliest tokens of new positions, int32 [positions, count]; missing ones are -1."""
    if not rows:
        return before
    count = max(len(row) for row in rows) if before is None else before.shape[1]
    added = np.array([[*row[:count], *[NO_TOKEN] * (count - len(row))] for row in rows], np.int32)
    return added if before is None else np.concatenate([before, added])


def experts_start(sample: Sample) -> int:
    """First position whose routed experts are not recorded."""
    return 0 if sample.rollout_routed_experts is None else len(sample.rollout_routed_experts)


def without_response(sample: Sample) -> Sample:
    """The sample as it was before anything was generated."""
    return dataclasses.replace(
        sample,
        tokens=sample.prompt_tokens.copy(),
        response_length=0,
        response="",
        reward=None,
        loss_mask=None,
        status=SampleStatus.PENDING,
        rollout_log_probs=None,
        rollout_routed_experts=None,
        weight_versions=(),
        speculative=None,
        prefix_cache=None,
        teacher_log_probs=None,
        teacher_tokens=None,
        teacher_token_log_probs=None,
        remove_sample=False,
    )


def is_resumable(sample: Sample, *, with_experts: bool, with_top_tokens: bool = False) -> bool:
    """True when everything that training needs was recorded of the response so far, or there is no response."""
    if sample.status not in (SampleStatus.PENDING, SampleStatus.ABORTED, *FINISHED):
        return False
    if sample.response_length == 0:
        return sample.status not in FINISHED
    covered = bool(sample.weight_versions) and sample.weight_versions[-1].end == sample.response_length
    has_experts = sample.rollout_routed_experts is not None or not with_experts
    has_top_tokens = sample.teacher_tokens is not None or not with_top_tokens
    return covered and sample.rollout_log_probs is not None and has_experts and has_top_tokens


def merge_partial(
    leased: Sample, stored: Sample | None, *, with_experts: bool, with_top_tokens: bool = False
) -> Sample:
    """Choose what to continue: the stored response if it fits the leased prompt, else the leased one, else none.

    The label is the lease's, and so are its metadata keys; further stored metadata and a stored reward stay.
    """
    if stored is None and leased.status is SampleStatus.PENDING and not leased.response_length:
        return leased
    for partial in (stored, leased):
        if partial is None or not np.array_equal(partial.prompt_tokens, leased.prompt_tokens):
            continue
        if is_resumable(partial, with_experts=with_experts, with_top_tokens=with_top_tokens):
            metadata = {**partial.metadata, **leased.metadata}
            return dataclasses.replace(partial, prompt=leased.prompt, label=leased.label, metadata=metadata)
    return without_response(leased)


def is_rolled_back(sample: Sample, newest_version: int | None) -> bool:
    """True when some tokens come from a version that was rolled back."""
    return newest_version is not None and any(span.version > newest_version for span in sample.weight_versions)


def mask_older_versions(sample: Sample) -> Sample:
    """Mask tokens out of the loss that an older version than the sample's newest one generated."""
    if len(sample.weight_versions) < 2:
        return sample
    newest = max(span.version for span in sample.weight_versions)
    mask = np.ones(sample.response_length, np.uint8) if sample.loss_mask is None else sample.loss_mask.copy()
    for span in sample.weight_versions:
        if span.version < newest:
            mask[span.start : span.end] = 0
    return dataclasses.replace(sample, loss_mask=mask)


def cut_to_limit(sample: Sample, max_new_tokens: int) -> Sample:
    """Mark a partial response that has reached its limit as TRUNCATED."""
    if sample.status in FINISHED or sample.response_length < max_new_tokens:
        return sample
    return dataclasses.replace(sample, status=SampleStatus.TRUNCATED)
