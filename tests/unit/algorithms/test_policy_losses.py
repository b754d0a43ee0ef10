import itertools
import math
from typing import Any

import algorithm_reference as reference
import pytest
import torch

from miles.algorithms import (
    POLICY_LOSSES,
    Packing,
    PolicyInputs,
    PolicyLossConfig,
    PolicyTerms,
    opsm_drop,
    policy_loss,
    register_policy_loss,
)

PACKING = Packing((3, 2))
MASK_T = torch.tensor([1, 1, 1, 1, 0])
ASYMMETRIC = PolicyLossConfig(eps_clip=0.2, eps_clip_high=0.3, dro_beta=0.1)


def evaluate(name: str, config: PolicyLossConfig, **columns: Any) -> PolicyTerms:
    return policy_loss(name, config, PolicyInputs.of(**columns))


def terms(
    name: str,
    log_ratio: list[float] | torch.Tensor,
    advantages: list[float] | torch.Tensor,
    config: PolicyLossConfig = ASYMMETRIC,
    packing: Packing = PACKING,
    mask_T: torch.Tensor = MASK_T,
) -> PolicyTerms:
    new_T = torch.as_tensor(log_ratio, dtype=torch.float32) - 1.0
    return evaluate(
        name,
        config,
        packing=packing,
        mask_T=mask_T,
        log_probs_T=new_T,
        old_log_probs_T=torch.full_like(new_T, -1.0),
        advantages_T=torch.as_tensor(advantages, dtype=torch.float32),
    )


def test_asymmetric_clip_by_hand() -> None:
    # Ratios 2, 2, 0.5, 0.5: clipped to 1.3 or 0.8 where that makes the loss larger.
    log_ratios = [math.log(2), math.log(2), math.log(0.5), math.log(0.5), 0.0]
    result = terms("ppo_clip", log_ratios, [1.0, -1.0, 1.0, -1.0, 9.0])
    assert result.loss_T.tolist() == pytest.approx([-1.3, 2.0, -0.5, 0.8, 0.0], abs=1e-6)
    assert result.clipped_T.tolist() == [1, 0, 0, 1, 0]


def test_the_upper_bound_defaults_to_the_lower() -> None:
    result = terms("ppo_clip", [math.log(2)] * 5, [1.0] * 5, PolicyLossConfig(eps_clip=0.1))
    assert result.loss_T[0].item() == pytest.approx(-1.1)


def test_dual_clip_caps_the_loss_of_negative_advantages() -> None:
    config = PolicyLossConfig(eps_clip=0.2, eps_clip_c=3.0)
    result = terms("ppo_clip", [math.log(5), math.log(2), math.log(5), 0.0, 0.0], [-1.0, -1.0, 1.0, -1.0, 0.0], config)
    assert result.loss_T.tolist() == pytest.approx([3.0, 2.0, -1.2, 1.0, 0.0], abs=1e-6)


def test_dual_clip_at_or_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eps_clip_c is 1\.0"):
        PolicyLossConfig(eps_clip_c=1.0)


def test_gspo_gives_every_token_the_mean_log_ratio_of_its_sequence() -> None:
    result = terms("gspo", [0.1, 0.2, 0.0, 0.05, 99.0], [1.0] * 5)
    assert result.log_ratio_T.tolist() == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.0], abs=1e-6)
    assert result.loss_T.tolist() == pytest.approx([-math.exp(0.1)] * 3 + [-math.exp(0.05), 0.0], abs=1e-6)


def test_cispo_by_hand() -> None:
    # -clip(r) A log p with log p = log ratio - 1.
    result = terms("cispo", [math.log(2), math.log(0.5), 0.0, 0.1, 0.0], [1.0, 1.0, -2.0, -1.0, 1.0])
    expected = [
        -1.3 * (math.log(2) - 1),
        -0.8 * (math.log(0.5) - 1),
        2.0 * -1.0,
        math.exp(0.1) * (0.1 - 1),
        0.0,
    ]
    assert result.loss_T.tolist() == pytest.approx(expected, abs=1e-6)
    assert result.clipped_T.tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("eps_clip", [1.0, 1.5, 1000.0])
def test_cispo_without_a_lower_bound_weights_by_the_ratio_itself_however_small(eps_clip: float) -> None:
    config = PolicyLossConfig(eps_clip=eps_clip, eps_clip_high=0.3)
    ratios = [1e-6, 0.01, 0.5, 1.2, 4.0]
    result = terms("cispo", [math.log(ratio) for ratio in ratios], [1.0] * 5, config)
    expected = [-min(ratio, 1.3) * (math.log(ratio) - 1) for ratio in ratios]
    kept = MASK_T.bool().tolist()
    assert result.loss_T.tolist() == pytest.approx([x * m for x, m in zip(expected, kept, strict=True)], rel=1e-5)
    assert result.clipped_T.tolist() == [0, 0, 0, 0, float(kept[4])]


