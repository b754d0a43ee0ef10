"""What a layer multiplies with in place of its weight and its inputs, with straight-through gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from miles.precision.base import WeightFormat
from miles.precision.rounding import rounded_inputs
from miles.services.trainer.backends.megatron.precision.matrices import Matrices


class ParameterRounding:
    """Rounds one parameter, and the inputs that it is multiplied with."""

    def __init__(self, weight_format: WeightFormat, matrices: Matrices, covered: tuple[bool, ...]) -> None:
        self._format = weight_format
        self._matrices = matrices
        self._covered = covered
        self._keeps = False
        self._kept: torch.Tensor | None = None

    def weight(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """What exported parts of its matrices stand for, (O, I) in its dtype; gradients go straight through."""
        rounded: torch.Tensor = _StraightThrough.apply(weight_OI, self)  # type: ignore[no-untyped-call]
        return rounded

    def inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Rounded inputs (..., I), in their dtype; an expert may have no rows."""
        return rounded_inputs(self._format, rows) if rows.numel() else rows

    def values(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """`weight` without gradient."""
        if self._kept is not None:
            return self._kept.detach()
        rounded = self._matrices.rounded(weight_OI, self._covered, self._format.rounded)
        if self._keeps:
            self._kept = rounded
        return rounded.detach()

    def keep(self, *, keeps: bool) -> None:
        """Whether the rounded weight is kept from its next use on; what was kept is freed."""
        self._keeps, self._kept = keeps, None


@contextlib.contextmanager
def rounded_once(modules: Iterable[Any]) -> Iterator[None]:
    """Inside the block, in which weights do not change, each weight that these modules round is rounded once.

    A pass without recomputation holds all rounded weights for its backward half anyway.
    """
    roundings = [rounding for module in modules for rounding in getattr(module, "roundings", {}).values()]
    for rounding in roundings:
        rounding.keep(keeps=True)
    try:
        yield
    finally:
        for rounding in roundings:
            rounding.keep(keeps=False)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: torch.Tensor, rounding: ParameterRounding) -> torch.Tensor:
        return rounding.values(weight_OI)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None
