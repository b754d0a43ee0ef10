"""Validation of samples and groups, when they are encoded and decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.types.errors import MalformedMessage, prefixed
from miles.types.sample import Reward, Sample, SampleGroup, SampleStatus, VersionSpan
from miles.types.usual import UINT32_MAX, UINT64_MAX, is_usual

_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_UINT8, _UINT16 = np.dtype(np.uint8), np.dtype(np.uint16)
_NUMBERS = (float, int, np.floating, np.integer)
_JOINED_ENTRIES = 16_384
"""Arrays with up to this many entries in total are checked as one: for short ones the calls cost more than a copy."""


def check_group(group: SampleGroup, path: str = "") -> None:
    """Raise MalformedMessage unless the group and all its samples satisfy sample.proto.

    `path` prefixes field names, for a group inside another message; end it with a dot.
    """
    _check_text(group.job_id, path + "job_id")
    _check_unsigned(group.group_id, UINT64_MAX, path + "group_id")
    previous = -1
    for i, sample in enumerate(group.samples):
        if sample.group_id == group.group_id and is_usual(sample) and sample.index > previous:
            previous = sample.index
            continue
        with prefixed(f"{path}samples[{i}]."):
            _check_form(sample)
            if sample.group_id != group.group_id:
                raise MalformedMessage("group_id", f"{sample.group_id}, but the group's is {group.group_id}")
            if sample.index <= previous:
                raise MalformedMessage("index", f"{sample.index} after {previous}; samples are in order of index")
        previous = sample.index
    if not _values_hold(group.samples):
        for i, sample in enumerate(group.samples):
            check_sample(sample, f"{path}samples[{i}].")


def check_sample(sample: Sample, path: str = "") -> None:
    """Raise MalformedMessage that names the first invalid field, unless the sample satisfies sample.proto."""
    check_samples([sample], path)


def check_samples(samples: Sequence[Sample], path: str = "") -> None:
    """`check_sample` of several samples, with few calls."""
    if all(map(is_usual, samples)) and _values_hold(samples):
        return
    for sample in samples:
        with prefixed(path):
            _check_form(sample)
            _check_values(sample)


def _check_form(sample: Sample) -> None:
    """Check everything except the entries of arrays, which `_check_values` checks."""
    for check in FORM_CHECKS:
        check(sample)


def _check_identity(sample: Sample) -> None:
    _check_unsigned(sample.group_id, UINT64_MAX, "group_id")
    _check_unsigned(sample.index, UINT32_MAX, "index")


def _check_texts(sample: Sample) -> None:
    _check_prompt(sample.prompt, "prompt")
    _check_text(sample.response, "response")
    if sample.label is not None:
        _check_text(sample.label, "label")


def _check_state(sample: Sample) -> None:
    if not isinstance(sample.status, SampleStatus):
        raise MalformedMessage("status", f"{sample.status!r} is not a SampleStatus")
    if not isinstance(sample.metadata, dict):
        raise MalformedMessage("metadata", f"a {type(sample.metadata).__name__}; expected a JSON object")


def _check_tokens(sample: Sample) -> None:
    length = sample.response_length
    _check_dtype(sample.tokens, (_INT32,), 1, "tokens")
    _check_unsigned(length, UINT32_MAX, "response_length")
    if length > len(sample.tokens):
        raise MalformedMessage("response_length", f"{length}, but there are only {len(sample.tokens)} tokens")


def _check_loss_mask(sample: Sample) -> None:
    if sample.loss_mask is not None:
        _check_per_response(sample.loss_mask, _UINT8, sample.response_length, "loss_mask")


def _check_rollout_log_probs(sample: Sample) -> None:
    if sample.rollout_log_probs is not None:
        _check_per_response(sample.rollout_log_probs, _FLOAT32, sample.response_length, "rollout_log_probs")


def _check_teacher_log_probs(sample: Sample) -> None:
    if sample.teacher_log_probs is not None:
        _check_per_response(sample.teacher_log_probs, _FLOAT32, sample.response_length, "teacher_log_probs")


def _check_teacher_tokens(sample: Sample) -> None:
    tokens, log_probs = sample.teacher_tokens, sample.teacher_token_log_probs
    if tokens is not None:
        _check_per_response(tokens, _INT32, sample.response_length, "teacher_tokens", ndim=2)
    if log_probs is not None:
        _check_per_response(log_probs, _FLOAT32, sample.response_length, "teacher_token_log_probs", ndim=2)
        if tokens is None or tokens.shape != log_probs.shape:
            raise MalformedMessage(
                "teacher_token_log_probs",
                f"shape {log_probs.shape}; teacher_tokens has {None if tokens is None else tokens.shape}",
            )


def _check_routing(sample: Sample) -> None:
    if sample.rollout_routed_experts is not None:
        _check_experts(sample.rollout_routed_experts, len(sample.tokens), "rollout_routed_experts")


def _check_versions(sample: Sample) -> None:
    _check_spans(sample.weight_versions, sample.response_length)


def _check_rewards(sample: Sample) -> None:
    if sample.reward is not None:
        _check_reward(sample.reward, "reward")


def _values_hold(samples: Sequence[Sample]) -> bool:
    """Return whether `_check_values` would accept all samples, with few calls."""
    for block in _blocks([sample.tokens for sample in samples]):
        if block.min(initial=0) < 0:
            return False
    log_probs = [sample.rollout_log_probs for sample in samples] + [sample.teacher_log_probs for sample in samples]
    log_probs += [None if s.teacher_token_log_probs is None else s.teacher_token_log_probs.ravel() for s in samples]
    for block in _blocks([array for array in log_probs if array is not None]):
        if not np.isfinite(block).all():
            return False
    masks = [sample.loss_mask for sample in samples if sample.loss_mask is not None]
    return all(block.max(initial=0) <= 1 for block in _blocks(masks))


def _blocks(arrays: Sequence[npt.NDArray[Any]]) -> Sequence[npt.NDArray[Any]]:
    return [np.concatenate(arrays)] if len(arrays) > 1 and sum(map(len, arrays)) <= _JOINED_ENTRIES else arrays


def _check_values(sample: Sample) -> None:
    """Check the entries of arrays whose form is valid."""
    for check in VALUE_CHECKS.values():
        check(sample)


def _check_token_values(sample: Sample) -> None:
    if (at := _first(sample.tokens < 0)) is not None:
        raise MalformedMessage("tokens", f"token {at} is {sample.tokens[at]}; token ids are not negative")


def _check_mask_values(sample: Sample) -> None:
    if (mask := sample.loss_mask) is not None and (at := _first(mask > 1)) is not None:
        raise MalformedMessage("loss_mask", f"entry {at} is {mask[at]}; allowed: 0 and 1")


def _check_rollout_values(sample: Sample) -> None:
    _check_log_probs(sample.rollout_log_probs, "rollout_log_probs")


def _check_teacher_values(sample: Sample) -> None:
    _check_log_probs(sample.teacher_log_probs, "teacher_log_probs")


def _check_teacher_token_values(sample: Sample) -> None:
    log_probs = sample.teacher_token_log_probs
    _check_log_probs(None if log_probs is None else log_probs.ravel(), "teacher_token_log_probs")


def _check_log_probs(array: npt.NDArray[np.float32] | None, path: str) -> None:
    if array is not None and (at := _first(~np.isfinite(array))) is not None:
        raise MalformedMessage(path, f"entry {at} is {array[at]}; log-probabilities are finite")


def _first(where: npt.NDArray[np.bool_]) -> int | None:
    return int(where.argmax()) if where.any() else None


def _check_experts(array: np.ndarray[Any, Any], num_tokens: int, path: str) -> None:
    _check_dtype(array, (_UINT8, _UINT16), 3, path)
    if array.shape[0] != max(num_tokens - 1, 0):
        raise MalformedMessage(
            path, f"shape {array.shape} for {num_tokens} tokens; expected ({max(num_tokens - 1, 0)}, moe_layers, top_k)"
        )


def _check_per_response(
    array: np.ndarray[Any, Any], dtype: np.dtype[Any], length: int, path: str, *, ndim: int = 1
) -> None:
    _check_dtype(array, (dtype,), ndim, path)
    if len(array) != length:
        raise MalformedMessage(path, f"{len(array)} entries, but response_length is {length}")


def _check_dtype(array: Any, dtypes: Sequence[np.dtype[Any]], ndim: int, path: str) -> None:
    if not isinstance(array, np.ndarray):
        raise MalformedMessage(path, f"a {type(array).__name__}; expected a numpy array")
    if array.dtype not in dtypes:
        allowed = " or ".join(dtype.name for dtype in dtypes)
        raise MalformedMessage(path, f"dtype {array.dtype}; expected {allowed}")
    if array.ndim != ndim:
        raise MalformedMessage(path, f"shape {array.shape}; expected {ndim} dimension{'s' * (ndim > 1)}")


def _check_spans(spans: Sequence[VersionSpan], length: int) -> None:
    covered = 0
    for i, span in enumerate(spans):
        with prefixed(f"weight_versions[{i}]."):
            _check_unsigned(span.version, UINT64_MAX, "version")
            _check_unsigned(span.start, UINT32_MAX, "start")
            _check_unsigned(span.end, UINT32_MAX, "end")
            if span.start != covered:
                raise MalformedMessage("start", f"{span.start}; expected {covered}, where the span before it ended")
            if span.end <= span.start:
                raise MalformedMessage("end", f"{span.end}; expected more than start = {span.start}")
        covered = span.end
    if covered != length:
        raise MalformedMessage("weight_versions", f"cover {covered} response tokens, but response_length is {length}")


def _check_reward(reward: Reward, path: str) -> None:
    if not isinstance(reward, dict):
        _check_finite(reward, path)
        return
    if not reward:
        raise MalformedMessage(path, "no values; a named reward has at least one")
    for name, value in reward.items():
        _check_text(name, path)
        _check_finite(value, f"{path}[{name!r}]")


def _check_finite(value: Any, path: str) -> None:
    if not isinstance(value, _NUMBERS):
        raise MalformedMessage(path, f"a {type(value).__name__}; expected a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond the doubles
        finite = False
    if not finite:
        raise MalformedMessage(
            path, f"{value if isinstance(value, float) else 'an integer'}; a reward is a finite double"
        )


def _check_stats(sample: Sample) -> None:
    if (speculative := sample.speculative) is not None:
        where = "speculative."
        _check_unsigned(speculative.accepted_draft_tokens, UINT64_MAX, where + "accepted_draft_tokens")
        _check_unsigned(speculative.proposed_draft_tokens, UINT64_MAX, where + "proposed_draft_tokens")
        _check_unsigned(speculative.verify_count, UINT64_MAX, where + "verify_count")
        if speculative.accepted_draft_tokens > speculative.proposed_draft_tokens:
            raise MalformedMessage(
                where + "accepted_draft_tokens",
                f"{speculative.accepted_draft_tokens}, more than the {speculative.proposed_draft_tokens} proposed",
            )
    if (cache := sample.prefix_cache) is not None:
        where = "prefix_cache."
        _check_unsigned(cache.cached_tokens, UINT64_MAX, where + "cached_tokens")
        _check_unsigned(cache.prompt_tokens, UINT64_MAX, where + "prompt_tokens")
        if cache.cached_tokens > cache.prompt_tokens:
            raise MalformedMessage(
                where + "cached_tokens", f"{cache.cached_tokens}, more than the prompt's {cache.prompt_tokens}"
            )


def _check_prompt(prompt: Any, path: str) -> None:
    if isinstance(prompt, str):
        _check_text(prompt, path)
        return
    if not isinstance(prompt, list):
        raise MalformedMessage(path, f"a {type(prompt).__name__}; expected text or a list of messages")
    for i, message in enumerate(prompt):
        if not isinstance(message, dict):
            raise MalformedMessage(f"{path}[{i}]", f"a {type(message).__name__}; a message is a JSON object")


def _check_text(text: Any, path: str) -> None:
    if not isinstance(text, str):
        raise MalformedMessage(path, f"a {type(text).__name__}; expected text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MalformedMessage(path, f"not valid Unicode text: {error.reason} at {error.start}") from error


def _check_unsigned(value: Any, maximum: int, path: str) -> None:
    if type(value) is int and 0 <= value <= maximum:
        return
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise MalformedMessage(path, f"a {type(value).__name__}; expected an integer")
    if not 0 <= int(value) <= maximum:
        raise MalformedMessage(path, f"{value}; allowed: 0 to {maximum}")


FORM_CHECKS: tuple[Callable[[Sample], None], ...] = (
    _check_identity,
    _check_texts,
    _check_state,
    _check_tokens,
    _check_loss_mask,
    _check_rollout_log_probs,
    _check_teacher_log_probs,
    _check_teacher_tokens,
    _check_routing,
    _check_versions,
    _check_rewards,
    _check_stats,
)
"""What `check_sample` checks first; each names the field."""
VALUE_CHECKS: Mapping[str, Callable[[Sample], None]] = {
    "tokens": _check_token_values,
    "loss_mask": _check_mask_values,
    "rollout_log_probs": _check_rollout_values,
    "teacher_log_probs": _check_teacher_values,
    "teacher_token_log_probs": _check_teacher_token_values,
}
"""What it checks then, of fields whose form is valid."""
