"""What a generator does about drafts in each step: have them proposed, tell the proposer what became of them, count."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch

from miles.config.speculation import Speculation
from miles.services.rollout.engines.base import SpeculationState
from miles.services.rollout.engines.torch.drafts.automatic import Automatic, Measured
from miles.services.rollout.engines.torch.drafts.proposer import Computed, Proposer
from miles.services.rollout.engines.torch.generation.scheduler import Copy, Plan
from miles.services.rollout.engines.torch.generation.sequence import Sequence as Request
from miles.services.rollout.engines.torch.generation.verification import Drawn
from miles.services.rollout.engines.version_counts import VersionCounts
from miles.types import SpeculativeStats


class Drafting:
    """Drafts of running requests. Used by the worker thread alone, but for `state`."""

    def __init__(self, proposer: Proposer, speculation: Speculation, *, max_draft_tokens: int, vocabulary: int) -> None:
        """`max_draft_tokens`: of all requests together in one step at most; `vocabulary`: of the policy, in tokens."""
        self.proposer = proposer
        self._vocabulary = vocabulary
        self._num_steps = speculation.num_steps
        self._max_draft_tokens = max_draft_tokens
        self._automatic = None if speculation.adaptive is False else Automatic(speculation.num_steps)
        self._steps = 0
        """Most drafts of a request in the present step."""
        self._served = self.draft_version
        self._counts = VersionCounts()

    @property
    def draft_version(self) -> int | None:
        """Version of the draft's weights; None before the first, and for drafts without."""
        return None if self.proposer.weights is None else self.proposer.weights.version

    @property
    def state(self) -> SpeculationState:
        """As of now, for any thread."""
        counts = self._counts.counts
        automatic = self._automatic
        if automatic is None:
            return SpeculationState(self.draft_version, self._num_steps, counts=counts)
        return SpeculationState(
            self.draft_version, automatic.decided_steps, automatic.reason, counts, speedup=automatic.speedup
        )

    def propose(self, plan: Plan) -> None:
        """Give the plan's decoding requests their drafts."""
        self._note_shared(plan.copies)
        if not plan.decode:
            return
        if self._served != self.draft_version:
            self._served = self.draft_version
            self.weights_changed()
        requests = len(plan.decode)
        decided = self._num_steps if self._automatic is None else self._automatic.steps(requests)
        self._steps = min(decided, self._max_draft_tokens // requests)
        if not self._steps:
            return
        for request, drafts in zip(plan.decode, self.proposer.propose(plan.decode, self._steps), strict=True):
            room = request.request.sampling.max_new_tokens - request.response_length - 1
            request.drafts = list(itertools.takewhile(self._is_token, drafts[: min(room, self._steps)]))

    def note_computed(self, plan: Plan, kept: Mapping[int, int], hidden_ND: Mapping[int, torch.Tensor]) -> None:
        """Pass on what a forward pass has computed, before its tokens are appended.

        `kept`: accepted drafts, by KV slot, of requests that decode. `hidden_ND`: by layer, of all packed tokens.
        """
        computed = []
        first = 0
        for request in plan.decode:
            start, length = len(request.tokens) - 1, 1 + kept[request.slot]
            computed.append(_computed(request, start, length, hidden_ND, first))
            first += 1 + len(request.drafts)
        for chunk in plan.prefill:
            length = chunk.end - chunk.start
            computed.append(_computed(chunk.sequence, chunk.start, length, hidden_ND, first))
            first += length
        self.proposer.note_computed(computed)
        self._note_shared(plan.shares)

    def note_measured(self, plan: Plan, kept: Mapping[int, int], seconds: float) -> None:
        """Learn from the time that a step took, before its tokens are appended; see `note_computed`."""
        mixed = plan.prefill or plan.copies or plan.shares
        if self._automatic is None or mixed or len(plan.decode) > self._max_draft_tokens:
            return
        proposed = [len(request.drafts) for request in plan.decode]
        accepted = [kept[request.slot] for request in plan.decode]
        self._automatic.note(Measured(self._steps, seconds, proposed, accepted))

    def weights_changed(self) -> None:
        """The policy's weights are others now."""
        if self._automatic is not None:
            self._automatic.versions_changed()

    def count(self, drawn: Drawn, taken: int, policy_version: int) -> None:
        """Count a request's verification, of which `taken` tokens are in the response. Its drafts are done with."""
        request = drawn.sequence
        proposed, request.drafts = len(request.drafts), []
        stats = request.speculative or SpeculativeStats()
        if proposed:
            accepted = max(0, taken - 1)
            stats = SpeculativeStats(
                stats.accepted_draft_tokens + accepted, stats.proposed_draft_tokens + proposed, stats.verify_count + 1
            )
            new = SpeculativeStats(accepted, proposed, 1)
            self._counts.add(policy_version, self.draft_version, new)
        request.speculative = stats

    def forget(self, requests: Iterable[Request]) -> None:
        """Requests have ended, or their caches are gone."""
        for request in requests:
            self.proposer.forget(request)

    def _is_token(self, draft: int) -> bool:
        return 0 <= draft < self._vocabulary

    def _note_shared(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self.proposer.note_shared(copy.source, copy.target, copy.length)


def _computed(request: Request, start: int, length: int, hidden_ND: Mapping[int, torch.Tensor], first: int) -> Computed:
    states = {layer: states_ND[first : first + length] for layer, states_ND in hidden_ND.items()}
    return Computed(request, start, start + length, states)
