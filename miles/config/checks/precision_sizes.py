"""Which matrices of a model a recipe covers, and whether their sizes are ones that it takes: from config.json alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from miles.memory.model import ModelShape
from miles.memory.tensors import Tensors, model_tensors
from miles.precision.recipe import Recipe
from miles.precision.shards import COLUMNS, ROWS, cut_fault

_REPLICATED = ("replicated",)
_KERNEL_UNIT = 16
_FUSED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
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
    """The first covered matrix whose rows are no whole number of INT4's groups; None when there is none.

    Blocks and groups of other formats may be smaller at the edges of a matrix.
    """
    size = recipe.group_size if recipe.format == "int4" else 1
    return next((each for each in covered(recipe, shape) if each.shape[COLUMNS] % size), None)


def split_experts(recipe: Recipe, shape: ModelShape) -> str | None:
    """Why experts that are held as one tensor cannot be in a recipe's format; None when they can, or are not."""
    asked = recipe.layers.layers_to_ask(shape.expert_layers)
    for layer in sorted(shape.expert_layers):
        for matrices_of_all in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{matrices_of_all}"
            try:
                recipe.layers.cover(name, 3)
                if layer in asked:
                    recipe.layers.cover_experts(name, shape.experts)
            except ValueError as error:
                return str(error).partition(";")[0]
    return None


def parted(recipe: Recipe, shape: ModelShape) -> tuple[str, str] | None:
    """A covered matrix and one that is not, which Megatron multiplies at once; None when there are none."""
    together: dict[str, tuple[str, bool]] = {}
    for each in matrices(shape):
        within, _, leaf = each.name.rpartition(".")
        kind = next((kind for kind, leaves in _FUSED.items() if leaf in leaves), leaf)
        if shape.latent is not None and kind == "qkv":
            continue  # latent attention multiplies queries by themselves
        is_covered = recipe.layers.cover(each.name, 2)
        other, other_covered = together.setdefault(f"{within}.{kind}", (each.name, is_covered))
        if is_covered != other_covered:
            return (each.name, other) if is_covered else (other, each.name)
    return None


def narrow(recipe: Recipe, shape: ModelShape, *, tensor: int, expert_tensor: int) -> tuple[str, str] | None:
    """Which of Megatron's sizes leaves a rank a matrix that FP8 kernels do not take, and how; see `cut_problem`."""
    for each, key, ranks, dimension in _on_ranks(recipe, shape, tensor, expert_tensor):
        sizes = list(each.shape)
        sizes[dimension] //= ranks
        if any(size % _KERNEL_UNIT for size in sizes):
            problem = f"{each.name} is {sizes[0]} x {sizes[1]} on a rank, and FP8 kernels take multiples of"
            return key, f"{problem} {_KERNEL_UNIT}"
    return None


def cut_problem(recipe: Recipe, shape: ModelShape, *, tensor: int, expert_tensor: int) -> tuple[str, str] | None:
    """Which of Megatron's sizes cuts a covered matrix between numbers that share a scale, and how; None when none does.

    Args:
        tensor: tensor_model_parallel_size.
        expert_tensor: expert_tensor_parallel_size.
    """
    for each, key, ranks, dimension in _on_ranks(recipe, shape, tensor, expert_tensor):
        problem = None if ranks == 1 else cut_fault(recipe, dimension, each.shape[dimension] // ranks)
        if problem is not None:
            return key, f"of {each.name}, {problem}"
    return None


def other_blocks(recipe: Recipe, shape: ModelShape, *, tensor: int, expert_tensor: int) -> str | None:
    """The first covered matrix that shares a block with others, or with another rank's part, in Megatron's parameters.

    Kernels round these as they lie there: heads of queries, keys and values in turn, and gates with ups.
    """
    for each, _, ranks, dimension in _on_ranks(recipe, shape, tensor, expert_tensor):
        leaf, run = each.name.rpartition(".")[2], each.shape[dimension] // ranks
        if shape.latent is None and leaf in _FUSED["qkv"]:
            run = shape.head_dim
        elif ranks == 1 and leaf not in _FUSED["gate_up"]:
            continue
        if cut_fault(recipe, dimension, run) is not None:
            return each.name
    return None


def _on_ranks(
    recipe: Recipe, shape: ModelShape, tensor: int, expert_tensor: int
) -> Iterator[tuple[Tensors, str, int, int]]:
    """Covered matrices, which of Megatron's sizes cuts each, into how many parts, and along which dimension."""
    for each in covered(recipe, shape):
        key, ranks = "tensor_model_parallel_size", tensor
        if each.kind == "experts":
            key, ranks = "expert_tensor_parallel_size", expert_tensor
        elif each.kind == "key_values":
            ranks = min(ranks, shape.key_value_heads)
        elif each.kind in _REPLICATED:
            ranks = 1
        yield each, key, ranks, COLUMNS if each.name.rpartition(".")[2] in _OUTPUTS else ROWS
