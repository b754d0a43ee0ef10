"""What rounding does to the matrices of a model and to their inputs, by decoder layer.

Sums and maxima add up over matrices and ranks, so that each rank may look at a part of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch

from miles.precision.base import WeightFormat
from miles.precision.layers import layer_of
from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format
from miles.precision.rounding import as_matrices
from miles.precision.small_floats import powers_of_two


@dataclasses.dataclass(slots=True)
class LayerStatistics:
    """Numbers of one layer and what they are rounded to."""

    amax: float = 0.0
    """Largest magnitude before rounding."""
    smallest_scale: float = math.inf
    largest_scale: float = 0.0
    nonzero: int = 0
    """Numbers that are not zero before rounding."""
    lost: int = 0
    """Those of them that are zero after it."""
    square: float = 0.0
    """Sum of squares before rounding."""
    error: float = 0.0
    """Sum of squares of what engines' rounding changes."""
    difference: float = 0.0
    """Sum of squares of the difference between what the trainer computes with and what engines do."""

    def add(self, other: LayerStatistics) -> None:
        """Take another part's numbers in."""
        self.amax = max(self.amax, other.amax)
        self.smallest_scale = min(self.smallest_scale, other.smallest_scale)
        self.largest_scale = max(self.largest_scale, other.largest_scale)
        for field in ("nonzero", "lost", "square", "error", "difference"):
            setattr(self, field, getattr(self, field) + getattr(other, field))


class WeightStatistics:
    """Of the matrices that the recipe of trainer or engines covers."""

    def __init__(self, training: Recipe | None, rollout: Recipe | None) -> None:
        self._recipes = (training, rollout)
        self._formats = tuple(None if recipe is None else weight_format(recipe) for recipe in self._recipes)
        self.layers: dict[int, LayerStatistics] = {}

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Take in a tensor in the type that is computed with; one that no recipe covers is left out."""
        layer = layer_of(name)
        covers = [recipe is not None and recipe.layers.cover(name, weight.dim()) for recipe in self._recipes]
        if layer is None or not any(covers):
            return
        matrices = as_matrices(name, weight)
        used = [
            codec.rounded(matrices) if codec is not None and covered else matrices
            for codec, covered in zip(self._formats, covers, strict=True)
        ]
        rounded = used[1] if covers[1] else used[0]
        codec = self._formats[1] if covers[1] else self._formats[0]
        assert codec is not None, "one of them covers it"
        found = _compare(matrices, rounded)
        scales = _scales(codec.quantise(matrices))
        found.smallest_scale, found.largest_scale = float(scales.min()), float(scales.max())
        found.difference = float((used[0].float() - used[1].float()).square().sum())
        self.layers.setdefault(layer, LayerStatistics()).add(found)


class InputStatistics:
    """Of the inputs that modules are called with, while hooks are there."""

    def __init__(self, codec: WeightFormat) -> None:
        self._codec = codec
        self.layers: dict[int, LayerStatistics] = {}

    def add(self, layer: int, rows: torch.Tensor) -> None:
        """Take in the inputs (..., I) of a matrix in a layer."""
        if rows.numel():  # an expert may get no token
            self.layers.setdefault(layer, LayerStatistics()).add(_compare(rows, self._codec.rounded_rows(rows)))


def merged(parts: Iterable[Mapping[int, LayerStatistics]]) -> dict[int, LayerStatistics]:
    """What several ranks have found, by layer."""
    layers: dict[int, LayerStatistics] = {}
    for part in parts:
        for layer, found in part.items():
            layers.setdefault(layer, LayerStatistics()).add(found)
    return dict(sorted(layers.items()))


def weight_metrics(layers: Mapping[int, LayerStatistics]) -> dict[str, float]:
    """Metrics of weights: amax, scales, the share of numbers that underflow to zero, and relative errors."""
    metrics: dict[str, float] = {}
    for layer, found in layers.items():
        norm = math.sqrt(found.square) or 1.0
        values = {
            "weight_amax": found.amax,
            "weight_scale_min": found.smallest_scale,
            "weight_scale_max": found.largest_scale,
            "weight_underflow": found.lost / max(found.nonzero, 1),
            "weight_error": math.sqrt(found.error) / norm,
            "train_rollout_weight_diff": math.sqrt(found.difference) / norm,
        }
        metrics |= {_name(kind, layer): value for kind, value in values.items()}
    return metrics


def input_metrics(layers: Mapping[int, LayerStatistics]) -> dict[str, float]:
    """Metrics of inputs: amax, the share of numbers that underflow to zero, and the relative error."""
    metrics: dict[str, float] = {}
    for layer, found in layers.items():
        values = {
            "input_amax": found.amax,
            "input_underflow": found.lost / max(found.nonzero, 1),
            "input_error": math.sqrt(found.error) / (math.sqrt(found.square) or 1.0),
        }
        metrics |= {_name(kind, layer): value for kind, value in values.items()}
    return metrics


def _name(kind: str, layer: int) -> str:
    return f"precision/{kind}/layer_{layer:02d}"


def _compare(exact: torch.Tensor, rounded: torch.Tensor) -> LayerStatistics:
    wide, there = exact.float(), exact != 0
    numbers = torch.stack(
        [
            wide.abs().amax().double(),
            there.sum().double(),
            (there & (rounded == 0)).sum().double(),
            wide.square().sum(dtype=torch.float64),
            (wide - rounded.float()).square().sum(dtype=torch.float64),
        ]
    ).tolist()  # one transfer from a GPU
    amax, nonzero, lost, square, error = numbers
    return LayerStatistics(amax=amax, nonzero=int(nonzero), lost=int(lost), square=square, error=error)


def _scales(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The scales among the parts of a matrix, float32; of a format with scales of scales their product."""
    product = torch.ones(())
    for suffix, part in parts.items():
        if "scale" in suffix:
            own = powers_of_two(part.int()).cpu() if part.dtype == torch.uint8 else part.cpu().float()
            product = product * (own if product.dim() <= own.dim() or not own.dim() else own.unsqueeze(-1))
    return product
