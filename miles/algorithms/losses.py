"""Losses of one micro-batch: reinforcement learning, critic, supervised fine-tuning.

Each returns its part of the optimizer step's loss (see `aggregation`), and metrics as sums and counts.
"""

from __future__ import annotations

import dataclasses

import torch

from miles.algorithms import divergence_masks, sequence_losses, soft_losses  # noqa: F401  (they register their losses)
from miles.algorithms.corrections import Correction, CorrectionMethod, compute_correction
from miles.algorithms.kl import approximate_kl
from miles.algorithms.loss_aggregation import token_weights, weighted_sum
from miles.algorithms.loss_reducer import LossReducer
from miles.algorithms.metrics import MetricSum
from miles.algorithms.mis import mismatch_metrics
from miles.algorithms.packing import Packing, as_float, keep_log_probs, keep_where
from miles.algorithms.policy_losses import (
    PolicyInputs,
    PolicyLossConfig,
    PolicyTerms,
    bounded_exp,
    opsm_drop,
    policy_loss,
)
from miles.algorithms.user_functions import UserCorrection, UserReducer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(PolicyLossConfig):
    """Options of the policy's loss, named like the flags where there is one."""

    policy_loss: str = "ppo_clip"
    """Registered policy loss."""
    calculate_per_token_loss: bool = False
    """Mean over the step's tokens rather than over its rollouts."""
    loss_length: float | None = None
    """dr_grpo: the constant every sample's token sum is divided by, e.g. the response length limit; a mean over tokens
    (calculate_per_token_loss) has no use for it."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    use_kl_loss: bool = False
    """Compute the KL to the reference."""
    kl_loss_coef: float = 0.0
    """Weight of that KL in the loss; 0 only observes it."""
    kl_loss_type: str = "k1"
    use_unbiased_kl: bool = False
    """Multiply the KL by the importance ratio."""
    echo_loss_coef: float = 0.0
    """Weight of the cross-entropy of observation tokens (ECHO); excludes calculate_per_token_loss."""
    use_rollout_logprobs: bool = False
    """The rollout's log-probs are the old policy's."""
    use_opsm: bool = False
    """Off-policy sequence masking."""
    opsm_delta: float = 1e-4
    correction: CorrectionMethod | None = None
    """Train/rollout correction of the policy loss; None: off."""
    user_correction: UserCorrection | None = None
    """The user's own in its place, computed for each micro-batch."""
    user_reducer: UserReducer | None = None
    """The user's own sum of the policy loss."""
    get_mismatch_metrics: bool = False
    """Report the mismatch of train and rollout log-probs; never changes the loss."""

    def __post_init__(self) -> None:
        PolicyLossConfig.__post_init__(self)
        if self.policy_loss == "dr_grpo" and self.loss_length is None:
            raise ValueError("policy_loss dr_grpo needs loss_length, the constant to divide by (say the length limit)")
        if self.echo_loss_coef != 0 and self.calculate_per_token_loss:
            raise ValueError("echo_loss_coef weighs means of samples, so calculate_per_token_loss must be off")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossBatch:
    """The response tokens of a micro-batch. Values at masked tokens are ignored."""

    packing: Packing
    mask_T: torch.Tensor
    """1 on tokens that are trained on, 0 elsewhere; any dtype."""
    advantages_T: torch.Tensor
    train_log_probs_T: torch.Tensor | None = None
    """Of the policy before this step's updates, computed by the trainer (or by a kept old actor). None: the policy
    being trained, without gradient, which is the same thing in the first update after a rollout."""
    rollout_log_probs_T: torch.Tensor | None = None
    """As the rollout engine reported them."""
    ref_log_probs_T: torch.Tensor | None = None
    correction: Correction | None = None
    """This micro-batch's part of a correction computed over the whole batch; None: computed here where configured."""
    opd_reverse_kl_T: torch.Tensor | None = None
    """Reported only."""
    observation_mask_T: torch.Tensor | None = None
    """1 on tokens that an environment has put into the response; needed for echo_loss_coef."""
    denominator: float | None = None
    """Rollouts (tokens with calculate_per_token_loss) of the optimizer step over all ranks; None: this batch's."""
    mask_sums_B: torch.Tensor | None = None
    """Mask sum of the rollout each sample belongs to, where a rollout became several samples; None: each its own."""
    num_rollouts: float | None = None
    """Rollouts this micro-batch stands for in metrics, where that is not its number of samples."""


