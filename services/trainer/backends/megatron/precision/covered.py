"""Tells each layer of a model which of its matrices a recipe covers, by the names that megatron-bridge exports."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format
from miles.precision.shards import COLUMNS, ROWS, cut_fault
from miles.services.trainer.backends.megatron.precision import kernels
from miles.services.trainer.backends.megatron.precision.choice import LowPrecision
from miles.services.trainer.backends.megatron.precision.matrices import Matrices, matrices_of
from miles.services.trainer.backends.megatron.precision.rounding import ParameterRounding

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


def weights(recipe: Recipe, config: Any, tasks: Iterable[Any]) -> Iterator[Weight]:
    """This rank's parameters of two dimensions, from megatron-bridge's tasks and Megatron-Core's TransformerConfig."""
    for task in tasks:
        if task is None or task.megatron_module is None or task.param_weight is None or task.param_weight.dim() != 2:
            continue
        matrices = matrices_of(task.mapping, config)
        known = _hf_names(task.mapping) if matrices is None else matrices.names
        covered = tuple(recipe.layers.cover(each, 2) for each in known)
        attribute = task.param_name.rpartition(".")[2]
        yield Weight(task.global_param_name, attribute, task.megatron_module, task.param_weight, matrices, covered)


def apply_recipe(low: LowPrecision, config: Any, tasks: Iterable[Any]) -> None:
    """Have the layers of bare chunks compute by a recipe. Raises ValueError naming weights with which they cannot."""
    found = weights(low.recipe, config, tasks)
    if low.by_engine:
        kernels.check_scales(low.recipe)
        faults = _apply_by_engine(found)
    else:
        faults = _apply_emulated(low.recipe, found)
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        shown = "; ".join(faults[:_SHOWN])
        other = "low_precision_impl emulated" if low.by_engine else "train_backend fsdp"
        way_out = f"name them in extra_high_precision_layers_hf, change the layout, or use {other}"
        raise ValueError(f"these cannot be computed in {low.recipe.format}: {shown}{more}; {way_out}")


def differences(low: LowPrecision, config: Any, tasks: Iterable[Any]) -> list[str]:
    """What a person should know of how layers compute on this rank: where it is not what engines are sent."""
    notes = []
    if low.reason and torch.cuda.is_available():
        notes.append(f"{low.recipe.format} is emulated, which is slower than train_dtype alone: {low.reason}")
    if low.by_engine:
        found = [weight.name for weight in weights(low.recipe, config, tasks) if has_other_blocks(low.recipe, weight)]
        if found:
            more = f" and {len(found) - 1} more weights" if len(found) > 1 else ""
            notes.append(
                f"TransformerEngine may round {found[0]}{more} in other blocks than the exported ones: matrices in it, "
                "or ranks' parts of them, are no whole number of blocks, or it is not known where they lie; "
                "low_precision_impl = emulated rounds as exported, and refuses what it cannot round so"
            )
    return notes


def _apply_by_engine(found: Iterable[Weight]) -> list[str]:
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


def _apply_emulated(recipe: Recipe, found: Iterable[Weight]) -> list[str]:
    """Returns what is wrong."""
    from miles.services.trainer.backends.megatron.precision.rounded_layers import round_in

    chosen, faults = weight_format(recipe), []
    for weight in found:
        if not any(weight.covered):
            continue
        if weight.matrices is None:
            faults.append(f"{weight.name}, a {type(weight.module).__name__}")
        elif recipe.rounds_inputs and not all(weight.covered):
            faults.append(f"some matrices of {weight.name} alone, which have the same inputs")
        elif fault := _cut_fault(recipe, weight) or chosen.why_not(tuple(weight.parameter.shape)):
            faults.append(f"{weight.name}: {fault}")
        elif not round_in(weight.module, weight.attribute, ParameterRounding(chosen, weight.matrices, weight.covered)):
            faults.append(f"{weight.name}, a {type(weight.module).__name__}")
    return faults


def _cut_fault(recipe: Recipe, weight: Weight) -> str | None:
    """Why the parts that ranks hold cannot be rounded by themselves; None when they can."""
    dimension = _cut_dimension(weight)
    if dimension is None:
        return None
    outputs, inputs = weight.parameter.shape
    if dimension == COLUMNS or weight.matrices is None:
        return cut_fault(recipe, COLUMNS, inputs)
    faults = (cut_fault(recipe, ROWS, rows) for rows in weight.matrices.rows(outputs))
    return next((fault for fault in faults if fault), None)


def has_other_blocks(recipe: Recipe, weight: Weight) -> bool:
    """Whether rounding a covered parameter as one matrix may round differently than its matrices are by themselves."""
    if not any(weight.covered):
        return False
    if weight.matrices is None:
        return True
    outputs, inputs = weight.parameter.shape
    runs, dimension = weight.matrices.runs(outputs), _cut_dimension(weight)
    if dimension == COLUMNS and cut_fault(recipe, COLUMNS, inputs):
        return True
    return (dimension == ROWS or len(runs) > 1) and any(cut_fault(recipe, ROWS, run) for run in runs)


def _cut_dimension(weight: Weight) -> int | None:
    """The dimension in which ranks hold parts of a parameter; None when each holds all of it."""
    from megatron.core import parallel_state

    if ".experts." in weight.name:
        ranks = parallel_state.get_expert_tensor_parallel_world_size() or 1
    else:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
    if ranks == 1 or not getattr(weight.parameter, "tensor_model_parallel", False):
        return None
    return int(weight.parameter.partition_dim)  # type: ignore[attr-defined]


def _hf_names(mapping: Any) -> tuple[str, ...]:
    names = mapping.hf_param
    return tuple(names.values()) if isinstance(names, dict) else (names,)
