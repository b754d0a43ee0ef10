import math

import pytest
import torch
from policy_loss_cases import gradient, gradients_are_those_of_the_loss, terms

from miles.algorithms import LossBatch, LossConfig, Packing, PolicyLossConfig, rl_loss

OLD = [-1.0, -2.0, -0.5, -1.5, 0.0, -0.7]
STEP = [0.6, -0.2, 0.1, -0.9, 0.0, 0.3]
NEW = [o + s for o, s in zip(OLD, STEP, strict=True)]
ADVANTAGES = [2.0, 2.0, 2.0, -1.0, 0.0, -1.0]


def test_gmpo_by_hand() -> None:
    # Clipped to [-0.4, 0.4] on the side that its advantage pushes to: 0.6 -> 0.4 above, and -0.9 -> -0.4 below.
    result = terms("gmpo", NEW, OLD, ADVANTAGES, PolicyLossConfig(eps_clip=0.4))
    first, second = (0.4 - 0.2 + 0.1) / 3, (-0.4 + 0.3) / 2
    assert result.log_ratio_T.tolist() == pytest.approx([first] * 3 + [second, 0, second])
    assert result.loss_T.tolist() == pytest.approx(
        [-2 * math.exp(first)] * 3 + [math.exp(second), 0, math.exp(second)], abs=1e-12
    )
    assert result.clipped_T.tolist() == [1, 0, 0, 1, 0, 0]


def test_gmpo_clips_nothing_on_the_way_back() -> None:
    result = terms("gmpo", NEW, OLD, [-a for a in ADVANTAGES], PolicyLossConfig(eps_clip=0.4))
    assert result.clipped_T.sum() == 0
    assert result.log_ratio_T[0].item() == pytest.approx((0.6 - 0.2 + 0.1) / 3)


def test_gmpo_has_a_bound_for_each_side() -> None:
    result = terms("gmpo", NEW, OLD, ADVANTAGES, PolicyLossConfig(eps_clip=1.0, eps_clip_high=0.05))
    assert result.clipped_T.tolist() == [1, 0, 1, 0, 0, 0]


def test_gmpos_gradient_is_closed_form() -> None:
    # d/d log p_t of sum over n tokens of -s A is -s A (n / n) for tokens that are not clipped.
    config = PolicyLossConfig(eps_clip=0.4)
    first, second = math.exp(0.1), math.exp(-0.05)
    assert gradient("gmpo", NEW, OLD, ADVANTAGES, config) == pytest.approx(
        [0, -2 * first, -2 * first, 0, 0, second], abs=1e-12
    )
    assert gradients_are_those_of_the_loss("gmpo", OLD, ADVANTAGES, config, STEP)


def test_luspo_is_gspo_times_the_trained_length() -> None:
    config = PolicyLossConfig(eps_clip=0.2, eps_clip_high=0.25)
    for name, factor in (("gspo", [1.0] * 6), ("luspo", [3.0, 3.0, 3.0, 2.0, 2.0, 2.0])):
        result = terms(name, NEW, OLD, ADVANTAGES, config)
        first, second = math.exp(0.5 / 3), math.exp(-0.3)  # the second is below 0.8: clipped
        values = [-2 * first] * 3 + [max(second, 0.8), 0, max(second, 0.8)]
        assert result.loss_T.tolist() == pytest.approx([f * v for f, v in zip(factor, values, strict=True)])
        assert result.clipped_T.tolist() == [0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("name", ["gspo", "luspo"])
def test_gradients_match_finite_differences(name: str) -> None:
    assert gradients_are_those_of_the_loss(name, OLD, ADVANTAGES, PolicyLossConfig(eps_clip=0.2), STEP)


def test_a_tokens_share_in_luspo_does_not_depend_on_its_sequences_length() -> None:
    # On policy, with advantage 1: every token's gradient is that of one sample's mean times its length, over B.
    lengths = (2, 5)
    new_T = torch.full((7,), -1.0, dtype=torch.float64, requires_grad=True)
    batch = LossBatch(packing=Packing(lengths), mask_T=torch.ones(7), advantages_T=torch.ones(7))
    gradients = {}
    for name in ("gspo", "luspo"):
        rl_loss(LossConfig(policy_loss=name, eps_clip=0.002), batch, new_T).loss.backward()
        assert new_T.grad is not None
        gradients[name], new_T.grad = new_T.grad.tolist(), None
    assert gradients["gspo"] == pytest.approx([-1 / 4] * 2 + [-1 / 10] * 5)
    assert gradients["luspo"] == pytest.approx([-1 / 2] * 7)
