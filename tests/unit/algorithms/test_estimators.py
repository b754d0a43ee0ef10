import dataclasses
from typing import Any

import algorithm_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.algorithms import (
    ESTIMATORS,
    AdvantageBatch,
    AdvantageConfig,
    Packing,
    compute_advantages,
    register_estimator,
    shape_rewards,
    subtract_mean,
)
from miles.algorithms.scan import discounted_suffix_sums

PACKING = Packing((3, 1, 4))
MASK_T = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0], dtype=torch.uint8)


def batch(**fields: torch.Tensor) -> AdvantageBatch:
    torch.manual_seed(3)
    defaults = {
        "rewards_B": torch.tensor([1.0, -0.5, 2.0]),
        "old_log_probs_T": -torch.rand(8),
        "ref_log_probs_T": -torch.rand(8),
        "teacher_log_probs_T": -torch.rand(8),
        "values_T": torch.randn(8),
        "squared_probs_T": torch.rand(8),
        "group_ids_B": torch.tensor([0, 1, 0]),
        "num_groups": 2,
    }
    return AdvantageBatch(packing=PACKING, mask_T=MASK_T, **(defaults | fields))


@pytest.mark.parametrize("estimator", ["grpo", "gspo", "cispo", "dr_grpo", "rloo"])
def test_the_reward_stands_on_every_response_token(estimator: str) -> None:
    result = compute_advantages(AdvantageConfig(advantage_estimator=estimator), batch())
    assert result.advantages_T.tolist() == [1.0, 1.0, 1.0, -0.5, 2.0, 2.0, 2.0, 2.0]
    assert torch.equal(result.returns_T, result.advantages_T)


def test_reinforce_plus_plus_by_hand() -> None:
    # KL k1 = 0.1 everywhere, kl_coef 0.5, gamma 0.5: r = -0.05 a token, +1 at token 1 of sample 0 (token 2 is masked).
    config = AdvantageConfig(advantage_estimator="reinforce_plus_plus", kl_coef=0.5, gamma=0.5)
    result = compute_advantages(
        config, batch(old_log_probs_T=torch.full((8,), -1.0), ref_log_probs_T=torch.full((8,), -1.1))
    )
    g2 = -0.05
    g1 = 0.95 + 0.5 * g2
    g0 = -0.05 + 0.5 * g1
    assert result.returns_T[:3].tolist() == pytest.approx([g0, g1, g2], abs=1e-6)
    expected = reference.whitened(result.returns_T.tolist(), MASK_T.tolist())
    assert result.advantages_T.tolist() == pytest.approx(expected, abs=1e-5)


def test_reinforce_plus_plus_baseline_subtracts_the_kl_of_each_token() -> None:
    config = AdvantageConfig(advantage_estimator="reinforce_plus_plus_baseline", kl_coef=0.2, kl_loss_type="k2")
    data = batch()
    result = compute_advantages(config, data)
    rewards = PACKING.expand(data.rewards_B).tolist()
    kls = [
        reference.kl(a, b, "k2")
        for a, b in zip(data.old_log_probs_T.tolist(), data.ref_log_probs_T.tolist(), strict=True)
    ]
    unwhitened = [r - 0.2 * k for r, k in zip(rewards, kls, strict=True)]
    assert result.advantages_T.tolist() == pytest.approx(reference.whitened(unwhitened, MASK_T.tolist()), abs=1e-5)


