"""Masked importance sampling: weights and rejection at token, sequence or geometric level, and mismatch metrics.

All ratios are trainer over rollout, of the same policy version. Weighting and rejection have their own levels and
bounds. A rejected token leaves the numerators of the loss and stays in its denominators.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, get_args

import torch

from miles.algorithms.collectives import all_reduce_sum
from miles.algorithms.corrections import Correction
from miles.algorithms.packing import Packing, as_float, keep_where
from miles.algorithms.policy_losses import bounded_exp

if TYPE_CHECKING:
    import torch.distributed as dist

MisLevel = Literal["token", "sequence", "geometric"]
MisMode = Literal["truncate", "clip", "mask"]

_SMALLEST_MEAN_WEIGHT = 1e-8
_LARGEST_LOG_PPL = 80.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedImportanceSampling:
    """Options of masked importance sampling; calling it computes the correction."""

    use_tis: bool = True
    """Weight the loss; False: weights are 1."""
    use_rs: bool = True
    """Reject tokens or sequences."""
    tis_level: MisLevel = "token"
    """Log ratio that weights are made of: each token's, the sequence's sum, or the sequence's mean (geometric)."""
    rs_level: MisLevel = "token"
    """The same for rejection."""
    tis_mode: MisMode = "truncate"
    """Weights above the upper bound are lowered to it (truncate), weights outside both bounds are moved to them (clip),
    or tokens whose weight lies outside are rejected (mask)."""
    tis_lower_bound: float | None = None
    """None: 1 / tis_upper_bound."""
    tis_upper_bound: float = 2.0
    rs_lower_bound: float | None = None
    """None: that of weighting."""
    rs_upper_bound: float | None = None
    """None: that of weighting."""
    rs_veto_threshold: float | None = None
    """With use_rs: one token whose ratio is below this rejects its whole sequence. None: off."""
    tis_batch_normalize: bool = False
    """Divide the weights by their mean over the data-parallel group's batch: over tokens at token level, over sequences
    otherwise. Rejected tokens count in the mean."""

    def __post_init__(self) -> None:
        for name, allowed in (("tis_level", MisLevel), ("rs_level", MisLevel), ("tis_mode", MisMode)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(get_args(allowed))}")
        for name, (low, high) in (("tis", self.tis_bounds), ("rs", self.rs_bounds)):
            if not 0 <= low < high:
                raise ValueError(f"{name}_lower_bound is {low} and {name}_upper_bound {high}; need 0 <= lower < upper")

    @property
    def tis_bounds(self) -> tuple[float, float]:
        """Bounds of the weights."""
        low = 1 / self.tis_upper_bound if self.tis_lower_bound is None else self.tis_lower_bound
        return low, self.tis_upper_bound

    @property
    def rs_bounds(self) -> tuple[float, float]:
        """Bounds outside which a ratio is rejected."""
        low, high = self.tis_bounds
        return (
            low if self.rs_lower_bound is None else self.rs_lower_bound,
            high if self.rs_upper_bound is None else self.rs_upper_bound,
        )

    def __call__(
        self,
        train_log_probs_T: torch.Tensor,
        rollout_log_probs_T: torch.Tensor,
        mask_T: torch.Tensor,
        packing: Packing,
        group: dist.ProcessGroup | None = None,
    ) -> Correction:
        """See `CorrectionMethod`."""
        log_ratio_T = train_log_probs_T - rollout_log_probs_T
        metrics = mismatch_metrics(train_log_probs_T, rollout_log_probs_T, mask_T, packing)
        weights_T: torch.Tensor | None = None
        keep_T = torch.ones_like(mask_T)
        if self.use_tis:
            ratio_T = bounded_exp(at_level(log_ratio_T, mask_T, packing, self.tis_level))
            weights_T, in_bounds_T = self._bound(ratio_T, metrics)
            keep_T = keep_T & in_bounds_T
            if self.tis_batch_normalize:
                mean = self._mean_weight(weights_T, mask_T, packing, group)
                weights_T = weights_T / mean
                metrics["mis_batch_norm_factor"] = mean.expand_as(weights_T)
            metrics["mis_ratio_mean_after_tis"] = weights_T
        if self.use_rs:
            keep_T = keep_T & self._accepted(log_ratio_T, mask_T, packing, metrics)
        metrics["mis_rejected_fraction"] = as_float(~keep_T)
        return Correction(weights_T, keep_T, metrics)

    def _bound(self, ratio_T: torch.Tensor, metrics: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights, and which tokens the mode keeps."""
        low, high = self.tis_bounds
        metrics["mis_tis_weight_before_bound"] = ratio_T
        everything_T = torch.ones_like(ratio_T, dtype=torch.bool)
        if self.tis_mode == "truncate":
            metrics["mis_truncate_fraction"] = as_float(ratio_T > high)
            weights_T, keep_T = ratio_T.clamp(max=high), everything_T
        elif self.tis_mode == "clip":
            metrics["mis_clip_fraction_low"] = as_float(ratio_T < low)
            metrics["mis_clip_fraction_high"] = as_float(ratio_T > high)
            weights_T, keep_T = ratio_T.clamp(low, high), everything_T
        else:
            metrics["mis_mask_fraction_low"] = as_float(ratio_T < low)
            metrics["mis_mask_fraction_high"] = as_float(ratio_T > high)
            weights_T, keep_T = ratio_T, (ratio_T >= low) & (ratio_T <= high)
        metrics["mis_tis_weight_after_bound"] = weights_T
        return weights_T, keep_T

    def _accepted(
        self, log_ratio_T: torch.Tensor, mask_T: torch.Tensor, packing: Packing, metrics: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return which tokens rejection sampling and the veto accept."""
        low, high = self.rs_bounds
        ratio_T = bounded_exp(at_level(log_ratio_T, mask_T, packing, self.rs_level))
        metrics["mis_rs_fraction_low"] = as_float(ratio_T < low)
        metrics["mis_rs_fraction_high"] = as_float(ratio_T > high)
        keep_T = (ratio_T >= low) & (ratio_T <= high)
        if self.rs_veto_threshold is not None:
            log_threshold = torch.tensor(self.rs_veto_threshold, dtype=torch.float64).log().item()
            catastrophic_T = mask_T & (log_ratio_T < log_threshold)
            vetoed_T = packing.expand(packing.sum(as_float(catastrophic_T)) > 0)
            metrics["mis_catastrophic_token_fraction"] = as_float(catastrophic_T)
            metrics["mis_catastrophic_seq_fraction"] = as_float(vetoed_T)
            keep_T = keep_T & ~vetoed_T
        return keep_T

    def _mean_weight(
        self, weights_T: torch.Tensor, mask_T: torch.Tensor, packing: Packing, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        """Mean weight of the whole batch; 1 where it is too small to divide by."""
        if self.tis_level == "token":
            total, count = keep_where(mask_T, weights_T).double().sum(), mask_T.double().sum()
        else:
            total = packing.mean(weights_T.double(), mask_T).sum()
            count = packing.sum(mask_T.double()).gt(0).double().sum()
        total, count = all_reduce_sum(torch.stack([total, count]), group)
        mean = total / count.clamp_min(1)
        return torch.where(mean > _SMALLEST_MEAN_WEIGHT, mean, 1.0).to(weights_T.dtype)


def at_level(log_ratio_T: torch.Tensor, mask_T: torch.Tensor, packing: Packing, level: MisLevel) -> torch.Tensor:
    """Each token's own log ratio, or on all its tokens the sequence's masked sum (sequence) or mean (geometric)."""
    if level == "token":
        return log_ratio_T
    if level == "sequence":
        return packing.expand(packing.sum(keep_where(mask_T, log_ratio_T)))
    return packing.expand(packing.mean(log_ratio_T, mask_T))


def _perplexity(mean_log_prob_B: torch.Tensor) -> torch.Tensor:
    """exp of the negative mean log-prob, at most e^80, which fits float32."""
    return (-mean_log_prob_B).clamp(max=_LARGEST_LOG_PPL).exp()


def mismatch_metrics(
    train_log_probs_T: torch.Tensor, rollout_log_probs_T: torch.Tensor, mask_T: torch.Tensor, packing: Packing
) -> dict[str, torch.Tensor]:
    """Compute per-token metrics of the mismatch; sequence-level values repeat over the sequence.

    Perplexities of both, log_ppl_diff = log(train ppl / rollout ppl), kl = rollout - train log-prob, k3_kl =
    rho - log rho - 1, chi2 = E[rho^2] - 1 with rho = p_train / p_rollout over tokens (chi2_token) or the whole sequence
    (chi2_seq). Exponents are clamped to +-20.
    """
    log_ratio_T = train_log_probs_T - rollout_log_probs_T
    train_mean_B = packing.mean(train_log_probs_T, mask_T)
    rollout_mean_B = packing.mean(rollout_log_probs_T, mask_T)
    ratio_T = bounded_exp(log_ratio_T)
    difference_B = rollout_mean_B - train_mean_B
    sequence_log_ratio_B = packing.sum(keep_where(mask_T, log_ratio_T))
    per_sequence = {
        "mis_training_log_ppl": -train_mean_B,
        "mis_training_ppl": _perplexity(train_mean_B),
        "mis_rollout_log_ppl": -rollout_mean_B,
        "mis_rollout_ppl": _perplexity(rollout_mean_B),
        "mis_log_ppl_diff": difference_B,
        "mis_log_ppl_abs_diff": difference_B.abs(),
        "mis_ppl_ratio": _perplexity(-difference_B),
        "mis_chi2_token": packing.mean(ratio_T.square(), mask_T) - 1,
        "mis_chi2_seq": bounded_exp(sequence_log_ratio_B).square() - 1,
    }
    return {
        **{name: packing.expand(x_B) for name, x_B in per_sequence.items()},
        "mis_kl": -log_ratio_T,
        "mis_k3_kl": ratio_T - log_ratio_T - 1,
    }
