"""Whether a server that runs already holds weights as versions come: in which format, which of them, in what groups."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from miles.config.checks.json_file import read_json_object
from miles.precision.quantization_config import UnknownQuantisation, recipe_of
from miles.precision.recipe import FormatName, Recipe

_NAMES: Mapping[FormatName | None, tuple[str, ...]] = {
    None: ("unquant",),
    "fp8_block": ("fp8",),
    "int4": ("compressed-tensors",),
}
"""What SGLang calls its quantisation of weights in a format; it need not say so where the folder does."""


def why_unfit(
    server: Mapping[str, Any], recipe: Recipe | None, dtype: str, shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Why a server cannot take versions by this recipe, as what is to be said of it; None when nothing is known.

    Args:
        server: What it answers to /server_info.
        recipe: By which versions are quantised; None: they are in `dtype`.
        shapes: Of the tensors of a version, by name, before matrices are quantised.

    Its folder may be on another host: then only what the server itself says can be compared.
    """
    wanted = None if recipe is None else recipe.format
    said = server.get("quantization")
    if said is not None and str(said) not in _NAMES.get(wanted, ()):
        return f"runs with quantization = {said}, and versions come in {wanted or dtype}"
    model = _model(server)
    if not model:
        return None
    try:
        held = recipe_of(model)
    except UnknownQuantisation as error:
        return f"was started from {server.get('model_path')}: {error}, and versions come in {wanted or dtype}"
    if held is None or recipe is None or held.format != wanted:
        if held is None and recipe is None:
            return None
        holds = dtype if held is None else held.format
        return f"was started to hold weights in {holds}, and versions come in {wanted or dtype}"
    if held.format == "int4" and held.group_size != recipe.group_size:
        return f"holds INT4 weights in groups of {held.group_size}, and versions come in groups of {recipe.group_size}"
    return _apart(held, recipe, shapes)


def _model(server: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of its folder, with what its flags say otherwise; empty where it cannot be read."""
    model = read_json_object(pathlib.Path(str(server.get("model_path") or "")) / "config.json")
    other = server.get("json_model_override_args") or {}
    try:
        other = json.loads(other) if isinstance(other, str) else other
    except ValueError:
        other = {}
    return {**model, **other} if model and isinstance(other, dict) else model


def _apart(held: Recipe, recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What one of two recipes of a format covers and the other does not."""
    for name, shape in shapes.items():
        try:
            there, here = held.layers.cover(name, len(shape)), recipe.layers.cover(name, len(shape))
        except ValueError as error:
            return f"cannot hold what versions bring: {error}"
        if there != here:
            return f"has {name} {'' if there else 'not '}in {held.format}, and versions {'do' if here else 'do not'}"
    return None
