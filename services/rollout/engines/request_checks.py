"""Checks of a generation request that every engine makes before it takes one."""

from __future__ import annotations

from collections.abc import Sequence

from miles.services.rollout.engines.base import GenerationRequest

Check = tuple[bool, str]
"""Whether it holds, and the fault when it does not."""


def check_request(
    request: GenerationRequest,
    *,
    vocabulary: int,
    max_total_tokens: int,
    running: bool,
    further: Sequence[Check] = (),
) -> None:
    """Raise ValueError listing every fault of a request that the engine cannot serve.

    Args:
        request: the request.
        vocabulary: size of the model's vocabulary.
        max_total_tokens: the engine's limit of prompt and response together.
        running: whether a request of the same id is running.
        further: checks that are this engine's own.
    """
    sampling = request.sampling
    prompt = len(request.input_ids) - request.resumed_tokens
    wrong = [id_ for id_ in request.input_ids if not 0 <= id_ < vocabulary]
    checks: tuple[Check, ...] = (
        (not running, "a request with this id is running"),
        (prompt >= 1, f"{len(request.input_ids)} input tokens, {request.resumed_tokens} of them resumed: no prompt"),
        (request.resumed_tokens >= 0, f"resumed_tokens is {request.resumed_tokens}; it cannot be negative"),
        (not wrong, f"token {wrong[:1]} is not in the vocabulary of {vocabulary}"),
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
        *further,
    )
    faults = [fault for holds, fault in checks if not holds]
    if faults:
        raise ValueError(f"request {request.request_id}: " + "; ".join(faults))
