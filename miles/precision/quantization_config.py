"""What `quantization_config` in config.json of a Hugging Face folder says of its weights, as a recipe and back.

FP8 blocks are written as transformers and DeepSeek-V3 have them, INT4 as compressed-tensors (`pack-quantized`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from miles.precision.layers import QuantisedLayers
from miles.precision.recipe import FP8_BLOCK, Recipe

_BLOCK = (FP8_BLOCK, FP8_BLOCK)


class UnknownQuantisation(ValueError):
    """Weights in a format that there is no recipe for."""


def recipe_of(model_config: Mapping[str, Any]) -> Recipe | None:
    """The recipe by which the weights of a folder with this config.json are held; None when they are not quantised.

    Raises UnknownQuantisation.
    """
    stated = model_config.get("quantization_config")
    if not isinstance(stated, Mapping):
        return None
    match stated.get("quant_method"):
        case "fp8":
            return _fp8(stated)
        case "compressed-tensors":
            return _int4(stated)
    raise UnknownQuantisation(f"its weights are quantised by {stated.get('quant_method')}, which is not known here")


def quantization_config(recipe: Recipe, kept: Iterable[str]) -> dict[str, Any]:
    """What config.json of a folder says whose weights are held by this recipe.

    Args:
        kept: Names of modules with a matrix that the recipe does not cover, in the checkpoint form.

    Raises ValueError for a format that folders do not have.
    """
    ignored = sorted(kept)
    match recipe.format:
        case "fp8_block":
            stated: dict[str, Any] = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(_BLOCK),
                "modules_to_not_convert": ignored,
            }
            return stated | ({"scale_fmt": "ue8m0"} if recipe.power_of_two_scales else {})
        case "int4":
            weights = {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": recipe.group_size,
                "dynamic": False,
            }
            return {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
                "ignore": ignored,
            }
    raise ValueError(f"Hugging Face folders do not have weights in {recipe.format}")


def _fp8(stated: Mapping[str, Any]) -> Recipe:
    block = tuple(stated.get("weight_block_size") or ())
    if block != _BLOCK:
        raise UnknownQuantisation(f"its FP8 weights have blocks of {list(block) or 'no size'}, not of {list(_BLOCK)}")
    if stated.get("fmt", "e4m3") != "e4m3" or stated.get("activation_scheme", "dynamic") != "dynamic":
        problem = f"{stated.get('fmt')} values and {stated.get('activation_scheme')} scales of inputs"
        raise UnknownQuantisation(f"its FP8 weights have {problem}, not e4m3 and dynamic")
    layers = QuantisedLayers(ignored=_names(stated.get("modules_to_not_convert")))
    return Recipe(format="fp8_block", layers=layers, power_of_two_scales=stated.get("scale_fmt") == "ue8m0")


def _int4(stated: Mapping[str, Any]) -> Recipe:
    groups = list((stated.get("config_groups") or {}).values())
    weights = groups[0].get("weights") or {} if len(groups) == 1 else {}
    known = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    wrong = {key: weights.get(key) for key, value in known.items() if weights.get(key, value) != value}
    if len(groups) != 1 or wrong or stated.get("format") != "pack-quantized" or not weights.get("group_size"):
        raise UnknownQuantisation(
            f"its compressed-tensors weights are {stated.get('format')} {wrong or ''} in {len(groups)} groups of "
            "modules; only one group of symmetric INT4 weights in pack-quantized form is known"
        )
    layers = QuantisedLayers(ignored=_names(stated.get("ignore")), ignores_inside=False)
    return Recipe(format="int4", layers=layers, group_size=int(weights["group_size"]))


def _names(stated: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(map(str, stated or ()))