@dataclasses.dataclass(frozen=True)
class LossOutput:
    """A loss to call backward on, and its metrics by full name."""

    loss: torch.Tensor
    metrics: dict[str, MetricSum]


def rl_loss(
    config: LossConfig, batch: LossBatch, log_probs_T: torch.Tensor, entropy_T: torch.Tensor | None = None
) -> LossOutput:
    """Policy loss, masked (OPSM) and corrected (TIS, IcePop, MIS), minus the entropy bonus, plus KL and ECHO's loss.

    Rejected tokens leave the numerators of the first three terms; masked sequences (OPSM) and a correction's weights
    affect only the policy loss.

    Args:
        config: what to compute.
        batch: the micro-batch.
        log_probs_T: of the policy being trained, [T], with gradient.
        entropy_T: of the policy being trained, [T]; needed where entropy_coef is set, else reported when given.

    Raises:
        KeyError: unknown policy loss.
        ValueError: something the config needs is missing, or a shape does not fit the packing.
    """
    _check(config, batch, log_probs_T, entropy_T)
    batch = dataclasses.replace(batch, mask_T=batch.mask_T.bool())  # once for all that read it
    reducer = LossReducer(batch, config.calculate_per_token_loss)
    inputs = PolicyInputs.of(
        packing=batch.packing,
        mask_T=batch.mask_T,
        log_probs_T=log_probs_T,
        old_log_probs_T=_old_log_probs(config, batch),
        advantages_T=batch.advantages_T,
    )
    new_T, old_T = inputs.log_probs_T, inputs.old_log_probs_T
    train_T = _train_log_probs(config, batch, inputs)
    terms = policy_loss(config.policy_loss, config, inputs)
    pg_loss_T = _drop_sequences(config, inputs, reducer, terms.loss_T)
    correction = _correction(config, batch, train_T)
    keep_T = correction.keep_T if correction else None
    if correction and correction.weights_T is not None:
        pg_loss_T = pg_loss_T * correction.weights_T

    if config.user_correction is not None:
        rollout_T = _required(batch.rollout_log_probs_T, "rollout_log_probs_T", "custom_tis_function_path")
        pg_loss_T, correction = config.user_correction(pg_loss_T, train_T, rollout_T, batch.mask_T, batch.packing)
        keep_T = correction.keep_T

    constant_length = config.loss_length if config.policy_loss == "dr_grpo" else None
    if config.user_reducer is None:
        pg_total = reducer.total(pg_loss_T, keep_T, constant_length)
    else:
        kept_T = batch.mask_T if keep_T is None else batch.mask_T & keep_T
        pg_total = config.user_reducer(pg_loss_T, kept_T, batch.packing, per_token=config.calculate_per_token_loss)
    loss_total = pg_total
    if entropy_T is not None:
        entropy_total = reducer.total(entropy_T, keep_T)
        reducer.report("entropy_loss", entropy_total)
        if config.entropy_coef != 0:
            loss_total = loss_total - config.entropy_coef * entropy_total
    if config.use_kl_loss:
        kl_total = reducer.total(_reference_kl(config, batch, new_T, old_T), keep_T)
        reducer.report("kl_loss", kl_total)
        if config.kl_loss_coef != 0:
            loss_total = loss_total + config.kl_loss_coef * kl_total
    if config.echo_loss_coef != 0:
        echo_total = _observation_loss(batch, log_probs_T)
        reducer.report("echo_loss", echo_total)
        loss_total = loss_total + config.echo_loss_coef * echo_total
    reducer.report("loss", loss_total)
    reducer.report("pg_loss", pg_total)
    _report_policy(batch, reducer, terms, keep_T)
    _report_mismatch(config, batch, reducer, train_T, terms, correction)
    return LossOutput(reducer.loss(loss_total), reducer.metrics)


def _old_log_probs(config: LossConfig, batch: LossBatch) -> torch.Tensor | None:
    """Of the policy that the ratio is taken against, as given; None: the one being trained."""
    if config.use_rollout_logprobs:
        return _required(batch.rollout_log_probs_T, "rollout_log_probs_T", "use_rollout_logprobs")
    return batch.train_log_probs_T


