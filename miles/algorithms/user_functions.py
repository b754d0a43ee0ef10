"""Corrections and sums of users, in the forms that slime and miles call them; `user_loss` has whole losses.

Their arguments are lists with a tensor a sample, or per-token values of all samples behind each other: what a packing
has as [T].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from miles.algorithms.corrections import Correction
from miles.algorithms.packing import Packing, as_float, keep_log_probs

Function = Callable[..., Any]


class UserFunctionError(ValueError):
    """A function of the user's returned what cannot be used."""


@dataclasses.dataclass(frozen=True)
class UserCorrection:
    """`fn(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs)`.

    It returns the policy loss of each token, the loss masks of each sample, and per-token metrics by name.
    """

    function: Function
    args: Any

    def __call__(
        self,
        pg_loss_T: torch.Tensor,
        train_log_probs_T: torch.Tensor,
        rollout_log_probs_T: torch.Tensor,
        mask_T: torch.Tensor,
        packing: Packing,
    ) -> tuple[torch.Tensor, Correction]:
        """Return the corrected loss, [T], and which tokens are rejected, with the metrics.

        A token whose mask the function sets to 0 adds nothing to the loss and stays in its denominators.
        """
        lengths = list(packing.lengths)
        returned = self.function(
            self.args,
            pg_loss=pg_loss_T,
            train_log_probs=per_sample(train_log_probs_T, packing),
            rollout_log_probs=per_sample(keep_log_probs(mask_T, rollout_log_probs_T), packing),
            loss_masks=per_sample(as_float(mask_T), packing),
            total_lengths=lengths,
            response_lengths=lengths,
        )
        if not isinstance(returned, tuple | list) or len(returned) != 3:
            raise UserFunctionError("custom_tis_function_path: return (pg_loss, loss_masks, metrics)")
        loss_T, masks, metrics = returned
        keep_T = _tokens(masks, packing, "loss_masks").bool()
        found = {name: _tokens(values, packing, name).detach() for name, values in metrics.items()}
        return _tokens(loss_T, packing, "pg_loss"), Correction(None, keep_T, found)


@dataclasses.dataclass(frozen=True)
class UserReducer:
    """`fn(total_lengths, response_lengths, loss_masks, calculate_per_token_loss)`, which returns a function.

    That function makes a micro-batch's policy losses of tokens, [T], the sum that stands in the loss's numerator.
    """

    function: Function

    def __call__(
        self, loss_T: torch.Tensor, mask_T: torch.Tensor, packing: Packing, *, per_token: bool
    ) -> torch.Tensor:
        """Return the numerator, 0-d."""
        lengths = list(packing.lengths)
        reduce = self.function(lengths, lengths, per_sample(as_float(mask_T), packing), per_token)
        return scalar(reduce(torch.where(mask_T.bool(), loss_T, 0.0)), "custom_pg_loss_reducer_function_path")


def per_sample(values_T: torch.Tensor, packing: Packing) -> list[torch.Tensor]:
    """Return a tensor a sample of values [T]."""
    return list(packing.split(values_T))


def _tokens(values: torch.Tensor | Sequence[torch.Tensor], packing: Packing, name: str) -> torch.Tensor:
    """Return per-token values, given as one tensor or one a sample, as [T]."""
    found = values if isinstance(values, torch.Tensor) else torch.cat(list(values))
    if found.shape != (packing.num_tokens,):
        problem = f"{name} has shape {tuple(found.shape)}; there are {packing.num_tokens} tokens"
        raise UserFunctionError(f"custom_tis_function_path: {problem}")
    return found


def scalar(value: Any, name: str) -> torch.Tensor:
    """Return what a function gave as a 0-d tensor. Raises UserFunctionError."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise UserFunctionError(f"{name} gave {type(value).__name__}; a tensor with one number is expected")
    return value.reshape(())
