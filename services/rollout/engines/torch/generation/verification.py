"""Verification: which of a request's drafts are what the policy draws, and what it draws behind them.

Every position is drawn as it would be without drafts: from its own row of logits, with the random number of its own
index, under the stop rule at its own length. Drafts are kept up to the first that differs from what was drawn there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

import torch

from miles.services.rollout.engines.torch.generation.sampling import Draw, likeliest, sample
from miles.services.rollout.engines.torch.generation.sequence import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens that a step has drawn for a sequence: its accepted drafts and one more."""

    sequence: Sequence
    tokens: list[int]
    log_probs: list[float]
    top_ids: list[list[int]]
    """Beside each token as many of the likeliest as the request asks for."""

    @property
    def accepted(self) -> int:
        """Drafts whose keys and values stay."""
        return len(self.tokens) - 1


def verify(logits_RV: torch.Tensor, drawing: Seq[Sequence]) -> list[Drawn]:
    """Draw for each sequence; `logits_RV` has a row for its next token and each of its drafts, one after the other."""
    draws = [draw for sequence in drawing for draw in _draws(sequence)]
    if not draws:
        return []
    counts = [sequence.request.top_token_ids for sequence in drawing for _ in range(1 + len(sequence.drafts))]
    top_ids = likeliest(logits_RV, counts)
    tokens, log_probs = sample(logits_RV, draws)
    drawn = []
    first = 0
    for sequence in drawing:
        end = first + 1 + accepted(sequence.drafts, tokens[first:])
        drawn.append(Drawn(sequence, tokens[first:end], log_probs[first:end], top_ids[first:end]))
        first += 1 + len(sequence.drafts)
    return drawn


def accepted(drafts: Seq[int], tokens: Seq[int]) -> int:
    """How many drafts, from the first on, are the tokens that were drawn."""
    return next((i for i, draft in enumerate(drafts) if draft != tokens[i]), len(drafts))


def _draws(sequence: Sequence) -> list[Draw]:
    length = sequence.response_length
    return [
        Draw(sequence.request.sampling, length + i, sequence.stop_rule.banned(length + i))
        for i in range(1 + len(sequence.drafts))
    ]
