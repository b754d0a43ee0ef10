"""What events of a response add to the counters of drafts. Pure."""

from __future__ import annotations

from miles.types import SpeculativeStats


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
