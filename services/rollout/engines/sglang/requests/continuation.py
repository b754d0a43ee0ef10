"""One response that takes several requests to servers, because pauses end those whose routing is recorded.

SGLang keeps the experts of a token beside the token's keys and values. Where it retracts a request, it computes both
again, with the weights of that time, and would report those experts for tokens that others had sampled. So a pause ends
such a request, with what was recorded, and a new one goes on behind its tokens.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Collection

from miles.services.rollout.engines.base import FinishReason, GenerationDelta, GenerationRequest, GenerationResult
from miles.services.rollout.engines.joining import add_speculative, join_experts, join_spans


class Continuation:
    """What a response has so far, and the request that goes on with it."""

    def __init__(self, request: GenerationRequest, end_tokens: Collection[int] = ()) -> None:
        """`end_tokens`: tokens of the model that end a response, besides those of the request."""
        self._first = request
        self._end_tokens = frozenset(end_tokens) | frozenset(request.sampling.stop_token_ids)
        self._tokens: list[int] = []
        self._earlier = GenerationResult(FinishReason.ABORT, ())
        """Joined results of the requests that were ended."""
        self._earlier_tokens = 0

    @property
    def request(self) -> GenerationRequest:
        """The next request."""
        if not self._tokens:
            return self._first
        recorded = self._earlier.routed_experts
        return dataclasses.replace(
            self._first,
            input_ids=[*self._first.input_ids, *self._tokens],
            resumed_tokens=self._first.resumed_tokens + len(self._tokens),
            routed_experts_start=self._first.routed_experts_start + (0 if recorded is None else len(recorded)),
        )

    def add(self, delta: GenerationDelta) -> GenerationDelta:
        """The current request's delta as one of the whole response."""
        self._tokens.extend(delta.token_ids)
        if delta.result is None:
            return delta
        result = self._joined(delta.result)
        if result.reason is FinishReason.ABORT and not self._lost(result):
            result = dataclasses.replace(result, reason=self._reason(new=len(delta.token_ids)))
        return dataclasses.replace(delta, result=result)

    def goes_on(self, result: GenerationResult) -> bool:
        """Keep the result of a request that was ended, for the next one; False when none can follow."""
        if result.reason is not FinishReason.ABORT or self._lost(result):
            return False
        self._earlier, self._earlier_tokens = result, len(self._tokens)
        return True

    def aborted(self) -> GenerationResult:
        """The result of a response that is aborted between two requests."""
        return self._earlier

    def _joined(self, later: GenerationResult) -> GenerationResult:
        earlier = self._earlier
        if not self._earlier_tokens:
            return later
        if len(self._tokens) == self._earlier_tokens:
            return dataclasses.replace(earlier, reason=later.reason)
        return GenerationResult(
            reason=later.reason,
            weight_versions=join_spans(earlier.weight_versions, later.weight_versions, self._earlier_tokens),
            cached_prompt_tokens=earlier.cached_prompt_tokens,
            routed_experts=join_experts(earlier.routed_experts, later.routed_experts),
            speculative=add_speculative(earlier.speculative, later.speculative),
            retractions=earlier.retractions + later.retractions,
        )

    def _lost(self, result: GenerationResult) -> bool:
        """Whether nobody knows the experts of tokens that came."""
        return bool(self._tokens) and self._first.return_routed_experts and result.routed_experts is None

    def _reason(self, *, new: int) -> FinishReason:
        """Why an aborted response ended: SGLang samples one more token of it without looking at what it is."""
        if new and self._first.resumed_tokens + len(self._tokens) >= self._first.sampling.max_new_tokens:
            return FinishReason.LENGTH
        if new and self._tokens[-1] in self._end_tokens:
            return FinishReason.STOP
        return FinishReason.ABORT


def read_end_tokens(hf_checkpoint: str) -> frozenset[int]:
    """The tokens that end a response by a checkpoint's config.json and generation_config.json."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = pathlib.Path(hf_checkpoint) / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for part in (content, content.get("text_config") or {}):
            tokens = part.get("eos_token_id")
            found.update([tokens] if isinstance(tokens, int) else tokens or ())
    return frozenset(found)
