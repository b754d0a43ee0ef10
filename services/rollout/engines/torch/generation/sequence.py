"""The state of one running request: its tokens, cache position, versions and routing."""

from __future__ import annotations

from array import array

from miles.services.rollout.engines.base import FinishReason, GenerationRequest, GenerationResult
from miles.services.rollout.engines.torch.generation.stop import StopRule
from miles.services.rollout.engines.torch.model.routing_recorder import RoutingLog
from miles.types import SpeculativeStats, VersionSpan


class Sequence:
    """A request's tokens and what is known of each; only the worker thread touches it."""

    def __init__(self, request: GenerationRequest, stop_rule: StopRule) -> None:
        self.request = request
        self.stop_rule = stop_rule
        self.tokens = list(request.input_ids)
        """Prompt, resumed tokens and new tokens."""
        self.prompt_length = len(request.input_ids) - request.resumed_tokens
        self.prompt_key = (array("q", self.tokens[: self.prompt_length]).tobytes(), request.return_routed_experts)
        """Equal for requests that can share a prompt."""
        self.computed = 0
        """Leading positions whose keys and values are in the cache."""
        self.current_weights = True
        """Whether those were computed with the weights served now."""
        self.slot = -1
        """KV slot; -1 while it waits for one."""
        self.drafts: list[int] = []
        """Proposed to follow `tokens`; the next forward pass verifies them."""
        self.cached_prompt_tokens = 0
        self.routing = RoutingLog() if request.return_routed_experts else None
        self.speculative: SpeculativeStats | None = None
        """What became of its drafts; None where there are never any."""
        self._spans: list[VersionSpan] = []

    @property
    def input_length(self) -> int:
        """Tokens the request came with."""
        return len(self.request.input_ids)

    @property
    def response_length(self) -> int:
        """Tokens after the prompt, resumed ones included."""
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be sampled, drafts apart; 1 means decoding."""
        return len(self.tokens) - self.computed

    def append(self, token: int, version: int) -> FinishReason | None:
        """Add a token sampled with the weights of `version`; return why the response ends there, if it does."""
        index = len(self.tokens) - self.input_length
        self.tokens.append(token)
        if self._spans and self._spans[-1].version == version:
            self._spans[-1] = VersionSpan(version, self._spans[-1].start, index + 1)
        else:
            self._spans.append(VersionSpan(version, index, index + 1))
        if self.stop_rule.ends(self.tokens, self.response_length):
            return FinishReason.STOP
        if self.response_length >= self.request.sampling.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def forget_cache(self) -> None:
        """Free the KV slot; everything is computed again when the request runs next."""
        self.slot = -1
        self.drafts = []
        self.computed = 0
        self.current_weights = True

    def result(self, reason: FinishReason) -> GenerationResult:
        """The result of the response, which ends here."""
        known = len(self.tokens) - 1
        routed = None
        if self.routing is not None and self.routing.length >= known:
            routed = self.routing.prefix(known)[self.request.routed_experts_start :]
        return GenerationResult(
            reason=reason,
            weight_versions=tuple(self._spans),
            cached_prompt_tokens=self.cached_prompt_tokens,
            routed_experts=routed,
            speculative=self.speculative,
        )
