"""The critic: the policy's architecture with a value head instead of the output layer."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch

from miles.megatron_checkpoint import tensors_of
from miles.services.trainer.step.value_head import ValueHead, initial_weight

VALUE_HEAD = "output_layer."
"""Prefix of its tensors in a chunk."""


class OutputValueHead(ValueHead):
    """A value head with the interface of Megatron-Core's output layer; every tensor-parallel rank holds all of it.

    `response_logits` calls it with the rows of all ranks, so that each rank has its whole gradient.
    """

    def __init__(self, weight_1H: torch.Tensor, *, sequence_parallel: bool) -> None:
        super().__init__(weight_1H)
        self.sequence_parallel = sequence_parallel

    def forward(self, hidden: torch.Tensor, weight: None = None) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """[R, 1, H] to values, float32 [R, 1, 1]."""
        return super().forward(hidden), None


def load_critic(load: Callable[[list[Any]], Any], folder: str, chunks: list[Any]) -> list[Any]:
    """Fill bare chunks with the weights that `load` reads, and give the last stage its value head.

    The folder need not have an output layer: the bridge does not look for one, nor does a checkpoint's reader.
    """
    last = [chunk for chunk in chunks if chunk.post_process]
    from_checkpoint = tensors_of(pathlib.Path(folder)) is not None
    for chunk in last:
        chunk.output_layer = _value_head(chunk, folder) if from_checkpoint else None
    load(chunks)
    for chunk in last if not from_checkpoint else ():
        chunk.output_layer = _value_head(chunk, folder)
    return chunks


def _value_head(chunk: Any, folder: str) -> OutputValueHead:
    like = next(chunk.parameters())
    weight_1H = initial_weight(folder, chunk.config.hidden_size).to(like)
    return OutputValueHead(weight_1H, sequence_parallel=bool(chunk.config.sequence_parallel))
