"""AdamW, its learning-rate schedule, and gradient clipping."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from miles.config.optimizer import OptimizerConfig


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over all trainable parameters; vectors and scalars are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )


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


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this rate in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(model: torch.nn.Module, max_norm: float) -> float:
    """Scale the gradients down to a global L2 norm of `max_norm` (0: only measure); return the norm before.

    Collective over ranks. Raises FloatingPointError, before anything changed, when the norm is not finite.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    total = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(total):
        raise FloatingPointError(
            f"the gradient's norm is {total}; the weights were left as they were. A lower lr, a smaller clip range or "
            "float32 may help; rewards and log-probabilities of this step are worth a look"
        )
    if max_norm > 0 and total > max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return total
