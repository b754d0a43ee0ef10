"""The recipes of a run: what its trainer computes by, and by what its engines are served. Needs no PyTorch."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from miles.precision.layers import QuantisedLayers
from miles.precision.megatron_names import ModulePattern
from miles.precision.quantization_config import UnknownQuantisation, recipe_of
from miles.precision.recipe import INT4_GROUP, FormatName, Recipe
from miles.precision.te_config import PrecisionFileError, patterns_in

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.config.schema.flat_settings import FlatSettings
    from miles.config.sections.precision import PrecisionConfig

    Settings = PrecisionConfig | FlatSettings
    """FlatSettings has the section's settings too."""


class Recipes(NamedTuple):
    """Both of a run's."""

    trained: Recipe | None
    """By what the trainer computes; None for train_dtype alone."""
    served: Recipe | None
    """By what engines are served; None for rollout_dtype alone."""


def training_recipe(config: JobConfig) -> Recipe | None:
    """By what the trainer of a job computes; None for train_dtype alone."""
    return training_recipe_of(config.precision, model_config(config))


def rollout_recipe(config: JobConfig) -> Recipe | None:
    """By what the engines of a job are served; None for rollout_dtype alone."""
    return rollout_recipe_of(config.precision, model_config(config))


def export_recipe(config: JobConfig) -> Recipe | None:
    """By what exports in Hugging Face format are written; None for rollout_dtype alone."""
    return rollout_recipe(config) if config.checkpoint.save_hf_format == "rollout" else None


def recipes_of(settings: Settings, model: Mapping[str, Any]) -> Recipes | None:
    """The recipes of settings and a model with this config.json; None when te_precision_config_file has a fault.

    For whatever looks at settings that nobody has checked: rules and checks of the configuration report the fault.
    """
    try:
        return Recipes(training_recipe_of(settings, model), rollout_recipe_of(settings, model))
    except PrecisionFileError:
        return None


def training_recipe_of(settings: Settings, model: Mapping[str, Any]) -> Recipe | None:
    """By what a trainer computes that has these settings and a model with this config.json.

    Raises PrecisionFileError.
    """
    chosen = training_format(settings)
    return None if chosen is None else _recipe(chosen, settings, model)


def rollout_recipe_of(settings: Settings, model: Mapping[str, Any]) -> Recipe | None:
    """By what engines are served. `auto` is the format of the folder, or else the trainer's.

    Raises PrecisionFileError.
    """
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
    return stated_recipe(chosen, settings, model)


def stated_recipe(chosen: FormatName, settings: Settings, model: Mapping[str, Any]) -> Recipe:
    """What settings say of a format, whatever the folder is in."""
    layers = QuantisedLayers(
        only=settings.int4_layers if chosen == "int4" else (),
        but=settings.extra_high_precision_layers_hf,
        high_layers=_high_layers(settings, int(model.get("num_hidden_layers") or 0)),
        modules=module_patterns(settings),
    )
    return Recipe(
        format=chosen,
        layers=layers,
        group_size=settings.int4_group_size or INT4_GROUP,
        power_of_two_scales=settings.fp8_block_scales == "power_of_two",
    )


def module_patterns(settings: Settings) -> tuple[ModulePattern, ...]:
    """What settings keep out by Megatron's names of modules. Raises PrecisionFileError."""
    found = tuple(ModulePattern(f"*{part}*", kept=True) for part in settings.extra_high_precision_layers_megatron)
    if settings.te_precision_config_file is None:
        return found
    fp8, recipe = settings.fp8_format, settings.fp8_recipe
    own = None if fp8 is None or recipe is None else (recipe, fp8)
    fp4 = None if settings.fp4_format is None else settings.fp4_recipe or "nvfp4"
    return found + patterns_in(settings.te_precision_config_file, own, fp4)


def _high_layers(settings: Settings, layers: int) -> frozenset[int]:
    if not settings.first_last_layers_bf16:
        return frozenset()
    start, end = settings.num_layers_at_start_in_bf16, settings.num_layers_at_end_in_bf16
    return frozenset([*range(min(start, layers)), *range(max(layers - end, 0), layers)])
