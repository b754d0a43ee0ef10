"""How a model's matrices are held in few bits, and which of them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from miles.precision.layers import EVERY_MATRIX, QuantisedLayers

FormatName = Literal["fp8_block", "int4", "mxfp8", "nvfp4"]
FP8_BLOCK = 128
"""Sides of a block of fp8_block, and elements of a row of inputs that share a scale."""
MX_GROUP, NV_GROUP = 32, 16
"""Elements that share a scale along the last dimension: of mxfp8, of nvfp4."""
INT4_GROUP = 128
"""Such elements of int4 where nothing says otherwise."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One format and what it is applied to. Trainer and engine with equal recipes compute the same function."""

    format: FormatName
    layers: QuantisedLayers = EVERY_MATRIX
    group_size: int = INT4_GROUP
    """Elements that share a scale: int4 along the last dimension. Other formats have one size alone."""
    power_of_two_scales: bool = False
    """fp8_block: scales are rounded to powers of two, as GPUs with scales in UE8M0 need them."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of the matrices are quantised too; int4 is of weights alone (W4A16)."""
        return self.format != "int4"
