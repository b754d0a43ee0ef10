"""Which matrices of a model a recipe covers, and whether their sizes are ones that it takes: from config.json alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from miles.memory.model import ModelShape
from miles.memory.tensors import Tensors, model_tensors
from miles.precision.recipe import Recipe
from miles.precision.shards import COLUMNS, ROWS, cut_fault

_REPLICATED = ("replicated",)
_OUTPUTS = ("o_proj", "down_proj")
"""Matrices that tensor parallelism cuts along their columns; others along their rows."""


@dataclasses.dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a model's matrices in decoder layers a recipe covers, in elements."""

    covered: int
    matrices: int


def matrices(shape: ModelShape) -> Iterator[Tensors]:
    """The matrices of decoder layers; the experts of a layer are one entry."""
    return (each for each in model_tensors(shape) if len(each.shape) == 2 and each.name.startswith("model.layers."))


def covered(recipe: Recipe, shape: ModelShape) -> Iterator[Tensors]:
    """Those that a recipe covers."""
    return (each for each in matrices(shape) if recipe.layers.cover(each.name, 2))


def coverage(recipe: Recipe, shape: ModelShape) -> Coverage:
    """How much that is."""
    return Coverage(
        covered=sum(each.elements for each in covered(recipe, shape)),
        matrices=sum(each.elements for each in matrices(shape)),
    )


def undivided(recipe: Recipe, shape: ModelShape) -> Tensors | None:
    """The first covered matrix whose rows are no whole number of the recipe's groups; None when there is none.

    Blocks of FP8 at the edges of a matrix may be smaller.
    """
    size = {"int4": recipe.group_size, "mxfp8": 32, "nvfp4": 16}.get(recipe.format, 1)
    return next((each for each in covered(recipe, shape) if each.shape[COLUMNS] % size), None)


def cut_problem(recipe: Recipe, shape: ModelShape, *, tensor: int, expert_tensor: int) -> tuple[str, str] | None:
    """Which of Megatron's sizes cuts a covered matrix between numbers that share a scale, and how; None when none does.

    Args:
        tensor: tensor_model_parallel_size.
        expert_tensor: expert_tensor_parallel_size.
    """
    for each in covered(recipe, shape):
        key, ranks = ("tensor_model_parallel_size", tensor)
        if each.kind == "experts":
            key, ranks = "expert_tensor_parallel_size", expert_tensor
        if each.kind == "key_values":
            ranks = min(ranks, shape.key_value_heads)
        if ranks == 1 or each.kind in _REPLICATED:
            continue
        dimension = COLUMNS if each.name.rpartition(".")[2] in _OUTPUTS else ROWS
        problem = cut_fault(recipe, dimension, each.shape[dimension] // ranks)
        if problem is not None:
            return key, f"of {each.name}, {problem}"
    return None
