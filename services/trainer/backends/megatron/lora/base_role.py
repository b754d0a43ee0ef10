"""The reference of a policy of which adapters are trained: the same model with its adapters off."""

from __future__ import annotations

import torch

from miles.services.trainer.backends.megatron.learner import MegatronPolicy
from miles.services.trainer.backends.megatron.lora.adapter import without_adapters
from miles.services.trainer.batch.rollout_batch import RolloutBatch
from miles.services.trainer.step.progress import Report


class AdaptedBase:
    """See `Reference`."""

    def __init__(self, policy: MegatronPolicy) -> None:
        self._policy = policy

    def compute_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `LogProbRole.compute_log_probs`."""
        with without_adapters(self._policy.model.bare_chunks):
            return self._policy.compute_log_probs_unrouted(batch, report)

    def follow(self) -> None:
        """Never called: ref_update_interval and adapters exclude each other."""
        raise RuntimeError("the base of an adapter does not change")
