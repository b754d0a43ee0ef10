"""A loss of the user's own in place of the policy's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from miles.algorithms.loss_reducer import LossReducer
from miles.algorithms.losses import LossBatch, LossOutput
from miles.algorithms.packing import as_float
from miles.algorithms.user_functions import UserFunctionError, per_sample, scalar


@dataclasses.dataclass(frozen=True)
class UserLoss:
    """`fn(args, batch, log_probs, sum_of_sample_mean)`, which returns a loss and metrics, 0-d each."""

    function: Callable[..., Any]
    args: Any

    def __call__(
        self, batch: LossBatch, log_probs_T: torch.Tensor, entropy_T: torch.Tensor | None, *, per_token: bool
    ) -> LossOutput:
        """Return the micro-batch's part of the loss. `log_probs_T` are of the policy that is trained, with gradient."""
        reducer, packing = LossReducer(batch, per_token), batch.packing
        old_T = log_probs_T.detach() if batch.train_log_probs_T is None else batch.train_log_probs_T
        seen: dict[str, Any] = {
            "response_lengths": list(packing.lengths),
            "loss_masks": per_sample(as_float(batch.mask_T), packing),
            "log_probs": per_sample(old_T, packing),
            "advantages": per_sample(batch.advantages_T, packing),
        }
        for name in ("rollout_log_probs", "ref_log_probs"):
            values_T = getattr(batch, name + "_T")
            seen[name] = None if values_T is None else per_sample(values_T, packing)
        seen["entropy"] = None if entropy_T is None else per_sample(entropy_T, packing)
        returned = self.function(self.args, seen, log_probs_T, reducer.total)
        if not isinstance(returned, tuple | list) or len(returned) != 2 or not isinstance(returned[1], Mapping):
            raise UserFunctionError("custom_loss_function_path: return (loss, metrics)")
        loss = scalar(returned[0], "custom_loss_function_path")
        if log_probs_T.requires_grad and not loss.requires_grad:
            raise UserFunctionError("custom_loss_function_path: its loss has no gradient; compute it from log_probs")
        reducer.report("loss", loss)
        for name, value in returned[1].items():
            reducer.report(name, scalar(value, f"the metric {name} of custom_loss_function_path"))
        return LossOutput(reducer.loss(loss), reducer.metrics)
