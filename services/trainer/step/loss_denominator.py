"""The denominator of a loss: by what the summed token losses of a whole optimizer step are divided."""

from __future__ import annotations

from miles.services.trainer.batch.rollout_batch import OptimizerStepPlan


def loss_denominator(step: OptimizerStepPlan, *, per_token: bool) -> int:
    """Return the step's unmasked response tokens with `per_token` (calculate_per_token_loss), else its samples.

    Both are counted over all micro-batches and all data-parallel ranks, so that the losses of all micro-batches add up
    to what one process would compute; see `miles.algorithms.loss_aggregation`.
    """
    return step.num_tokens if per_token else step.num_samples
