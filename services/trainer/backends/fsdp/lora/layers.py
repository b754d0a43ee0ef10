"""Linear layers with a low-rank adapter beside their frozen weight. Dims: T rows, O outputs, I inputs, R rank."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from miles.weights.adapters.lora import adapter_names, merged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


class LoraLinear(torch.nn.Module):
    """x * merged(W, A, B)^T + bias, where only A and B are trained.

    Parameters have the names of the layer it replaces, and `lora_A.weight` (R, I) and `lora_B.weight` (O, R) in float32
    beside them. A begins as PEFT's does, uniform within 1 / sqrt(I); B is 0, so that the layer begins as it was.
    """

    def __init__(self, layer: torch.nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale = scale
        self.enabled = True
        device = layer.weight.device
        with torch.device("meta"):
            self.lora_A = torch.nn.Linear(layer.in_features, rank, bias=False, dtype=torch.float32)
            self.lora_B = torch.nn.Linear(rank, layer.out_features, bias=False, dtype=torch.float32)
        if device.type != "meta":
            self.lora_A.to_empty(device=device)
            self.lora_B.to_empty(device=device)
            torch.nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=generator)
            torch.nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] to [..., O]."""
        if not self.enabled:
            return linear(x, self.weight, self.bias)
        out: torch.Tensor = _MergedLinear.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.lora_A.weight, self.lora_B.weight, self.bias, self.scale
        )
        return out


class _MergedLinear(torch.autograd.Function):
    """Merges the weight again in the backward pass instead of keeping it, and never forms its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        bias_O: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight_OI, a_RI, b_OR)
        ctx.scale = scale
        return linear(x, merged(weight_OI, a_RI, b_OR, scale), bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight_OI, a_RI, b_OR = ctx.saved_tensors
        (grad,) = gradients
        grad_x = grad @ merged(weight_OI, a_RI, b_OR, ctx.scale) if ctx.needs_input_grad[0] else None
        x_TI, grad_TO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]) * ctx.scale
        grad_a_RI = (grad_TO @ b_OR).t() @ x_TI
        grad_b_OR = grad_TO.t() @ (x_TI @ a_RI.t())
        return grad_x, None, grad_a_RI, grad_b_OR, None, None


def attach_adapters(
    model: PreTrainedModel, targets: Sequence[str], excluded: Sequence[str], *, rank: int, scale: float, seed: int
) -> list[str]:
    """Freeze the model and give the targeted linear layers adapters; returns their names.

    The model need not have weights yet: a rank that gets them from another one gets A and B too. Raises ValueError as
    `select_layers` does.
    """
    names = select_layers(model, targets, excluded)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        setattr(model.get_submodule(parent), child, LoraLinear(layer, rank, scale, generator))
    return names


def select_layers(model: PreTrainedModel, targets: Sequence[str], excluded: Sequence[str]) -> list[str]:
    """Names of the linear layers that are targeted and not excluded, in the model's order.

    A name means every module that is called so or ends in it after a dot, as with PEFT; `all-linear` every linear layer
    but the head. Raises ValueError, naming every fault, for names that fit nothing, modules that are no linear layer
    (experts that transformers holds in one tensor, for instance), and a head that shares its weight with the embedding.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    every = [name for name, m in modules.items() if isinstance(m, torch.nn.Linear) and m is not head]
    faults: list[str] = []
    chosen: set[str] = set()
    for target in targets:
        fitting = every if target == ALL_LINEAR else _called(target, modules)
        if not fitting:
            faults.append(f"target_modules: {target} is no module of the model")
        for name in fitting:
            if not isinstance(modules[name], torch.nn.Linear):
                kind = type(modules[name]).__name__
                faults.append(f"target_modules: {name} is a {kind}; adapters are for linear layers")
        chosen.update(fitting)
    for name in excluded:
        fitting = _called(name, modules)
        if not fitting:
            faults.append(f"exclude_modules: {name} is no module of the model")
        chosen.difference_update(fitting)
    embedding = model.get_input_embeddings()
    if any(modules[name] is head and _weight(head) is _weight(embedding) for name in chosen):
        faults.append("target_modules: the head shares its weight with the embedding, which an adapter would untie")
    if not chosen and not faults:
        faults.append("exclude_modules leaves no layer of target_modules")
    if faults:
        raise ValueError("; ".join(faults))
    return [name for name in modules if name in chosen]


def _called(name: str, modules: Mapping[str, torch.nn.Module]) -> list[str]:
    return [full for full in modules if full == name or full.endswith("." + name)]


def _weight(module: Any) -> Any:
    return getattr(module, "weight", None)


@contextlib.contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, the model computes as its base."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def named_adapters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A and B of every adapted layer by PEFT's names."""
    # Gives shards, even where a pass has left gathered parameters in the modules.
    state = model.state_dict(keep_vars=True)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            parts = (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"])
            yield from zip(adapter_names(f"{name}.weight"), parts, strict=True)


def load_adapters(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy A and B of every adapted layer from tensors by PEFT's names; raises ValueError when they do not fit."""
    own = dict(named_adapters(model))
    faults = [f"{name} is missing" for name in own if name not in tensors]
    faults += [f"{name} belongs to no adapted layer" for name in tensors if name not in own]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(parameter.shape)}"
        for name, parameter in own.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if faults:
        raise ValueError(
            f"lora_adapter_path does not fit target_modules: {'; '.join(faults[:5])}, {len(faults)} faults"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            if not parameter.is_meta:
                parameter.copy_(tensors[name])
