"""The losses of one micro-batch in an optimizer step: the policy's and the critic's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from miles.algorithms.device_copies import to_device
from miles.algorithms.losses import LossBatch, LossOutput, critic_loss, rl_loss
from miles.algorithms.vocab_rows import TokenLogProbs
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.rollout_batch import OptimizerStepPlan, RolloutBatch
from miles.services.trainer.step import algorithm_options
from miles.services.trainer.step.loss_denominator import loss_denominator
from miles.services.trainer.step.preparation import TokenTensors

if TYPE_CHECKING:
    from miles.config import JobConfig


class StepLosses:
    """A micro-batch's share of an optimizer step's loss; sums over micro-batches and replicas give the step's loss."""

    def __init__(self, config: JobConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._loss_config = algorithm_options.loss_config(config)
        self._user_loss = algorithm_options.user_loss(config)

    def policy(
        self,
        batch: RolloutBatch,
        step: OptimizerStepPlan,
        tokens: TokenTensors,
        micro_batch: MicroBatch,
        outputs: TokenLogProbs,
    ) -> LossOutput:
        """The policy's loss; fills in `tokens.seen` when the training pass itself gives the old log-probabilities."""
        where = to_device(batch.token_indices(micro_batch), self._device)
        if tokens.train is None:
            tokens.seen[where] = outputs.log_probs_T.detach()
        members = [batch.position(i) for i in micro_batch.samples]
        per_token = self._config.algorithm.calculate_per_token_loss
        loss_batch = LossBatch(
            packing=batch.packing.subset(members),
            mask_T=tokens.mask[where],
            advantages_T=tokens.advantages[where],
            train_log_probs_T=None if tokens.train is None else tokens.train[where],
            rollout_log_probs_T=None if tokens.rollout is None else tokens.rollout[where],
            ref_log_probs_T=None if tokens.ref is None else tokens.ref[where],
            opd_reverse_kl_T=None if tokens.opd_reverse_kl is None else tokens.opd_reverse_kl[where],
            observation_mask_T=1 - tokens.mask[where],
            correction=None if tokens.correction is None else tokens.correction.take(batch.packing, members),
            denominator=loss_denominator(step, per_token=per_token),
        )
        if self._user_loss is not None:
            return self._user_loss(loss_batch, outputs.log_probs_T, outputs.entropy_T, per_token=per_token)
        return rl_loss(self._loss_config, loss_batch, outputs.log_probs_T, outputs.entropy_T)

    def critic(
        self,
        batch: RolloutBatch,
        step: OptimizerStepPlan,
        tokens: TokenTensors,
        micro_batch: MicroBatch,
        values_R: torch.Tensor,
    ) -> LossOutput:
        """The same for the critic."""
        assert tokens.values is not None, "a critic learns from the values before its first step"
        where = to_device(batch.token_indices(micro_batch), self._device)
        algorithm = self._config.algorithm
        return critic_loss(
            LossBatch(
                packing=batch.packing.subset([batch.position(i) for i in micro_batch.samples]),
                mask_T=tokens.mask[where],
                advantages_T=tokens.advantages[where],
                denominator=loss_denominator(step, per_token=algorithm.calculate_per_token_loss),
            ),
            values_R,
            tokens.values[where],
            tokens.returns[where],
            value_clip=algorithm.value_clip,
            calculate_per_token_loss=algorithm.calculate_per_token_loss,
        )
