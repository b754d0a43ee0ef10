"""Scores of several tokens of each row, and of the likeliest."""

from __future__ import annotations

import pytest
import torch

from miles.algorithms import token_log_probs
from miles.algorithms.token_sets import TokenSetScores, score_token_sets


@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_those_of_the_whole_distribution(dtype: torch.dtype, chunk_rows: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    logits_TV = (4 * torch.randn(9, 31, generator=generator)).to(dtype)
    tokens_TM = torch.randint(0, 31, (9, 5), generator=generator)
    found = score_token_sets(logits_TV, tokens_TM, 6, temperature=0.7, chunk_rows=chunk_rows)
    wide = logits_TV if dtype is torch.float64 else logits_TV.float()
    expected_TV = (wide / 0.7).log_softmax(-1)
    assert torch.equal(found.log_probs_TM, expected_TV.gather(1, tokens_TM))
    assert torch.equal(found.top_log_probs_TK, expected_TV.topk(6).values)
    assert torch.equal(expected_TV.gather(1, found.top_ids_TK), found.top_log_probs_TK)


def test_a_token_has_the_same_bits_as_alone() -> None:
    logits_TV = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(4))
    tokens_T = torch.arange(6) * 7
    alone = token_log_probs(logits_TV, tokens_T).log_probs_T
    assert torch.equal(score_token_sets(logits_TV, tokens_T[:, None], 0).log_probs_TM[:, 0], alone)


def test_tokens_outside_the_vocabulary_are_impossible_and_too_few_tokens_leave_places() -> None:
    found = score_token_sets(torch.zeros(2, 3), torch.tensor([[-1, 0], [3, 2]]), 5)
    assert found.log_probs_TM[:, 0].tolist() == [-torch.inf] * 2
    assert found.log_probs_TM[:, 1].isfinite().all()
    assert found.top_ids_TK[:, 3:].tolist() == [[-1, -1]] * 2
    assert found.top_log_probs_TK[:, 3:].tolist() == [[-torch.inf] * 2] * 2


@pytest.mark.parametrize("rows", [0, 3])
def test_joined_scores_are_read_back(rows: int) -> None:
    logits_TV = torch.randn(rows, 200_000, generator=torch.Generator().manual_seed(5))
    found = score_token_sets(logits_TV, torch.full((rows, 2), 7), 3)
    read = TokenSetScores.from_joined(found.joined(), 3)
    for name in ("log_probs_TM", "top_ids_TK", "top_log_probs_TK"):
        assert torch.equal(getattr(read, name), getattr(found, name))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="need logits"):
        score_token_sets(torch.zeros(2, 3), torch.zeros(3, 1), 0)
