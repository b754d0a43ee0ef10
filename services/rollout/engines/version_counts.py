"""What becomes of drafts, by version of the policy and of the draft model. Pure."""

from __future__ import annotations

from miles.services.rollout.engines.base import SpeculationCounts
from miles.types import SpeculativeStats

KEPT_PAIRS = 16

_Pair = tuple[int, int | None]


class VersionCounts:
    """Adds up what was verified; keeps the counts of the pairs of versions that were counted for last.

    Not of the highest versions: a policy that was taken back counts on from lower ones. One thread adds, any may read.
    """

    def __init__(self) -> None:
        self._counts: dict[_Pair, SpeculationCounts] = {}
        """By pair, that of the last call last. Another order is another dict, so that readers miss no pair."""

    def add(self, policy_version: int, draft_version: int | None, new: SpeculativeStats) -> None:
        """Count what was verified since the last call."""
        if not new.verify_count:
            return
        pair = (policy_version, draft_version)
        before = self._counts.get(pair) or SpeculationCounts(*pair)
        now = SpeculationCounts(
            *pair,
            before.verify_count + new.verify_count,
            before.proposed_draft_tokens + new.proposed_draft_tokens,
            before.accepted_draft_tokens + new.accepted_draft_tokens,
        )
        if next(reversed(self._counts), None) == pair:
            self._counts[pair] = now
        else:
            others = [each for each in self._counts.items() if each[0] != pair]
            self._counts = dict([*others[1 - KEPT_PAIRS :], (pair, now)])

    @property
    def counts(self) -> tuple[SpeculationCounts, ...]:
        """Of the pairs counted for last, the last one last."""
        return tuple(self._counts.values())
