"""Where in the model a gradient is not finite."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")


def broken_gradients(chunks: Sequence[Any]) -> list[str]:
    """Megatron-Core's names of the parameters whose gradient is not finite on some rank, layers numbered from 0 over
    all pipeline stages; collective over all ranks."""
    found = [name for name, gradient in _gradients(chunks) if not bool(gradient.isfinite().all())]
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, found)
    return sorted(dict.fromkeys(name for names in everywhere for name in names), key=_place)


def _gradients(chunks: Sequence[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for chunk in unwrap_model(list(chunks)):
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is None:
                gradient = parameter.grad
            if gradient is not None:
                yield _over_all_stages(name, numbers), gradient


def _over_all_stages(name: str, numbers: Sequence[int]) -> str:
    """A name of this stage with the layer's number in the model."""
    return _LAYER.sub(lambda found: str(numbers[int(found[0])]), name)


def _place(name: str) -> float:
    """Where in the forward pass a parameter is used."""
    found = _LAYER.search(name)
    if found is not None:
        return float(found[0])
    return -1.0 if name.startswith("embedding") else math.inf
