"""AdamW, the scale of float16 losses, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from miles.config.sections.optimizer import OptimizerConfig


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


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the state with which its first step begins, where it has not taken one.

    PyTorch makes the state for a checkpoint by a step with gradients of 0, which would count in the bias correction.
    """
    if optimizer.state:
        return
    for parameter in _parameters(optimizer):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """The tensors of its state; none before its first step."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this rate in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class LossScale:
    """Keeps gradients inside the range of float16: the loss is multiplied by `value`, gradients are divided by it.

    Not dynamic: the value is 1. Dynamic (Micikevicius et al. 2018): a gradient that is not finite halves the value; it
    doubles after `GROWTH_INTERVAL` steps without one.
    """

    GROWTH_INTERVAL = 1000

    def __init__(self, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = 2.0**14 if dynamic else 1.0
        self.good_steps = 0

    def unscale(self, optimizer: torch.optim.Optimizer) -> float:
        """Divide the gradients and return their global L2 norm; collective over ranks."""
        gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
        if self.dynamic and gradients:
            torch._foreach_mul_(gradients, 1 / self.value)
        norm = torch.nn.utils.get_total_norm(gradients)
        total = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(total):
            self.good_steps += 1
            if self.dynamic and self.good_steps % self.GROWTH_INTERVAL == 0:
                self.value *= 2
        return total

    def back_off(self) -> bool:
        """Halve the value after a gradient that is not finite; False where a smaller one would not help."""
        if not self.dynamic or self.value <= 1:
            return False
        self.value, self.good_steps = self.value / 2, 0
        return True


def broken_gradients(model: torch.nn.Module) -> list[str]:
    """Names of the parameters whose gradient is not finite on some rank; collective."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    parts = [grad.to_local() if isinstance(grad, DTensor) else grad for _, grad in named]
    broken = torch.tensor([part is not None and not bool(part.isfinite().all()) for part in parts], dtype=torch.uint8)
    if dist.get_world_size() > 1:
        device = next((part.device for part in parts if part is not None), torch.device("cpu"))
        broken = broken.to(device)
        dist.all_reduce(broken, dist.ReduceOp.MAX)
    return [name for (name, _), is_broken in zip(named, broken.tolist(), strict=True) if is_broken]


def clip_gradients(optimizer: torch.optim.Optimizer, norm: float, max_norm: float) -> None:
    """Scale the gradients, whose global L2 norm is `norm`, down to `max_norm`; 0 leaves them as they are."""
    if max_norm > 0 and norm > max_norm:
        torch.nn.utils.clip_grads_with_norm_(_parameters(optimizer), max_norm, torch.tensor(norm))


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """What the optimizer updates: the masters, or under FSDP always the shards."""
    return [p for group in optimizer.param_groups for p in group["params"]]
