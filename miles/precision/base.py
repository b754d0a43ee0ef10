"""The Protocol of a low-precision format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Part = tuple[str, "torch.dtype", tuple[int, ...]]
"""Suffix of the name, dtype and shape of one of the tensors that a quantised matrix is held as."""


class WeightFormat(Protocol):
    """Quantises matrices (..., O, I); leading dimensions (experts held in one tensor) are matrices of their own.

    Bytes are the same on every device. Names of parts are the matrix's name and a suffix, "" for one.
    """

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why a matrix of this shape cannot be held so; None when it can."""

    def parts(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Layout of what `quantise` returns for a matrix of this dtype and shape."""

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts by suffix, in the order of `parts`, on the weight's device. Raises ValueError; see `why_not`."""

    def dequantise(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The matrix that parts stand for: computed in float32 and rounded once to `dtype`."""

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """`dequantise(quantise(weight), weight.dtype)`, to the bit."""

    def rounded_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Inputs (..., I) of a matrix as it is multiplied with them, in their dtype; formats of weights alone return
        them as they are."""