@pytest.mark.parametrize("bounds", [{"eps_clip": -0.1}, {"eps_clip": math.nan}, {"eps_clip_high": math.nan}])
def test_clip_ranges_are_not_negative(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 0"):
        PolicyLossConfig(**bounds)


def test_clipped_tokens_keep_a_gradient_in_cispo_and_lose_it_in_ppo() -> None:
    for name, expected in (("cispo", -1.3), ("ppo_clip", 0.0)):
        new_T = torch.tensor([math.log(2)], requires_grad=True)
        evaluate(
            name,
            ASYMMETRIC,
            packing=Packing((1,)),
            mask_T=torch.ones(1),
            log_probs_T=new_T,
            old_log_probs_T=torch.zeros(1),
            advantages_T=torch.ones(1),
        ).loss_T.sum().backward()
        assert new_T.grad is not None
        assert new_T.grad.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dual", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_surrogate_matches_the_reference(dual: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = PolicyLossConfig(eps_clip=0.2, eps_clip_high=0.28, eps_clip_c=dual)
    packing, new_T, old_T = Packing((64,)), -torch.rand(64).to(dtype) * 4, -torch.rand(64).to(dtype) * 4
    advantages_T = torch.randn(64)
    result = evaluate(
        "ppo_clip",
        config,
        packing=packing,
        mask_T=torch.ones(64),
        log_probs_T=new_T,
        old_log_probs_T=old_T,
        advantages_T=advantages_T,
    )
    expected = [
        reference.ppo_token_loss(n - o, a, 0.2, 0.28, dual)
        for n, o, a in zip(new_T.tolist(), old_T.tolist(), advantages_T.tolist(), strict=True)
    ]
    assert result.loss_T.dtype == torch.float32
    torch.testing.assert_close(
        result.loss_T.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "dr_grpo"])
def test_gradients_match_finite_differences(name: str) -> None:
    torch.manual_seed(1)
    old_T = -torch.rand(5, dtype=torch.float64)
    new_T = (old_T + 0.3 * torch.randn(5, dtype=torch.float64)).requires_grad_()
    advantages_T = torch.randn(5, dtype=torch.float64)

    def loss(x_T: torch.Tensor) -> torch.Tensor:
        return evaluate(
            name,
            PolicyLossConfig(eps_clip=0.2, eps_clip_c=3.0),
            packing=PACKING,
            mask_T=MASK_T,
            log_probs_T=x_T,
            old_log_probs_T=old_T,
            advantages_T=advantages_T,
        ).loss_T

    assert torch.autograd.gradcheck(loss, new_T)


@pytest.mark.parametrize(
    ("name", "log_ratio"),
    [
        *itertools.product(
            ["ppo_clip", "gspo", "dr_grpo", "dppo_tv", "dppo_kl", "gmpo", "luspo", "sapo"],
            [-1e4, -30.0, 30.0, 1e4, math.inf, -math.inf],
        ),
        *itertools.product(
            ["cispo", "vespo", "dro"], [-1e4, -30.0, 30.0, 1e4]
        ),  # its loss is proportional to the log-prob
    ],
)
def test_huge_log_ratios_stay_finite(name: str, log_ratio: float) -> None:
    old_T = torch.zeros(1)
    new_T = torch.tensor([log_ratio], requires_grad=True)
    loss = evaluate(
        name,
        ASYMMETRIC,
        packing=Packing((1,)),
        mask_T=torch.ones(1),
        log_probs_T=new_T,
        old_log_probs_T=old_T,
        advantages_T=-torch.ones(1),
    ).loss_T.sum()
    loss.backward()
    assert loss.isfinite()
    assert new_T.grad is not None
    assert new_T.grad.isfinite().all()


@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_what_stands_at_masked_tokens_reaches_neither_loss_nor_gradient(name: str) -> None:
    new_T = torch.tensor([-1.0, torch.nan, -2.0, -torch.inf, -0.5], requires_grad=True)
    result = evaluate(
        name,
        ASYMMETRIC,
        packing=PACKING,
        mask_T=torch.tensor([1, 0, 1, 0, 0]),
        log_probs_T=new_T,
        old_log_probs_T=torch.tensor([-1.1, 0.0, -1.9, torch.nan, torch.inf]),
        advantages_T=torch.tensor([1.0, torch.nan, -1.0, 1.0, torch.inf]),
    )
    result.loss_T.sum().backward()
    assert result.loss_T[[1, 3, 4]].tolist() == [0, 0, 0]
    assert result.loss_T.isfinite().all()
    assert new_T.grad is not None
    assert new_T.grad[[1, 3, 4]].tolist() == [0, 0, 0]
    assert new_T.grad.isfinite().all()


def test_sequence_masking_drops_off_policy_sequences_with_negative_advantage() -> None:
    # mean(old - new): sample 0: 0.02 over two unmasked tokens, sample 1: 0.02, sample 2: -0.1.
    packing = Packing((3, 1, 1))
    dropped_T = opsm_drop(
        packing=packing,
        mask_T=torch.tensor([1, 1, 0, 1, 1]),
        log_probs_T=torch.tensor([-1.04, -1.0, 55.0, -1.02, -0.9]),
        old_log_probs_T=torch.full((5,), -1.0),
        advantages_T=torch.tensor([-1.0, -1.0, -1.0, 1.0, -1.0]),
        delta=0.01,
    )
    assert dropped_T.tolist() == [True, True, True, False, False]


def test_a_registered_function_is_a_policy_loss() -> None:
    @register_policy_loss("score_function")
    def score_function(config: PolicyLossConfig, inputs: PolicyInputs) -> PolicyTerms:
        zeros_T = torch.zeros_like(inputs.log_probs_T)
        return PolicyTerms(-inputs.log_probs_T * inputs.advantages_T, zeros_T, zeros_T)

    result = terms("score_function", [0.0] * 5, [2.0] * 5)
    assert result.loss_T.tolist() == [2.0, 2.0, 2.0, 2.0, 0.0]
    assert not POLICY_LOSSES["score_function"].trust_region


def test_unknown_names_and_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(KeyError, match="did you mean 'ppo_clip'"):
        terms("ppo_clp", [0.0] * 5, [0.0] * 5)
    with pytest.raises(ValueError, match="advantages_T has shape"):
        terms("ppo_clip", [0.0] * 5, [0.0] * 4)
