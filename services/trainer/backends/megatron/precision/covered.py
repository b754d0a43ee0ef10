"""Tells each layer of a model which of its matrices a recipe covers, by the names that megatron-bridge exports."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from miles.precision.registry import weight_format
from miles.precision.shards import ROWS, cut_fault
from miles.services.trainer.backends.megatron.precision import kernels
from miles.services.trainer.backends.megatron.precision.choice import LowPrecision
from miles.services.trainer.backends.megatron.precision.matrices import Matrices, matrices_of
from miles.services.trainer.backends.megatron.precision.rounding import Rounding

_SHOWN = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """A matrix product's parameter on this rank."""

    name: str
    """Megatron-Core's, with the numbers of layers and experts in the whole model."""
    attribute: str
    """In its module."""
    module: Any
    parameter: torch.Tensor
    matrices: Matrices | None
    """None where it is not known which matrices of the checkpoint it holds."""
    covered: tuple[bool, ...]
    """By matrix."""


def weights(low: LowPrecision, config: Any, tasks: Sequence[Any], kept: Sequence[str] = ()) -> Iterator[Weight]:
    """This rank's parameters of two dimensions in layers, from megatron-bridge's tasks.

    Args:
        kept: Parts of Megatron-Core's names of weights that stay in train_dtype.
    """
    for task in tasks:
        if task is None or task.megatron_module is None or task.param_weight is None or task.param_weight.dim() != 2:
            continue
        matrices, name = matrices_of(task.mapping, config), task.global_param_name
        known = _hf_names(task.mapping) if matrices is None else matrices.names
        high = any(part in name for part in kept)
        covered = tuple(not high and low.recipe.layers.cover(each, 2) for each in known)
        attribute = task.param_name.rpartition(".")[2]
        yield Weight(name, attribute, task.megatron_module, task.param_weight, matrices, covered)


def apply_recipe(low: LowPrecision, config: Any, tasks: Sequence[Any], kept: Sequence[str] = ()) -> None:
    """Have the layers of bare chunks compute by a recipe. Raises ValueError naming weights with which they cannot."""
    faults: list[str] = []
    if low.by_engine:
        kernels.check_scales(low.recipe)
        faults = _apply_by_engine(list(weights(low, config, tasks, kept)))
    else:
        faults = _apply_emulated(low, weights(low, config, tasks, kept))
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        found = "; ".join(faults[:_SHOWN])
        way_out = "name them in extra_high_precision_layers_hf, change the layout, or use train_backend fsdp"
        raise ValueError(f"these cannot be computed in {low.recipe.format}: {found}{more}; {way_out}")


def _apply_by_engine(found: Sequence[Weight]) -> list[str]:
    """TransformerEngine rounds all matrices of a module, or none. Returns what is wrong."""
    faults = []
    by_module: dict[int, list[Weight]] = {}
    for weight in found:
        by_module.setdefault(id(weight.module), []).append(weight)
    for together in by_module.values():
        module, name = together[0].module, together[0].name
        covered = {each for weight in together for each in weight.covered}
        if len(covered) > 1:
            faults.append(f"some matrices of {name} alone, which TransformerEngine multiplies at once")
        elif hasattr(module, "finish_init"):
            if covered == {False}:
                kernels.keep_high(module, name)
            else:
                faults += kernels.size_faults(name, [tuple(weight.parameter.shape) for weight in together])
        elif True in covered:
            faults.append(f"{name}, a {type(module).__name__}")
    return faults


def _apply_emulated(low: LowPrecision, found: Iterator[Weight]) -> list[str]:
    """Returns what is wrong."""
    chosen, faults = weight_format(low.recipe), []
    for weight in found:
        if not any(weight.covered):
            continue
        if weight.matrices is None or not hasattr(weight.module, "roundings"):
            faults.append(f"{weight.name}, a {type(weight.module).__name__}")
        elif low.recipe.rounds_inputs and not all(weight.covered):
            faults.append(f"some matrices of {weight.name} alone, which have the same inputs")
        elif fault := _cut_fault(low, weight, weight.matrices) or chosen.why_not(tuple(weight.parameter.shape)):
            faults.append(f"{weight.name}: {fault}")
        else:
            weight.module.roundings[weight.attribute] = Rounding(chosen, weight.matrices, weight.covered)
    return faults


def _cut_fault(low: LowPrecision, weight: Weight, matrices: Matrices) -> str | None:
    if not getattr(weight.parameter, "tensor_model_parallel", False) or _ranks(weight) == 1:
        return None
    dimension = int(weight.parameter.partition_dim)  # type: ignore[attr-defined]
    if dimension != ROWS:
        return cut_fault(low.recipe, dimension, weight.parameter.shape[1])
    faults = (cut_fault(low.recipe, ROWS, rows) for rows in matrices.rows(weight.parameter.shape[0]))
    return next((fault for fault in faults if fault), None)


def _ranks(weight: Weight) -> int:
    """Over how many ranks the parameter is spread."""
    from megatron.core import parallel_state

    if ".experts." in weight.name:
        return int(parallel_state.get_expert_tensor_parallel_world_size() or 1)
    return int(parallel_state.get_tensor_model_parallel_world_size())


def _hf_names(mapping: Any) -> tuple[str, ...]:
    names = mapping.hf_param
    return tuple(names.values()) if isinstance(names, dict) else (names,)
