"""Two small samples for policy losses, in float64: the second has a masked token, which holds rubbish."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from miles.algorithms import Packing, PolicyInputs, PolicyLossConfig, PolicyTerms, policy_loss

LENGTHS = (3, 3)
MASK = [1, 1, 1, 1, 0, 1]
SAMPLES = ([0, 1, 2], [3, 5])
"""Positions of each sample's unmasked tokens."""


def terms(
    name: str,
    new: Sequence[float] | torch.Tensor,
    old: Sequence[float],
    advantages: Sequence[float],
    config: PolicyLossConfig,
) -> PolicyTerms:
    """A loss of the six tokens' log-probs; masked ones are replaced by infinities."""
    mask_T = torch.tensor(MASK).bool()
    new_T = torch.as_tensor(new, dtype=torch.float64)

    def spoilt(values: Sequence[float], rubbish: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).masked_fill(~mask_T, rubbish)

    inputs = PolicyInputs.of(
        packing=Packing(LENGTHS),
        mask_T=mask_T,
        log_probs_T=torch.where(mask_T, new_T, -torch.inf),
        old_log_probs_T=spoilt(old, torch.nan),
        advantages_T=spoilt(advantages, torch.inf),
    )
    return policy_loss(name, config, inputs)


def gradient(
    name: str, new: Sequence[float], old: Sequence[float], advantages: Sequence[float], config: PolicyLossConfig
) -> list[float]:
    """The gradient of the sum of the tokens' losses with respect to their log-probs."""
    new_T = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    terms(name, new_T, old, advantages, config).loss_T.sum().backward()
    assert new_T.grad is not None
    return new_T.grad.tolist()


def gradients_are_those_of_the_loss(
    name: str, old: Sequence[float], advantages: Sequence[float], config: PolicyLossConfig, step: Sequence[float]
) -> bool:
    """Whether autograd agrees with finite differences at old + step."""
    new_T = torch.tensor([o + s for o, s in zip(old, step, strict=True)], dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradcheck(lambda x: terms(name, x, old, advantages, config).loss_T, new_T)
