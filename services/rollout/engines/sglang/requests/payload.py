"""A generation request as SGLang spells it."""

from __future__ import annotations

from typing import Any

from miles.services.rollout.engines.base import GenerationRequest

STREAM_INTERVAL = 256
"""Tokens from one event of a stream to the next. An event shows that a response gets on and little else, as an abort
returns all there is, but what a request that was sent back to the queue has generated since its last event. Each costs
every process on its way as much as some dozen tokens."""
_SEEDS = 1 << 63


def to_payload(
    request: GenerationRequest, rid: str, *, cache_key: str, seeded: bool, interval: int = STREAM_INTERVAL
) -> dict[str, Any]:
    """The body of POST /generate.

    Args:
        request: what to generate.
        rid: id under which the server can be told to abort it.
        cache_key: prefixes are shared only among requests with the same key.
        seeded: whether the server honours seeds.
        interval: tokens from one event to the next.
    """
    sampling = request.sampling
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens - request.resumed_tokens,
        "min_new_tokens": max(0, sampling.min_new_tokens - request.resumed_tokens),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        # The rest of what a checkpoint's generation_config.json might set otherwise.
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "stream_interval": interval,
    }
    if seeded:
        params["sampling_seed"] = sampling.seed % _SEEDS
    payload: dict[str, Any] = {
        "rid": rid,
        "input_ids": list(request.input_ids),
        "sampling_params": params,
        "return_logprob": True,
        "stream": True,
        "extra_key": cache_key,
    }
    if request.return_routed_experts:
        payload["return_routed_experts"] = True
        payload["routed_experts_start_len"] = request.routed_experts_start
    return payload


def faults(request: GenerationRequest, *, vocabulary: int, max_total_tokens: int, running: bool) -> list[str]:
    """Why the engine cannot serve a request; empty when it can."""
    sampling = request.sampling
    prompt = len(request.input_ids) - request.resumed_tokens
    wrong = [id_ for id_ in request.input_ids if not 0 <= id_ < vocabulary]
    start = request.routed_experts_start
    checks = (
        (not running, "a request with this id is running"),
        (prompt >= 1, f"{len(request.input_ids)} input tokens, {request.resumed_tokens} of them resumed: no prompt"),
        (request.resumed_tokens >= 0, f"resumed_tokens is {request.resumed_tokens}; it cannot be negative"),
        (not wrong, f"token {wrong[:1]} is not in the vocabulary of {vocabulary}"),
        (
            sampling.max_new_tokens > request.resumed_tokens,
            f"max_new_tokens is {sampling.max_new_tokens}; it must be more than the {request.resumed_tokens} resumed",
        ),
        (
            prompt + sampling.max_new_tokens <= max_total_tokens,
            f"prompt of {prompt} tokens and max_new_tokens {sampling.max_new_tokens} exceed the engine's limit of "
            f"{max_total_tokens} tokens; shorten the prompt or lower max_new_tokens",
        ),
        (sampling.temperature >= 0, f"temperature is {sampling.temperature}; it must be 0 (greedy) or more"),
        (0 < sampling.top_p <= 1, f"top_p is {sampling.top_p}; it must be in (0, 1]"),
        (sampling.top_k == -1 or sampling.top_k >= 1, f"top_k is {sampling.top_k}; it must be -1 (all) or positive"),
        (
            0 <= sampling.min_new_tokens <= sampling.max_new_tokens,
            f"min_new_tokens is {sampling.min_new_tokens}; it must be in [0, max_new_tokens]",
        ),
        (all(sampling.stop), "stop holds an empty string"),
        (
            0 <= start <= len(request.input_ids),
            f"routed_experts_start is {start}; there are {len(request.input_ids)} input tokens",
        ),
    )
    return [message for good, message in checks if not good]
