"""The recipes of a run: what its trainer computes by, and by what its engines are served. Needs no PyTorch."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from miles.precision.layers import QuantisedLayers
from miles.precision.quantization_config import UnknownQuantisation, recipe_of
from miles.precision.recipe import FormatName, Recipe

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.config.schema.flat_settings import FlatSettings
    from miles.config.sections.precision import PrecisionConfig

    Settings = PrecisionConfig | FlatSettings
    """FlatSettings has the section's settings too."""

DEFAULT_GROUP_SIZE = 128


def training_recipe(config: JobConfig) -> Recipe | None:
    """By what the trainer of a job computes; None for train_dtype alone."""
    return training_recipe_of(config.precision, model_config(config))


def rollout_recipe(config: JobConfig) -> Recipe | None:
    """By what the engines of a job are served; None for rollout_dtype alone."""
    return rollout_recipe_of(config.precision, model_config(config))


def training_recipe_of(settings: Settings, model: Mapping[str, Any]) -> Recipe | None:
    """By what a trainer computes that has these settings and a model with this config.json."""
    chosen = training_format(settings)
    return None if chosen is None else _recipe(chosen, settings, model)


def rollout_recipe_of(settings: Settings, model: Mapping[str, Any]) -> Recipe | None:
    """By what engines are served. `auto` is the format of the folder, or else the trainer's."""
    asked = settings.rollout_weight_format
    if asked == "as_trained":
        return None
    if asked != "auto":
        return _recipe(asked, settings, model)
    return folder_recipe(model) or training_recipe_of(settings, model)


def training_format(settings: Settings) -> FormatName | None:
    """The trainer's format; None for train_dtype alone."""
    if settings.fp8_format is not None:
        return "mxfp8" if settings.fp8_recipe == "mxfp8" else "fp8_block"
    if settings.fp4_format is not None:
        return "nvfp4"
    return "int4" if settings.int4_qat else None


def folder_recipe(model: Mapping[str, Any]) -> Recipe | None:
    """The recipe of a folder with this config.json; None when its weights are not quantised, or as nothing known."""
    try:
        return recipe_of(model)
    except UnknownQuantisation:
        return None


def model_config(config: JobConfig) -> dict[str, Any]:
    """config.json of the job's model; empty when it cannot be read."""
    from miles.config.checks.json_file import read_json_object  # rules of the configuration import this module

    return read_json_object(pathlib.Path(str(config.rollout.hf_checkpoint)) / "config.json")


def _recipe(chosen: FormatName, settings: Settings, model: Mapping[str, Any]) -> Recipe:
    """What a folder that is in this format covers, or else what settings say."""
    folder = folder_recipe(model)
    if folder is not None and folder.format == chosen:
        return folder
    layers = QuantisedLayers(
        only=settings.int4_layers if chosen == "int4" else (),
        but=settings.extra_high_precision_layers_hf,
        high_layers=_high_layers(settings, int(model.get("num_hidden_layers") or 0)),
    )
    return Recipe(
        format=chosen,
        layers=layers,
        group_size=settings.int4_group_size or DEFAULT_GROUP_SIZE,
        power_of_two_scales=settings.fp8_block_scales == "power_of_two",
    )


def _high_layers(settings: Settings, layers: int) -> frozenset[int]:
    if not settings.first_last_layers_bf16:
        return frozenset()
    start, end = settings.num_layers_at_start_in_bf16, settings.num_layers_at_end_in_bf16
    return frozenset([*range(min(start, layers)), *range(max(layers - end, 0), layers)])
