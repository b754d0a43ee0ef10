"""What became of drafts, as counts, and what follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from miles.rpc.gen import rollout_pb2

_HALVINGS = 40


class Versions(NamedTuple):
    """Which version of the policy verified what which version of the draft model had proposed."""

    policy: int
    draft: int | None
    """None for drafts without weights of their own, and before the first version."""

    def __str__(self) -> str:
        return f"policy {self.policy}" if self.draft is None else f"policy {self.policy}, draft {self.draft}"


@dataclasses.dataclass(frozen=True, slots=True)
class DraftCounts:
    """Counts of drafts; sums and differences are those of each count."""

    verify_count: int = 0
    """Forward passes times the requests in them that had drafts."""
    proposed: int = 0
    """Draft tokens proposed."""
    accepted: int = 0
    """Draft tokens that the policy accepted."""

    @classmethod
    def of(cls, message: rollout_pb2.SpeculationCounts) -> DraftCounts:
        """Read what an engine reports of a pair of versions."""
        return cls(message.verify_count, message.proposed_draft_tokens, message.accepted_draft_tokens)

    def to_proto(self, versions: Versions) -> rollout_pb2.SpeculationCounts:
        """Return the counts of a pair of versions as a message."""
        return rollout_pb2.SpeculationCounts(
            policy_version=versions.policy,
            draft_version=versions.draft,
            verify_count=self.verify_count,
            proposed_draft_tokens=self.proposed,
            accepted_draft_tokens=self.accepted,
        )

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(
            self.verify_count + other.verify_count, self.proposed + other.proposed, self.accepted + other.accepted
        )

    def __sub__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(
            self.verify_count - other.verify_count, self.proposed - other.proposed, self.accepted - other.accepted
        )

    def any_below(self, other: DraftCounts) -> bool:
        """Whether one of the counts is smaller than another's, which no counter becomes by itself."""
        return (
            self.verify_count < other.verify_count or self.proposed < other.proposed or self.accepted < other.accepted
        )

    @property
    def accept_length(self) -> float | None:
        """Mean tokens per verification: the accepted drafts and the policy's own token; None without verifications."""
        return 1 + self.accepted / self.verify_count if self.verify_count else None

    @property
    def accept_rate(self) -> float | None:
        """Accepted drafts over those proposed; None without any."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def drafts_per_verification(self) -> float:
        """Mean draft tokens that a verification had before it."""
        return self.proposed / self.verify_count if self.verify_count else 0.0


def total(counts: Iterable[DraftCounts]) -> DraftCounts:
    """Return the sum of counts."""
    return sum(counts, DraftCounts())


def length_at(counts: DraftCounts, drafts: float) -> float:
    """Return the mean tokens per verification that the same drafts would have with `drafts` of them in a row.

    Lengths with other numbers of drafts cannot be compared: engines draft fewer where few are accepted. This takes
    each draft to be accepted with one chance a if those before it were, so that of k drafts in a row a + a² + … + a^k
    are (Leviathan et al. 2023, eq. 1), solved for a by bisection.
    """
    if not counts.verify_count or not counts.proposed:
        return 1.0
    accepted, own = counts.accepted / counts.verify_count, counts.drafts_per_verification
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _accepted_of(own, middle) < accepted else (low, middle)
    return 1 + _accepted_of(drafts, high)


def _accepted_of(drafts: float, chance: float) -> float:
    if chance >= 1.0:
        return drafts
    return float(chance * (1 - chance**drafts) / (1 - chance))
