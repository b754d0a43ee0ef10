"""The policy's loss: which one, and the numbers that belong to one of them alone."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Derived, NonNegativeFloat, PositiveFloat, Section, derived
from miles.policy_loss_spec import PolicyLossName


class PolicyLossConfig(Section):
    """The policy's loss from advantages and log-probabilities; docs/algorithms.md has the formulas."""

    policy_loss_type: Annotated[
        PolicyLossName, Derived("advantage_estimator for gspo, cispo and dr_grpo, else ppo_clip")
    ] = derived()
    """Policy loss."""

    sapo_tau_pos: PositiveFloat = 1.0
    """Temperature of the gate where the advantage is positive (sapo)."""

    sapo_tau_neg: PositiveFloat = 1.05
    """Temperature of the gate where it is not (sapo)."""

    vespo_k_pos: NonNegativeFloat = 2.0
    """Exponent of the sequence's ratio where the advantage is not negative (vespo)."""

    vespo_lambda_pos: PositiveFloat = 3.0
    """Decay in the sequence's ratio where the advantage is not negative (vespo)."""

    vespo_k_neg: NonNegativeFloat = 3.0
    """Exponent of the sequence's ratio where the advantage is negative (vespo)."""

    vespo_lambda_neg: PositiveFloat = 2.0
    """Decay in the sequence's ratio where the advantage is negative (vespo)."""

    dro_beta: PositiveFloat | None = None
    """Weight of the squared log ratio (dro, which needs one)."""

    echo_loss_coef: NonNegativeFloat = 0.0
    """Weight of a cross-entropy loss on observation tokens, those of the response with a loss mask of 0 (ECHO, whose
    paper has 0.05); 0 leaves it out."""