def _train_log_probs(config: LossConfig, batch: LossBatch, inputs: PolicyInputs) -> torch.Tensor:
    """`LossBatch.train_log_probs_T` without gradient, 0 at masked tokens."""
    if batch.train_log_probs_T is None:
        return inputs.log_probs_T.detach()
    if config.use_rollout_logprobs:
        return keep_log_probs(inputs.mask_T, batch.train_log_probs_T)
    return inputs.old_log_probs_T


def _drop_sequences(
    config: LossConfig, inputs: PolicyInputs, reducer: LossReducer, loss_T: torch.Tensor
) -> torch.Tensor:
    if not config.use_opsm:
        return loss_T
    dropped_T = opsm_drop(
        packing=inputs.packing,
        mask_T=inputs.mask_T,
        log_probs_T=inputs.log_probs_T,
        old_log_probs_T=inputs.old_log_probs_T,
        advantages_T=inputs.advantages_T,
        delta=config.opsm_delta,
    )
    reducer.report_tokens("opsm_clipfrac", as_float(dropped_T))
    return torch.where(dropped_T, 0.0, loss_T)


def _correction(config: LossConfig, batch: LossBatch, train_T: torch.Tensor) -> Correction | None:
    if batch.correction is not None or config.correction is None:
        return batch.correction
    return compute_correction(
        config.correction,
        train_log_probs_T=train_T,
        rollout_log_probs_T=_required(batch.rollout_log_probs_T, "rollout_log_probs_T", "correction"),
        mask_T=batch.mask_T,
        packing=batch.packing,
    )


def _reference_kl(config: LossConfig, batch: LossBatch, new_T: torch.Tensor, old_T: torch.Tensor) -> torch.Tensor:
    ref_T = keep_log_probs(batch.mask_T, _required(batch.ref_log_probs_T, "ref_log_probs_T", "use_kl_loss"))
    return approximate_kl(new_T, ref_T, config.kl_loss_type, old_T if config.use_unbiased_kl else None)


def _observation_loss(batch: LossBatch, log_probs_T: torch.Tensor) -> torch.Tensor:
    """Sum over samples of the mean negative log-likelihood of their observation tokens (ECHO, 2605.24517), 0-d."""
    mask_T = _required(batch.observation_mask_T, "observation_mask_T", "echo_loss_coef").bool()
    weights_T = token_weights(mask_T, batch.packing, dtype=as_float(log_probs_T).dtype)
    return -weighted_sum(keep_log_probs(mask_T, log_probs_T), weights_T, mask_T)


def _report_policy(batch: LossBatch, reducer: LossReducer, terms: PolicyTerms, keep_T: torch.Tensor | None) -> None:
    reducer.report("pg_clipfrac", reducer.total(terms.clipped_T, keep_T))
    reducer.report("ppo_kl", reducer.total(-terms.log_ratio_T.detach(), keep_T))
    for name, values_T in terms.metrics_T.items():
        reducer.report_tokens(name, values_T)
    reducer.report_tokens("ess_ratio", effective_sample_ratio(terms.log_ratio_T, batch.mask_T, batch.packing))
    if batch.opd_reverse_kl_T is not None:
        reducer.report_tokens("opd_reverse_kl", batch.opd_reverse_kl_T)


def _report_mismatch(
    config: LossConfig,
    batch: LossBatch,
    reducer: LossReducer,
    train_T: torch.Tensor,
    terms: PolicyTerms,
    correction: Correction | None,
) -> None:
    if batch.rollout_log_probs_T is not None:
        rollout_T = keep_log_probs(batch.mask_T, batch.rollout_log_probs_T)
        difference_T = (train_T - rollout_T).abs()
        reducer.report_tokens("train_rollout_logprob_abs_diff", difference_T)
        reducer.report_largest("train_rollout_logprob_abs_diff_max", difference_T)
        reducer.report_tokens("train_rollout_kl", approximate_kl(rollout_T, train_T, "low_var_kl"))
    metrics_T = dict(correction.metrics_T) if correction else {}
    if config.get_mismatch_metrics:
        sampled_T = _required(batch.rollout_log_probs_T, "rollout_log_probs_T", "get_mismatch_metrics")
        rollout_T = keep_log_probs(batch.mask_T, sampled_T)
        metrics_T |= mismatch_metrics(train_T, rollout_T, batch.mask_T.bool(), batch.packing)
    if metrics_T:
        metrics_T["ois"] = bounded_exp(terms.log_ratio_T.detach())
    for name, values_T in metrics_T.items():
        reducer.report_tokens(name, values_T)


