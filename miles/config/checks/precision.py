"""Checks of low precision that need config.json of the model, or files: that one recipe is behind all of it.

`rules.precision` has those of settings alone, `checks.served_precision` what SGLang demands.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Iterator
from typing import Any

from miles.config.checks.json_file import read_json_object
from miles.config.checks.precision_sizes import covered, cut_problem, matrices, narrow, parted, split_experts, undivided
from miles.config.rules.precision import (
    EXCEPTIONS,
    precision_file_faults,
    server_format_faults,
    switch,
    why_emulated,
    without_format,
)
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault, RunFault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.schema.precision_variables import SCALES
from miles.memory.model import ModelShape, shape_of
from miles.precision.number_types import AUTO
from miles.precision.of_run import (
    folder_recipe,
    recipes_of,
    stated_recipe,
    training_format,
)
from miles.precision.recipe import Recipe
from miles.precision.te_config import BASE64

_SCALES = {True: "power_of_two", False: "float32"}


def precision_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield a fault for each setting that does not go with the folder's format, or with the model's sizes."""
    if s.low_precision_impl == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        remedy = "install it where the trainer runs (docs/megatron.md), or set it to emulated"
        yield RunFault("low_precision_impl", s.low_precision_impl, "TransformerEngine is not installed here", remedy)
    file = s.te_precision_config_file
    if file is not None and not file.startswith(BASE64):
        yield from precision_file_faults(s)
    if not s.hf_checkpoint or not (model := read_json_object(pathlib.Path(s.hf_checkpoint) / "config.json")):
        return
    folder = folder_recipe(model)
    if folder is not None and (other := _other_format(s, folder)) is not None:
        yield other
        return
    if (recipes := recipes_of(s, model)) is None:
        return
    trained, served = recipes
    yield from _formats(s, trained, served)
    shape = shape_of(model)
    if folder is not None and folder in (trained, served):
        yield from _agreement(s, folder, model, shape)
    if shape is not None:
        yield from _sizes(s, trained, served, shape)


def _other_format(s: FlatSettings, folder: Recipe) -> Fault | None:
    """The fault of a format that is not the folder's."""
    problem = f"the weights of hf_checkpoint are rounded to {folder.format} already"
    trained = training_format(s)
    if trained not in (None, folder.format):
        key = switch(s)
        remedy = "`miles convert hf-to-hf` it to 16 bits and give that, or train in its format"
        return Fault(key, getattr(s, key), f"{problem}, and {trained} is another one", remedy)
    if s.rollout_weight_format not in (AUTO, "as_trained", folder.format):
        remedy = "leave it out: engines get the folder's format, or rollout_dtype with as_trained"
        return Fault("rollout_weight_format", s.rollout_weight_format, problem, remedy)
    return None


def _formats(s: FlatSettings, trained: Recipe | None, served: Recipe | None) -> Iterator[Fault]:
    """Settings of formats that neither has, and of engines that quantise by themselves."""
    if s.rollout_weight_format != AUTO:
        return  # a rule looked
    yield from without_format(s, {each.format for each in (trained, served) if each is not None})
    if served is None:
        yield from server_format_faults(s)
    elif s.lora_rank and trained is None:
        problem = f"engines get {served.format}, as hf_checkpoint is, and adapters are merged in rollout_dtype"
        yield Fault("lora_rank", s.lora_rank, problem, "set rollout_weight_format to as_trained")