def test_gae_by_hand() -> None:
    # One sample, values 0.5, 9 (masked), 0.25, reward 1, gamma 0.9, lambda 0.8.
    # delta_2 = 1 - 0.25 = 0.75; delta_0 = 0.9 * 0.25 - 0.5 = -0.275; A_0 = -0.275 + 0.72 * 0.75 = 0.265.
    result = compute_advantages(
        AdvantageConfig(advantage_estimator="ppo", gamma=0.9, lambd=0.8),
        AdvantageBatch(
            packing=Packing((3,)),
            mask_T=torch.tensor([1, 0, 1]),
            rewards_B=torch.tensor([1.0]),
            values_T=torch.tensor([0.5, 9.0, 0.25]),
        ),
    )
    assert result.advantages_T.tolist() == pytest.approx([0.265, 0.0, 0.75], abs=1e-6)
    assert result.returns_T.tolist() == pytest.approx([0.765, 0.0, 1.0], abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
)
def test_gae_and_returns_match_the_recursion(masks: list[list[int]], gamma: float, lambd: float) -> None:
    torch.manual_seed(4)
    packing = Packing(tuple(len(m) for m in masks))
    mask_T = torch.tensor([m for row in masks for m in row])
    values_T, rewards_B = torch.randn(packing.num_tokens), torch.randn(len(masks))
    old_T, ref_T = -torch.rand(packing.num_tokens), -torch.rand(packing.num_tokens)
    data = AdvantageBatch(
        packing=packing,
        mask_T=mask_T,
        rewards_B=rewards_B,
        values_T=values_T,
        old_log_probs_T=old_T,
        ref_log_probs_T=ref_T,
    )
    ppo = compute_advantages(AdvantageConfig(advantage_estimator="ppo", gamma=gamma, lambd=lambd, kl_coef=0.1), data)
    plus_plus = compute_advantages(
        AdvantageConfig(advantage_estimator="reinforce_plus_plus", gamma=gamma, kl_coef=0.1), data
    )
    start = 0
    for mask, reward in zip(masks, rewards_B.tolist(), strict=True):
        rows = slice(start, start + len(mask))
        start += len(mask)
        penalties = (-0.1 * (old_T - ref_T)[rows]).tolist()
        advantages, returns = reference.gae(penalties, values_T[rows].tolist(), mask, reward, gamma, lambd)
        assert ppo.advantages_T[rows].tolist() == pytest.approx(advantages, abs=1e-5)
        assert ppo.returns_T[rows].tolist() == pytest.approx(returns, abs=1e-5)
        if any(mask):
            penalties[max(t for t in range(len(mask)) if mask[t])] += reward
        expected = reference.discounted_returns(penalties, gamma)
        assert plus_plus.returns_T[rows].tolist() == pytest.approx(expected, abs=1e-5)


