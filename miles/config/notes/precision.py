"""Notes on low precision: by which recipe trainer and engines compute, where it comes from, and what is emulated."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from miles.config.checks.json_file import read_json_object
from miles.config.checks.precision_sizes import coverage, other_blocks
from miles.config.notes.registry import Note, noted
from miles.config.rules.precision import switch, why_emulated
from miles.config.schema.flat_settings import FlatSettings
from miles.config.schema.precision_variables import asked_by
from miles.memory.model import shape_of
from miles.precision.number_types import AUTO
from miles.precision.of_run import folder_recipe, recipes_of, training_format
from miles.precision.recipe import Recipe

_NARROW = ("fp8", "fp4", "mxfp8", "nvfp4")
"""Beginnings of SGLang's types of a KV cache in few bits."""


@noted
def recipes_of_trainer_and_engines(s: FlatSettings) -> Iterator[Note]:
    model = read_json_object(pathlib.Path(s.hf_checkpoint or "") / "config.json")
    if (recipes := recipes_of(s, model)) is None:
        return  # a rule or a check reports it
    trained, served = recipes
    folder = folder_recipe(model)
    if trained is not None:
        key = switch(s)
        source = ", as config.json of hf_checkpoint has them" if trained == folder else ""
        yield Note(key, getattr(s, key), f"the trainer computes in {_described(trained, model)}{source}; {_how(s)}")
    if s.debug_train_only or (served is None and folder is None and trained is None):
        return
    asked = s.rollout_weight_format
    if served is None:
        text = "engines get weights in rollout_dtype"
        if trained is not None:
            text += ", and sample from another function than is trained: use_tis or use_mis corrects for it"
        yield Note("rollout_weight_format", asked, text)
        return
    sources = {AUTO: "as the trainer computes" if folder is None else "as config.json of hf_checkpoint says"}
    text = f"engines get {_described(served, model)}"
    text += f", {sources[asked]}" if asked in sources else ""
    if trained is None:
        text += "; the trainer computes in train_dtype, and use_tis or use_mis corrects for the difference"
    yield Note("rollout_weight_format", asked, text)


@noted
def blocks_of_kernels(s: FlatSettings) -> Iterator[Note]:
    if training_format(s) is None or s.low_precision_impl == "emulated" or why_emulated(s) is not None:
        return
    model = read_json_object(pathlib.Path(s.hf_checkpoint or "") / "config.json")
    recipes, shape = recipes_of(s, model), shape_of(model)
    if recipes is None or recipes.trained is None or shape is None:
        return  # a rule or a check reports a file with a fault
    sizes = {"tensor": s.tensor_model_parallel_size, "expert_tensor": s.expert_tensor_parallel_size}
    if (name := other_blocks(recipes.trained, shape, **sizes)) is not None:
        text = (
            f"TransformerEngine's kernels round {name}, among others, in blocks that it shares with what lies beside "
            "it in Megatron's parameters, so that the trainer's weights differ from those that engines are sent; with "
            "emulated they are the same"
        )
        yield Note("low_precision_impl", s.low_precision_impl, text)


@noted
def variables_that_are_settings(s: FlatSettings) -> Iterator[Note]:
    for asked in asked_by(s.train_env_vars, fp8=s.fp8_format is not None):
        if asked.value is not False and getattr(s, asked.key) == asked.value:
            yield Note(asked.key, asked.value, f"{asked.variable} in train_env_vars asks for it")


@noted
def keys_and_values_in_few_bits(s: FlatSettings) -> Iterator[Note]:
    kind = s.sglang_args.get("kv_cache_dtype")
    if str(kind).startswith(_NARROW):
        text = (
            "engines round keys and values to it, and the trainer does not, so that their log-probabilities differ by "
            "that: use_tis or use_mis corrects for it"
        )
        yield Note("sglang_kv_cache_dtype", kind, text)


def _described(recipe: Recipe, model: Mapping[str, Any]) -> str:
    match recipe.format:
        case "fp8_block":
            scales = "powers of two" if recipe.power_of_two_scales else "float32"
            text = f"FP8 (blocks of 128 x 128, scales in {scales})"
        case "int4":
            text = f"INT4 (groups of {recipe.group_size})"
        case other:
            text = other.upper()
    if (shape := shape_of(model)) is None:
        return text
    found = coverage(recipe, shape)
    return f"{text} for {found.covered / found.matrices:.1%} of the layers' weights"


def _how(s: FlatSettings) -> str:
    why = "low_precision_impl = emulated" if s.low_precision_impl == "emulated" else why_emulated(s)
    if why is None:
        return "TransformerEngine's kernels compute it where the GPU has them, products of rounded numbers elsewhere"
    return f"it is emulated, with products of rounded numbers in train_dtype: {why}"