def effective_sample_ratio(log_ratio_T: torch.Tensor, mask_T: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(sum w)^2 / (n sum w^2) over each sample's n unmasked tokens, w = exp(log ratio), on every token of the sample.

    1 where all ratios are equal, near 1 / n where one of them outweighs the rest; 0 for a sample without a token.
    """
    ratio_T = keep_where(mask_T, bounded_exp(as_float(log_ratio_T.detach())))
    count_B = packing.sum(as_float(mask_T.bool())).clamp_min(1)
    ratio_B = packing.sum(ratio_T).square() / (count_B * packing.sum(ratio_T.square()).clamp_min(1e-8))
    return packing.expand(ratio_B)


def value_loss(
    values_T: torch.Tensor, old_values_T: torch.Tensor, returns_T: torch.Tensor, value_clip: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor]:
    """The larger of the clipped and the unclipped squared error of each token, and where the value left the clip range.

    The clipped value is old + clamp(value - old, +-value_clip); the second result is 0 or 1.
    """
    values_T, old_values_T, returns_T = as_float(values_T), as_float(old_values_T), as_float(returns_T)
    moved_T = values_T - old_values_T
    clipped_T = old_values_T + moved_T.clamp(-value_clip, value_clip)
    loss_T = torch.maximum((clipped_T - returns_T).square(), (values_T - returns_T).square())
    return loss_T, as_float(moved_T.detach().abs() > value_clip)


def critic_loss(
    batch: LossBatch,
    values_T: torch.Tensor,
    old_values_T: torch.Tensor,
    returns_T: torch.Tensor,
    *,
    value_clip: float = 0.2,
    calculate_per_token_loss: bool = False,
) -> LossOutput:
    """`value_loss` aggregated like a policy loss; of `batch` only layout, mask and denominators are read."""
    batch.packing.check(mask_T=batch.mask_T, values_T=values_T, old_values_T=old_values_T, returns_T=returns_T)
    reducer = LossReducer(batch, calculate_per_token_loss)
    loss_T, clipped_T = value_loss(
        keep_where(batch.mask_T, values_T),
        keep_where(batch.mask_T, old_values_T),
        keep_where(batch.mask_T, returns_T),
        value_clip,
    )
    total = reducer.total(loss_T)
    reducer.report("value_loss", total)
    reducer.report_tokens("value_clipfrac", clipped_T)
    return LossOutput(reducer.loss(total), reducer.metrics)


def sft_loss(batch: LossBatch, log_probs_T: torch.Tensor, *, calculate_per_token_loss: bool = False) -> LossOutput:
    """Negative log-likelihood of the unmasked tokens; of `batch` only layout, mask and denominators are read."""
    batch.packing.check(mask_T=batch.mask_T, log_probs_T=log_probs_T)
    reducer = LossReducer(batch, calculate_per_token_loss)
    total = -reducer.total(keep_log_probs(batch.mask_T, log_probs_T))
    reducer.report("loss", total)
    return LossOutput(reducer.loss(total), reducer.metrics)


def _required(x_T: torch.Tensor | None, name: str, flag: str) -> torch.Tensor:
    if x_T is None:
        raise ValueError(f"{flag} needs LossBatch.{name}")
    return x_T


def _check(config: LossConfig, batch: LossBatch, log_probs_T: torch.Tensor, entropy_T: torch.Tensor | None) -> None:
    batch.packing.check(
        mask_T=batch.mask_T,
        log_probs_T=log_probs_T,
        entropy_T=entropy_T,
        advantages_T=batch.advantages_T,
        train_log_probs_T=batch.train_log_probs_T,
        rollout_log_probs_T=batch.rollout_log_probs_T,
        ref_log_probs_T=batch.ref_log_probs_T,
        opd_reverse_kl_T=batch.opd_reverse_kl_T,
        observation_mask_T=batch.observation_mask_T,
    )
    if entropy_T is None and config.entropy_coef != 0:
        raise ValueError("entropy_coef needs entropy_T: compute log-probs with_entropy=True")
