"""What must hold of a sample, whichever way it crosses the wire."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from miles.types.errors import MalformedMessage
from miles.types.sample import Reward, Sample, SampleGroup, SampleStatus, VersionSpan

UINT32_MAX = 2**32 - 1
UINT64_MAX = 2**64 - 1


def check_group(group: SampleGroup, path: str = "") -> None:
    """Raise MalformedMessage unless the group and all its samples hold what sample.proto says of them.

    `path` prefixes field names, for a group inside another message; end it with a dot.
    """
    _check_text(group.job_id, path + "job_id")
    _check_unsigned(group.group_id, UINT64_MAX, path + "group_id")
    previous = -1
    for i, sample in enumerate(group.samples):
        where = f"{path}samples[{i}]."
        check_sample(sample, where)
        if sample.group_id != group.group_id:
            raise MalformedMessage(where + "group_id", f"{sample.group_id}, but the group's is {group.group_id}")
        if sample.index <= previous:
            raise MalformedMessage(where + "index", f"{sample.index} after {previous}; samples are in order of index")
        previous = sample.index


def check_sample(sample: Sample, path: str = "") -> None:
    """Raise MalformedMessage, naming the first offending field, unless the sample holds what sample.proto says."""
    _check_unsigned(sample.group_id, UINT64_MAX, path + "group_id")
    _check_unsigned(sample.index, UINT32_MAX, path + "index")
    _check_prompt(sample.prompt, path + "prompt")
    _check_text(sample.response, path + "response")
    if sample.label is not None:
        _check_text(sample.label, path + "label")
    if not isinstance(sample.status, SampleStatus):
        raise MalformedMessage(path + "status", f"{sample.status!r} is not a SampleStatus")
    if not isinstance(sample.metadata, dict):
        raise MalformedMessage(path + "metadata", f"a {type(sample.metadata).__name__}; expected a JSON object")
    _check_arrays(sample, path)
    _check_spans(sample.weight_versions, sample.response_length, path + "weight_versions")
    if sample.reward is not None:
        _check_reward(sample.reward, path + "reward")
    _check_stats(sample, path)


def _check_arrays(sample: Sample, path: str) -> None:
    _check_dtype(sample.tokens, (np.int32,), 1, path + "tokens")
    num_tokens = len(sample.tokens)
    if num_tokens and int(sample.tokens.min()) < 0:
        at = int(np.argmax(sample.tokens < 0))
        raise MalformedMessage(path + "tokens", f"token {at} is {sample.tokens[at]}; token ids are not negative")
    length = sample.response_length
    _check_unsigned(length, UINT32_MAX, path + "response_length")
    if length > num_tokens:
        raise MalformedMessage(path + "response_length", f"{length}, but there are only {num_tokens} tokens")
    if sample.loss_mask is not None:
        _check_per_response(sample.loss_mask, np.uint8, length, path + "loss_mask")
        if length and int(sample.loss_mask.max()) > 1:
            at = int(np.argmax(sample.loss_mask > 1))
            raise MalformedMessage(path + "loss_mask", f"entry {at} is {sample.loss_mask[at]}; allowed: 0 and 1")
    for name in ("rollout_log_probs", "teacher_log_probs"):
        array = getattr(sample, name)
        if array is not None:
            _check_per_response(array, np.float32, length, path + name)
            finite = np.isfinite(array)
            if not finite.all():
                at = int(np.argmin(finite))
                raise MalformedMessage(path + name, f"entry {at} is {array[at]}; log-probabilities are finite")
    if sample.rollout_routed_experts is not None:
        _check_experts(sample.rollout_routed_experts, num_tokens, path + "rollout_routed_experts")


def _check_experts(array: np.ndarray[Any, Any], num_tokens: int, path: str) -> None:
    _check_dtype(array, (np.uint8, np.uint16), 3, path)
    if array.shape[0] != max(num_tokens - 1, 0):
        raise MalformedMessage(
            path, f"shape {array.shape} for {num_tokens} tokens; expected ({max(num_tokens - 1, 0)}, moe_layers, top_k)"
        )


def _check_per_response(array: np.ndarray[Any, Any], dtype: type[np.generic], length: int, path: str) -> None:
    _check_dtype(array, (dtype,), 1, path)
    if len(array) != length:
        raise MalformedMessage(path, f"{len(array)} entries, but response_length is {length}")


def _check_dtype(array: Any, dtypes: Sequence[type[np.generic]], ndim: int, path: str) -> None:
    if not isinstance(array, np.ndarray):
        raise MalformedMessage(path, f"a {type(array).__name__}; expected a numpy array")
    if array.dtype not in dtypes:
        allowed = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise MalformedMessage(path, f"dtype {array.dtype}; expected {allowed}")
    if array.ndim != ndim:
        raise MalformedMessage(path, f"shape {array.shape}; expected {ndim} dimension{'s' * (ndim > 1)}")


def _check_spans(spans: Sequence[VersionSpan], length: int, path: str) -> None:
    covered = 0
    for i, span in enumerate(spans):
        where = f"{path}[{i}]"
        _check_unsigned(span.version, UINT64_MAX, where + ".version")
        _check_unsigned(span.start, UINT32_MAX, where + ".start")
        _check_unsigned(span.end, UINT32_MAX, where + ".end")
        if span.start != covered:
            raise MalformedMessage(
                where + ".start", f"{span.start}; expected {covered}, where the span before it ended"
            )
        if span.end <= span.start:
            raise MalformedMessage(where + ".end", f"{span.end}; expected more than start = {span.start}")
        covered = span.end
    if covered != length:
        raise MalformedMessage(path, f"cover {covered} response tokens, but response_length is {length}")


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
    if not isinstance(value, int | float | np.integer | np.floating):
        raise MalformedMessage(path, f"a {type(value).__name__}; expected a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond the doubles
        finite = False
    if not finite:
        raise MalformedMessage(
            path, f"{value if isinstance(value, float) else 'an integer'}; a reward is a finite double"
        )


def _check_stats(sample: Sample, path: str) -> None:
    if (speculative := sample.speculative) is not None:
        where = path + "speculative."
        _check_unsigned(speculative.accepted_draft_tokens, UINT64_MAX, where + "accepted_draft_tokens")
        _check_unsigned(speculative.proposed_draft_tokens, UINT64_MAX, where + "proposed_draft_tokens")
        _check_unsigned(speculative.verify_count, UINT64_MAX, where + "verify_count")
        if speculative.accepted_draft_tokens > speculative.proposed_draft_tokens:
            raise MalformedMessage(
                where + "accepted_draft_tokens",
                f"{speculative.accepted_draft_tokens}, more than the {speculative.proposed_draft_tokens} proposed",
            )
    if (cache := sample.prefix_cache) is not None:
        where = path + "prefix_cache."
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
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise MalformedMessage(path, f"a {type(value).__name__}; expected an integer")
    if not 0 <= int(value) <= maximum:
        raise MalformedMessage(path, f"{value}; allowed: 0 to {maximum}")
