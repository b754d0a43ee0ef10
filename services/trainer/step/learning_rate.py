"""The learning rate of an optimizer step, the same for every backend."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.config.sections.optimizer import OptimizerConfig


def learning_rate(iteration: int, config: OptimizerConfig, total_iterations: int) -> float:
    """Rate of optimizer step `iteration` (from 0): a linear rise over the warm-up, then constant, linear or cosine.

    Decay ends at `min_lr` after lr_decay_iters steps, warm-up included (`total_iterations` when that is not set).
    """
    decay_iters = config.lr_decay_iters or total_iterations
    warmup = config.lr_warmup_iters
    if config.lr_warmup_fraction is not None:
        warmup = int(config.lr_warmup_fraction * decay_iters)
    if iteration < warmup:
        return config.lr_warmup_init + (config.lr - config.lr_warmup_init) * (iteration + 1) / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if iteration >= decay_iters:
        return config.min_lr
    done = (iteration - warmup) / max(1, decay_iters - warmup)
    left = 1 - done if config.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left
