"""The denominator of a loss: by what the summed token losses of a whole optimizer step are divided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from miles.algorithms.metrics import MetricMax, MetricSum
from miles.services.trainer.batch.rollout_batch import OptimizerStepPlan


def loss_denominator(step: OptimizerStepPlan, *, per_token: bool) -> int:
    """Return the step's unmasked response tokens with `per_token` (calculate_per_token_loss), else its samples.

    Both are counted over all micro-batches and all data-parallel ranks, so that the losses of all micro-batches add up
    to what one process would compute; see `miles.algorithms.loss_aggregation`.
    """
    return step.num_tokens if per_token else step.num_samples


def untrained_counts(
    parts: Iterable[Mapping[str, MetricSum]], step: OptimizerStepPlan, *, per_token: bool
) -> dict[str, MetricSum]:
    """What samples that are not trained on add to the step's metrics: nothing to the sums, one each to the counts.

    The means are then over the samples that `loss_denominator` counts, and train/loss is the loss that was minimised.
    One data-parallel rank adds this; `parts` are its micro-batches' metrics.
    """
    untrained = 0 if per_token else step.num_samples - step.num_trained
    totals = {name: sum_.total for part in parts for name, sum_ in part.items() if not isinstance(sum_, MetricMax)}
    if not totals:
        return {}
    zero = torch.zeros_like(next(iter(totals.values())))
    return {name: MetricSum(zero, untrained) for name in totals}
