"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles.config.schema.section import Derived, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """Optimizer and schedule; iterations are optimizer steps."""

    optimizer: Literal["adam"] = "adam"
    """adam is AdamW: weight decay is decoupled from the gradient."""

    lr: NonNegativeFloat = 1e-6
    """Learning rate after warm-up."""

    min_lr: NonNegativeFloat = 0.0
    """Learning rate at which decay ends."""

    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from lr to min_lr."""

    lr_decay_iters: Annotated[Positive | None, Derived("every step of the run")] = None
    """Iterations over which it falls, warm-up included."""

    lr_warmup_iters: NonNegative = 0
    """Iterations over which it rises from lr_warmup_init to lr."""

    lr_warmup_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warm-up as a fraction of lr_decay_iters, in place of lr_warmup_iters."""

    lr_warmup_init: NonNegativeFloat = 0.0
    """Learning rate at which warm-up starts."""

    critic_lr: Annotated[NonNegativeFloat | None, Derived("lr, with ppo")] = None
    """The critic's learning rate after its warm-up; everything else about its optimizer is as the policy's (ppo)."""

    critic_lr_warmup_iters: NonNegative = 0
    """Iterations over which the critic's rises from lr_warmup_init."""

    weight_decay: NonNegativeFloat = 0.0
    """Weight decay."""

    adam_beta1: Beta = 0.9
    """Decay of the first moment."""

    adam_beta2: Beta = 0.95
    """Decay of the second moment."""

    adam_eps: PositiveFloat = 1e-8
    """Added to the denominator of the update."""

    clip_grad: NonNegativeFloat = 1.0
    """Largest norm of the gradient; 0 does not clip."""
