"""What becomes of drafts, by version of the policy and of the draft model. Pure."""

from __future__ import annotations

import dataclasses

from miles.services.rollout.engines.base import SpeculationCounts
from miles.types import SpeculativeStats

KEPT_PAIRS = 16


class Acceptance:
    """Adds up the counters of responses; keeps those of the newest pairs of versions."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int | None], SpeculationCounts] = {}

    def add(self, policy_version: int, draft_version: int | None, new: SpeculativeStats) -> None:
        """Count what was verified since the last call for a request."""
        if not new.verify_count:
            return
        pair = (policy_version, draft_version)
        before = self._counts.get(pair, SpeculationCounts(*pair))
        self._counts[pair] = dataclasses.replace(
            before,
            verify_count=before.verify_count + new.verify_count,
            proposed_draft_tokens=before.proposed_draft_tokens + new.proposed_draft_tokens,
            accepted_draft_tokens=before.accepted_draft_tokens + new.accepted_draft_tokens,
        )
        if len(self._counts) > KEPT_PAIRS:
            del self._counts[min(self._counts, key=_age)]

    @property
    def counts(self) -> tuple[SpeculationCounts, ...]:
        """Of the newest pairs, oldest first."""
        return tuple(self._counts[pair] for pair in sorted(self._counts, key=_age))


def _age(pair: tuple[int, int | None]) -> tuple[int, int]:
    policy, draft = pair
    return policy, -1 if draft is None else draft


class RequestCounters:
    """Turns a request's totals, of which each event of its stream has the newest, into what is new in each."""

    def __init__(self) -> None:
        self._seen = SpeculativeStats()

    def new(self, total: SpeculativeStats | None) -> SpeculativeStats:
        """What an event adds. One without counters, as of a request that the server lost, adds nothing."""
        if total is None:
            return SpeculativeStats()
        seen, self._seen = self._seen, total
        return SpeculativeStats(
            accepted_draft_tokens=max(0, total.accepted_draft_tokens - seen.accepted_draft_tokens),
            proposed_draft_tokens=max(0, total.proposed_draft_tokens - seen.proposed_draft_tokens),
            verify_count=max(0, total.verify_count - seen.verify_count),
        )
