import dataclasses
import math

import algorithm_reference as reference
import pytest
import torch

from miles.algorithms import (
    IcePop,
    LossBatch,
    LossConfig,
    LossOutput,
    MaskedImportanceSampling,
    Packing,
    TruncatedImportanceSampling,
    compute_correction,
    critic_loss,
    reduce_metrics,
    rl_loss,
    sft_loss,
    token_log_probs,
    value_loss,
)

PACKING = Packing((5, 3, 1, 4))
MASK_T = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1, 1])  # the third sample is fully masked
VOCAB = 17


@dataclasses.dataclass
class Case:
    """A micro-batch with everything a loss may read; advantages have one sign a sample."""

    logits_TV: torch.Tensor
    tokens_T: torch.Tensor
    batch: LossBatch


def case(mask_T: torch.Tensor = MASK_T, drift: float = 0.3, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    logits_TV = 2 * torch.randn(13, VOCAB, generator=generator)
    tokens_T = torch.randint(0, VOCAB, (13,), generator=generator)
    new_T = reference.log_prob_and_entropy(logits_TV, tokens_T, 0.9)[0].float()
    train_T, rollout_T, ref_T = (new_T + drift * torch.randn(13, generator=generator) for _ in range(3))
    advantages_B = torch.tensor([1.2, -0.7, 3.0, -1.5])
    batch = LossBatch(
        packing=PACKING,
        mask_T=mask_T,
        advantages_T=PACKING.expand(advantages_B),
        train_log_probs_T=train_T,
        rollout_log_probs_T=rollout_T,
        ref_log_probs_T=ref_T,
    )
    return Case(logits_TV.requires_grad_(), tokens_T, batch)


IMPOSSIBLE = {
    "by the trainer now": ("log_probs_T",),
    "by the trainer before": ("train_log_probs_T",),
    "by the trainer now and before": ("log_probs_T", "train_log_probs_T"),
    "by the engine": ("rollout_log_probs_T",),
    "by all": ("log_probs_T", "train_log_probs_T", "rollout_log_probs_T", "ref_log_probs_T"),
    "by the reference": ("ref_log_probs_T",),
}


@pytest.mark.parametrize("impossible", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
@pytest.mark.parametrize("policy", ["ppo_clip", "gspo", "cispo", "dr_grpo"])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3", "low_var_kl"])
def test_a_token_that_is_impossible_leaves_loss_and_gradient_finite(
    policy: str, kl_type: str, impossible: tuple[str, ...]
) -> None:
    config = LossConfig(
        policy_loss=policy,
        loss_length=8.0,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        kl_loss_type=kl_type,
        use_unbiased_kl=kl_type == "k3",
        use_opsm=True,
        correction=MaskedImportanceSampling(tis_level="sequence", rs_veto_threshold=1e-4),
        get_mismatch_metrics=True,
    )
    batch = case().batch
    names = ("train_log_probs_T", "rollout_log_probs_T", "ref_log_probs_T")
    columns = {name: getattr(batch, name).detach().clone() for name in names}
    columns["log_probs_T"] = columns["train_log_probs_T"] + 0.1
    for name in impossible:
        columns[name][1] = -torch.inf
    new_T = columns.pop("log_probs_T").requires_grad_()
    output = rl_loss(config, dataclasses.replace(batch, **columns), new_T)
    output.loss.backward()
    assert output.loss.isfinite()
    assert new_T.grad.isfinite().all()
    assert [name for name, metric in output.metrics.items() if not metric.total.isfinite()] == []


def run(config: LossConfig, data: Case) -> tuple[LossOutput, torch.Tensor]:
    """Loss, and gradient of the logits."""
    scored = token_log_probs(data.logits_TV, data.tokens_T, temperature=0.9, with_entropy=True, chunk_rows=4)
    output = rl_loss(config, data.batch, scored.log_probs_T, scored.entropy_T)
    (grad_TV,) = torch.autograd.grad(output.loss, data.logits_TV)
    return output, grad_TV


def straight_line(config: LossConfig, data: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64, one sample after the other, with torch's own log-softmax and gradients."""
    logits_TV = data.logits_TV.detach().double().requires_grad_()
    new_T, entropy_T = reference.log_prob_and_entropy(logits_TV, data.tokens_T, 0.9)
    batch = data.batch
    columns = [new_T, entropy_T, batch.train_log_probs_T, batch.rollout_log_probs_T, batch.ref_log_probs_T]
    columns += [batch.advantages_T, batch.mask_T]
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0.0
    for new, entropy, train, rollout, ref, advantage, mask in zip(
        *(torch.split(x_T.double(), PACKING.lengths) for x_T in columns), strict=True
    ):
        n = max(float(mask.sum()), 1.0)
        tokens += float(mask.sum())
        old = rollout if config.use_rollout_logprobs else train
        log_ratio = new - old
        if config.policy_loss == "gspo":
            log_ratio = ((log_ratio * mask).sum() / n).expand_as(mask)
        ratio = log_ratio.clamp(-20, 20).exp()
        low, high = 1 - config.eps_clip, 1 + (config.eps_clip_high or config.eps_clip)
        if config.policy_loss == "cispo":
            pg = -ratio.clamp(low, high).detach() * advantage * new
        else:
            pg = torch.maximum(-ratio * advantage, -ratio.clamp(low, high) * advantage)
        if config.eps_clip_c is not None:
            pg = torch.where(advantage < 0, torch.minimum(-config.eps_clip_c * advantage, pg), pg)
        if config.use_opsm and float(((old - new.detach()) * mask).sum() / n) > config.opsm_delta:
            pg = torch.where(advantage < 0, 0.0, pg)
        keep = torch.ones_like(mask)
        if isinstance(config.correction, TruncatedImportanceSampling):
            pg = pg * (train - rollout).exp().clamp(config.correction.tis_clip_low, config.correction.tis_clip)
        if isinstance(config.correction, MaskedImportanceSampling):
            weight = (((train - rollout) * mask).sum() / n).exp()
            pg = pg * weight.clamp(max=config.correction.tis_upper_bound)
            r = (train - rollout).exp()
            keep = ((r >= config.correction.rs_bounds[0]) & (r <= config.correction.rs_bounds[1])).double()
        kl = torch.tensor(0.0)
        if config.use_kl_loss:
            x = new - ref
            kl = {"k1": x, "k2": x**2 / 2}.get(config.kl_loss_type, (-x).exp() - 1 + x)
            if config.use_unbiased_kl:
                kl = kl * (new - old).exp()
        per_sample = 1.0 if config.calculate_per_token_loss else n
        pg_length = config.loss_length if config.policy_loss == "dr_grpo" else per_sample
        total = total + (pg * mask * keep).sum() / pg_length
        total = total + ((config.kl_loss_coef * kl - config.entropy_coef * entropy) * mask * keep).sum() / per_sample
    loss = total / (tokens if config.calculate_per_token_loss else len(PACKING.lengths))
    (grad_TV,) = torch.autograd.grad(loss, logits_TV)
    return loss, grad_TV


CONFIGS = {
    "ppo_clip": LossConfig(),
    "asymmetric and dual": LossConfig(eps_clip=0.1, eps_clip_high=0.28, eps_clip_c=1.2),
    "per token": LossConfig(calculate_per_token_loss=True, entropy_coef=0.01),
    "gspo": LossConfig(policy_loss="gspo", eps_clip=3e-2, eps_clip_high=4e-2),
    "cispo": LossConfig(policy_loss="cispo", eps_clip=1.0, eps_clip_high=0.2),
    "dr_grpo": LossConfig(policy_loss="dr_grpo", loss_length=32),
    "rollout log-probs": LossConfig(use_rollout_logprobs=True),
    "entropy": LossConfig(entropy_coef=0.1),
    "k1": LossConfig(use_kl_loss=True, kl_loss_coef=0.2, kl_loss_type="k1"),
    "unbiased k2": LossConfig(use_kl_loss=True, kl_loss_coef=0.2, kl_loss_type="k2", use_unbiased_kl=True),
    "low_var_kl": LossConfig(use_kl_loss=True, kl_loss_coef=0.2, kl_loss_type="low_var_kl"),
    "opsm": LossConfig(use_opsm=True, opsm_delta=0.0),
    "tis": LossConfig(correction=TruncatedImportanceSampling(tis_clip=1.1, tis_clip_low=0.8)),
    "mis": LossConfig(
        correction=MaskedImportanceSampling(
            tis_level="geometric", tis_upper_bound=1.1, rs_lower_bound=0.7, rs_upper_bound=1.2
        ),
        entropy_coef=0.05,
        use_kl_loss=True,
        kl_loss_coef=0.1,
    ),
}


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_and_gradients_of_logits_match_float64(name: str, seed: int) -> None:
    data = case(seed=seed)
    output, grad_TV = run(CONFIGS[name], data)
    loss, expected_TV = straight_line(CONFIGS[name], data)
    torch.testing.assert_close(output.loss.double(), loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_TV.double(), expected_TV, atol=1e-5, rtol=1e-5)
    assert expected_TV.abs().max() > 1e-3


@pytest.mark.parametrize("name", list(CONFIGS))
def test_micro_batches_add_up_to_the_whole(name: str) -> None:
    config, data = CONFIGS[name], case()
    whole, whole_TV = run(config, data)
    correction = None
    if config.correction is not None:
        correction = compute_correction(
            config.correction,
            train_log_probs_T=data.batch.train_log_probs_T,
            rollout_log_probs_T=data.batch.rollout_log_probs_T,
            mask_T=MASK_T,
            packing=PACKING,
        )
    losses, gradients, metrics = [], torch.zeros_like(data.logits_TV), []
    for samples in ([3, 0], [2], [1]):
        columns = ("mask_T", "advantages_T", "train_log_probs_T", "rollout_log_probs_T", "ref_log_probs_T")
        part = LossBatch(
            packing=PACKING.subset(samples),
            denominator=float(MASK_T.sum()) if config.calculate_per_token_loss else 4,
            correction=correction and correction.take(PACKING, samples),
            **{column: PACKING.take(getattr(data.batch, column), samples) for column in columns},
        )
        scored = token_log_probs(
            PACKING.take(data.logits_TV, samples),
            PACKING.take(data.tokens_T, samples),
            temperature=0.9,
            with_entropy=True,
        )
        output = rl_loss(config, part, scored.log_probs_T, scored.entropy_T)
        gradients += torch.autograd.grad(output.loss, data.logits_TV)[0]
        losses.append(output.loss.detach())
        metrics.append(output.metrics)
    torch.testing.assert_close(torch.stack(losses).sum(), whole.loss.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients, whole_TV, atol=1e-6, rtol=1e-6)
    assert reduce_metrics(metrics) == pytest.approx(reduce_metrics([whole.metrics]), abs=1e-6, rel=1e-5)


def test_on_policy_the_ratio_is_one_and_nothing_is_clipped() -> None:
    data = case(drift=0.0)
    config = LossConfig(get_mismatch_metrics=True)
    for train_T in (data.batch.train_log_probs_T, None):
        new_T = data.batch.train_log_probs_T.clone().requires_grad_()
        output = rl_loss(config, dataclasses.replace(data.batch, train_log_probs_T=train_T), new_T)
        metrics = reduce_metrics([output.metrics])
        assert abs(metrics["train/ppo_kl"]) < 1e-9
        assert metrics["train/pg_clipfrac"] == 0
        assert metrics["train/ess_ratio"] == pytest.approx(3 / 4)  # the fully masked sample has none
        output.loss.backward()
        # The gradient of the policy loss is then that of -A log p.
        weights_T = -data.batch.advantages_T * MASK_T / PACKING.expand(torch.tensor([4.0, 3.0, 1.0, 3.0])) / 4
        torch.testing.assert_close(new_T.grad, weights_T)


def test_metrics_by_hand() -> None:
    # Two samples of one and two tokens; log ratios 0.5, 0, -0.5.
    new_T = torch.tensor([-1.0, -2.0, -1.5], requires_grad=True)
    batch = LossBatch(
        packing=Packing((1, 2)),
        mask_T=torch.ones(3),
        advantages_T=torch.tensor([1.0, -1.0, -1.0]),
        train_log_probs_T=torch.tensor([-1.5, -2.0, -1.0]),
        rollout_log_probs_T=torch.tensor([-1.3, -2.0, -2.0]),
        ref_log_probs_T=torch.tensor([-1.0, -2.0, -2.5]),
        opd_reverse_kl_T=torch.tensor([0.3, 0.1, 0.3]),
    )
    config = LossConfig(
        correction=TruncatedImportanceSampling(), use_kl_loss=True, use_opsm=True, opsm_delta=0.1, entropy_coef=0.1
    )
    output = rl_loss(config, batch, new_T, torch.tensor([0.2, 0.4, 0.6]))
    metrics = reduce_metrics([output.metrics])
    ratio, rho = math.exp(-0.5), math.exp(1.0)
    expected = {
        # Sample 1 has mean(old - new) = 0.25 > 0.1 and a negative advantage: dropped.
        "train/opsm_clipfrac": 0.5,
        "train/pg_loss": (-1.2 * math.exp(-0.2)) / 2,
        "train/pg_clipfrac": (1 + 0.5) / 2,
        "train/ppo_kl": (-0.5 + 0.25) / 2,
        "train/entropy_loss": (0.2 + 0.5) / 2,
        "train/kl_loss": (0 + 0.5) / 2,
        "train/ess_ratio": (1 + (1 + ratio) ** 2 / (2 * (1 + ratio**2))) / 2,
        "train/ois": (math.exp(0.5) + (1 + ratio) / 2) / 2,
        "train/tis": (math.exp(-0.2) + (1 + rho) / 2) / 2,
        "train/tis_clipfrac": (0 + 0.5) / 2,
        "train/tis_abs": (1 - math.exp(-0.2) + (rho - 1) / 2) / 2,
        "train/train_rollout_logprob_abs_diff": (0.2 + 0.5) / 2,
        "train/train_rollout_logprob_abs_diff_max": 1.0,
        "train/train_rollout_kl": ((math.exp(-0.2) - 1 + 0.2) + (math.exp(1) - 2) / 2) / 2,
        "train/opd_reverse_kl": (0.3 + 0.2) / 2,
    }
    expected["train/loss"] = expected["train/pg_loss"] - 0.1 * 0.35
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert output.loss.item() == pytest.approx(expected["train/loss"], abs=1e-6)


def test_mismatch_metrics_do_not_change_the_loss() -> None:
    data = case()
    plain, plain_TV = run(LossConfig(), data)
    observed, observed_TV = run(LossConfig(get_mismatch_metrics=True), data)
    assert torch.equal(plain.loss, observed.loss)
    assert torch.equal(plain_TV, observed_TV)
    assert observed.metrics.keys() > plain.metrics.keys()
    assert "train/mis_chi2_seq" in observed.metrics


@pytest.mark.parametrize("name", list(CONFIGS))
def test_masked_garbage_reaches_nothing(name: str) -> None:
    data = case()
    output, grad_TV = run(CONFIGS[name], data)
    hidden_T = MASK_T == 0
    columns = ("advantages_T", "train_log_probs_T", "rollout_log_probs_T", "ref_log_probs_T")
    dirty = {
        c: getattr(data.batch, c).masked_fill(hidden_T, v)
        for c, v in zip(columns, [math.nan, math.inf] * 2, strict=True)
    }
    data.batch = dataclasses.replace(data.batch, **dirty)
    output_dirty, dirty_TV = run(CONFIGS[name], data)
    assert torch.equal(output.loss, output_dirty.loss)
    assert torch.equal(grad_TV, dirty_TV)
    assert reduce_metrics([output.metrics]) == reduce_metrics([output_dirty.metrics])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_fully_masked_batch_has_a_zero_loss_and_gradient(name: str) -> None:
    output, grad_TV = run(CONFIGS[name], case(mask_T=torch.zeros(13)))
    assert output.loss.item() == 0
    assert grad_TV.abs().max() == 0


@pytest.mark.parametrize("name", list(CONFIGS))
def test_half_precision_log_probs_are_computed_in_float32(name: str) -> None:
    data = case()
    columns = ("advantages_T", "train_log_probs_T", "rollout_log_probs_T", "ref_log_probs_T")
    halves = {c: getattr(data.batch, c).bfloat16() for c in columns}
    new_T, entropy_T = -torch.rand(13).bfloat16(), torch.rand(13).bfloat16()
    half = rl_loss(CONFIGS[name], dataclasses.replace(data.batch, **halves), new_T, entropy_T)
    floats = {c: x_T.float() for c, x_T in halves.items()}
    full = rl_loss(CONFIGS[name], dataclasses.replace(data.batch, **floats), new_T.float(), entropy_T.float())
    assert half.loss.dtype == torch.float32
    assert torch.equal(half.loss, full.loss)


@pytest.mark.parametrize("policy_loss", ["ppo_clip", "gspo"])
@pytest.mark.parametrize("drift", [60.0, 1e4])
def test_huge_log_ratios_give_finite_losses_and_gradients(policy_loss: str, drift: float) -> None:
    config = LossConfig(
        policy_loss=policy_loss,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        kl_loss_type="low_var_kl",
        use_unbiased_kl=True,
        correction=MaskedImportanceSampling(tis_level="sequence", rs_level="geometric", tis_batch_normalize=True),
    )
    output, grad_TV = run(config, case(drift=drift))
    assert output.loss.isfinite()
    assert grad_TV.isfinite().all()


def test_icepop_and_a_user_s_own_correction_are_applied() -> None:
    data = case()
    icepop, _ = run(LossConfig(correction=IcePop(tis_clip=1e-9, tis_clip_low=0.0)), data)
    assert icepop.loss.item() == 0

    def halve(train_T, rollout_T, mask_T, packing, group=None):  # type: ignore[no-untyped-def]
        return dataclasses.replace(
            TruncatedImportanceSampling()(train_T, rollout_T, mask_T, packing), weights_T=0.5 * mask_T
        )

    halved, _ = run(LossConfig(correction=halve), data)
    plain, _ = run(LossConfig(), data)
    assert halved.loss.item() == pytest.approx(plain.loss.item() / 2, abs=1e-6)


def test_what_a_config_needs_and_the_batch_lacks_is_named() -> None:
    data = case()
    bare = LossBatch(packing=PACKING, mask_T=MASK_T, advantages_T=data.batch.advantages_T)
    new_T = torch.zeros(13)
    for config, message in (
        (LossConfig(use_kl_loss=True), r"use_kl_loss needs LossBatch\.ref_log_probs_T"),
        (LossConfig(use_rollout_logprobs=True), r"use_rollout_logprobs needs LossBatch\.rollout_log_probs_T"),
        (LossConfig(correction=IcePop()), r"correction needs LossBatch\.rollout_log_probs_T"),
        (LossConfig(entropy_coef=0.1), "entropy_coef needs entropy_T"),
    ):
        with pytest.raises(ValueError, match=message):
            rl_loss(config, bare, new_T)
    with pytest.raises(ValueError, match="log_probs_T has shape"):
        rl_loss(LossConfig(), bare, new_T[1:])
    with pytest.raises(ValueError, match="dr_grpo needs loss_length"):
        LossConfig(policy_loss="dr_grpo")


def test_value_loss_by_hand() -> None:
    # old 0, clip 0.2. Value 0.5, return 1: clipped 0.2 is worse. Value 0.5, return 0: unclipped is worse.
    loss_T, clipped_T = value_loss(torch.tensor([0.5, 0.5, 0.1]), torch.zeros(3), torch.tensor([1.0, 0.0, 0.3]))
    assert loss_T.tolist() == pytest.approx([0.64, 0.25, 0.04])
    assert clipped_T.tolist() == [1, 1, 0]


def test_value_loss_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    values_T = torch.randn(9, dtype=torch.float64).requires_grad_()
    old_T, returns_T = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x_T: value_loss(x_T, old_T, returns_T)[0], values_T)


def test_critic_loss_averages_sample_means_and_ignores_masked_values() -> None:
    batch = LossBatch(packing=Packing((2, 2)), mask_T=torch.tensor([1, 0, 1, 1]), advantages_T=torch.zeros(4))
    values_T = torch.tensor([0.5, torch.nan, 0.5, 0.1], requires_grad=True)
    output = critic_loss(batch, values_T, torch.zeros(4), torch.tensor([1.0, torch.nan, 0.0, 0.3]))
    output.loss.backward()
    assert output.loss.item() == pytest.approx((0.64 + (0.25 + 0.04) / 2) / 2)
    assert values_T.grad.tolist() == pytest.approx([0.0, 0.0, 0.25, -0.1])
    assert reduce_metrics([output.metrics])["train/value_clipfrac"] == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize("per_token", [False, True])
def test_sft_loss_is_cross_entropy(per_token: bool) -> None:
    data = case()
    scored = token_log_probs(data.logits_TV, data.tokens_T)
    batch = LossBatch(packing=PACKING, mask_T=MASK_T, advantages_T=torch.zeros(13))
    output = sft_loss(batch, scored.log_probs_T, calculate_per_token_loss=per_token)
    exact_TV = data.logits_TV.detach().double().requires_grad_()
    nll_T = torch.nn.functional.cross_entropy(exact_TV, data.tokens_T, reduction="none")
    expected = (
        (nll_T * MASK_T).sum() / MASK_T.sum()
        if per_token
        else reference.sum_of_sample_means(PACKING.split(nll_T), PACKING.split(MASK_T)) / 4
    )
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-5, rtol=1e-5)
    grad_TV = torch.autograd.grad(output.loss, data.logits_TV)[0]
    torch.testing.assert_close(grad_TV.double(), torch.autograd.grad(expected, exact_TV)[0], atol=1e-5, rtol=1e-5)
    assert reduce_metrics([output.metrics])["train/loss"] == pytest.approx(output.loss.item(), abs=1e-6)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_padded_rows_give_the_same_loss_and_gradient(name: str) -> None:
    data = case()
    config = CONFIGS[name]
    packed, packed_TV = run(config, data)
    rows = Packing((5, 5, 5, 5))
    columns = ("mask_T", "advantages_T", "train_log_probs_T", "rollout_log_probs_T", "ref_log_probs_T")
    padded = Case(
        rows.pack(PACKING.unpack(data.logits_TV.detach())).requires_grad_(),
        rows.pack(PACKING.unpack(data.tokens_T)),
        LossBatch(packing=rows, **{c: rows.pack(PACKING.unpack(getattr(data.batch, c))) for c in columns}),
    )
    output, padded_TV = run(config, padded)
    torch.testing.assert_close(output.loss, packed.loss, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(PACKING.pack(rows.unpack(padded_TV)), packed_TV, atol=1e-7, rtol=1e-6)


def test_dr_grpo_is_divided_by_the_length_and_the_samples_or_is_a_mean_over_tokens() -> None:
    advantages_T = torch.tensor([1.0] * 4 + [-3.0] * 4)
    batch = LossBatch(packing=Packing((4, 4)), mask_T=torch.ones(8), advantages_T=advantages_T)
    for per_token, denominator, divisor in ((False, 2.0, 10 * 2), (True, 8.0, 8)):
        config = LossConfig(policy_loss="dr_grpo", loss_length=10.0, calculate_per_token_loss=per_token)
        output = rl_loss(config, dataclasses.replace(batch, denominator=denominator), torch.zeros(8))
        assert output.loss.item() == pytest.approx(-float(advantages_T.sum()) / divisor)


def test_echo_adds_the_mean_nll_of_each_samples_observation_tokens() -> None:
    # Sample 0 has two observation tokens, sample 1 one, sample 2 none, over three rollouts of the step and one more.
    packing = Packing((4, 2, 1))
    mask_T = torch.tensor([1, 0, 0, 1, 0, 1, 1])
    new_T = torch.tensor([-1.0, -2.0, -3.0, -0.5, -0.7, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    advantages_T = torch.tensor([1.0, 9.0, 9.0, 1.0, 9.0, -1.0, 0.5])
    batch = LossBatch(
        packing=packing, mask_T=mask_T, advantages_T=advantages_T, observation_mask_T=1 - mask_T, denominator=4
    )
    plain = rl_loss(LossConfig(), batch, new_T)
    (grad_T,) = torch.autograd.grad(plain.loss, new_T)
    echo = rl_loss(LossConfig(echo_loss_coef=0.05), batch, new_T)
    (with_echo_T,) = torch.autograd.grad(echo.loss, new_T)
    nll = (2.0 + 3.0) / 2 + 0.7
    assert echo.loss.item() - plain.loss.item() == pytest.approx(0.05 * nll / 4)
    assert (with_echo_T - grad_T).tolist() == pytest.approx(
        [0, -0.05 / 2 / 4, -0.05 / 2 / 4, 0, -0.05 / 4, 0, 0], abs=1e-12
    )
    assert reduce_metrics([echo.metrics])["train/echo_loss"] == pytest.approx(nll / 3)
    assert "train/echo_loss" not in plain.metrics


def test_echos_share_adds_up_over_micro_batches() -> None:
    packing, mask_T = Packing((3, 4, 2)), torch.tensor([1, 0, 1, 0, 0, 1, 1, 1, 0])
    torch.manual_seed(8)
    new_T, advantages_T = -torch.rand(9), torch.randn(9)
    config = LossConfig(echo_loss_coef=0.3)

    def loss(samples: list[int]) -> torch.Tensor:
        part = {"mask_T": mask_T, "advantages_T": advantages_T, "observation_mask_T": 1 - mask_T}
        tensors = {name: packing.take(x_T, samples) for name, x_T in part.items()}
        batch = LossBatch(packing=packing.subset(samples), **tensors, denominator=3)
        return rl_loss(config, batch, packing.take(new_T, samples)).loss

    torch.testing.assert_close(loss([0]) + loss([2, 1]), loss([0, 1, 2]))


def test_echo_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="calculate_per_token_loss must be off"):
        LossConfig(echo_loss_coef=0.1, calculate_per_token_loss=True)
    batch = LossBatch(packing=Packing((1,)), mask_T=torch.ones(1), advantages_T=torch.ones(1))
    with pytest.raises(ValueError, match=r"echo_loss_coef needs LossBatch\.observation_mask_T"):
        rl_loss(LossConfig(echo_loss_coef=0.1), batch, -torch.ones(1))
