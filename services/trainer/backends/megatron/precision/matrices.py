"""Where the matrices of a Hugging Face checkpoint lie in the parameters of Megatron-Core, on a rank.

Dims: O outputs and I inputs of a parameter, on this rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch

Round = Callable[[torch.Tensor], torch.Tensor]


class Matrices(Protocol):
    """The matrices in one parameter."""

    @property
    def names(self) -> tuple[str, ...]:
        """In the Hugging Face checkpoint."""

    def rows(self, outputs: int) -> tuple[int, ...]:
        """Rows of each on this rank, of a parameter with so many."""

    def runs(self, outputs: int) -> tuple[int, ...]:
        """Rows that follow each other in one matrix and in the parameter, one run after the other."""

    def rounded(self, weight_OI: torch.Tensor, covered: tuple[bool, ...], round_matrix: Round) -> torch.Tensor:
        """A parameter with those matrices rounded that are covered, each by itself; of its shape and dtype."""


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """A parameter that is a matrix of the checkpoint."""

    names: tuple[str, ...]

    def rows(self, outputs: int) -> tuple[int, ...]:
        """See `Matrices.rows`."""
        return (outputs,)

    def runs(self, outputs: int) -> tuple[int, ...]:
        """See `Matrices.runs`."""
        return (outputs,)

    def rounded(self, weight_OI: torch.Tensor, covered: tuple[bool, ...], round_matrix: Round) -> torch.Tensor:
        """See `Matrices.rounded`."""
        return round_matrix(weight_OI)


@dataclasses.dataclass(frozen=True, slots=True)
class GateAndUp:
    """linear_fc1: a rank's rows of the gate, and then its rows of the up projection."""

    names: tuple[str, ...]

    def rows(self, outputs: int) -> tuple[int, ...]:
        """See `Matrices.rows`."""
        return (outputs // 2, outputs // 2)

    def runs(self, outputs: int) -> tuple[int, ...]:
        """See `Matrices.runs`."""
        return self.rows(outputs)

    def rounded(self, weight_OI: torch.Tensor, covered: tuple[bool, ...], round_matrix: Round) -> torch.Tensor:
        """See `Matrices.rounded`."""
        halves = weight_OI.view(2, -1, weight_OI.shape[-1])  # leading dimensions are matrices of their own
        if all(covered):
            return round_matrix(halves).view(weight_OI.shape)
        parts = [round_matrix(half) if chosen else half for half, chosen in zip(halves, covered, strict=True)]
        return torch.cat(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class QueryGroups:
    """linear_qkv: for each query group its query heads, its key head and its value head, groups spread over ranks."""

    names: tuple[str, ...]
    """Of queries, keys, values."""
    heads: int
    """Query heads of a group."""
    head_size: int

    def rows(self, outputs: int) -> tuple[int, ...]:
        """See `Matrices.rows`."""
        one = outputs // (self.heads + 2)
        return (one * self.heads, one, one)

    def runs(self, outputs: int) -> tuple[int, ...]:
        """See `Matrices.runs`."""
        groups = outputs // (self.head_size * (self.heads + 2))
        return (self.heads * self.head_size, self.head_size, self.head_size) * groups

    def rounded(self, weight_OI: torch.Tensor, covered: tuple[bool, ...], round_matrix: Round) -> torch.Tensor:
        """See `Matrices.rounded`."""
        result = weight_OI.clone()
        shape = (-1, self.heads + 2, self.head_size, weight_OI.shape[-1])
        grouped, changed, first = weight_OI.view(shape), result.view(shape), 0
        for count, chosen in zip((self.heads, 1, 1), covered, strict=True):
            part = grouped[:, first : first + count]
            if chosen:
                matrix = part.reshape(-1, weight_OI.shape[-1])
                changed[:, first : first + count] = round_matrix(matrix).view(part.shape)
            first += count
        return result


def matrices_of(mapping: Any, config: Any) -> Matrices | None:
    """The matrices of a weight with this mapping of megatron-bridge; None for mappings that are not known here.

    Args:
        config: Megatron-Core's TransformerConfig.
    """
    from megatron.bridge.models.conversion.param_mapping import (
        AutoMapping,
        ColumnParallelMapping,
        FusedExpertMapping,
        FusedGatedExpertMapping,
        GatedMLPMapping,
        QKVMapping,
        ReplicatedMapping,
        RowParallelMapping,
    )

    name = mapping.hf_param
    if getattr(mapping, "permute_dims", None) or getattr(mapping, "transpose_on_export", False):
        return None
    if type(mapping) is QKVMapping and not getattr(config, "attention_output_gate", False):
        heads = config.num_attention_heads // config.num_query_groups
        return QueryGroups((name["q"], name["k"], name["v"]), heads, config.kv_channels)
    if isinstance(mapping, GatedMLPMapping):
        return GateAndUp((name["gate"], name["up"]))
    if type(mapping) is FusedGatedExpertMapping:
        return GateAndUp((name, name))
    whole = (AutoMapping, ColumnParallelMapping, FusedExpertMapping, ReplicatedMapping, RowParallelMapping)
    return Whole((name,)) if type(mapping) in whole else None
