"""Per-token values of one micro-batch made into a loss and metrics, all with the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from miles.algorithms.loss_aggregation import token_weights, weighted_sum
from miles.algorithms.metrics import MetricMax, MetricSum
from miles.algorithms.packing import as_float, keep_where

if TYPE_CHECKING:
    from miles.algorithms.losses import LossBatch


class LossReducer:
    """Aggregates per-token values of one micro-batch, for the loss and for metrics."""

    def __init__(self, batch: LossBatch, per_token: bool) -> None:
        self._mask_T = batch.mask_T.bool()
        self._packing = batch.packing
        self._mask_sums_B = batch.mask_sums_B
        self._per_token = per_token
        rollouts = batch.packing.num_samples if batch.num_rollouts is None else batch.num_rollouts
        self.count = float(self._mask_T.sum()) if per_token else float(rollouts)
        self._denominator = max(self.count if batch.denominator is None else batch.denominator, 1.0)
        self.metrics: dict[str, MetricSum] = {}
        self._known_weights: dict[tuple[torch.dtype, float | None], torch.Tensor] = {}

    def total(
        self, values_T: torch.Tensor, keep_T: torch.Tensor | None = None, constant_length: float | None = None
    ) -> torch.Tensor:
        """Return the numerator of `aggregate`."""
        weights_T = self._weights(as_float(values_T).dtype, constant_length)
        return weighted_sum(values_T, weights_T, self._mask_T, keep_T)

    def _weights(self, dtype: torch.dtype, constant_length: float | None) -> torch.Tensor:
        """The tokens' weights, which all values but those of dr_grpo share; computed once."""
        key = (dtype, constant_length)
        if key not in self._known_weights:
            self._known_weights[key] = token_weights(
                self._mask_T,
                self._packing,
                per_token=self._per_token,
                constant_length=constant_length,
                mask_sums_B=self._mask_sums_B,
                dtype=dtype,
            )
        return self._known_weights[key]

    def loss(self, total: torch.Tensor) -> torch.Tensor:
        """Divide a numerator by the step's denominator."""
        return total / self._denominator

    def report(self, name: str, total: torch.Tensor) -> None:
        """Add metric train/name from its numerator."""
        self.metrics[f"train/{name}"] = MetricSum(total.detach(), self.count)

    def report_tokens(self, name: str, values_T: torch.Tensor) -> None:
        """Add metric train/name, the mean of per-token values with no token rejected."""
        self.report(name, self.total(values_T.detach()))

    def report_largest(self, name: str, values_T: torch.Tensor) -> None:
        """Add metric train/name, the largest of the unmasked tokens' values, which are not negative."""
        kept_T = keep_where(self._mask_T, as_float(values_T.detach()))
        self.metrics[f"train/{name}"] = MetricMax(torch.cat([kept_T, kept_T.new_zeros(1)]).max())