def test_suffix_sums_of_a_long_sample_match_the_recursion() -> None:
    torch.manual_seed(5)
    x_T = torch.randn(5000)
    sums = discounted_suffix_sums(x_T, Packing((5000,)), 0.99)
    expected = reference.discounted_returns(x_T.double().tolist(), 0.99)
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_fully_masked_samples_leave_the_others_alone(estimator: str) -> None:
    config = AdvantageConfig(advantage_estimator=estimator, kl_coef=0.1)
    torch.manual_seed(6)
    fields = {name: -torch.rand(8) for name in ("old_log_probs_T", "ref_log_probs_T", "values_T")}
    fields["squared_probs_T"] = torch.rand(8)
    groups: dict[str, Any] = {"group_ids_B": torch.zeros(3, dtype=torch.int64), "num_groups": 1}
    mask_T = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1])
    rewards_B = torch.tensor([1.0, 100.0, -1.0])
    whole = compute_advantages(
        config, AdvantageBatch(packing=PACKING, mask_T=mask_T, rewards_B=rewards_B, **fields, **groups)
    ).advantages_T
    others = [0, 2]
    without = compute_advantages(
        config,
        AdvantageBatch(
            packing=PACKING.subset(others),
            mask_T=PACKING.take(mask_T, others),
            rewards_B=rewards_B[others],
            **{name: PACKING.take(x_T, others) for name, x_T in fields.items()},
            **groups | {"group_ids_B": torch.zeros(2, dtype=torch.int64)},
        ),
    ).advantages_T
    assert whole.isfinite().all()
    torch.testing.assert_close(PACKING.take(whole, others), without, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_a_batch_of_nothing_but_masked_tokens_has_finite_advantages(estimator: str) -> None:
    data = AdvantageBatch(
        packing=Packing((2, 1)),
        mask_T=torch.zeros(3),
        rewards_B=torch.ones(2),
        **dict.fromkeys(("values_T", "old_log_probs_T", "squared_probs_T"), torch.full((3,), torch.nan)),
        group_ids_B=torch.tensor([0, 0]),
        num_groups=1,
    )
    result = compute_advantages(AdvantageConfig(advantage_estimator=estimator, normalize_advantages=True), data)
    assert result.advantages_T.isfinite().all()


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_padded_rows_give_the_same_advantages(estimator: str) -> None:
    config = AdvantageConfig(
        advantage_estimator=estimator, kl_coef=0.1, gamma=0.9, lambd=0.8, normalize_advantages=True
    )
    data = batch()
    rows = Packing((4, 4, 4))
    names = ("mask_T", "old_log_probs_T", "ref_log_probs_T", "values_T", "squared_probs_T")
    padded = {name: rows.pack(PACKING.unpack(getattr(data, name))) for name in names}
    result = compute_advantages(config, dataclasses.replace(data, packing=rows, teacher_log_probs_T=None, **padded))
    expected = compute_advantages(config, data)
    for name in ("advantages_T", "returns_T"):
        actual_T = PACKING.pack(rows.unpack(getattr(result, name)))
        torch.testing.assert_close(actual_T, getattr(expected, name), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_garbage_at_masked_tokens_reaches_no_unmasked_one(estimator: str) -> None:
    config = AdvantageConfig(advantage_estimator=estimator, kl_coef=0.1, use_opd=True, normalize_advantages=True)
    names = ("old_log_probs_T", "ref_log_probs_T", "values_T", "teacher_log_probs_T", "squared_probs_T")
    data, kept_T = batch(), MASK_T.bool()
    clean = {name: getattr(data, name).masked_fill(~kept_T, 0.0) for name in names}
    dirty = {name: getattr(data, name).masked_fill(~kept_T, torch.nan) for name in names}
    expected, actual = (compute_advantages(config, batch(**fields)).advantages_T for fields in (clean, dirty))
    assert torch.equal(actual[kept_T], expected[kept_T])


def test_distillation_subtracts_the_reverse_kl_before_whitening() -> None:
    data = batch()
    plain = compute_advantages(AdvantageConfig(use_opd=True, opd_kl_coef=0.3), data)
    reverse_kl_T = data.old_log_probs_T - data.teacher_log_probs_T
    unwhitened_T = PACKING.expand(data.rewards_B) - 0.3 * reverse_kl_T
    torch.testing.assert_close(plain.advantages_T, unwhitened_T)
    torch.testing.assert_close(plain.opd_reverse_kl_T, reverse_kl_T)
    whitened = compute_advantages(AdvantageConfig(use_opd=True, opd_kl_coef=0.3, normalize_advantages=True), data)
    expected = reference.whitened(unwhitened_T.tolist(), MASK_T.tolist())
    assert whitened.advantages_T.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_half_precision_inputs_are_computed_in_float32(estimator: str, dtype: torch.dtype) -> None:
    config = AdvantageConfig(advantage_estimator=estimator, kl_coef=0.1, kl_loss_type="k3", use_opd=True)
    data = batch()
    names = ("old_log_probs_T", "ref_log_probs_T", "teacher_log_probs_T", "values_T", "squared_probs_T")
    halves = {name: getattr(data, name).to(dtype) for name in names}
    result = compute_advantages(config, batch(**halves))
    exact = compute_advantages(config, batch(**{name: x_T.float() for name, x_T in halves.items()}))
    assert result.advantages_T.dtype == torch.float32
    assert torch.equal(result.advantages_T, exact.advantages_T)


def test_what_a_config_needs_and_the_batch_lacks_is_named() -> None:
    data = AdvantageBatch(packing=Packing((1,)), mask_T=torch.ones(1), rewards_B=torch.ones(1))
    with pytest.raises(ValueError, match=r"kl_coef needs AdvantageBatch\.old_log_probs_T"):
        compute_advantages(AdvantageConfig(kl_coef=0.1), data)
    with pytest.raises(ValueError, match="values"):
        compute_advantages(AdvantageConfig(advantage_estimator="ppo"), data)
    with pytest.raises(ValueError, match="use_opd needs"):
        compute_advantages(AdvantageConfig(use_opd=True), data)
    with pytest.raises(KeyError, match="did you mean 'grpo'"):
        compute_advantages(AdvantageConfig(advantage_estimator="grpos"), data)


def test_a_registered_function_is_an_estimator() -> None:
    @register_estimator("twice_the_centred_reward", shaping=subtract_mean)
    def twice(config: AdvantageConfig, data: AdvantageBatch, kl_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        advantages_T = 2 * data.packing.expand(data.rewards_B)
        return advantages_T, advantages_T

    config = AdvantageConfig(advantage_estimator="twice_the_centred_reward")
    rewards_B = shape_rewards(config, [1.0, 3.0], [0, 0])
    result = compute_advantages(
        config, AdvantageBatch(packing=Packing((1, 1)), mask_T=torch.ones(2), rewards_B=rewards_B)
    )
    assert result.advantages_T.tolist() == [-2.0, 2.0]
    with pytest.raises(ValueError, match="already registered"):
        register_estimator("twice_the_centred_reward")(twice)
