"""Corrections of the mismatch between the log-probs of rollout engine and trainer, for the same policy.

A correction has a weight for each token, which multiplies its policy loss, and the tokens to reject; see also `mis`. It
has no gradient, and is computed once for a rank's whole batch before the first optimizer step (with the data-parallel
group, for normalisation over the batch), and then split into micro-batches with `Correction.take`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from miles.algorithms.packing import Packing, as_float, keep_log_probs
from miles.algorithms.policy_losses import bounded_exp

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class Correction:
    """Weights, rejections and metrics, [T] each."""

    weights_T: torch.Tensor | None
    """Multiplies the policy loss; None means 1."""
    keep_T: torch.Tensor | None
    """False where a token is rejected: it adds nothing to the loss, but counts in its denominators. None: all kept."""
    metrics_T: dict[str, torch.Tensor]
    """Per-token metrics by name, averaged like a loss without rejection."""

    def take(self, packing: Packing, samples: Sequence[int]) -> Correction:
        """Return the correction of some of the packed samples."""
        return Correction(
            None if self.weights_T is None else packing.take(self.weights_T, samples),
            None if self.keep_T is None else packing.take(self.keep_T, samples),
            {name: packing.take(x_T, samples) for name, x_T in self.metrics_T.items()},
        )


class CorrectionMethod(Protocol):
    """A method that computes a correction: one of the classes here, or a user's own."""

    def __call__(
        self,
        train_log_probs_T: torch.Tensor,
        rollout_log_probs_T: torch.Tensor,
        mask_T: torch.Tensor,
        packing: Packing,
        group: dist.ProcessGroup | None = None,
    ) -> Correction:
        """Log-probs are 0 where masked; `group` is the data-parallel group, all of whose ranks must call."""


def compute_correction(
    method: CorrectionMethod,
    *,
    train_log_probs_T: torch.Tensor,
    rollout_log_probs_T: torch.Tensor,
    mask_T: torch.Tensor,
    packing: Packing,
    group: dist.ProcessGroup | None = None,
) -> Correction:
    """Run `method` without gradient, on log-probs of any float dtype, whose values at masked tokens are ignored."""
    packing.check(train_log_probs_T=train_log_probs_T, rollout_log_probs_T=rollout_log_probs_T, mask_T=mask_T)
    with torch.no_grad():
        return method(
            keep_log_probs(mask_T, train_log_probs_T),
            keep_log_probs(mask_T, rollout_log_probs_T),
            mask_T.bool(),
            packing,
            group,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruncatedImportanceSampling:
    """Weight clamp(exp(train - rollout), tis_clip_low, tis_clip)."""

    tis_clip: float = 2.0
    tis_clip_low: float = 0.0

    def __call__(
        self,
        train_log_probs_T: torch.Tensor,
        rollout_log_probs_T: torch.Tensor,
        mask_T: torch.Tensor,
        packing: Packing,
        group: dist.ProcessGroup | None = None,
    ) -> Correction:
        """See `CorrectionMethod`."""
        ratio_T = bounded_exp(train_log_probs_T - rollout_log_probs_T)
        weights_T = ratio_T.clamp(self.tis_clip_low, self.tis_clip)
        return Correction(weights_T, None, _tis_metrics(ratio_T, weights_T))


@dataclasses.dataclass(frozen=True, kw_only=True)
class IcePop:
    """Weight exp(train - rollout) inside [tis_clip_low, tis_clip] and 0 outside."""

    tis_clip: float = 2.0
    tis_clip_low: float = 0.0

    def __call__(
        self,
        train_log_probs_T: torch.Tensor,
        rollout_log_probs_T: torch.Tensor,
        mask_T: torch.Tensor,
        packing: Packing,
        group: dist.ProcessGroup | None = None,
    ) -> Correction:
        """See `CorrectionMethod`."""
        ratio_T = bounded_exp(train_log_probs_T - rollout_log_probs_T)
        inside_T = (ratio_T >= self.tis_clip_low) & (ratio_T <= self.tis_clip)
        weights_T = torch.where(inside_T, ratio_T, 0.0)
        return Correction(weights_T, None, _tis_metrics(ratio_T, weights_T))


def _tis_metrics(ratio_T: torch.Tensor, weights_T: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "tis": ratio_T,
        "tis_clipfrac": as_float(weights_T != ratio_T),
        "tis_abs": (ratio_T - 1).abs(),
    }
