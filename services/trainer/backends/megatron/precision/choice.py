"""What computes in the trainer's format: TransformerEngine's kernels, or ordinary products of rounded numbers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

import torch

from miles.precision.of_run import training_recipe
from miles.precision.recipe import Recipe
from miles.services.trainer.backends.megatron.model.engine_layers import why_no_engine

if TYPE_CHECKING:
    from miles.config import JobConfig

SCALES_VARIABLE = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
"""TransformerEngine reads it when it is imported: 1 for scales that are any float32, else they are powers of two."""
_OF_ENGINE = ("fp8_block", "mxfp8")
"""Formats in which TransformerEngine rounds as `miles.precision` does. Its NVFP4 has other blocks and rounds gradients
at random, and it knows no INT4."""


@dataclasses.dataclass(frozen=True, slots=True)
class LowPrecision:
    """How a trainer computes in few bits."""

    recipe: Recipe
    by_engine: bool
    """Whether TransformerEngine's kernels do; otherwise numbers are rounded and multiplied in train_dtype."""
    reason: str = ""
    """Why TransformerEngine's kernels do not, where nothing asked for that."""

    @property
    def needs_local_layers(self) -> bool:
        """Whether inputs are rounded where TransformerEngine's layers, which fuse norms, do not show them."""
        return not self.by_engine and self.recipe.rounds_inputs


def low_precision(config: JobConfig) -> LowPrecision | None:
    """How this process computes in the format of a job; None for train_dtype alone.

    Raises ValueError when kernels are asked for that cannot be used here, and for adapters.
    """
    recipe = training_recipe(config)
    if recipe is None:
        return None
    if config.lora.lora_rank:
        raise ValueError(
            f"the trainer's format is {recipe.format} with lora_rank = {config.lora.lora_rank}, but engines would "
            "round the sum of base and adapter; leave one of them out"
        )
    asked = config.precision.low_precision_impl
    if asked == "emulated":
        return LowPrecision(recipe, by_engine=False)
    problem = why_no_kernels(config, recipe)
    if problem is not None and asked == "transformer_engine":
        raise ValueError(f"low_precision_impl = transformer_engine, but {problem}; set it to emulated, or to auto")
    return LowPrecision(recipe, by_engine=problem is None, reason=problem or "")


def why_no_kernels(config: JobConfig, recipe: Recipe) -> str | None:
    """Why TransformerEngine's kernels cannot compute by a recipe here; None when they can."""
    if recipe.format not in _OF_ENGINE:
        return f"it does not round to {recipe.format} as engines are served"
    if config.megatron.transformer_impl == "local":
        return "transformer_impl is local"
    if (problem := why_no_engine(config)) is not None:
        return problem
    if config.train.train_dtype != "bfloat16":
        return f"its kernels are used with train_dtype bfloat16 alone, which is {config.train.train_dtype}"
    if not torch.cuda.is_available():
        return "there is no GPU"
    from transformer_engine.pytorch.quantization import check_fp8_block_scaling_support, check_mxfp8_support

    supported, why = check_mxfp8_support() if recipe.format == "mxfp8" else check_fp8_block_scaling_support()
    return None if supported else f"this GPU has no such kernels ({why})"


def choose_scales(config: JobConfig, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have TransformerEngine scale as the trainer's recipe says; before it is imported.

    A job without one leaves the choice that most jobs make to the next job in this process.
    """
    recipe = training_recipe(config)
    if recipe is None or recipe.format != "fp8_block":
        environment.setdefault(SCALES_VARIABLE, "1")
    else:
        environment[SCALES_VARIABLE] = "0" if recipe.power_of_two_scales else "1"