def _agreement(s: FlatSettings, folder: Recipe, model: dict[str, Any], shape: ModelShape | None) -> Iterator[Fault]:
    """Settings that say otherwise how the folder's weights are held."""
    where = "of hf_checkpoint"
    if folder.format == "int4" and s.int4_group_size not in (None, folder.group_size):
        problem = f"the INT4 weights {where} have groups of {folder.group_size}"
        remedy = "leave it out, or `miles convert` a folder with that size"
        yield Fault("int4_group_size", s.int4_group_size, problem, remedy)
    scales = _SCALES[folder.power_of_two_scales]
    if folder.format == "fp8_block" and s.fp8_block_scales not in (None, scales):
        remedy = f"leave it out, and {SCALES} unset"
        yield Fault("fp8_block_scales", s.fp8_block_scales, f"the FP8 weights {where} have {scales} scales", remedy)
    said = [key for key in EXCEPTIONS if getattr(s, key) not in (None, False, ())]
    chosen = folder.format == "int4" and s.int4_layers != catalog()["int4_layers"].default
    if shape is None or not (said or chosen):
        return
    stated = stated_recipe(folder.format, s, model)
    for each in matrices(shape):
        there, here = folder.layers.cover(each.name, 2), stated.layers.cover(each.name, 2)
        if there == here or not (chosen or there):
            continue
        key = said[0] if said and there else "int4_layers"
        value = getattr(s, key)
        problem = f"{each.name} {where} is {'in' if there else 'not in'} {folder.format}"
        remedy = "leave it out: the folder says what is covered, or `miles convert` another one"
        yield Fault(key, list(value) if isinstance(value, tuple) else value, problem, remedy)
        return


def _sizes(s: FlatSettings, trained: Recipe | None, served: Recipe | None, shape: ModelShape) -> Iterator[Fault]:
    for recipe in dict.fromkeys(each for each in (trained, served) if each is not None):
        if not any(covered(recipe, shape)):
            yield _nothing_covered(s, recipe, shape)
        elif (matrix := undivided(recipe, shape)) is not None:
            problem = f"rows of {matrix.name} have {matrix.shape[1]} numbers, which it does not divide"
            yield Fault("int4_group_size", recipe.group_size, problem, "choose one that does")
        elif (why := split_experts(recipe, shape)) is not None:
            said = [key for key in ("int4_layers", *EXCEPTIONS) if getattr(s, key) != catalog()[key].default]
            value = getattr(s, said[0]) if said else s.hf_checkpoint
            shown = list(value) if isinstance(value, tuple) else value
            yield Fault(said[0] if said else "hf_checkpoint", shown, why, "cover all of them, or none")
            return
    if trained is None or s.train_backend != "megatron":
        return
    if trained.rounds_inputs and (pair := parted(trained, shape)) is not None:
        problem = f"Megatron multiplies {pair[0]} and {pair[1]} at once, and the first alone is in {trained.format}"
        remedy = "set extra_high_precision_layers_hf to keep both out, or train with fsdp"
        yield Fault("train_backend", s.train_backend, problem, remedy)
    sizes = {"tensor": s.tensor_model_parallel_size, "expert_tensor": s.expert_tensor_parallel_size}
    emulated = why_emulated(s) is not None or s.low_precision_impl == "emulated"
    found = cut_problem(trained, shape, **sizes) if emulated else narrow(trained, shape, **sizes)
    if found is not None:  # kernels round each rank's part by itself, so that a cut may be anywhere
        key, problem = found
        yield Fault(key, getattr(s, key), problem, "lower it, or train with fsdp")


def _nothing_covered(s: FlatSettings, recipe: Recipe, shape: ModelShape) -> Fault:
    if recipe.format == "int4" and s.int4_layers == catalog()["int4_layers"].default and not shape.experts:
        problem = "it covers routed experts, and the model has none"
        return Fault("int4_layers", list(s.int4_layers), problem, "set it to . for every matrix")
    if s.first_last_layers_bf16 and s.num_layers_at_start_in_bf16 + s.num_layers_at_end_in_bf16 >= shape.layers:
        problem = f"it keeps all {shape.layers} layers out of {recipe.format}"
        remedy = "lower num_layers_at_start_in_bf16 or num_layers_at_end_in_bf16"
        return Fault("first_last_layers_bf16", True, problem, remedy)
    key = "int4_layers" if recipe.format == "int4" else "extra_high_precision_layers_hf"
    problem = f"no matrix of the model is left for {recipe.format}"
    return Fault(key, list(getattr(s, key)), problem, "cover some, or leave the format out")
