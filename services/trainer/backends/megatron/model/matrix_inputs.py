"""The modules of Megatron-Core whose inputs are multiplied by matrices of decoder layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

_LINEAR = re.compile(r"linear_\w+$")
_NORMS_FIRST = "LayerNorm"
"""In the names of TransformerEngine's classes that norm their inputs before they multiply them."""


def matrix_inputs(chunks: Sequence[Any]) -> Iterator[tuple[int, torch.nn.Module]]:
    """Number of the layer, from 0, and module; without those that norm their inputs themselves."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for name, module in layer.named_modules():
                if _LINEAR.search(name) and _NORMS_FIRST not in type(module).__name__:
                    yield layer.layer_number - 1, module
