"""What a generator does about drafts in each step: have them proposed, tell the proposer what became of them, count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from miles.services.rollout.engines.base import SpeculationCounts, SpeculationState
from miles.services.rollout.engines.torch.drafts.proposer import Computed, Proposer
from miles.services.rollout.engines.torch.generation.scheduler import Copy, Plan
from miles.services.rollout.engines.torch.generation.sequence import Sequence as Request
from miles.services.rollout.engines.torch.generation.verification import Drawn
from miles.types import SpeculativeStats

_PAIRS_KEPT = 16
"""Newest pairs of versions that are counted apart."""

Versions = tuple[int, int | None]


class Drafting:
    """Drafts of running requests. Used by the worker thread alone, but for `state`."""

    def __init__(self, proposer: Proposer, num_steps: int, max_draft_tokens: int) -> None:
        """`num_steps`: drafts of a request in one step at most; `max_draft_tokens`: of all requests together."""
        self.proposer = proposer
        self._num_steps = num_steps
        self._max_draft_tokens = max_draft_tokens
        self._counts: dict[Versions, SpeculationCounts] = {}

    @property
    def draft_version(self) -> int | None:
        """Version of the draft's weights; None before the first, and for drafts without."""
        return None if self.proposer.weights is None else self.proposer.weights.version

    @property
    def state(self) -> SpeculationState:
        """As of now, for any thread."""
        return SpeculationState(self.draft_version, self._num_steps, counts=tuple(self._counts.copy().values()))

    def propose(self, plan: Plan) -> None:
        """Give the plan's decoding requests their drafts."""
        self._note_shared(plan.copies)
        steps = self._num_steps
        if plan.decode:
            steps = min(steps, self._max_draft_tokens // len(plan.decode))
        if not steps or not plan.decode:
            return
        for request, drafts in zip(plan.decode, self.proposer.propose(plan.decode, steps), strict=True):
            room = request.request.sampling.max_new_tokens - request.response_length - 1
            request.drafts = drafts[: min(room, steps)]

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
            self._add(policy_version, proposed, accepted)
        request.speculative = stats

    def forget(self, requests: Iterable[Request]) -> None:
        """Requests have ended, or their caches are gone."""
        for request in requests:
            self.proposer.forget(request)

    def _add(self, policy_version: int, proposed: int, accepted: int) -> None:
        versions = (policy_version, self.draft_version)
        before = self._counts.get(versions) or SpeculationCounts(*versions)
        self._counts[versions] = SpeculationCounts(
            *versions,
            before.verify_count + 1,
            before.proposed_draft_tokens + proposed,
            before.accepted_draft_tokens + accepted,
        )
        if len(self._counts) > _PAIRS_KEPT:
            del self._counts[next(iter(self._counts))]

    def _note_shared(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self.proposer.note_shared(copy.source, copy.target, copy.length)


def _computed(request: Request, start: int, length: int, hidden_ND: Mapping[int, torch.Tensor], first: int) -> Computed:
    states = {layer: states_ND[first : first + length] for layer, states_ND in hidden_ND.items()}
    return Computed(request, start, start + length, states)
