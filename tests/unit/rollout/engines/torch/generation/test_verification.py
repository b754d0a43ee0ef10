"""Drafts are kept up to the first that is not what was drawn."""

from __future__ import annotations

import pytest
import torch

from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
from miles.services.rollout.engines.torch.generation.sequence import Sequence
from miles.services.rollout.engines.torch.generation.stop import StopRule
from miles.services.rollout.engines.torch.generation.verification import accepted, verify


@pytest.mark.parametrize(
    ("drafts", "tokens", "kept"),
    [([], [5], 0), ([5], [5, 6], 1), ([4], [5, 6], 0), ([5, 6, 7], [5, 6, 8, 9], 2), ([5, 4, 7], [5, 6, 7, 8], 1)],
)
def test_drafts_are_accepted_while_they_are_what_was_drawn(drafts: list[int], tokens: list[int], kept: int) -> None:
    assert accepted(drafts, tokens) == kept


def greedy(drafts: list[int], min_new_tokens: int = 0, top: int = 0) -> Sequence:
    params = SamplingParams(max_new_tokens=9, temperature=0.0)
    made = Sequence(GenerationRequest("r", [1, 2], params, top_token_ids=top), StopRule((3,), None, min_new_tokens))
    made.drafts = drafts
    return made


def test_each_position_has_its_own_row_and_rule() -> None:
    """Token 3 ends responses, which must not be the first two tokens of the second request."""
    logits_RV = torch.zeros(9, 6)
    logits_RV[:, 3], logits_RV[:, 4] = 2.0, 1.0
    logits_RV[1, 5] = 9.0
    logits_RV[8] = torch.nan  # padding
    first, second, third = verify(logits_RV, [greedy([3, 5], top=2), greedy([4, 4, 3], min_new_tokens=3), greedy([])])
    assert (first.tokens, first.accepted) == ([3, 5, 3], 2)
    assert first.top_ids == [[3, 4], [5, 3], [3, 4]]
    assert (second.tokens, second.accepted) == ([4, 4, 3, 3], 3)
    assert (second.top_ids, len(second.log_probs)) == ([[], [], [], []], 4)
    assert third.tokens == [3]
