"""The proposers by kind of draft."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from miles.config.speculation import DraftKind
from miles.services.rollout.engines.torch.drafts.eagle3 import Eagle3Proposer
from miles.services.rollout.engines.torch.drafts.ngram import NgramProposer
from miles.services.rollout.engines.torch.drafts.proposer import Policy, Proposer
from miles.services.rollout.engines.torch.drafts.standalone import StandaloneProposer

_BY_KIND: Mapping[DraftKind, Callable[[Policy], Proposer]] = {
    DraftKind.NGRAM: lambda _policy: NgramProposer(),
    DraftKind.STANDALONE: StandaloneProposer,
    DraftKind.EAGLE3: Eagle3Proposer,
}


def create_proposer(policy: Policy) -> Proposer:
    """Build the proposer of the policy's kind of drafts.

    Raises ValueError for a kind that this engine lacks, and what its proposer raises when it cannot be built.
    """
    kind = policy.speculation.kind
    if kind not in _BY_KIND:
        known = ", ".join(sorted(kind.value for kind in _BY_KIND))
        raise ValueError(f"the torch engine has no drafts of kind {kind.value}; it has {known}")
    return _BY_KIND[kind](policy)
