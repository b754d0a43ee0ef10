"""Tokens and log-probs out of logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.algorithms.log_probs import token_log_probs
from miles.services.rollout.engines.base import SamplingParams
from miles.services.rollout.engines.torch.generation.sampling import Draw, likeliest, sample


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 10, **changes})  # type: ignore[arg-type]


def counts(logits_V: torch.Tensor, draws: int, **changes: object) -> torch.Tensor:
    """How often each token is drawn over seeds 0, 1, 2, ..."""
    logits_RV = logits_V.expand(draws, -1)
    tokens, _ = sample(logits_RV, [Draw(params(seed=seed, **changes), 0) for seed in range(draws)])
    return torch.bincount(torch.tensor(tokens), minlength=logits_V.numel())


def assert_distributed(observed: torch.Tensor, expected: torch.Tensor) -> None:
    """Chi-square over the tokens that can occur; fails once in a million for a right sampler."""
    total = float(observed.sum())
    possible = expected > 0
    assert int(observed[~possible].sum()) == 0
    chi_square = float(((observed - total * expected)[possible] ** 2 / (total * expected[possible])).sum())
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 15


def nucleus(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Straight-line top-k, then top-p of the rest: the likeliest tokens until they reach top_p together."""
    order = probabilities.argsort(descending=True)
    if top_k > 0:
        order = order[:top_k]
    kept = torch.zeros_like(probabilities)
    mass, limit = 0.0, top_p * float(probabilities[order].sum())
    for token in order.tolist():
        if mass >= limit and top_p < 1:
            break
        kept[token] = probabilities[token]
        mass += float(probabilities[token])
    return kept / kept.sum()


@pytest.mark.parametrize("vocabulary", [7, 256, 300])
def test_plain_sampling_follows_the_softmax(vocabulary: int) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    assert_distributed(counts(logits, 8_000, temperature=1.5), (logits / 1.5).double().softmax(-1))


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (-1, 0.7), (20, 0.6), (-1, 0.05), (1, 1.0), (400, 0.9)])
def test_top_k_and_top_p_cut_the_tail_off(top_k: int, top_p: float) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(2)) * 2
    expected = nucleus(logits.double().softmax(-1), top_k, top_p)
    assert_distributed(counts(logits, 8_000, top_k=top_k, top_p=top_p), expected)


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 0.9), (2500, 1.0), (2500, 0.95)])
def test_a_nucleus_larger_than_the_first_look_is_found_whole(top_k: int, top_p: float) -> None:
    logits = torch.linspace(0, 0.3, 4000)[torch.randperm(4000, generator=torch.Generator().manual_seed(3))]
    expected = nucleus(logits.double().softmax(-1), top_k, top_p)
    assert_distributed(counts(logits, 3_000, top_k=top_k, top_p=top_p), expected)


def test_log_probs_are_those_of_the_trainer_bit_for_bit_before_top_k_and_top_p() -> None:
    logits = torch.randn(16, 500, generator=torch.Generator().manual_seed(4)).bfloat16()
    draws = [Draw(params(seed=i, temperature=0.8, top_k=10, top_p=0.9), i) for i in range(16)]
    tokens, log_probs = sample(logits, draws)
    expected = token_log_probs(logits, torch.tensor(tokens), temperature=0.8).log_probs_T
    assert log_probs == expected.tolist()


def test_greedy_takes_the_largest_and_reports_its_log_prob_at_temperature_one() -> None:
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(5))
    mixed = [Draw(params(temperature=0.0 if i % 2 else 2.0, seed=i), 0) for i in range(16)]
    tokens, log_probs = sample(logits, mixed)
    all_greedy, _ = sample(logits, [Draw(params(temperature=0.0), 0)] * 16)
    assert all_greedy == logits.argmax(-1).tolist()
    assert tokens[1::2] == all_greedy[1::2]
    assert log_probs[1] == logits.log_softmax(-1)[1, tokens[1]].item()


def test_banned_tokens_are_never_drawn_and_leave_log_probs_alone() -> None:
    logits = torch.zeros(16, 4)
    logits[:, 2] = 9.0
    for temperature in (0.0, 1.0):
        draws = [Draw(params(seed=i, temperature=temperature), 0, banned=(2, 3)) for i in range(16)]
        tokens, log_probs = sample(logits, draws)
        assert set(tokens) <= {0, 1}
        assert log_probs[0] == logits.log_softmax(-1)[0, 0].item()


def test_tokens_of_no_weight_are_never_drawn() -> None:
    logits = torch.full((16, 1000), -torch.inf)
    logits[:, 777] = 0.0
    tokens, log_probs = sample(logits, [Draw(params(seed=i), i) for i in range(16)])
    assert tokens == [777] * 16
    assert log_probs == [0.0] * 16


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    vocabulary=st.integers(2, 700),
    rows=st.integers(1, 20),
)
def test_a_row_is_drawn_alike_whatever_rows_are_beside_it(data: st.DataObject, vocabulary: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    choice = st.builds(
        lambda seed, index, temperature, top_k, top_p: Draw(
            params(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p), index
        ),
        st.integers(0, 2**64 - 1),
        st.integers(0, 5000),
        st.sampled_from([0.0, 0.6, 1.0, 1.7]),
        st.sampled_from([-1, 1, 3, 100]),
        st.sampled_from([0.01, 0.5, 0.95, 1.0]),
    )
    draws = [data.draw(choice) for _ in range(rows)]
    padded = torch.cat([logits, torch.zeros(16, vocabulary)])
    together = list(zip(*sample(padded, draws), strict=True))
    for row in range(rows):
        alone = sample(torch.cat([logits[row : row + 1], torch.zeros(15, vocabulary)]), [draws[row]])
        assert (alone[0][0], alone[1][0]) == together[row]


def test_likeliest_tokens_of_rows_that_ask_for_them() -> None:
    logits_RV = torch.tensor([[0.1, 3.0, 2.0], [5.0, 1.0, 4.0], [0.0, 0.0, 9.0]])
    assert likeliest(logits_RV, [2, 0]) == [[1, 2], []]
    assert likeliest(logits_RV, [0, 9, 1]) == [[], [0, 2, 1], [2]]
