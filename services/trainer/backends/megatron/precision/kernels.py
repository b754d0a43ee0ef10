"""TransformerEngine's FP8 in Megatron-Core: its settings, what it requires, and matrices that stay in train_dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from miles.config.sections.precision import PrecisionConfig
from miles.precision.recipe import Recipe
from miles.services.trainer.backends.megatron.precision.choice import SCALES_VARIABLE

ROWS = 128
"""Rows of a micro-batch on a rank are padded to a multiple: kernels need 16 or 32, whole blocks are gathered in FP8."""
_DIVIDES = 16
"""Rows and columns of a matrix are multiples of it."""
_HIGH_PRECISION: dict[str, Any] = {"transformer_engine_config_type": "TEQuantizationParams", "training_recipe": {}}
"""Megatron-Core's description of a module that computes in train_dtype."""


def engine_values(precision: PrecisionConfig, recipe: Recipe) -> dict[str, Any]:
    """Fields of Megatron-Core's TransformerConfig.

    Layers that are kept in train_dtype are told so one by one (`keep_high`), for Megatron-Core's own setting goes with
    even pipeline stages alone. Experts pad their rows themselves, so routing is as it is without FP8.
    """
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": "mxfp8" if recipe.format == "mxfp8" else "blockwise",
        "fp8_param": False,
        "first_last_layers_bf16": False,
        "moe_router_padding_for_quantization": False,
        "disable_parameter_transpose_cache": False,
    }


def check_scales(recipe: Recipe) -> None:
    """Raise ValueError when TransformerEngine was imported with other scales than a recipe's."""
    from transformer_engine.common.recipe import Float8BlockScaling

    powers = Float8BlockScaling().fp8_quant_fwd_weight.power_2_scale
    if recipe.format == "fp8_block" and powers != recipe.power_of_two_scales:
        found, wanted = (("powers of two" if each else "float32") for each in (powers, recipe.power_of_two_scales))
        raise ValueError(
            f"TransformerEngine was imported for scales that are {found}, but the trainer's are {wanted}; start the "
            f"trainer anew, with {SCALES_VARIABLE} unset"
        )


def keep_high(module: Any, name: str) -> None:
    """Have a module of TransformerEngine compute in train_dtype within FP8."""
    from megatron.core.quantization.quant_config import MatchContext, QuantizationConfig

    module.finish_init(QuantizationConfig(_HIGH_PRECISION, MatchContext(name, None), "train_dtype"))


def drop_copies(chunks: Iterable[Any]) -> None:
    """Free the FP8 copies of weights that modules keep for a pass's micro-batches; the next pass makes new ones."""
    for chunk in chunks:
        for module in chunk.modules():
            getattr(module, "_fp8_workspaces", {}).clear()


def size_faults(name: str, shapes: Iterable[tuple[int, ...]]) -> list[str]:
    """What is wrong with matrices that are to be multiplied in FP8 on a rank."""
    return [
        f"{name} is {shape[0]} x {shape[1]} on a rank, which must be multiples of {_DIVIDES}"
        for shape in shapes
        if any(size % _DIVIDES for size in shape)
    ]
