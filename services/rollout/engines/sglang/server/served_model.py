"""The model folder that servers start from: hf_checkpoint itself, or its description with another quantisation.

Servers allocate a model's parameters by `quantization_config` in config.json. A job may serve a folder's model in
another format than the folder's: then servers start from a folder of their own, with the same description and
tokenizer, and with `quantization_config` of the job's recipe, but without weights. They come with the first version,
so that no other quantiser has a part in them, and no server ever holds the weights in another format. What no version
brings is as without a checkpoint: SGLang's noise has a fixed seed that makes scales of keys and values negative, which
stands for 1.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from miles.config.checks.json_file import read_json_object
from miles.precision.quantization_config import QUANTISED_BY, quantization_config
from miles.precision.recipe import Recipe

Shapes = Mapping[str, tuple[int, ...]]

_EXPERTS = ".experts."
_NOT_ROUTED = r"re:^(?!.*\.experts\.).*"
"""Modules that are no routed experts, by any name that SGLang gives to several projections in one."""
_DESCRIPTION = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf", ".index.json")
_OF_OTHER_QUANTISERS = "hf_quant_config.json"


@dataclasses.dataclass(frozen=True, slots=True)
class ServedModel:
    """What servers start from."""

    folder: str
    max_positions: int = 0
    """Positions that the model was made for."""
    has_weights: bool = True
    """Whether the folder has weights to start with; without, a server holds noise until the first version."""


def needs_own_folder(hf_checkpoint: str, recipe: Recipe | None) -> bool:
    """Whether the folder's description does not fit what is served."""
    model = read_json_object(pathlib.Path(hf_checkpoint) / _DESCRIPTION)
    return recipe is not None or any(model.get(key) is not None for key in QUANTISED_BY)


def write_folder(folder: pathlib.Path, hf_checkpoint: str, quantisation: Mapping[str, Any] | None) -> None:
    """Describe the model of a folder in another one, with this `quantization_config`; None for none.

    Other files than weights are linked to.
    """
    source = pathlib.Path(hf_checkpoint).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if not path.name.endswith(_WEIGHTS) and path.name not in (_DESCRIPTION, _OF_OTHER_QUANTISERS):
            (folder / path.name).symlink_to(path)
    model = json.loads((source / _DESCRIPTION).read_text())
    model = {key: value for key, value in model.items() if key not in QUANTISED_BY}
    if quantisation is not None:
        model["quantization_config"] = quantisation
    (folder / _DESCRIPTION).write_text(json.dumps(model, indent=2))


def served_quantisation(recipe: Recipe, shapes: Shapes) -> dict[str, Any]:
    """`quantization_config` by which SGLang gives parts to what the recipe covers, and to nothing else.

    Args:
        shapes: Of the model's tensors in the checkpoint form, by name.

    SGLang holds a layer's experts in one module, which it knows by the name of all of them.
    """
    if recipe.format == "int4":
        kept: list[str] = [_NOT_ROUTED]
        kept += [f"re:{re.escape(experts)}" for experts in _modules(recipe, shapes) if experts.endswith(_EXPERTS)]
    else:
        kept = [module.removesuffix(".") for module in _modules(recipe, shapes)]
    return quantization_config(recipe, kept)


def _modules(recipe: Recipe, shapes: Shapes) -> Iterable[str]:
    """Modules with a matrix that the recipe does not cover, those of experts by `model.layers.0.mlp.experts.`."""
    return dict.fromkeys(_kept(recipe, shapes))


def _kept(recipe: Recipe, shapes: Shapes) -> Iterator[str]:
    for name, shape in shapes.items():
        if len(shape) >= 2 and not recipe.layers.cover(name, len(shape)):
            layer, experts, _ = name.partition(_EXPERTS)
            yield layer + experts if experts else name.removesuffix(".weight")
