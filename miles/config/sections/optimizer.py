"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles.config.schema.section import Derived, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """Optimizer and schedule; iterations are optimizer steps."""

    optimizer: Literal["adam"] = "adam"
    """Optimizer; adam is AdamW, with decoupled weight decay."""

    lr: NonNegativeFloat = 1e-6
    """Learning rate after warm-up."""

    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "constant"
    """Decay of the learning rate from lr to min_lr; WSD (warm-up, stable, decay) begins it lr_wsd_decay_iters before
    the end."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the decay with lr_decay_style WSD."""

    lr_wsd_decay_iters: Positive | None = None
    """Number of iterations of the decay with lr_decay_style WSD."""

    lr_decay_iters: Annotated[Positive | None, Derived("every step of the run")] = None
    """Number of iterations of the schedule, including warm-up."""

    lr_warmup_iters: NonNegative = 0
    """Number of warm-up iterations, from lr_warmup_init to lr."""

    lr_warmup_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warm-up as a fraction of lr_decay_iters, instead of lr_warmup_iters."""

    lr_warmup_init: NonNegativeFloat = 0.0
    """Learning rate at the start of warm-up."""

    critic_lr: Annotated[NonNegativeFloat | None, Derived("lr, with ppo")] = None
    """Learning rate of the critic after its warm-up; its other optimizer settings are the policy's (ppo)."""

    critic_lr_warmup_iters: NonNegative = 0
    """Number of warm-up iterations of the critic, from lr_warmup_init (ppo)."""

    weight_decay: NonNegativeFloat = 0.0
    """Weight decay."""

    max_nonfinite_steps: NonNegative = 3
    """Number of steps in a row that are skipped, with a warning that names parameters, because a gradient is NaN or
    infinite; one more ends the run. Steps of float16 whose scaled loss overflows are not counted."""

    adam_beta1: Beta = 0.9
    """Decay rate of Adam's first moment."""

    adam_beta2: Beta = 0.95
    """Decay rate of Adam's second moment."""

    adam_eps: PositiveFloat = 1e-8
    """Epsilon in the denominator of Adam's update."""

    clip_grad: NonNegativeFloat = 1.0
    """Maximum norm of the gradient; 0 turns clipping off."""
