"""The learning rate of an optimizer step, the same for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.config.sections.optimizer import OptimizerConfig

_LEFT: Mapping[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "exponential": lambda done: 2 * 0.5**done - 1,
    "minus_sqrt": lambda done: 1 - math.sqrt(done),
}
"""The part of lr − min_lr that is left when a part of the decay is done."""


def learning_rate(iteration: int, config: OptimizerConfig, total_iterations: int) -> float:
    """Rate of optimizer step `iteration` (from 0): a linear rise over the warm-up, then one of Megatron-LM's decays.

    Decay ends at `min_lr` after lr_decay_iters steps, warm-up included (`total_iterations` when that is not set). WSD
    (Hu et al. 2024, arXiv 2404.06395) is constant up to the last lr_wsd_decay_iters of them.
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
    if config.lr_decay_style == "inverse-square-root":
        return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1) / max(iteration, 1)))
    begin = warmup
    shape: str = config.lr_decay_style
    if config.lr_decay_style == "WSD":
        begin, shape = max(warmup, decay_iters - (config.lr_wsd_decay_iters or 0)), config.lr_wsd_decay_style
    done = max(0, iteration - begin) / max(1, decay_iters - begin)
    return config.min_lr + (config.lr - config.min_lr) * _LEFT[shape](done)
