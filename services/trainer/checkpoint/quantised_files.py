"""The files of a Hugging Face folder whose matrices are held by a recipe, written as tensors come."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Mapping

import torch

from miles.precision.quantization_config import QUANTISED_BY, quantization_config
from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format
from miles.precision.tensors import QuantisedTensors
from miles.services.trainer.checkpoint.shard_writer import SHARD_BYTES, ShardWriter
from miles.weights.naming.conversion import Shapes


class QuantisingWriter(ShardWriter):
    """Writes each matrix that a recipe covers as its parts, other tensors as they come, and says so in config.json.

    Args:
        known: Names of the model's own tensors; matrices beyond them are not quantised.
    """

    def __init__(
        self, directory: pathlib.Path, recipe: Recipe, known: Collection[str], shard_bytes: int = SHARD_BYTES
    ) -> None:
        super().__init__(directory, shard_bytes)
        self._config = directory / "config.json"
        self._quantised = QuantisedTensors(recipe)
        self._known = known
        self._kept: set[str] = set()
        """Modules with a matrix that is not quantised."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, or the parts that it becomes."""
        if name in self._known and self._quantised.covers(name, tensor.dtype, tensor.dim()):
            self.add_parts(name, {part.removeprefix(name): t for part, t in self._quantised.convert(name, tensor)})
            return
        if tensor.is_floating_point() and tensor.dim() > 1:
            self._kept.add(name.removesuffix(".weight"))
        super().add(name, tensor)

    def add_parts(self, name: str, parts: Mapping[str, torch.Tensor]) -> None:
        """Write a matrix that is held as parts already, by suffix."""
        for suffix, part in parts.items():
            super().add(name + suffix, part)

    def finish(self) -> None:
        """Write what is left, name the files, and complete config.json."""
        super().finish()
        config = json.loads(self._config.read_text())
        config = {key: value for key, value in config.items() if key not in QUANTISED_BY}
        config["quantization_config"] = quantization_config(self._quantised.recipe, self._kept)
        self._config.write_text(json.dumps(config, indent=2))


def refuse_unfit(recipe: Recipe, shapes: Shapes) -> None:
    """Raise ValueError naming the matrices that a recipe covers and its format cannot hold."""
    codec = weight_format(recipe)
    covered = {name: shape for name, shape in shapes.items() if recipe.layers.cover(name, len(shape))}
    unfit = [f"{name}: {problem}" for name, shape in covered.items() if (problem := codec.why_not(shape)) is not None]
    if unfit:
        more = f"; and {len(unfit) - 3} more" if len(unfit) > 3 else ""
        raise ValueError(
            f"{len(unfit)} matrices cannot be {recipe.format}: {'; '.join(unfit[:3])}{more}; choose another group "
            "size, or keep them out by extra_high_precision_layers_hf"
        )
