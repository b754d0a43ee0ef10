"""The body of a generation request to SGLang."""

from __future__ import annotations

from typing import Any

from miles.services.rollout.engines.base import GenerationRequest

STREAM_INTERVAL = 256
"""Tokens per event of a stream. Events mainly show progress: an abort returns all tokens anyway, except for requests
that the server re-queued, which return only what was streamed. Each event costs every process that it passes as much as
some dozen tokens."""
_SEEDS = 1 << 63
_PLAIN: dict[str, Any] = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "logit_bias": None,
    "ignore_eos": False,
    "regex": None,
    "json_schema": None,
    "ebnf": None,
    "structural_tag": None,
    "stop_regex": None,
    "custom_params": None,
    "beam_width": None,
    "n": 1,
}
"""All else that changes what is drawn, which a server's own preferences would otherwise set: tokens are scored as drawn
from the full distribution at the temperature."""


def to_payload(
    request: GenerationRequest, rid: str, *, cache_key: str, seeded: bool, interval: int = STREAM_INTERVAL
) -> dict[str, Any]:
    """Build the body of POST /generate.

    Args:
        request: what to generate.
        rid: id by which the server can abort it.
        cache_key: prefixes are shared only among requests with the same key.
        seeded: whether the server honours seeds.
        interval: tokens from one event to the next. The first token of a response gets no event of its own.
    """
    sampling = request.sampling
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens - request.resumed_tokens,
        "min_new_tokens": max(0, sampling.min_new_tokens - request.resumed_tokens),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        **_PLAIN,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        # With a positive one SGLang sends an event after the first token too, which doubles what short responses cost.
        "stream_interval": -interval,
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
    if request.top_token_ids:
        payload["top_logprobs_num"] = request.top_token_ids
    if request.return_routed_experts:
        payload["return_routed_experts"] = True
        payload["routed_experts_start_len"] = request.routed_experts_start
    return payload
