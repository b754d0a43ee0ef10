"""A quick look at a sample, which spares most of them the checks one by one."""

from __future__ import annotations

import math

import numpy as np

from miles.types.sample import Sample, SampleStatus, SpeculativeStats

UINT32_MAX = 2**32 - 1
UINT64_MAX = 2**64 - 1

_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_UINT8, _UINT16 = np.dtype(np.uint8), np.dtype(np.uint16)


def is_usual(sample: Sample) -> bool:
    """Return whether a sample is seen at a glance to have a valid form; one that is not may have it all the same.

    Looks at everything that `validate.FORM_CHECKS` check.
    """
    length, tokens, log_probs, label = sample.response_length, sample.tokens, sample.rollout_log_probs, sample.label
    covered = 0
    for version, start, end in sample.weight_versions:
        if not (type(version) is type(start) is type(end) is int):
            return False
        if not (0 <= version <= UINT64_MAX and start == covered < end <= UINT32_MAX):
            return False
        covered = end
    return (
        covered == length
        and type(length) is type(sample.group_id) is type(sample.index) is int
        and 0 <= sample.group_id <= UINT64_MAX
        and 0 <= sample.index <= UINT32_MAX
        and _is_text(sample.prompt)
        and _is_text(sample.response)
        and (label is None or _is_text(label))
        and type(sample.status) is SampleStatus
        and type(sample.metadata) is dict
        and (sample.reward is None or (type(sample.reward) is float and math.isfinite(sample.reward)))
        and type(tokens) is np.ndarray
        and tokens.dtype is _INT32
        and tokens.ndim == 1
        and length <= len(tokens)
        and (
            log_probs is None
            or (type(log_probs) is np.ndarray and log_probs.dtype is _FLOAT32 and log_probs.shape == (length,))
        )
        and (sample.loss_mask is None or _is_mask(sample.loss_mask, length))
        and sample.teacher_log_probs is None
        and sample.teacher_tokens is None
        and sample.teacher_token_log_probs is None
        and (sample.rollout_routed_experts is None or _are_experts(sample.rollout_routed_experts, len(tokens)))
        and (sample.speculative is None or _are_drafts(sample.speculative))
        and (
            sample.prefix_cache is None
            or _is_cache(sample.prefix_cache.cached_tokens, sample.prefix_cache.prompt_tokens)
        )
    )


def _is_text(text: object) -> bool:
    if type(text) is not str:
        return False
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_mask(mask: object, length: int) -> bool:
    return type(mask) is np.ndarray and mask.dtype is _UINT8 and mask.shape == (length,)


def _are_experts(experts: object, num_tokens: int) -> bool:
    return (
        type(experts) is np.ndarray
        and (experts.dtype is _UINT8 or experts.dtype is _UINT16)
        and experts.ndim == 3
        and len(experts) == max(num_tokens - 1, 0)
    )


def _are_drafts(stats: SpeculativeStats) -> bool:
    return _is_cache(stats.accepted_draft_tokens, stats.proposed_draft_tokens) and _is_cache(0, stats.verify_count)


def _is_cache(cached: object, prompt: object) -> bool:
    return type(cached) is int and type(prompt) is int and 0 <= cached <= prompt <= UINT64_MAX
