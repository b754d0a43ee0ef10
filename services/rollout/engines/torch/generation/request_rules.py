"""What a checkpoint says of requests: which it can serve, and what ends their responses."""

from __future__ import annotations

from collections.abc import Collection

from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
from miles.services.rollout.engines.request_checks import check_request
from miles.services.rollout.engines.torch.generation.stop import Decoder, StopRule, StopStrings


class RequestRules:
    """Checks requests and builds their stop rules."""

    def __init__(
        self, tokenizer: Decoder, end_tokens: Collection[int], *, vocabulary: int, max_total_tokens: int
    ) -> None:
        """`max_total_tokens`: prompt and response of a request together at most."""
        self._tokenizer = tokenizer
        self._end_tokens = tuple(end_tokens)
        self._vocabulary = vocabulary
        self._max_total_tokens = max_total_tokens

    def stop_rule(self, sampling: SamplingParams) -> StopRule:
        """What ends a response: the model's own end tokens, and what the request names."""
        strings = StopStrings(self._tokenizer, sampling.stop) if sampling.stop else None
        return StopRule((*self._end_tokens, *sampling.stop_token_ids), strings, sampling.min_new_tokens)

    def check(self, request: GenerationRequest, *, running: bool) -> None:
        """Raise ValueError listing all faults of a request; `running`: whether one of its id is."""
        sampling = request.sampling
        check_request(
            request,
            vocabulary=self._vocabulary,
            max_total_tokens=self._max_total_tokens,
            running=running,
            further=(
                (sampling.max_new_tokens >= 1, f"max_new_tokens is {sampling.max_new_tokens}; it must be at least 1"),
                (0 <= sampling.seed < 2**64, f"seed is {sampling.seed}; it must fit 64 bits"),
            ),
        )
