import math

import pytest
import torch
from policy_loss_cases import gradient, gradients_are_those_of_the_loss, terms

from miles.algorithms import PolicyLossConfig
from miles.algorithms.divergence_masks import binary_kl

# Probabilities of the sampled token before and after: two rare tokens, three frequent ones, one that is masked out.
OLD = [math.log(p) for p in (0.001, 0.5, 0.5, 0.6, 0.5, 0.3)]
NEW = [math.log(p) for p in (0.030, 0.7, 0.3, 0.3, 0.9, 0.29)]
TV = [0.029, 0.2, 0.2, 0.3, None, 0.01]
ADVANTAGES = [1.0, 2.0, 3.0, -1.0, 1.0, -2.0]


def ratio(t: int) -> float:
    return math.exp(NEW[t] - OLD[t])


def kl(q: float, p: float) -> float:
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def test_total_variation_masks_what_moves_on_beyond_its_threshold() -> None:
    # Token 1 gained 0.2 > 0.1 with a positive advantage, token 3 lost 0.3 > 0.25 with a negative one. Token 2 moved by
    # 0.2 against its advantage, and token 0, whose ratio of 30 a clipped ratio would stop at, by 0.029.
    result = terms("dppo_tv", NEW, OLD, ADVANTAGES, PolicyLossConfig(eps_clip=0.25, eps_clip_high=0.1))
    assert result.loss_T.tolist() == pytest.approx([-ratio(0), 0, -3 * ratio(2), 0, 0, 2 * ratio(5)])
    assert result.clipped_T.tolist() == [0, 1, 0, 1, 0, 0]
    divergences = result.metrics_T["dppo_divergence"].tolist()
    assert [d for d, tv in zip(divergences, TV, strict=True) if tv is not None] == pytest.approx(
        [tv for tv in TV if tv is not None]
    )


def test_the_threshold_of_gains_defaults_to_that_of_losses() -> None:
    assert terms("dppo_tv", NEW, OLD, ADVANTAGES, PolicyLossConfig(eps_clip=0.19)).clipped_T.tolist() == [
        *(0, 1, 0),
        *(1, 0, 0),
    ]
    assert terms("dppo_tv", NEW, OLD, ADVANTAGES, PolicyLossConfig(eps_clip=0.31)).clipped_T.sum() == 0


def test_kl_is_that_of_the_two_point_distribution() -> None:
    result = terms("dppo_kl", NEW, OLD, ADVANTAGES, PolicyLossConfig(eps_clip=0.15))
    expected = [kl(0.001, 0.03), kl(0.5, 0.7), kl(0.5, 0.3), kl(0.6, 0.3), 0.0, kl(0.3, 0.29)]
    assert result.metrics_T["dppo_divergence"].tolist() == pytest.approx(expected, abs=1e-12)
    # Token 1's 0.087 is within 0.15; token 3's 0.192 is not.
    assert result.clipped_T.tolist() == [0, 0, 0, 1, 0, 0]


def test_kl_is_finite_where_a_token_is_certain_or_impossible() -> None:
    for dtype in (torch.float32, torch.float64):
        log_q = torch.tensor([0.0, -1e4, 0.0, -1e4], dtype=dtype)
        log_p = torch.tensor([0.0, -1e4, -1e4, 0.0], dtype=dtype)
        divergence = binary_kl(log_q, log_p)
        assert divergence.isfinite().all()
        assert divergence[:2].tolist() == [0, 0]
        assert (divergence[2:] > 10).all()


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_the_gradient_is_the_ratio_times_the_advantage_and_none_where_masked(name: str) -> None:
    config = PolicyLossConfig(eps_clip=0.08)
    masked = terms(name, NEW, OLD, ADVANTAGES, config).clipped_T.tolist()
    expected = [-(1 - m) * ratio(t) * ADVANTAGES[t] * (t != 4) for t, m in enumerate(masked)]
    assert gradient(name, NEW, OLD, ADVANTAGES, config) == pytest.approx(expected)
    assert gradients_are_those_of_the_loss(
        name, OLD, ADVANTAGES, config, [n - o for n, o in zip(NEW, OLD, strict=True)]
    )


def test_a_token_without_advantage_is_not_counted_as_masked() -> None:
    assert terms("dppo_tv", NEW, OLD, [0.0] * 6, PolicyLossConfig(eps_clip=0.01)).clipped_T.sum() == 0
